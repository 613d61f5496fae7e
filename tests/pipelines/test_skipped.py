"""Pictures that cannot be had: told once, kept over a resume, and too many at some point."""

import json
import logging
from pathlib import Path

import pytest

from droppos.errors import StorageError
from pipelines import skipped as module
from pipelines.skipped import AGAIN_S, FILE, NAMED, Skipped
from pipelines.storage import Place, open_place


@pytest.fixture
def home(tmp_path: Path) -> Place:
    return open_place(str(tmp_path))


def test_each_picture_counts_once_and_is_named_once(
    home: Place, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = Skipped(home, 1000, 0.5, resumed=True)
    skipped.add(3, {7: "cat.jpg: cut off", 9: "dog.jpg: gone"})
    skipped.add(40, {7: "cat.jpg: cut off"})
    assert len(skipped) == 2
    assert caplog.text.count("cat.jpg: cut off") == 1
    assert "step 3" in caplog.text


def test_a_vanished_shard_does_not_flood_the_log(
    home: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    skipped = Skipped(home, 10_000, 0.5, resumed=True)
    skipped.add(1, {row: f"shard gone, {row}" for row in range(600)})
    assert len(caplog.records) == NAMED + 1
    assert FILE in caplog.messages[-1]


def test_what_was_skipped_outlives_the_driver(home: Place) -> None:
    first = Skipped(home, 100, 0.02, resumed=True)
    first.add(1, {5: "a.jpg: gone"})
    first.write()
    lines = (home / FILE).read_bytes().decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"row": 5, "problem": "a.jpg: gone"}]
    second = Skipped(home, 100, 0.02, resumed=True)
    assert len(second) == 0  # it may have been restored
    second.add(9, {6: "b.jpg: gone"})
    assert second.write()
    lines = (home / FILE).read_bytes().decode().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [5, 6]


def test_restored_pictures_do_not_end_the_run_again(home: Place) -> None:
    first = Skipped(home, 100, 0.01, resumed=False)
    first.add(1, {4: "x.jpg: gone", 5: "y.jpg: gone"})
    first.write()
    assert first.too_many is not None
    assert Skipped(home, 100, 0.01, resumed=True).too_many is None


def test_rows_of_another_data_set_are_not_listed(home: Place) -> None:
    first = Skipped(home, 100, 0.5, resumed=False)
    first.add(1, {4: "x.jpg: gone"})
    first.write()
    assert Skipped(home, 80, 0.5, resumed=False).text() == ""
    assert not (home / FILE).exists()


def test_storage_that_refuses_is_tried_again_later_and_at_the_end(
    home: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, five times a second, each time for as long as retries last."""
    now, tries = 100.0, 0

    def refuse(place: Place, data: bytes, patience: float | None) -> None:
        nonlocal tries
        tries += 1
        raise StorageError("away")

    monkeypatch.setattr(module, "monotonic", lambda: now)
    skipped = Skipped(home, 100, 0.5, resumed=False)
    skipped.add(1, {5: "a.jpg: gone"})
    with monkeypatch.context() as patch:
        patch.setattr(Place, "write_bytes", refuse)
        assert not any(skipped.write() for _ in range(9))
        assert tries == 1
        now += AGAIN_S
        assert not skipped.write()
        assert tries == 2
    assert not skipped.write()
    assert skipped.write(last=True)
    assert "a.jpg" in (home / FILE).read_bytes().decode()


def test_nothing_is_written_when_nothing_was_skipped(home: Place) -> None:
    Skipped(home, 100, 0.0, resumed=True).write()
    assert not (home / FILE).exists()


@pytest.mark.parametrize(("limit", "count", "ends"), [(0.0, 1, True), (0.01, 1, False)])
def test_the_limit_is_a_fraction_of_the_data_set(
    home: Place, limit: float, count: int, ends: bool
) -> None:
    skipped = Skipped(home, 100, limit, resumed=True)
    assert skipped.too_many is None
    skipped.add(1, {row: f"{row}.jpg: gone" for row in range(count)})
    assert (skipped.too_many is not None) == ends


def test_the_end_names_the_number_the_limit_the_picture_and_the_way_out(home: Place) -> None:
    skipped = Skipped(home, 100, 0.01, resumed=True)
    skipped.add(1, {4: "x.jpg: gone", 5: "y.jpg: cut off"})
    message = str(skipped.too_many)
    for words in ("2 of 100", "data.skip_limit 0.01", "y.jpg: cut off", FILE, "--resume"):
        assert words in message
