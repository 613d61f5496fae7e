"""What a machine is told of its end reaches Ray, whatever else happens."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from droppos.errors import ConfigError, DropposError
from pipelines import notices
from pipelines.cli import main
from pipelines.notices import Kind, Metadata, Notice, check_head, only_one, read_notice, watch
from tests.hosts.metadata import Service

END = {"action": "terminate", "time": "2026-11-26T08:22:00Z"}
END_AT = 1795681320.0
HEAD = "10.0.0.1:6379"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Service]:
    file = tmp_path / "metadata.json"
    file.write_text("{}")
    service = Service(file)
    thread = threading.Thread(target=service.serve_forever, args=(0.05,))
    thread.start()
    yield service
    service.shutdown()
    thread.join()
    service.server_close()


def tell(machine: Service, **said: object) -> None:
    names = {
        "interruption": "spot/instance-action",
        "rebalance": "events/recommendations/rebalance",
    }
    machine.file.write_text(json.dumps({names[name]: value for name, value in said.items()}))


def heard(machine: Service, *, waits: int, between: list[object] | None = None) -> list[Notice]:
    """Watch until the interruption has been passed on, or for so many looks."""
    passed: list[Notice] = []
    left = iter(between or [])
    looks = 0

    def wait(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks > waits:
            raise KeyboardInterrupt
        if callable(act := next(left, None)):
            act()

    def drain(address: str, notice: Notice) -> bool:
        assert address == HEAD
        passed.append(notice)
        return True

    with contextlib.suppress(KeyboardInterrupt):
        watch(HEAD, Metadata(machine.address), drain=drain, wait=wait)
    return passed


def test_a_machine_that_stays_has_no_notice(machine: Service) -> None:
    assert read_notice(Metadata(machine.address)) is None
    assert heard(machine, waits=3) == []


def test_an_interruption_has_its_time(machine: Service) -> None:
    tell(machine, interruption=END)
    assert read_notice(Metadata(machine.address)) == Notice(Kind.INTERRUPTION, END_AT)


def test_an_interruption_counts_more_than_the_rebalance_before_it(machine: Service) -> None:
    tell(machine, rebalance={"noticeTime": "2026-11-26T08:00:00Z"})
    found = heard(
        machine,
        waits=9,
        between=[None, lambda: tell(machine, rebalance={"noticeTime": "…"}, interruption=END)],
    )
    assert found == [Notice(Kind.REBALANCE, None), Notice(Kind.INTERRUPTION, END_AT)]


def test_a_notice_is_passed_on_once(machine: Service) -> None:
    tell(machine, rebalance={"noticeTime": "2026-11-26T08:00:00Z"})
    assert heard(machine, waits=5) == [Notice(Kind.REBALANCE, None)]


def test_a_metadata_service_that_fails_is_asked_again_and_told_of_once(
    machine: Service, caplog: pytest.LogCaptureFixture
) -> None:
    machine.refuses = True
    tell(machine, interruption=END)

    def recover() -> None:
        machine.refuses = False

    assert len(heard(machine, waits=9, between=[None, None, recover])) == 1
    assert len([r for r in caplog.records if "trying again" in r.getMessage()]) == 1


def test_a_token_that_is_no_longer_good_is_replaced(machine: Service) -> None:
    metadata = Metadata(machine.address)
    assert read_notice(metadata) is None
    machine.tokens.clear()
    tell(machine, interruption=END)
    with pytest.raises(OSError, match="401"):
        read_notice(metadata)
    assert read_notice(metadata) is not None


def test_a_notice_that_is_not_understood_is_told_of_and_asked_for_again(
    machine: Service, caplog: pytest.LogCaptureFixture
) -> None:
    tell(machine, interruption={"action": "terminate"})
    found = heard(machine, waits=9, between=[None, lambda: tell(machine, interruption=END)])
    assert found == [Notice(Kind.INTERRUPTION, END_AT)]
    assert "no time in" in caplog.text


def test_a_notice_that_ray_did_not_take_is_passed_on_again(machine: Service) -> None:
    tell(machine, interruption=END)
    answers = iter([False, OSError("no route"), DropposError("no node"), True])
    given: list[Notice] = []

    def drain(address: str, notice: Notice) -> bool:
        given.append(notice)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch(HEAD, Metadata(machine.address), drain=drain, wait=lambda seconds: None)
    assert len(given) == 4


@pytest.mark.parametrize(
    "address", ["nonsense", "10.0.0.1", "10.0.0.1:", ":6379", "h:0", "h:65536", "h:6379/x", "a b:1"]
)
def test_an_address_that_is_none_of_a_head_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"host:port, got .*RAY_HEAD_IP:6379"):
        check_head(address)


def test_the_watch_does_not_begin_with_an_impossible_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "watch", lambda head: pytest.fail(f"{head} is watched"))
    with pytest.raises(SystemExit):
        main(["watch-spot", "nonsense"])
    assert "host:port, got 'nonsense'" in capsys.readouterr().err


def test_a_head_that_is_not_reached_is_told_of_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        reached = f"127.0.0.1:{head.getsockname()[1]}"
        check_head(reached)
        assert caplog.text == ""
    check_head(reached)
    assert f"no head answers at {reached}" in caplog.text


def test_a_machine_has_one_watcher(tmp_path: Path) -> None:
    with (
        only_one("watch-spot", tmp_path),
        pytest.raises(ConfigError, match="has its watch-spot already"),
    ):
        only_one("watch-spot", tmp_path).__enter__()
    with only_one("watch-spot", tmp_path):
        pass


def test_the_watcher_holds_none_of_rays_memory() -> None:
    probe = "import sys, pipelines.notices; print('ray' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


@pytest.mark.slow
def test_a_node_that_works_is_drained_and_can_be_given_a_time_later() -> None:
    script = str(Path(__file__).with_name("drained.py"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "2 live Ray nodes" in told["refused"]
    assert told["rebalance"]
    assert told["no_time"]
    assert told["interruption"]
    assert told["nodes_going"]
    assert told["late_by_s"] == pytest.approx(0, abs=0.01)
