"""The study as people run it: its cells as processes, an end before the end, and going on."""

import base64
import hashlib
from pathlib import Path

import pytest

from droppos.errors import TrainingError
from pipelines.evidence import cifar as module
from pipelines.evidence.cifar import FILE, Cifar, cifar
from pipelines.evidence.flow import evidence
from pipelines.evidence.results import read_rows
from pipelines.evidence.study import RESULTS, Study, run
from tests.pipelines.cifar_like import write_package


@pytest.fixture(scope="module")
def folder(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures like CIFAR-10's, prepared: 400 to train on, of which a tenth is all there are."""
    folder = tmp_path_factory.mktemp("evidence")
    package = folder / "cifar" / FILE
    package.parent.mkdir()
    write_package(package, photographs, 400, 60)
    digest = hashlib.sha512(package.read_bytes()).digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHA512", base64.b64encode(digest).decode())
        cifar(folder / "cifar")
    return folder


@pytest.mark.slow
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
        "knn", "linear", "rank", "location", "position", "tenth", "all",
    }  # fmt: skip
    assert {key[3] for key in rows if key[0] == "supervised"} == {
        "knn", "linear", "rank", "location", "all",
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


@pytest.mark.slow
def test_a_cell_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    nowhere = Cifar(*(str(tmp_path / "none") for _ in range(3)))
    study = Study(budget=1, seeds=1, curve=(), only=("random/0/0",))
    with pytest.raises(TrainingError, match=r"cell random/0/0 failed .*none.* its log is .*log"):
        run(study, nowhere, tmp_path, tmp_path / "out", lambda text: None)
