"""Data sets: packed, measured, and held against what was trained on."""

import sys
from math import inf
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.commands.speech import busy, console
from pipelines.sides import HOLDOUT_SHARE, HoldoutBy


def prepare(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")],
    shard_mb: float = 64,
    group_rows: int = 100,
    short_side: int | None = None,
    quality: int | None = None,
    holdout: str | None = None,
    holdout_share: float | None = None,
    holdout_by: HoldoutBy = "picture",
    only: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> None:
    """Pack pictures into shards that stream from object storage.

    Args:
        source: Folder of pictures (class sub-folders are labels), a tar, a zip, a parquet, or a
            folder of those; path or s3:// URI.
        dest: Folder of the prepared data set; path or s3:// URI.
        shard_mb: Encoded megabytes of a shard.
        group_rows: Pictures that are read at once.
        short_side: Store pictures with a longer short side as smaller JPEGs of this many pixels
            (320 suits crops of 224): quicker to read and decode. All are kept as they are
            without it.
        quality: JPEG quality of those, 1 to 100; 90 when not given.
        holdout: Folder of another data set, for pictures that are put aside, never to be trained
            on; path or s3:// URI. None are without it.
        holdout_share: About how many are, of all; 0.05 when not given. A hash of their names says
            which.
        holdout_by: Put aside single pictures, or all or nothing of each folder: what was filmed
            in one go, say, or comes from one patient.
        only: Take only files whose path below SOURCE is like this pattern, such as 'train/*'; a *
            stands for anything, slashes too.
        image_column: Column of a parquet that holds encoded pictures; found when not given.
        label_column: Column of a parquet that holds labels; found when not given.
    """
    from droppos.errors import ConfigError
    from pipelines.prepare import prepare as job
    from pipelines.report import show_prepare
    from pipelines.screen import progress
    from pipelines.sources import Wanted

    if not 0 < shard_mb < inf:
        raise ConfigError(f"--shard-mb must be positive, got {shard_mb:g}; 64 suits object stores")
    if holdout is None and (holdout_share is not None or holdout_by != "picture"):
        raise ConfigError(
            "--holdout-share and --holdout-by say what is put aside, and nothing says where: give "
            "--holdout a folder, too"
        )
    with progress(console, "packing") as on_progress:
        report = job(
            source,
            dest,
            shard_bytes=int(shard_mb * 1e6),
            group_rows=group_rows,
            short_side=short_side,
            quality=quality,
            wanted=Wanted(only, image_column, label_column),
            holdout=holdout,
            holdout_share=HOLDOUT_SHARE if holdout_share is None else holdout_share,
            holdout_by=holdout_by,
            on_progress=on_progress,
        )
    show_prepare(console, report, dest, holdout)


def doctor(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
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


def audit(run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]) -> None:
    """Compare what a run trained on, picture by picture, with its schedule.

    Args:
        run: Folder of a run that was made with run.record_ids, or of one of its checkpoints.
    """
    from pipelines.audit import audit as job
    from pipelines.report import show_audit

    with busy("reading ids"):
        result = job(run)
    show_audit(console, result)
    if not result.is_exact:
        sys.exit(1)
