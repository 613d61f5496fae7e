"""Launch, attach and stop on a real Ray head with token authentication, and a line that breaks."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from droppos.errors import ConfigError
from pipelines import checkpoints
from pipelines.launch import jobs
from pipelines.launch.backend import Address
from pipelines.launch.jobs import End, Jobs, Submission
from pipelines.launch.token import headers
from pipelines.launch.tunnel import tunnel
from pipelines.prepare import prepare
from pipelines.storage import open_place
from tests.droppos.tiny import TINY
from tests.ray_head import RayHead, ray_head

pytestmark = [
    pytest.mark.slow,
    # Ray's client to aiohttp.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

REPOSITORY = Path(__file__).parents[2]
EPOCHS = 500
"""Of 6 steps: more than there is patience for, so that the job runs until it is stopped."""
FORWARD = """
import asyncio, os, sys
async def pump(reader, writer):
    try:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def serve(reader, writer):
    far = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, far[1]), pump(far[0], writer))
async def main():
    open(sys.argv[3], "w").write(str(os.getpid()))
    await (await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))).serve_forever()
asyncio.run(main())
"""
"""A program that forwards a port, as ssh and kubectl do."""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(cpus=4, env={"OMP_NUM_THREADS": "1"}) as head:
        yield head


@pytest.fixture(scope="module")
def address(head: RayHead) -> Address:
    return Address(head.url, headers(head.token))


def script(folder: Path, text: str, launch: str) -> Submission:
    file = folder / "package.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("job.py", text)
    mark = {jobs.LAUNCH: launch, jobs.MARK: secrets.token_hex(8)}
    return Submission("exec python job.py", file, {}, mark)


def test_nobody_gets_in_without_the_token(head: RayHead) -> None:
    with pytest.raises(ConfigError, match="wants a token"):
        Jobs(Address(head.url))
    with pytest.raises(ConfigError, match="refuses the token"):
        Jobs(Address(head.url, headers("0" * 64)))


def test_a_broken_line_shows_nothing_twice_and_loses_nothing(
    head: RayHead, address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "QUIET_S", 1.0)
    monkeypatch.setattr(jobs, "ANSWER_S", 1.0)
    lines = 160
    text = f"import time\nfor i in range({lines}):\n print('line', i, flush=True); time.sleep(.05)"
    pid = tmp_path / "pid"

    def forward(port: int) -> list[str]:
        return [sys.executable, "-c", FORWARD, str(port), head.url.rsplit(":", 1)[1], str(pid)]

    def go_silent() -> None:
        """As a network that is gone: nothing is closed, and nothing comes."""
        os.kill(int(pid.read_text()), signal.SIGSTOP)
        threading.Timer(4, lambda: os.kill(int(pid.read_text()), signal.SIGCONT)).start()

    def die() -> None:
        os.kill(int(pid.read_text()), signal.SIGKILL)

    faults = {"line 20\n": go_silent, "line 120\n": die}
    shown = ""
    said: list[str] = []

    def show(piece: str) -> None:
        nonlocal shown
        shown += piece
        for mark in [mark for mark in faults if mark in shown]:
            faults.pop(mark)()

    with tunnel(forward, tmp_path / "tunnel.log") as url:
        through = Address(url, address.headers)
        jobs.hand_over(through, "broken-line", script(tmp_path, text, "broken-line"))
        job = jobs.follow(through, "broken-line", show, said.append)
    assert job.end is End.FINISHED and not faults
    assert re.findall(r"line (\d+)\n", shown) == [str(i) for i in range(lines)]
    assert sum("broke" in each for each in said) == sum("is back" in each for each in said) == 2


def test_a_job_is_handed_over_once_and_the_next_one_only_when_it_has_ended(
    address: Address, tmp_path: Path
) -> None:
    text = "import time; time.sleep(60)"
    jobs.hand_over(address, "once", script(tmp_path, text, "once"))
    there = Jobs(address)
    with pytest.raises(ConfigError, match="has a job once already"):
        jobs.hand_over(address, "once", script(tmp_path, text, "once"))
    with pytest.raises(ConfigError, match="once is still running"):
        there.next_id("once")
    there.stop("once")
    while there.get("once").running:
        time.sleep(0.1)
    assert there.next_id("once") == "once-2"
    assert there.next_id("once-upon") == "once-upon"


class Command:
    """A `droppos` command in a terminal of its own."""

    def __init__(self, head: RayHead, home: Path, *argv: str) -> None:
        inherited = {name: os.environ[name] for name in os.environ if not name.startswith("RAY_")}
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *argv],
            cwd=REPOSITORY,
            env={
                **inherited,
                "DROPPOS_HOME": str(home),
                "RAY_AUTH_TOKEN_PATH": str(head.token_file),
                "MLFLOW_TRACKING_URI": "",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def until(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line
            if words in line:
                return
        raise AssertionError(f"{words!r} never came:\n{self.text}")

    def end(self) -> int:
        self.text += self.process.communicate()[0]
        return self.process.returncode


@pytest.fixture
def recipe(photographs: Path, tmp_path: Path) -> Path:
    prepare(str(photographs), str(tmp_path / "data"))
    file = tmp_path / "tiny.yaml"
    content = {
        "model": {
            "size": "tiny",
            "image_size": list(TINY.image_size),
            "patch_size": TINY.patch_size,
            "width": TINY.width,
            "depth": TINY.depth,
            "heads": TINY.heads,
            "decoder_width": TINY.decoder_width,
            "decoder_heads": TINY.decoder_heads,
        },
        "method": {"mask_ratio": 0.25},
        "optim": {"epochs": EPOCHS, "global_batch": 12},
        "compute": {"precision": "float32", "device": "cpu"},
        "data": {"path": str(tmp_path / "data"), "window": 24, "decode_cpus": 1},
        "run": {"name": "tiny", "storage": str(tmp_path / "runs"), "log_every": 5},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_closed_terminal_leaves_the_job_and_stop_has_it_save(
    head: RayHead, address: Address, recipe: Path, tmp_path: Path
) -> None:
    def command(*argv: str) -> Command:
        return Command(head, tmp_path / "home", *argv)

    launched = command("launch", str(recipe), "--on", head.url, "--yes")
    launched.until("step 5/")
    launched.process.send_signal(signal.SIGHUP)
    assert launched.end() == 130, launched.text
    assert "droppos attach tiny" in launched.text
    assert Jobs(address).get("tiny").running

    attached = command("attach", "tiny")
    attached.until("step 5/")
    stopped = command("stop", "tiny")
    assert stopped.end() == 0, stopped.text
    assert attached.end() == 130, attached.text
    saved = checkpoints.newest(open_place(str(tmp_path / "runs" / "tiny")))
    assert saved is not None and 5 <= saved.step < 6 * EPOCHS

    # Its terminal said how it ended, and kept what it said.
    assert "job tiny stopped" in attached.text
    assert "step 5/" in (tmp_path / "home" / "launches" / "tiny" / "job.log").read_text()
