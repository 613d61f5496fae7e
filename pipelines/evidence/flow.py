"""Evidence: the whole experiment, from fetching the pictures to the page."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.evidence import ablations
from pipelines.evidence.cifar import cifar
from pipelines.evidence.page import fill, line
from pipelines.evidence.pictures import draw
from pipelines.evidence.study import Study, run


@dataclass(frozen=True, slots=True)
class Evidence:
    """What came of it."""

    line: str
    """For scripts."""
    missing: int
    """Cells that are not known yet."""
    pictures: list[Path]


def evidence(study: Study, folder: Path, out: Path, say: Callable[[str], None]) -> Evidence:
    """Run, or go on with, the experiment.

    Args:
        study: How much is compared.
        folder: Where pictures, checkpoints and logs are kept.
        out: Folder of raw results and pictures; the tables of the page beside it, OUT.md, are
            written anew if it is there.
        say: Told of progress.

    Raises:
        DataError: If CIFAR-10 cannot be had, or raw results or page cannot be read.
        TrainingError: If a training failed.
    """
    say("fetching and preparing CIFAR-10")
    folder = folder.absolute()
    data = cifar(folder / "cifar")
    out.mkdir(parents=True, exist_ok=True)
    rows = run(study, data, folder, out, say)
    missing = sum(bool(cell.missing(rows)) for cell in study.cells())
    if not missing and not study.only and study.ablations:
        say("searching: the settings that the paper chose, beside others")
        ablations.ablate(data, folder, out, say)
    page = out.with_suffix(".md")
    if page.exists():
        fill(page, study, rows, ablations.read(out / ablations.RESULTS))
    return Evidence(line(study, rows), missing, draw(study, rows, out))
