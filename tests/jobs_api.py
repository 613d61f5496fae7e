"""A stand-in for a cluster's jobs API, where only the states of its jobs matter."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray

from pipelines.launch.backend import Address


@contextmanager
def jobs_api(jobs: Mapping[str, str]) -> Iterator[Address]:
    """Serve the states of jobs, by their names; they may change meanwhile."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told: Any = {"ray_version": ray.__version__}
            if self.path == "/api/jobs/":
                told = [
                    {
                        "type": "SUBMISSION",
                        "submission_id": name,
                        "status": state,
                        "entrypoint": "x",
                    }
                    for name, state in jobs.items()
                ]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield Address(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
