"""What is known of runs: listed, sent, shown, proven."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from droppos.errors import ConfigError
from pipelines.commands.flags import STORAGE, WhereFlags
from pipelines.commands.speech import busy, console
from pipelines.tracking import Where


def runs(
    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN...]")] = (),
    where: WhereFlags = Where(),  # noqa: B008 - frozen
    most: int = 20,
) -> None:
    """List runs, show one, or compare several.

    Args:
        names: Names or ids of runs; without any, the newest are listed.
        where: Where runs are looked for by name.
        most: Runs to list.
    """
    from pipelines import runs_report
    from pipelines.runs import Registry, next_command

    registry = Registry(where)
    match names:
        case ():
            runs_report.show_runs(console, registry.newest(most))
        case (name,):
            run = registry.run(name)
            runs_report.show_run(console, run, next_command(run, where))
        case _:
            runs_report.show_comparison(console, registry.compare(names))


def sync(
    where: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[FOLDER]")] = STORAGE,
) -> None:
    """Send to MLflow what killed processes, or an outage, left behind.

    Args:
        where: Folder of runs, or of one run (s3:// too).
    """
    from pipelines.runs_report import show_synced
    from pipelines.sync import sync as job

    with busy("sending"):
        synced = job(where)
    show_synced(console, synced)
    if any(one.left or one.error for one in synced):
        sys.exit(1)


def report(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    out: Path | None = None,
    where: WhereFlags = Where(),  # noqa: B008 - frozen
) -> None:
    """Write all of a run as one HTML file: curves, pictures, figures, data, machines, receipt.

    Args:
        run: Folder of the run or of one of its checkpoints, or the run's name in MLflow.
        out: File to write; droppos-runs/NAME-report.html when not given.
        where: Where runs are looked for by name.
    """
    from pipelines.receipt import locate
    from pipelines.run_report import run_report

    with busy("reading and drawing"):
        saved = locate(run, where)
        text = run_report(saved)
        out = out or Path(STORAGE) / f"{saved.home.name}-report.html"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    console.print(f"report: {escape(str(out))}", soft_wrap=True, highlight=False)


def receipt(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN]")] = "",
    out: str = "receipt.json",
    backbone: str | None = None,
    verify: str | None = None,
    run: str | None = None,
    data: str | None = None,
    shards: bool = True,
    where: WhereFlags = Where(),  # noqa: B008 - frozen
) -> None:
    """Write what a backbone came from into one file; or verify such a file.

    Args:
        source: Folder of a run (its newest checkpoint) or of a checkpoint, or a run's name in
            MLflow.
        out: File to write; path or s3:// URI.
        backbone: Folder of an export that was made of the checkpoint.
        verify: A receipt to verify, in place of writing one; exit code 1 if anything differs.
        run: Folder of the run, if it is not where the receipt says.
        data: Prepared data set, if it is not where the receipt says.
        shards: Read the whole data set and hash it again.
        where: Where runs are looked for by name.
    """
    if bool(source) == (verify is not None):
        raise ConfigError(
            "droppos receipt takes a run to write the receipt of, or --verify RECEIPT: one of them"
        )
    from pipelines import receipt as job
    from pipelines import receipt_report

    if verify is None:
        with busy("reading the run's past"):
            made, notes = job.make(job.locate(source, where), backbone)
        job.write(made, out)
        receipt_report.show_receipt(console, made, notes, out)
        return
    from pipelines.receipt_check import verify as check

    with busy("comparing"):
        checks = check(job.load(verify), run=run, data=data, backbone=backbone, shards=shards)
    receipt_report.show_checks(console, checks)
    if any(each.state == "differs" for each in checks):
        sys.exit(1)
