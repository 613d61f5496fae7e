"""Results on the terminal: tables a person reads, in plain words.

The jobs are named for their types only: `droppos prepare` should not wait for torch and Ray.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from droppos.measure.intervals import read_metric
from pipelines.screen import clock

if TYPE_CHECKING:
    from droppos.export.flow import ExportReport
    from pipelines.audit import Audit
    from pipelines.copies import Bounded
    from pipelines.demo import DemoReport
    from pipelines.drill import DrillReport
    from pipelines.evaluate import Evaluation
    from pipelines.finetune import Finetuned
    from pipelines.look import Look
    from pipelines.prepare import PrepareReport
    from pipelines.pretrain import Outcome
    from pipelines.recipe import Recipe
    from pipelines.register import Registered
    from pipelines.search_outcome import SearchOutcome

Row = tuple[str, str | Path]

EPOCHS = 40
"""Epochs of an audit that are all shown; of more, those that are not exact."""

MANY = 500_000
"""Pictures from which on more than one GPU is worth their while."""


def show_prepare(
    console: Console, report: PrepareReport, dest: str, holdout: str | None = None
) -> None:
    """Tell what became of a source."""
    _show_data_set(console, "Data set", report, dest)
    recipe = "vit_base_imagenet" if report.pictures >= MANY else "vit_small_one_gpu"
    command = f"droppos plan {recipe} --data.path {shlex.quote(dest)}"
    if report.holdout is not None and holdout is not None:
        _show_data_set(console, "Held out", report.holdout, holdout)
        command += f" --data.holdout {shlex.quote(holdout)}"
    _next(console, command)


def _show_data_set(console: Console, title: str, report: PrepareReport, dest: str) -> None:
    if report.nothing_to_do:
        console.print(f"{escape(dest)} is complete already: nothing to do", highlight=False)
    print_table(console, title, prepare_rows(report))
    if report.set_aside:
        console.print(f"each file set aside is named in {escape(dest)}/set_aside.jsonl")


def prepare_rows(report: PrepareReport) -> list[Row]:
    """Write the counts of a data set."""
    rows = [
        ("pictures", f"{report.pictures:,}"),
        ("shards", f"{report.shards:,} ({report.bytes / 1e6:,.1f} MB)"),
        ("classes", f"{len(report.classes):,}" if report.classes else "none"),
    ]
    if report.bounded:
        rows.append(("made smaller", _smaller(report.bounded, report.pictures)))
    aside = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.set_aside.items()))
    return [*rows, ("set aside", aside or "none")]


def _smaller(bounded: Bounded, pictures: int) -> str:
    head = f"{bounded.copies:,} of {pictures:,}, to a short side of {bounded.short_side}"
    if not bounded.copies:
        return head
    before, after = bounded.bytes_before / 1e6, bounded.bytes_after / 1e6
    # Strongly compressed originals may be smaller than their copies: that is worth knowing, too.
    change = f"{abs(1 - after / before):.0%} {'less' if after <= before else 'more'}"
    return f"{head} ({after:,.1f} MB instead of {before:,.1f}: {change})"


def show_outcome(console: Console, recipe: Recipe, outcome: Outcome) -> None:
    """Tell where a run ended, and what to do next."""
    rows: list[Row] = []
    if outcome.checkpoint is not None:
        rows.append(("checkpoint", outcome.checkpoint.uri))
    for name, label in (("train/loss", "loss"), ("data/images_per_s", "images/s")):
        if name in outcome.metrics:
            rows.append((label, f"{outcome.metrics[name]:,.3g}"))
    if (accuracy := read_metric(outcome.metrics, "holdout/position/accuracy")) is not None:
        chance = outcome.metrics["holdout/position/chance"]
        rows.append(("held out, placed right", f"{accuracy}, chance {chance:.1%}"))
    for name, label in (("knn", "20 nearest neighbours"), ("probe", "linear probe")):
        accuracy = read_metric(outcome.metrics, f"holdout/features/{name}_accuracy")
        if accuracy is not None:
            rows.append((f"held out, {label}", accuracy))
    rows += [("picture", picture) for picture in outcome.pictures]
    done = outcome.checkpoint.step if outcome.checkpoint else 0
    title = "Run" if outcome.finished else f"Run, stopped at step {done:,} of {outcome.steps:,}"
    print_table(console, title, rows)
    if not outcome.finished:
        _next(console, "the same command with --resume goes on from there")
    elif outcome.checkpoint is not None:
        _next(console, f"droppos export {shlex.quote(outcome.home)} OUT")
    _mlflow(console, recipe)


def show_search(console: Console, recipe: Recipe, outcome: SearchOutcome) -> None:
    """Tell how the trials compare, the best first, and what to do next."""
    from pipelines.search_outcome import findings_of
    from pipelines.verdict import verdict

    by = f"Trials, by {outcome.objective} on held-out pictures"
    table = Table(title=by, title_justify="left")
    fields = list(outcome.trials[0].point) if outcome.trials else []
    columns = [name.rpartition(".")[2] for name in fields]
    for column in ("trial", *columns, outcome.objective, "state"):
        table.add_column(column, overflow="fold")
    for trial in sorted(
        outcome.trials,
        key=lambda trial: (
            trial is not outcome.best,
            trial.state != "finished",  # the others were measured earlier
            trial.objective is None,
            -(trial.objective or 0),
        ),
    ):
        values = [
            f"{value:.4g}" if isinstance(value, float) else str(value)
            for value in trial.point.values()
        ]
        skill = "" if trial.objective is None else f"{trial.objective:.4f}"
        table.add_row(f"{trial.number:03d}", *values, skill, trial.state)
    console.print(table, highlight=False)
    for trial in outcome.trials:
        if trial.error is not None:
            console.print(f"{escape(trial.name)}: {escape(trial.error)}", highlight=False)
    for sentence in verdict(findings_of(recipe, outcome, None)):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    if outcome.best is not None:
        print_table(console, "Best", [("checkpoint", outcome.best.checkpoint or "")])
    console.print(f"report: {escape(str(outcome.folder / 'report.html'))}", soft_wrap=True)
    if not outcome.finished:
        _next(console, "the same command with --resume goes on from there")
    elif outcome.best_recipe is not None:
        _next(console, f"droppos pretrain {shlex.quote(str(outcome.best_recipe))}")
    _mlflow(console, recipe)


def show_export(console: Console, report: ExportReport, out: str) -> None:
    """Tell what was written, and how to load it."""
    kind = "Classifier" if report.classes else "Backbone"
    print_table(console, kind, [*export_rows(report), ("folder", out)])
    _next(console, report.command)


def export_rows(report: ExportReport) -> list[Row]:
    """Write the facts of an export."""
    classes = [("classes", f"{report.classes:,}")] if report.classes else []
    return [
        ("format", report.format),
        ("architecture", report.architecture),
        *classes,
        ("parameters", f"{report.parameters / 1e6:,.2f} million"),
        ("pictures of", f"{report.image_size[0]} x {report.image_size[1]} pixels"),
        ("verified", report.verified),
        ("difference from the trained model", f"{report.largest_difference:.1e} at most"),
    ]


def show_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Tell what a backbone is worth, with what could not be measured."""
    print_table(console, "Evaluation", evaluation_rows(evaluation))
    for note in evaluation.notes:
        console.print(f"[dim]note: {escape(note)}[/]", highlight=False)


def show_finetuned(console: Console, done: Finetuned) -> None:
    """Tell how well a fine-tuned backbone classifies."""
    if done.top_1 is None:
        title = f"Fine-tuning, stopped at step {done.step:,} of {done.steps:,}"
        print_table(console, title, [("folder", done.home)])
        _next(console, "the same command with --resume goes on from there")
        return
    rows: list[Row] = [("steps", f"{done.steps:,}"), ("classified right", str(done.top_1))]
    if done.top_5 is not None:
        rows.append(("  among the first five", str(done.top_5)))
    print_table(console, "Fine-tuning", [*rows, ("folder", done.home)])
    _next(console, f"droppos export {shlex.quote(done.home)} OUT")


def evaluation_rows(evaluation: Evaluation) -> list[Row]:
    """Write the figures, accuracies with their 95 % interval."""
    rows = [("pictures", f"{evaluation.pictures:,}")]
    if evaluation.blocks > 1:
        told = f"of the last {evaluation.blocks} blocks, {evaluation.width} channels"
        rows.append(("features", told))
    if evaluation.position is not None:
        position = evaluation.position
        times = position.accuracy.value / position.chance
        rows += [
            ("placed right", str(position.accuracy)),
            ("  of pictures", evaluation.protocol),
            ("  against chance", f"{times:.1f} times {position.chance:.2%}"),
            ("placed within one cell", str(position.near)),
        ]
        if position.beside is not None:
            rows += [
                ("wrong ones beside the cell", str(position.beside)),
                ("  looking at nothing", f"{position.beside_chance:.1%}"),
            ]
    if evaluation.knn is not None:
        rows.append(("20 nearest neighbours", str(evaluation.knn)))
        rows.append(("  asked, learnt from", f"{evaluation.knn.total:,}, {evaluation.known:,}"))
    if evaluation.probe is not None:
        probe = evaluation.probe
        rows.append(("linear probe", f"{probe.accuracy}, by {probe.solver}"))
        if probe.top_5 is not None:
            rows.append(("  among the first five", str(probe.top_5)))
    rank = f"{evaluation.effective_rank:.1f} of {evaluation.width}"
    return [*rows, ("effective rank of features", rank)]


def show_look(console: Console, found: Look) -> None:
    """Tell what was drawn, and whether the task is solved by content."""
    print_table(console, "Pictures", [("picture", picture) for picture in found.pictures])
    if found.shortcuts is not None:
        report = found.shortcuts
        table = Table(title="Cues of the frame", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("cue")
        for column in ("times chance", "carried", "missed"):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        for cue in report.cues:
            shares = (str(share or "-") for share in (cue.carried, cue.missed))
            table.add_row(cue.name, f"{cue.probe.times_chance:.1f}", *shares, cue.verdict)
        console.print(table, highlight=False)
        console.print(
            "[dim]times chance: how far the cue alone tells a patch's cell; carried: share of the "
            "skill that it gives without a scene; missed: share that is lost without it[/]",
            highlight=False,
        )
        style = "bold red" if report.found else "green"
        console.print(f"[{style}]{escape(report.verdict)}[/]", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"[dim]not looked at: {escape(note)}[/]", highlight=False)


def show_audit(console: Console, audit: Audit) -> None:
    """Tell for each epoch what was trained on, and at the end whether it was the schedule."""
    table = Table(title=f"Pictures of {audit.run}", title_justify="left")
    columns = ("expected", "seen", "missing", "twice", "out_of_order")
    table.add_column("epoch")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    shown = audit.epochs if len(audit.epochs) <= EPOCHS else audit.inexact
    for epoch in shown:
        table.add_row(str(epoch.epoch), *(f"{getattr(epoch, name):,}" for name in columns))
    sums = [sum(getattr(epoch, name) for epoch in audit.epochs) for name in columns]
    table.add_row(
        "all" if len(shown) == len(audit.epochs) else f"all {len(audit.epochs):,}",
        *(f"{value:,}" for value in sums),
    )
    console.print(table, highlight=False)
    style = "green" if audit.is_exact else "bold red"
    console.print(f"[{style}]{escape(audit.verdict)}[/]", highlight=False, soft_wrap=True)


def show_drill(console: Console, report: DrillReport) -> None:
    """Tell how a run took each fault, and what it committed in the end."""
    table = Table(title="Drill", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("fault", no_wrap=True)
    for column in ("step", "told", "back", "size", "again", "lost", "twice"):
        table.add_column(column, justify="right", no_wrap=True)
    for bout in report.bouts:
        table.add_row(
            escape(bout.fault),
            f"{bout.step:,}",
            _seconds(bout.noticed_s, "not"),
            _seconds(bout.recovered_s, "never"),
            f"{bout.workers}",
            f"{bout.redone:,}",
            f"{bout.missing:,}",
            f"{bout.repeated:,}",
        )
    console.print(table, highlight=False)
    console.print(
        "[dim]step: done when it struck; told, back: seconds until the run told of it, and until "
        "it was further than before; size: workers it went on with; again: steps done twice; "
        "lost, twice: pictures[/]",
        highlight=False,
    )
    for name in report.not_struck:
        console.print(f"not struck, the run had ended: {escape(name)}", highlight=False)
    rows: list[Row] = [("steps", f"{report.steps:,} of {report.recipe.optim.global_batch} images")]
    if report.loss is not None and report.twin_loss is not None:
        rows.append(("last loss", f"{report.loss:.5f}, undisturbed {report.twin_loss:.5f}"))
    if report.logged is not None:
        rows.append(("losses in MLflow", f"{report.logged:,}" + ", each once" * (not report.error)))
    rows.append(("run", report.recipe.home))
    print_table(console, "Run", rows)
    if report.error:
        console.print(f"[bold red]error:[/] {escape(report.error)}", soft_wrap=True)


def _seconds(value: float | None, none: str) -> str:
    return none if value is None else f"{value:.1f}"


def show_registered(console: Console, registered: Registered) -> None:
    """Tell which version it is, and how it is opened."""
    rows: list[Row] = [("model", f"{registered.name}, version {registered.version}")]
    if registered.alias is not None:
        before = f" (version {registered.before} until now)" if registered.before else ""
        rows.append(("alias", f"{registered.alias}{before}"))
    rows += [("checkpoint", registered.checkpoint or "not known"), ("run", registered.run_id)]
    rows.append(("MLflow", registered.tracking))
    print_table(console, "Registered", rows)
    _next(console, f"droppos evaluate {registered.uri} DATA")


def show_demo(console: Console, report: DemoReport) -> None:
    """Tell all of the demo's results in one table."""
    if report.export is None or report.evaluation is None:
        show_outcome(console, report.recipe, report.outcome)
        return
    outcome = report.outcome
    sets = f"{report.train.pictures:,} to train, {report.holdout.pictures:,} held out"
    rows = [
        ("pictures", f"{sets} (other photographs)"),
        ("steps", f"{outcome.steps:,} of {report.recipe.optim.global_batch} images"),
        ("training", f"{outcome.metrics.get('data/images_per_s', 0):,.0f} images/s"),
        *evaluation_rows(report.evaluation)[1:],
        *export_rows(report.export),
        ("time", ", ".join(f"{name} {clock(s)}" for name, s in report.seconds.items())),
        ("backbone", report.export.path),
        *[("picture", picture) for picture in outcome.pictures],
    ]
    print_table(console, "DropPos on held-out photographs", rows)
    _next(console, report.export.command)
    _mlflow(console, report.recipe)


def print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print names and values; paths below, in one piece, to be copied."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        if not isinstance(value, Path):
            table.add_row(escape(name), escape(value))
    console.print(table, highlight=False)
    for name, value in rows:
        if isinstance(value, Path):
            console.print(
                f"[dim]{escape(name)}:[/] {escape(str(value))}", highlight=False, soft_wrap=True
            )


def _next(console: Console, text: str) -> None:
    console.print(f"[dim]next:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _mlflow(console: Console, recipe: Recipe) -> None:
    from pipelines.tracking import open_command, tracking_uri

    command = open_command(tracking_uri(recipe))
    console.print(f"[dim]metrics in MLflow:[/] {escape(command)}", highlight=False, soft_wrap=True)
