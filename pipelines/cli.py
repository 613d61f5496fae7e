"""The command line: each sub-command is a job's function, its arguments the job's.

A recipe's YAML becomes flags before the command line's own, so both go through one parser.
Jobs are imported when they are called: `droppos --help` should not wait for torch and Ray.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from droppos.config import Heads
from droppos.errors import ConfigError, DropposError
from droppos.export import FormatName
from droppos.measure.finetune_recipe import Finetune
from pipelines import recipe_file
from pipelines.finetune_run import FinetuneRun
from pipelines.launch.on import On
from pipelines.launch.request import JobKind, Request
from pipelines.plan.question import Question
from pipelines.recipe import Measure, Recipe, Tracking
from pipelines.spread import Spread
from pipelines.tracking import Where

if TYPE_CHECKING:
    from pipelines.search_outcome import SearchOutcome
    from pipelines.search_screen import SearchScreen

DESCRIPTION = "Pre-train vision transformers on your own pictures with DropPos."

STORAGE, EXPERIMENT = Where().storage, Where().experiment

RecipeFlags = Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
MeasureFlags = Annotated[Measure, tyro.conf.FlagConversionOff]
FinetuneFlags = Annotated[Finetune, tyro.conf.arg(name="")]
FinetuneRunFlags = Annotated[FinetuneRun, tyro.conf.arg(name="")]
QuestionFlags = Annotated[Question, tyro.conf.arg(name="")]
SpreadFlags = Annotated[Spread, tyro.conf.arg(name="")]
WhereFlags = Annotated[Where, tyro.conf.arg(name="")]
OnFlags = Annotated[On, tyro.conf.arg(name="")]
RecipeName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")]

console = Console(stderr=True)
"""For people; results that a script may want go to standard output."""


def prepare(
    source: tyro.conf.Positional[str],
    dest: tyro.conf.Positional[str],
    shard_mb: float = 64,
    group_rows: int = 100,
    short_side: int | None = None,
    quality: int | None = None,
) -> None:
    """Pack pictures into shards that stream from object storage.

    Args:
        source: Folder of pictures (class sub-folders are labels), a tar, a zip or a parquet
            with an image column; path or s3:// URI.
        dest: Folder of the prepared data set; path or s3:// URI.
        shard_mb: Encoded megabytes of a shard.
        group_rows: Pictures that are read at once.
        short_side: Store pictures with a longer short side as smaller JPEGs of this many pixels
            (320 suits crops of 224): quicker to read and decode. All are kept as they are
            without it.
        quality: JPEG quality of those, 1 to 100; 90 when not given.
    """
    from pipelines.prepare import prepare as job
    from pipelines.report import show_prepare
    from pipelines.screen import progress

    with progress(console, "packing") as on_progress:
        report = job(
            source,
            dest,
            shard_bytes=int(shard_mb * 1e6),
            group_rows=group_rows,
            short_side=short_side,
            quality=quality,
            on_progress=on_progress,
        )
    show_prepare(console, report, dest)


def pretrain(
    file: RecipeName = "",
    resume: bool = False,
    allow_changes: bool = False,
    init_from: str | None = None,
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Pre-train a vision transformer; Ctrl-C saves a last checkpoint and ends.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        resume: Go on from the newest checkpoint of run.storage/run.name, if there is one.
        allow_changes: Resume even if data or recipe differ from the checkpoint's.
        init_from: Trained weights to begin with, in place of run.init_from.
        recipe: Fields given here override the file's.
    """
    _refuse_late(file, "pretrain")
    if init_from is not None:
        recipe = replace(recipe, run=replace(recipe.run, init_from=init_from))
    _announce()
    from pipelines.pretrain import pretrain as job
    from pipelines.report import show_outcome
    from pipelines.screen import Screen

    with Screen(recipe, console) as screen:
        outcome = job(recipe, resume=resume, allow_changes=allow_changes, on_event=screen.event)
    show_outcome(console, recipe, outcome)
    if not outcome.finished:
        sys.exit(130)


def resume(
    run: tyro.conf.Positional[str],
    allow_changes: bool = False,
    where: WhereFlags = Where(),  # noqa: B008 - frozen
) -> None:
    """Go on with a pre-training run, found by its name in MLflow, as its recipe says.

    Args:
        run: Name of the run, or its id.
        allow_changes: Go on even if the data differ from the checkpoint's.
        where: Where runs are looked for by name.
    """
    from pipelines.runs import Registry, recipe_of

    recipe = recipe_of(Registry(where).run(run))
    pretrain("", resume=True, allow_changes=allow_changes, recipe=recipe)


def runs(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
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
    from pipelines.runs import Registry

    registry = Registry(where)
    match names:
        case ():
            runs_report.show_runs(console, registry.newest(most))
        case (name,):
            runs_report.show_run(console, registry.run(name))
        case _:
            runs_report.show_comparison(console, registry.compare(names))


def sync(where: tyro.conf.Positional[str] = STORAGE) -> None:
    """Send to MLflow what killed processes, or an outage, left behind.

    Args:
        where: Folder of runs, or of one run (s3:// too).
    """
    from pipelines.runs_report import show_synced
    from pipelines.sync import sync as job

    with console.status("sending"):
        synced = job(where)
    show_synced(console, synced)
    if any(one.left or one.error for one in synced):
        sys.exit(1)


def search(
    file: RecipeName = "",
    space: tuple[str, ...] = (),
    resume: bool = False,
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Try a recipe with other settings, and write the best one as a recipe.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        space: What may vary, in place of search.space: FIELD=choice(...), grid(...),
            uniform(low, high) or loguniform(low, high), such as 'method.sigma=uniform(0, 2)'.
        resume: Go on with the search of run.storage/run.name; trials that ended stay as they are.
        recipe: Fields given here override the file's.
    """
    _refuse_late(file, "search")
    if space:
        recipe = replace(recipe, search=replace(recipe.search, space=space))
    _announce()
    from pipelines.search import search as job

    with _searching() as screen:
        outcome = job(recipe, resume=resume, on_event=screen.event)
    _conclude_search(recipe, outcome)


def _searching() -> "SearchScreen":
    from pipelines.search_screen import SearchScreen

    # Tune tells of each trial that did not complete; the table does, too.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    return SearchScreen(console)


def _conclude_search(recipe: Recipe, outcome: "SearchOutcome", line: str = "") -> None:
    from pipelines.report import show_search

    show_search(console, recipe, outcome)
    if line:
        print(line)
    if not outcome.finished:
        sys.exit(130)
    if outcome.best is None:
        sys.exit(1)


def export(
    checkpoint: tyro.conf.Positional[str],
    out: tyro.conf.Positional[str],
    format: FormatName = "timm",
    image_size: tuple[int, int] | None = None,
    heads: Heads = Heads(),  # noqa: B008 - frozen
) -> None:
    """Write a backbone that others load, compared with the trained model before it says done.

    Args:
        checkpoint: Folder of a checkpoint, of a run (its newest) or of an export to timm; or a file
            of weights of the DropPos reference, MAE or timm.
        out: Folder to write; path or s3:// URI.
        format: Whose format. torchvision and detectron2 know square pictures only; detectron2 and
            mmseg are written without those projects, and compared by mapping their names back.
        image_size: Height and width of the pictures it will be given: positions are resampled, and
            the position head is left out. The model's own when not given.
        heads: For a file of weights.
    """
    from pipelines.export import export_checkpoint
    from pipelines.report import show_export

    report = export_checkpoint(checkpoint, out, format, image_size, heads)
    show_export(console, report, out)


def evaluate(
    backbone: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    train: str | None = None,
    pictures: int | None = None,
    probe: Literal["auto", "lbfgs", "sgd", "lars"] = "auto",
    track: bool = False,
    spread: SpreadFlags = Spread(cache="droppos-runs/features"),  # noqa: B008 - frozen
    measure: MeasureFlags = Measure(),  # noqa: B008 - frozen
    heads: Heads = Heads(),  # noqa: B008 - frozen
    tracking: Tracking = Tracking(),  # noqa: B008 - frozen
) -> None:
    """Measure a backbone: k-NN and linear probe with labels, position accuracy and rank without.

    Args:
        backbone: Folder of an export to timm, of a checkpoint, or of a run; models:/NAME@ALIAS; a
            file of weights of the DropPos reference, MAE or timm; or timm:NAME, which timm
            downloads.
        data: Prepared data set to measure on.
        train: Labelled data set to learn from; without it four fifths of `data`.
        pictures: Pictures to take of each data set, from all over it; all when not given.
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

    with console.status("measuring"):
        evaluation = job(
            backbone,
            data,
            train=train,
            measure=measure,
            limit=pictures,
            probe=probe,
            spread=spread,
            heads=heads,
        )
    show_evaluation(console, evaluation)
    if track:
        print(write(evaluation, tracking))


def finetune(
    backbone: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    holdout: str,
    resume: bool = False,
    recipe: FinetuneFlags = Finetune(),  # noqa: B008 - frozen
    run: FinetuneRunFlags = FinetuneRun(),  # noqa: B008 - frozen
    heads: Heads = Heads(),  # noqa: B008 - frozen
    tracking: Tracking = Tracking(),  # noqa: B008 - frozen
) -> None:
    """Fine-tune a backbone on labelled pictures by the published recipe, and classify others.

    Args:
        backbone: Folder of an export, of a checkpoint, or of a run.
        data: Labelled prepared data set to train on.
        holdout: Labelled prepared data set to classify at the end.
        resume: Go on from the newest checkpoint of --storage/--name, if there is one.
        recipe: How it is fine-tuned.
        run: Name, storage and workers.
        heads: For a file of weights.
        tracking: Where MLflow is.
    """
    _announce()
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


def look(
    backbone: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path],
    track: bool = False,
    measure: MeasureFlags = Measure(pictures=256),  # noqa: B008 - frozen
    heads: Heads = Heads(),  # noqa: B008 - frozen
    tracking: Tracking = Tracking(),  # noqa: B008 - frozen
) -> None:
    """Draw what a backbone sees and answers, and tell whether it takes shortcuts.

    Args:
        backbone: Folder of an export, of a checkpoint, or of a run.
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

    with console.status("looking"):
        found = job(backbone, data, out, measure=measure, heads=heads)
    show_look(console, found)
    if track:
        print(write(found, tracking))


def report(
    run: tyro.conf.Positional[str],
    out: Path = Path("droppos-runs/report.html"),
    where: WhereFlags = Where(),  # noqa: B008 - frozen
) -> None:
    """Write all of a run as one HTML file: curves, pictures, figures, data, machines, receipt.

    Args:
        run: Folder of the run or of one of its checkpoints, or the run's name in MLflow.
        out: File to write.
        where: Where runs are looked for by name.
    """
    from pipelines.receipt import locate
    from pipelines.run_report import run_report

    with console.status("reading and drawing"):
        text = run_report(locate(run, where))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    console.print(f"report: {escape(str(out))}", soft_wrap=True, highlight=False)


def doctor(
    data: tyro.conf.Positional[str],
    gpus: int | None = None,
    gpu_images_per_s: float = 1500,
    decode_cpus: int | None = None,
    image_size: tuple[int, int] = (224, 224),
    seconds: float = 60,
    picture: Path = Path("droppos-runs/doctor.png"),
) -> None:
    """Measure what bounds ingest of a data set on this cluster, and what the GPUs would need.

    Args:
        data: Prepared data set; path or s3:// URI.
        gpus: GPUs to feed; those that the cluster shows, else 1, when not given.
        gpu_images_per_s: Images that one GPU trains on in a second. 1500 is an assumption, for
            ViT-B on an A100 or H100; a run tells its own as data/images_per_s.
        decode_cpus: CPUs that decode; all but one for each GPU when not given.
        image_size: Height and width of the model's input, in pixels.
        seconds: How long it may take, about; at least 5.
        picture: PNG to write.
    """
    from pipelines.doctor import Question
    from pipelines.doctor import doctor as job
    from pipelines.doctor_report import show_doctor

    question = Question(
        gpus=gpus,
        gpu_images_per_s=gpu_images_per_s,
        decode_cpus=decode_cpus,
        image_size=image_size,
        seconds=seconds,
    )
    with console.status("loading torch and Ray") as status:
        report = job(data, question, picture=picture, say=status.update)
    show_doctor(console, report)


def plan(
    file: RecipeName = "",
    json: bool = False,
    question: QuestionFlags = Question(),  # noqa: B008 - frozen
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Say what a run would take before it is paid for: memory, pace, hours, load and price.

    Nothing is started or measured; each figure says whether it is a model or a measurement.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        json: Print all of it as JSON, for scripts.
        question: Machine types, prices, rates and what is measured already.
        recipe: Fields given here override the file's.
    """
    _refuse_late(file, "plan")
    from pipelines.plan.figures import as_json
    from pipelines.plan.job import plan as job
    from pipelines.plan.report import show_plan

    with console.status("simulating"):
        found = job(recipe, question)
    if json:
        print(dumps(as_json(found), indent=1))
    else:
        show_plan(console, found)


def audit(run: tyro.conf.Positional[str]) -> None:
    """Compare what a run trained on, picture by picture, with its schedule.

    Args:
        run: Folder of a run that was made with run.record_ids, or of one of its checkpoints.
    """
    from pipelines.audit import audit as job
    from pipelines.report import show_audit

    with console.status("reading ids"):
        result = job(run)
    show_audit(console, result)
    if not result.is_exact:
        sys.exit(1)


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
        with console.status("reading the run's past"):
            made, notes = job.make(job.locate(source, where), backbone)
        job.write(made, out)
        receipt_report.show_receipt(console, made, notes, out)
        return
    from pipelines.receipt_check import verify as check

    with console.status("comparing"):
        checks = check(job.load(verify), run=run, data=data, backbone=backbone, shards=shards)
    receipt_report.show_checks(console, checks)
    if any(each.state == "differs" for each in checks):
        sys.exit(1)


def register(
    backbone: tyro.conf.Positional[str],
    name: tyro.conf.Positional[str],
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

    with console.status("registering"):
        registered = job(
            backbone, name, alias, checkpoint=checkpoint, uri=uri, experiment=experiment
        )
    show_registered(console, registered)


def demo(resume: bool = False, recipe: RecipeFlags = Recipe()) -> None:  # noqa: B008 - frozen
    """Run the whole job on embedded photographs: prepare, pretrain, export, evaluate.

    Args:
        resume: Go on with the last demo instead of refusing to overwrite it.
        recipe: Fields given here override the demo recipe's.
    """
    _announce()
    from pipelines.demo import demo as job
    from pipelines.report import show_demo
    from pipelines.screen import Screen

    with Screen(recipe, console) as screen:
        report = job(recipe, resume=resume, say=screen.say, on_event=screen.event)
    show_demo(console, report)
    if not report.outcome.finished:
        sys.exit(130)


def demo_search(resume: bool = False, recipe: RecipeFlags = Recipe()) -> None:  # noqa: B008
    """Search on embedded photographs: eight trials, four at a time on one stream, and a report.

    The last line is for scripts.

    Args:
        resume: Go on with the last one instead of refusing to overwrite it.
        recipe: Fields given here override the demo search's recipe.
    """
    _announce()
    from pipelines.demo_search import demo_search as job
    from pipelines.demo_search import line

    with _searching() as screen:
        recipe, outcome = job(recipe, resume=resume, say=_say, on_event=screen.event)
    _conclude_search(recipe, outcome, line(outcome))


def drill(
    file: RecipeName = "",
    outage_s: float = 30,
    only: tuple[str, ...] = (),
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Kill workers, nodes, storage and MLflow under a run, and show that nothing is lost.

    Without RAY_ADDRESS it plays on nodes and servers of its own on this machine. On the cluster of
    RAY_ADDRESS it kills workers and a node there, and takes neither storage nor MLflow away; name
    --run.storage s3://BUCKET/FOLDER then. The last line is for scripts.

    Args:
        file: A YAML file, or the name of a recipe that is shipped; `drill` when not given.
        outage_s: Seconds that storage and MLflow are away.
        only: Some of kill, term, hang, damage, storage, mlflow, notice, node, grow; all of them
            when not given.
        recipe: Fields given here override the file's.
    """
    _refuse_late(file, "drill")
    _announce()
    from pipelines.drill import drill as job
    from pipelines.report import show_drill

    report = job(recipe, outage_s=outage_s, only=only, say=_say, on_event=_say_news)
    show_drill(console, report)
    print(report.line)
    if not report.passed:
        sys.exit(1)


def launch(
    file: RecipeName = "",
    name: str | None = None,
    on: OnFlags = On(),  # noqa: B008 - frozen
    job: JobKind = "pretrain",
    resume: bool = False,
    allow_changes: bool = False,
    keep: bool = False,
    detach: bool = False,
    yes: bool = False,
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Bring a cluster up, run a recipe on it, follow it, and end the machines.

    Once the job is handed over, Ctrl-C and a closed terminal only stop following it: `droppos
    attach`, `stop` and `down` go on from there. Exit code 0: finished; 1: failed; 130: no longer
    followed, or stopped.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        name: Name of the launch, and of its cluster; run.name when not given.
        on: Where.
        job: What is done with the recipe.
        resume: Go on from the newest checkpoint of run.storage/run.name, if there is one.
        allow_changes: Resume even if data or recipe differ from the checkpoint's.
        keep: Leave the cluster when the job has ended; another launch of this name runs on it.
        detach: Don't follow; nobody ends the machines then until `droppos attach` or `down`.
        yes: Don't ask.
        recipe: Fields given here override the file's.
    """
    _refuse_late(file, "launch")
    from pipelines.launch import flow, places, terminal

    asked = Request(recipe=recipe, job=job, resume=resume, allow_changes=allow_changes)
    made, backend = places.planned(name or places.launch_name(recipe.run.name), on, keep=keep)
    with terminal.signals_interrupt():
        speaking = terminal.terminal(console, yes=yes)
        sys.exit(flow.launch(asked, backend, made, speaking, start=Path.cwd(), detach=detach))


def attach(name: tyro.conf.Positional[str], on: OnFlags = On()) -> None:  # noqa: B008 - frozen
    """Follow a launch's job again, and end the machines when it has ended.

    Args:
        name: Name of the launch.
        on: Where it is, if another machine began it.
    """
    from pipelines.launch import flow, places, terminal

    with terminal.signals_interrupt():
        sys.exit(flow.attach(*places.found(name, on), terminal.terminal(console, yes=False)))


def stop(name: tyro.conf.Positional[str], on: OnFlags = On()) -> None:  # noqa: B008 - frozen
    """Ask a launch's job for a last checkpoint, wait for it, and end the machines.

    Args:
        name: Name of the launch.
        on: Where it is, if another machine began it.
    """
    from pipelines.launch import flow, places, terminal

    with terminal.signals_interrupt():
        sys.exit(flow.stop(*places.found(name, on), terminal.terminal(console, yes=False)))


def down(
    name: tyro.conf.Positional[str],
    yes: bool = False,
    on: OnFlags = On(),  # noqa: B008 - frozen
) -> None:
    """End all machines of a launch, and see that none is left.

    Args:
        name: Name of the launch.
        yes: Don't ask, even if a job still runs.
        on: Where it is, if another machine began it.
    """
    from pipelines.launch import flow, places, terminal

    with terminal.signals_interrupt():
        sys.exit(flow.down(*places.found(name, on), terminal.terminal(console, yes=yes)))


def watch_spot(head: tyro.conf.Positional[str]) -> None:
    """Watch this EC2 machine for the notice that it is taken back, and drain its Ray node then.

    cluster.yaml starts it on each machine that may be. It ends once the notice has been passed on.

    Args:
        head: Address of the cluster's head: host:port.
    """
    from pipelines.notices import only_watcher, watch

    with only_watcher():
        watch(head)


COMMANDS = {
    "demo": demo,
    "demo-search": demo_search,
    "drill": drill,
    "prepare": prepare,
    "pretrain": pretrain,
    "resume": resume,
    "runs": runs,
    "sync": sync,
    "search": search,
    "export": export,
    "evaluate": evaluate,
    "look": look,
    "finetune": finetune,
    "report": report,
    "doctor": doctor,
    "plan": plan,
    "audit": audit,
    "receipt": receipt,
    "register": register,
    "launch": launch,
    "attach": attach,
    "stop": stop,
    "down": down,
    "watch-spot": watch_spot,
}


def main(argv: list[str] | None = None) -> None:
    """Run a sub-command; an error meant for a person is printed without a traceback."""
    quiet()
    argv = sys.argv[1:] if argv is None else argv
    try:
        flags = with_recipe(argv)
        with _recipe_named(argv if flags != argv else []):
            run = tyro.extras.subcommand_cli_from_dict
            run(COMMANDS, prog="droppos", description=DESCRIPTION, args=flags)
    except DropposError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)


@contextmanager
def _recipe_named(argv: list[str]) -> Iterator[None]:
    """Add to the parser's complaint that the flag may stand in a file, as a field."""
    try:
        yield
    except SystemExit as error:
        if error.code == 2 and len(argv) > 1:
            console.print(f"the recipe {escape(argv[1])} is read as flags, too: look there as well")
        raise


def with_recipe(argv: list[str]) -> list[str]:
    """Put a recipe's fields, as flags, before the command line's own; the last one counts."""
    match argv:
        case [
            ("pretrain" | "search" | "drill" | "plan" | "launch") as command,
            name,
            *rest,
        ] if name[:1] != "-":
            return [command, *recipe_file.flags(recipe_file.read(name)), *rest]
        case [("demo" | "demo-search" | "drill") as command, *rest]:
            name = command.replace("-", "_")
            return [command, *recipe_file.flags(recipe_file.read(name)), *rest]
    return argv


def _announce() -> None:
    _say("loading torch and Ray")


def _say_news(event: Mapping[str, Any]) -> None:
    from pipelines.news import told

    if (news := told(event)) is not None:
        _say(f"    {news}")


def _say(text: str) -> None:
    console.print(f"[dim]·[/] {escape(text)}", highlight=False, soft_wrap=True)


def _refuse_late(file: str, command: str) -> None:
    if file:
        raise ConfigError(
            f"the recipe {file!r} must come first, before all flags: droppos {command} {file} ..."
        )


def quiet() -> None:
    """Keep other projects' notices off the screen; warnings and errors of ours stay."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("ray.train", "ray.data", "ray.tune", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
