"""The chain of checkpoints: what each was outlives it, and each vouches for those before it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from droppos.errors import DataError, StorageError
from pipelines import chain, checkpoints, stored_state
from pipelines.chain import Link
from pipelines.checkpoints import COMPLETE, Retention, Saved
from pipelines.storage import Place, open_place


@pytest.fixture
def home(tmp_path: Path) -> Place:
    return open_place(str(tmp_path / "run"))


def save(home: Place, step: int, before: Saved | None, keep: int = 1, **facts: Any) -> Saved:
    previous = before and {"step": before.step, "sha256": before.sha256}
    told = {"previous": previous, **facts}
    return stored_state.save(home, step, {"w": torch.ones(2) * step}, told, Retention(keep))


def saved_run(home: Place, steps: int = 3) -> Saved:
    saved = None
    for step in range(1, steps + 1):
        saved = save(home, step, saved)
    assert saved is not None
    return saved


def link_of(saved: Saved) -> Link:
    return Link.of((saved.place / COMPLETE).read_bytes())


def steps(home: Place, saved: Saved) -> list[int]:
    return [link.step for link in chain.walk(home, link_of(saved))]


def test_what_a_checkpoint_was_outlives_it(home: Place) -> None:
    newest = saved_run(home)
    assert (home / "checkpoints").children() == ["step-00000003"]
    links = list(chain.walk(home, link_of(newest)))
    assert [link.step for link in links] == [3, 2, 1]
    assert links[0].sha256 == newest.sha256 and links[-1].previous is None
    assert links[1].previous == chain.Previous(1, links[2].sha256)


def test_a_run_that_went_back_leaves_a_link_that_nobody_follows(home: Place) -> None:
    first = save(home, 1, None)
    save(home, 2, first)
    again = save(home, 3, first)
    assert len((home / chain.FOLDER).children()) == 3
    assert steps(home, again) == [3, 1]


def test_one_step_saved_twice_has_two_links(home: Place) -> None:
    first = save(home, 1, None, metrics={"a": 1})
    again = save(home, 1, first, metrics={"a": 2})
    assert steps(home, again) == [1, 1]


def test_a_missing_link_and_a_changed_one_are_named(home: Place) -> None:
    newest = saved_run(home)
    second = chain.place_of(home, *newest_previous(newest))
    text = second.read_bytes()
    second.write_bytes(text.replace(b'"world_size": 1', b'"world_size": 8'))
    with pytest.raises(DataError, match=rf"{second.name} was changed: expected sha256 .*, found"):
        list(chain.walk(home, link_of(newest)))
    second.delete()
    with pytest.raises(DataError, match=rf"{second.name}: there is no such file"):
        list(chain.walk(home, link_of(newest)))


def newest_previous(saved: Saved) -> chain.Previous:
    previous = link_of(saved).previous
    assert previous is not None
    return previous


def test_a_checkpoint_whose_link_storage_refuses_does_not_count(home: Place) -> None:
    first = save(home, 1, None)
    (home / chain.FOLDER).delete()
    (home / chain.FOLDER).write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match="part of its path is a file"):
        save(home, 2, first)
    assert checkpoints.newest(home) == first


def test_a_checkpoint_of_another_run_brings_its_past(home: Place, tmp_path: Path) -> None:
    other = open_place(str(tmp_path / "other"))
    best = saved_run(other)
    checkpoints.adopt(home, best)
    assert steps(home, best) == [3, 2, 1]
    later = save(other, 4, best)
    checkpoints.adopt(home, later)
    newest = checkpoints.newest(home)
    assert newest is not None and newest.home == home
    assert steps(home, newest) == [4, 3, 2, 1]


def test_a_past_that_is_not_whole_is_brought_as_far_as_it_goes(
    home: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = open_place(str(tmp_path / "other"))
    best = saved_run(other)
    chain.place_of(other, *newest_previous(best)).delete()
    with caplog.at_level(logging.WARNING):
        checkpoints.adopt(home, best)
    assert "past is not whole" in caplog.text and "step-00000002" in caplog.text
    assert chain.read(home, best.step, best.sha256).step == 3


def test_a_run_of_an_older_droppos_gets_a_link_of_where_it_goes_on(home: Place) -> None:
    old = stored_state.save(home, 1, {"w": torch.ones(2)}, {}, Retention(1))
    (home / chain.FOLDER).delete()
    chain.keep_start(home, old.step, old.sha256, old.place / COMPLETE)
    newer = save(home, 2, old)
    assert steps(home, newer) == [2, 1]
    chain.keep_start(home, newer.step, newer.sha256, home / "is not read again")


def test_storage_that_is_away_is_no_broken_past(
    home: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = saved_run(open_place(str(tmp_path / "other")))

    def away(*_: Any) -> Link:
        raise StorageError("s3://bucket cannot be reached")

    monkeypatch.setattr(chain, "read", away)
    with pytest.raises(StorageError):
        checkpoints.adopt(home, best)
