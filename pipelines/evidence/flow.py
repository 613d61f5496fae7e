"""Evidence: the whole experiment, from fetching the pictures to the page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.evidence import ablations
from pipelines.evidence.cifar import cifar
from pipelines.evidence.page import fill, line
from pipelines.evidence.pictures import draw
from pipelines.evidence.results import Key, Row
from pipelines.evidence.study import Study
from pipelines.evidence.work import known, only_study, work


@dataclass(frozen=True, slots=True)
class Evidence:
    """What came of it."""

    line: str
    """For scripts."""
    missing: int
    """Cells, and trials of the ablations, that are not known yet."""
    pictures: list[Path]


def evidence(study: Study, folder: Path, out: Path, say: Callable[[str], None]) -> Evidence:
    """Run, or go on with, the experiment.

    Args:
        study: How much is compared.
        folder: Where pictures, checkpoints and logs are kept.
        out: Folder of raw results and pictures. The tables of the page beside it, OUT.md, are
            written anew if it is there and the study is the one it tells of.
        say: Told of progress.

    Raises:
        ConfigError: If another study works in the folder.
        DataError: If CIFAR-10 cannot be had, or raw results or page cannot be read.
        TrainingError: If trainings failed.
    """
    folder, out = folder.absolute(), out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with only_study(folder):
        rows = known(study, folder, out, say)
        cells = study.cells()
        waiting = [cell for cell in cells if cell.missing(rows)]
        say(f"{len(cells) - len(waiting)} of {len(cells)} cells are known")
        searched = study.ablations and not study.only and study.minutes is None
        try:
            if waiting or (searched and ablations.missing(out)):
                say("fetching and preparing CIFAR-10")
                data = cifar(folder / "cifar")
                work(study, waiting, data, folder, out, say)
                if searched and ablations.missing(out):
                    say("searching: the settings that the paper chose, beside others")
                    ablations.ablate(data, folder, out, say)
        finally:  # an experiment of hours ends early more often than not
            rows = known(replace(study, again=False), folder, out, say)
            pictures = _show(study, rows, out)
    left = sum(bool(cell.missing(rows)) for cell in cells)
    if study.ablations and not study.only:
        left += ablations.missing(out)
    return Evidence(line(study, rows), left, pictures)


def _show(study: Study, rows: Mapping[Key, Row], out: Path) -> list[Path]:
    page = out.parent / f"{out.name}.md"
    if page.exists() and study.whole:
        fill(page, study, rows, ablations.read(out / ablations.RESULTS))
    return draw(study, rows, out)
