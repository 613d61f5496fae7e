"""What must be the same when a run goes on, and the words in which a difference is named."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from droppos.config import Model, Optim
from droppos.errors import ConfigError
from pipelines import checkpoints, stored_state
from pipelines.checkpoints import Saved
from pipelines.facts import check_resume, facts
from pipelines.order import Schedule
from pipelines.recipe import Data, Recipe, Run
from pipelines.shards import Manifest, Shard
from pipelines.storage import open_place

SHARDS = tuple(
    Shard(f"shard-{i}.parquet", 40, (20, 20), bytes=900, sha256=f"s{i}", content=f"c{i}")
    for i in range(3)
)
DATA = Manifest(shards=SHARDS, classes=("cat", "dog"))
RECIPE = Recipe(
    model=Model(size="tiny"),
    optim=Optim(epochs=2, global_batch=8, warmup_epochs=1),
    data=Data(path="/data"),
    run=Run(name="r", storage="/runs"),
)


def saved_at(folder: Path, step: int = 3, **without: None) -> Saved:
    told = {k: v for k, v in facts(RECIPE, DATA).items() if k not in without}
    return stored_state.save(
        open_place(str(folder)), step, {"w": torch.ones(1)}, told, checkpoints.Retention(1)
    )


SCHEDULE = Schedule(manifest=DATA, seed=0, global_batch=1, window=1, epochs=1)


def check(
    saved: Saved, recipe: Recipe = RECIPE, data: Manifest = DATA, allow: bool = False
) -> None:
    check_resume(recipe, Schedule.of(recipe, data), saved, resume=True, allow_changes=allow)


def test_the_same_run_goes_on_wherever_its_data_moved_to(tmp_path: Path) -> None:
    moved = replace(RECIPE, data=replace(RECIPE.data, path="s3://elsewhere/data"))
    check(saved_at(tmp_path), moved)
    rewritten = tuple(replace(shard, bytes=1000, sha256="another writer") for shard in SHARDS)
    check(saved_at(tmp_path), data=replace(DATA, shards=rewritten))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            replace(DATA, shards=(*SHARDS[:2], replace(SHARDS[2], content="other", bytes=890))),
            "bytes 2,700 in the checkpoint, 2,690 now; content: pictures, their names, labels",
        ),
        (
            replace(DATA, shards=SHARDS[:2]),
            "pictures 120 in the checkpoint, 80 now; shards 3 in the checkpoint, 2 now; "
            "row groups 6 in the checkpoint, 4 now; bytes",
        ),
        (replace(DATA, classes=None), "classes 2 ('cat' only there) in the checkpoint, none now"),
        (
            replace(DATA, classes=("dog", "cat")),
            "classes 2 (at 0 'cat') in the checkpoint, 2 (at 0 'dog') now",
        ),
        (
            replace(DATA, classes=("cat", "dog", "owl")),
            "classes 2 in the checkpoint, 3 ('owl' only there) now",
        ),
        (
            replace(DATA, shards=(replace(SHARDS[0], row_groups=(30, 10)), *SHARDS[1:])),
            "row groups: as many, but they are of other sizes",
        ),
    ],
)
def test_another_data_set_is_refused_with_the_difference_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: Manifest, words: str
) -> None:
    saved = saved_at(tmp_path)
    with pytest.raises(ConfigError) as refused:
        check(saved, data=changed)
    assert f"data set /data: {words}" in str(refused.value)
    assert "--allow-changes" in str(refused.value)
    assert DATA.digest not in str(refused.value)

    with caplog.at_level(logging.WARNING):
        check(saved, data=changed, allow=True)
    assert words in caplog.text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (replace(RECIPE, run=replace(RECIPE.run, seed=1)), "run.seed: 0 in the checkpoint, 1 now"),
        (
            replace(RECIPE, optim=replace(RECIPE.optim, global_batch=16)),
            "optim.global_batch: 8 in the checkpoint, 16 now",
        ),
    ],
)
def test_another_seed_or_batch_is_refused_by_name(
    tmp_path: Path, changed: Recipe, words: str
) -> None:
    saved = saved_at(tmp_path)
    with pytest.raises(ConfigError, match=words):
        check(saved, changed)
    check(saved, changed, allow=True)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_unasked(tmp_path: Path) -> None:
    recipe = replace(RECIPE, run=replace(RECIPE.run, storage=str(tmp_path), name="run"))
    for step in (2, 3):
        saved_at(tmp_path / "run", step).place.delete()
    with pytest.raises(ConfigError, match=r"had a checkpoint at step 3, and none that counts"):
        check_resume(recipe, SCHEDULE, None, resume=True, allow_changes=False)
    check_resume(recipe, SCHEDULE, None, resume=True, allow_changes=True)


def test_another_protocol_of_measuring_is_told_and_how_often_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = saved_at(tmp_path)
    check(saved, replace(RECIPE, measure=replace(RECIPE.measure, every_epochs=3)))
    assert not caplog.messages
    check(saved, replace(RECIPE, measure=replace(RECIPE.measure, pictures=7)))
    assert "measure.pictures 1024 in the checkpoint, 7 now" in caplog.text


def test_a_fine_tuning_is_no_pre_training_to_go_on_with(tmp_path: Path) -> None:
    told = {"finetune": {}}
    place, keep = open_place(str(tmp_path)), checkpoints.Retention(1)
    saved = stored_state.save(place, 3, {"w": torch.ones(1)}, told, keep)
    with pytest.raises(ConfigError, match=r"is a fine-tuning: `droppos finetune \.\.\. --resume`"):
        check(saved)


def test_a_checkpoint_from_before_it_told_of_its_data_still_resumes(tmp_path: Path) -> None:
    saved = saved_at(tmp_path, data=None)
    check(saved)
    with pytest.raises(ConfigError, match="data set /data: it is not the one the checkpoint"):
        check(saved, data=replace(DATA, shards=SHARDS[:2]))
