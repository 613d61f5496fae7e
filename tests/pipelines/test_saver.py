"""Checkpoints in the background, on one rank; that several agree is test_drill.py's."""

import threading
from collections.abc import Iterator
from time import monotonic, sleep

import pytest
import torch

from droppos.errors import DataError, StorageError, TrainingError
from pipelines import checkpoints, stored_state
from pipelines.attempt import SupersededError
from pipelines.checkpoints import Retention
from pipelines.parts import DamagedError
from pipelines.saver import Saver
from pipelines.storage import Place, open_place

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def home(tmp_path: object) -> Place:
    return open_place(f"{tmp_path}/run")


@pytest.fixture
def saver(home: Place) -> Iterator[Saver]:
    ours = Saver(home, Retention(2), CPU, may_write=lambda: None, timeout_s=60)
    yield ours
    ours.close()


def unreachable() -> None:
    raise StorageError("s3://bucket cannot be reached")


def test_training_goes_on_and_what_is_written_is_what_was_copied(saver: Saver, home: Place) -> None:
    weights, go_on = torch.ones(1000), threading.Event()
    saver.begin(1, {"w": weights}, {}, beside=lambda: go_on.wait(30))  # pyright: ignore
    assert not saver.ended and checkpoints.newest(home) is None
    weights.add_(1)  # the next step, while the write is held up
    go_on.set()
    done = saver.finish()
    assert done is not None and done.saved == checkpoints.newest(home)
    found: torch.Tensor = stored_state.load_full(done.saved)["w"]
    assert torch.equal(found, torch.ones(1000))


def test_the_host_copy_is_made_anew_each_time(saver: Saver, home: Place) -> None:
    weights = torch.zeros(10)
    for step in (1, 2, 3):
        weights.fill_(step)
        saver.begin(step, {"w": weights}, {})
        done = saver.finish()
        assert done is not None and done.saved is not None
        assert stored_state.load_full(done.saved)["w"].eq(step).all()
    assert (home / "checkpoints").children() == ["step-00000002", "step-00000003"]


def test_storage_that_is_away_once_costs_a_checkpoint_not_the_run(saver: Saver) -> None:
    state = {"w": torch.ones(3)}
    for step in (1, 3, 5):  # never twice in a row
        saver.begin(step, state, {}, beside=unreachable)
        done = saver.finish()
        assert done is not None and done.saved is None and "cannot be reached" in done.error
        saver.begin(step + 1, state, {})
        assert (done := saver.finish()) is not None and done.saved is not None


def test_the_last_checkpoint_may_not_fail_even_once(saver: Saver) -> None:
    saver.begin(1, {"w": torch.ones(3)}, {}, beside=unreachable)
    with pytest.raises(StorageError, match="cannot be reached"):
        saver.finish(last=True)


def test_what_has_ended_is_told_by_its_step(saver: Saver) -> None:
    go_on = threading.Event()
    saver.begin(7, {"w": torch.ones(3)}, {}, beside=lambda: go_on.wait(30))  # pyright: ignore
    assert (saver.step, saver.ended) == (7, 0)
    go_on.set()
    deadline = monotonic() + 30
    while not saver.ended and monotonic() < deadline:
        sleep(0.01)
    assert saver.ended == 7
    saver.finish()
    assert saver.ended == 0


def test_storage_that_stays_away_ends_the_run(saver: Saver) -> None:
    saver.begin(1, {"w": torch.ones(3)}, {}, beside=unreachable)
    saver.finish()
    saver.begin(2, {"w": torch.ones(3)}, {}, beside=unreachable)
    with pytest.raises(StorageError, match="cannot be reached"):
        saver.finish()


@pytest.mark.parametrize("error", [DataError("no such bucket"), TrainingError("taken over")])
def test_what_does_not_pass_ends_the_run_at_once(saver: Saver, error: Exception) -> None:
    def fail() -> None:
        raise error

    saver.begin(1, {"w": torch.ones(3)}, {}, beside=fail)
    with pytest.raises(type(error), match=str(error)):
        saver.finish()


def test_without_a_checkpoint_under_way_there_is_nothing_to_wait_for(saver: Saver) -> None:
    assert saver.finish() is None and not saver.ended


def test_of_a_checkpoint_that_storage_does_not_take_no_part_fills_the_disk(
    saver: Saver, home: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.begin(1, {"w": torch.ones(3)}, {})
    saver.finish()

    def full(place: Place, text: bytes, may_write: object) -> None:
        assert "part-00000.safetensors" in place.children()
        raise StorageError("no space left on device")

    monkeypatch.setattr(stored_state, "_complete", full)
    saver.begin(2, {"w": torch.ones(3)}, {})
    saver.finish()
    assert (home / "checkpoints/step-00000002").children() == ["index.json"]
    assert checkpoints.newest(home) is not None and checkpoints.lost(home) is None


def test_whether_it_may_count_is_asked_before_each_try(
    home: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage may be away from this node while another group takes the run over."""
    asked: list[bool] = []
    write = Place.write_bytes

    def away(place: Place, data: bytes, patience: float | None = None) -> None:
        if place.name == checkpoints.COMPLETE and len(asked) < 4:
            raise StorageError("away") from OSError("AWS Error NETWORK_CONNECTION")
        write(place, data)

    monkeypatch.setattr(Place, "write_bytes", away)
    arguments = home, 1, {"w": torch.ones(3)}, {}, Retention(2)
    saved = stored_state.save(*arguments, may_write=lambda: asked.append(True))
    assert saved == checkpoints.newest(home) and len(asked) == 5  # and before pruning

    def taken_over() -> None:
        if len(asked) == 2:
            raise SupersededError("taken over")
        asked.append(True)

    asked.clear()
    with pytest.raises(SupersededError):
        stored_state.save(home, 2, *arguments[2:], may_write=taken_over)
    assert (found := checkpoints.newest(home)) is not None and found.step == 1


def test_who_was_superseded_deletes_nothing(home: Place) -> None:
    """What does not count may be the checkpoint that the newer group is writing."""
    theirs = home / "checkpoints/step-00000003/part-00000.safetensors"
    theirs.write_bytes(b"half of it")
    asked: list[bool] = []

    def taken_over() -> None:
        asked.append(True)
        if len(asked) == 3:
            raise SupersededError("taken over")

    saved = stored_state.save(home, 2, {"w": torch.ones(3)}, {}, Retention(1), taken_over)
    assert saved.step == 2 and theirs.exists()


STEPS = (10, 20, 30, 40, 50)


def kept(home: Place, retention: Retention, scores: dict[int, float | None]) -> list[int]:
    for step, score in scores.items():
        metrics = {} if score is None else {"holdout/skill": score}
        stored_state.save(home, step, {"w": torch.ones(1)}, {"metrics": metrics}, retention)
    return [int(name[5:]) for name in (home / "checkpoints").children()]


@pytest.mark.parametrize(
    ("retention", "scores", "expected"),
    [
        (Retention(1), {}, [50]),
        (Retention(2, every=20), {}, [20, 40, 50]),
        (Retention(1, best="holdout/skill"), {10: 0.1, 20: 0.9, 40: 0.5}, [20, 50]),
        (Retention(1, best="holdout/skill", smallest=True), {10: 0.1, 20: 0.9}, [10, 50]),
        (Retention(1, best="holdout/skill"), {20: 0.9, 40: 0.9}, [40, 50]),
        (Retention(1, best="holdout/other"), {20: 0.9}, [50]),
    ],
)
def test_the_newest_every_nth_and_the_best_stay(
    home: Place,
    retention: Retention,
    scores: dict[int, float],
    expected: list[int],
) -> None:
    assert kept(home, retention, {step: scores.get(step) for step in STEPS}) == expected


def test_a_damaged_one_counts_no_more_and_the_one_before_it_does(
    home: Place, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        stored_state.save(home, step, {"w": torch.ones(9)}, {}, Retention(3))
    newest = checkpoints.newest(home)
    assert newest is not None
    part = newest.place / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match="not what was written") as error:
        stored_state.load(newest, {"w": torch.ones(9)})
    checkpoints.set_aside(newest, str(error.value))
    before = checkpoints.newest(home)
    assert before is not None and before.step == 1
    assert "damaged" in caplog.text
