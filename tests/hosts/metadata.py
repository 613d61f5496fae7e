"""EC2's instance metadata service, version 2, as far as a machine here asks for it.

As a program: `python metadata.py FILE ADDRESS PORT` serves the values of a JSON file, read anew for
each question, so that whoever writes the file tells the machine something.
"""

import json
import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Service(ThreadingHTTPServer):
    """Gives out tokens, and values to those that have one."""

    daemon_threads = True

    def __init__(self, file: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Answers)
        self.file = file
        self.tokens: set[str] = set()
        self.refuses = False
        """Whether every question is answered with an error."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not lifetime.isdigit() or self.server.refuses:
            return self._say(400)
        token = secrets.token_hex(8)
        self.server.tokens.add(token)
        return self._say(200, token)

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            return self._say(401)
        if self.server.refuses:
            return self._say(503)
        name = self.path.removeprefix("/latest/meta-data/").rstrip("/")
        value = json.loads(self.server.file.read_text()).get(name)
        if value is None:
            return self._say(404)
        return self._say(200, value if isinstance(value, str) else json.dumps(value))

    def _say(self, code: int, text: str = "") -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    Service(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])).serve_forever()
