"""The study as people run it: its cells as processes, an end before the end, and going on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from droppos.errors import ConfigError, TrainingError
from pipelines.evidence import protocol, rates
from pipelines.evidence.cifar import Cifar
from pipelines.evidence.flow import evidence
from pipelines.evidence.protocol import digest
from pipelines.evidence.rates import others
from pipelines.evidence.results import Row, read_rows, write_rows
from pipelines.evidence.study import Study
from pipelines.evidence.work import RESULTS, known, only_study, work
from pipelines.holdout import load_pictures
from pipelines.prepare import prepare
from tests.pipelines.cifar_like import prepare_like

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures like CIFAR-10's, prepared: 400 to train on, of which a tenth is all there are."""
    folder = tmp_path_factory.mktemp("evidence")
    prepare_like(folder / "cifar", photographs, 400, 60)
    return folder


@pytest.mark.shares
def test_a_study_ends_goes_on_and_knows_all(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    study = Study(budget=1, seeds=1, curve=(), only=("paper/1/0", "supervised/1/0"))
    hasty = Study(budget=1, seeds=1, curve=(), only=study.only, minutes=0)
    done = evidence(hasty, folder, tmp_path / "out", said.append)
    assert done.missing == 2
    assert done.line.startswith("evidence knn=? linear=?")

    done = evidence(study, folder, tmp_path / "out", said.append)
    assert done.missing == 0
    rows = read_rows(tmp_path / "out" / RESULTS)
    assert {key[3] for key in rows if key[0] == "paper"} == {
        "knn", "linear", "blocks", "rank", "location", "position", "tenth", "all",
    }  # fmt: skip
    assert {key[3] for key in rows if key[0] == "supervised"} == {
        "knn", "linear", "blocks", "rank", "location", "tenth", "all",
    }  # fmt: skip
    for row in rows.values():
        assert row.epochs >= 1
        assert row.gflops > 0
        assert row.low <= row.value <= row.high
    assert rows[("paper", 1, 0, "linear")].value > 1 / 6  # photographs differ in colour alone
    assert f"knn={rows[('paper', 1, 0, 'knn')].value:.3f}" in done.line
    assert [picture.name for picture in done.pictures] == ["compared.png"]

    # What is known is not taken again, and neither is what a killed study left in its folders.
    before = (tmp_path / "out" / RESULTS).read_text()
    (tmp_path / "out" / RESULTS).unlink()
    said.clear()
    evidence(study, folder, tmp_path / "out", said.append)
    assert (tmp_path / "out" / RESULTS).read_text() == before
    assert "2 of 2 cells are known" in said


@pytest.mark.shares
def test_a_cell_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    nowhere = Cifar(*(str(tmp_path / "none") for _ in range(3)))
    study = Study(budget=1, seeds=1, curve=(), only=("random/0/0",))
    with pytest.raises(TrainingError, match=r"cell random/0/0 failed .*none.* its log is .*log"):
        work(study, study.cells(), nowhere, tmp_path, tmp_path / "out", lambda text: None)


@pytest.mark.shares
def test_a_cell_of_another_recipe_is_told(folder: Path, tmp_path: Path) -> None:
    """Its process reads a file that was edited since the study began."""
    data = Cifar(*(str(folder / "cifar" / "data-2" / name) for name in ("train", "tenth", "test")))
    study = Study(budget=1, seeds=1, curve=(), only=("raw/0/0",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "VERSION", -1)
        with pytest.raises(TrainingError, match="raw/0/0 took figures of another recipe"):
            work(study, study.cells(), data, tmp_path, tmp_path / "out", lambda text: None)


def test_rates_are_asked_of_pictures_that_nothing_was_learnt_from(
    photographs: Path, tmp_path: Path
) -> None:
    """A picture has other names in the tenth than among all."""
    for number, picture in enumerate(sorted(photographs.glob("*/0*.jpg"))):
        named = tmp_path / "few" / picture.parent.name / f"{number:05d}.jpg"
        named.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, named)
    for source, name in ((photographs, "train"), (tmp_path / "few", "tenth")):
        prepare(str(source), str(tmp_path / name))
    data = Cifar(str(tmp_path / "train"), str(tmp_path / "tenth"), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "EVERY", 1)
        pixels, labels = others(data, (32, 32))
    assert len(pixels) == len(labels) == 12  # two of twelve of each class
    assert sorted(labels.tolist()) == sorted([*range(6)] * 2)
    known = {each.numpy().tobytes() for each in load_pictures(data.tenth, (32, 32)).pixels}
    assert not known & {each.numpy().tobytes() for each in pixels}


def test_a_folder_has_one_study(tmp_path: Path) -> None:
    with only_study(tmp_path), pytest.raises(ConfigError, match=rf"process {os.getpid()} works in"):
        only_study(tmp_path).__enter__()
    with only_study(tmp_path):
        pass


def test_again_forgets_what_is_named_and_nothing_else(tmp_path: Path) -> None:
    rows = [
        Row(arm, 5, 0, "knn", 0.5, 0.4, 0.6, 5, 1.0, 1.0, digest(arm, "knn"))
        for arm in ("paper", "pixels")
    ]
    write_rows(tmp_path / "out" / RESULTS, rows)
    for name in ("paper-5-0", "pixels-5-0"):
        (tmp_path / "cells" / name).mkdir(parents=True)
    study = Study(only=("paper/5/0",), again=True)
    left = known(study, tmp_path, tmp_path / "out", lambda text: None)
    assert [key[0] for key in left] == ["pixels"]
    assert [each.name for each in (tmp_path / "cells").iterdir()] == ["pixels-5-0"]


@pytest.mark.shares
def test_cells_end_with_their_study_and_go_on_with_the_next(folder: Path, tmp_path: Path) -> None:
    """A container that stops sends SIGTERM; whoever starts it again meets no second worker."""
    own = tmp_path / "evidence"
    shutil.copytree(folder / "cifar", own / "cifar")
    command = [
        sys.executable, "-m", "pipelines.cli", "evidence", "--folder", str(own), "--out",
        str(tmp_path / "out"), "--only", "pixels/2000/0", "--at-once", "1",
    ]  # fmt: skip
    log = own / "cells" / "pixels-2000-0" / "log"

    def started() -> subprocess.Popen[bytes]:
        log.unlink(missing_ok=True)
        study = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        wait_for(lambda: log.exists() and "epoch" in log.read_text())
        return study

    study = started()
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) == 130
    seen = log.read_text()
    time.sleep(5)
    assert log.read_text() == seen  # nobody works on

    study = started()
    study.kill()  # without a word to the cell
    study.wait()
    wait_for(lambda: "is gone" in log.read_text())


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.5)
