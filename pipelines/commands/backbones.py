"""What was trained: handed on, measured, looked at, trained on."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from droppos.config import Heads
from droppos.export import FormatName
from droppos.measure.finetune_recipe import Finetune
from pipelines.commands.flags import (
    EXPERIMENT,
    BackboneName,
    ExportedName,
    FinetuneFlags,
    FinetuneRunFlags,
    MeasureFlags,
    SpreadFlags,
)
from pipelines.commands.speech import announce, busy, console
from pipelines.finetune_run import FinetuneRun
from pipelines.recipe import MeasureProtocol, Recipe, Tracking
from pipelines.spread import Spread


def export(
    checkpoint: ExportedName,
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")],
    format: FormatName = "timm",
    image_size: tuple[int, int] | None = None,
    heads: Heads = Heads(),  # noqa: B008 - frozen
) -> None:
    """Write a backbone, or a fine-tuned classifier, that others load; compared before it says done.

    Args:
        checkpoint: As `ExportedName` says.
        out: Folder to write; path or s3:// URI.
        format: Whose format; of a classifier timm or onnx. torchvision and detectron2 know square
            pictures only; detectron2 and mmseg are written without those projects, and compared by
            mapping their names back.
        image_size: Height and width of the pictures it will be given: positions are resampled, and
            the position head is left out. The model's own when not given.
        heads: For a file of weights.
    """
    from pipelines.export import export_checkpoint
    from pipelines.report import show_export

    with busy("exporting and comparing"):
        report = export_checkpoint(checkpoint, out, format, image_size, heads)
    show_export(console, report, out)


def evaluate(
    backbone: BackboneName,
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    train: str | None = None,
    pictures: int | None = None,
    blocks: int = 1,
    probe: Literal["auto", "lbfgs", "sgd", "lars"] = "auto",
    track: bool = False,
    spread: SpreadFlags = Spread(cache="droppos-runs/features"),  # noqa: B008 - frozen
    measure: MeasureFlags = MeasureProtocol(),  # noqa: B008 - frozen
    heads: Heads = Heads(),  # noqa: B008 - frozen
    tracking: Tracking = Tracking(),  # noqa: B008 - frozen
) -> None:
    """Measure a backbone: k-NN and linear probe with labels, position accuracy and rank without.

    Args:
        backbone: As `BackboneName` says.
        data: Prepared data set to measure on.
        train: Labelled data set to learn from; without it four fifths of `data`.
        pictures: Pictures to take of each data set, from all over it; all when not given.
        blocks: Last blocks of the encoder that k-NN, probe and rank look at, side by side: what the
            last one holds serves the pre-training's own task first.
        probe: How the linear probe is fitted. lbfgs: exactly, in memory. sgd, lars: over a grid of
            rates, as the field does on a million pictures. auto: lbfgs where it fits.
        track: Write the figures to MLflow: to the run that made the backbone, if it is known.
        spread: Who takes the features, and where they are kept.
        measure: Protocol of position accuracy.
        heads: For a file of weights.
        tracking: Where MLflow is.
    """
    from pipelines.evaluate import evaluate as job
    from pipelines.evaluate import track as write
    from pipelines.report import show_evaluation

    with busy("measuring"):
        evaluation = job(
            backbone,
            data,
            train=train,
            measure=measure,
            blocks=blocks,
            limit=pictures,
            probe=probe,
            spread=spread,
            heads=heads,
        )
    show_evaluation(console, evaluation)
    if track:
        print(write(evaluation, tracking))


def finetune(
    backbone: BackboneName,
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    holdout: str,
    resume: bool = False,
    recipe: FinetuneFlags = Finetune(),  # noqa: B008 - frozen
    run: FinetuneRunFlags = FinetuneRun(),  # noqa: B008 - frozen
    heads: Heads = Heads(),  # noqa: B008 - frozen
    tracking: Tracking = Tracking(),  # noqa: B008 - frozen
) -> None:
    """Fine-tune a backbone on labelled pictures by the published recipe, and classify others.

    Args:
        backbone: As `BackboneName` says.
        data: Labelled prepared data set to train on.
        holdout: Labelled prepared data set to classify at the end.
        resume: Go on from the newest checkpoint of --storage/--name, if there is one.
        recipe: How it is fine-tuned.
        run: Name, storage and workers.
        heads: For a file of weights.
        tracking: Where MLflow is.
    """
    announce()
    from pipelines.finetune import finetune as job
    from pipelines.report import show_finetuned
    from pipelines.screen import Screen

    with Screen(Recipe(), console) as screen:
        done = job(
            backbone,
            data,
            holdout,
            recipe,
            run,
            tracking=tracking,
            resume=resume,
            heads=heads,
            on_event=screen.event,
        )
    show_finetuned(console, done)
    if not done.finished:
        sys.exit(130)


def look(
    backbone: BackboneName,
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    track: bool = False,
    measure: MeasureFlags = MeasureProtocol(pictures=256),  # noqa: B008 - frozen
    heads: Heads = Heads(),  # noqa: B008 - frozen
    tracking: Tracking = Tracking(),  # noqa: B008 - frozen
) -> None:
    """Draw what a backbone sees and answers, and tell whether it takes shortcuts.

    Args:
        backbone: As `BackboneName` says.
        data: Prepared data set that it was not trained on.
        out: Folder of the PNGs.
        track: Write what was found of shortcuts to MLflow: to the run that made the backbone, if it
            is known.
        measure: Protocol of position accuracy; so many pictures are looked at.
        heads: For a file of weights.
        tracking: Where MLflow is.
    """
    from pipelines.look import look as job
    from pipelines.look import track as write
    from pipelines.report import show_look

    with busy("looking"):
        found = job(backbone, data, out, measure=measure, heads=heads)
    show_look(console, found)
    if track:
        print(write(found, tracking))


def register(
    backbone: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="BACKBONE")],
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    alias: str | None = None,
    checkpoint: str | None = None,
    uri: str | None = None,
    experiment: str = EXPERIMENT,
) -> None:
    """Make a backbone a version of a registered model in MLflow; or move an alias to a version.

    Args:
        backbone: Folder of an export, of a checkpoint, or of a run; or models:/NAME@ALIAS or
            models:/NAME/VERSION, to set only the alias.
        name: Name of the registered model.
        alias: Points at the version from now on: candidate, or champion.
        checkpoint: For an export: the checkpoint or run it was made of, to be compared and named.
        uri: MLflow server or database; that of the run when not given.
        experiment: MLflow experiment of a backbone whose run is not known.
    """
    from pipelines.register import register as job
    from pipelines.report import show_registered

    with busy("registering"):
        registered = job(
            backbone, name, alias, checkpoint=checkpoint, uri=uri, experiment=experiment
        )
    show_registered(console, registered)
