"""The command line as a person meets it: what is said when something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import main, with_recipe
from pipelines.local_s3 import S3Server
from pipelines.prepare import prepare

JOBS = [
    "demo",
    "prepare",
    "pretrain",
    "export",
    "evaluate",
    "finetune",
    "search",
    "audit",
    "doctor",
]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Run a command in this process; give its exit code and all it printed, on one line."""
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((captured.out + captured.err).split())


@pytest.fixture(scope="module")
def data(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepare(str(photographs), str(folder))
    return str(folder)


def test_help_is_quick_and_names_every_job() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for job in JOBS:
        assert job in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "ray", "mlflow"}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(capsys: pytest.CaptureFixture[str], job: str) -> None:
    code, text = said(capsys, job, "--help")
    assert code == 0
    assert f"usage: droppos {job}" in text


def test_a_typo_in_a_flag_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "pretrain", "--method.mask-ratoi", "0.5")
    assert code == 2
    assert "Perhaps you meant" in text and "--method.mask-ratio" in text


def test_a_typo_in_a_recipe_suggests_the_right_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim:\n  gobal_batch: 12\n")
    code, text = said(capsys, "pretrain", str(recipe))
    assert code == 2
    assert "--optim.gobal-batch" in text and "--optim.global-batch" in text
    assert "mine.yaml" in "".join(text.split())  # the box may break it


def test_a_typo_of_a_command_without_a_recipe_names_no_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["drill", "--onlly", "kill"])
    said = capsys.readouterr()
    assert "the recipe --onlly" not in said.out + said.err


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method:\n  sigma: 2\n  attentive: false\ndata:\n  crop_scale: [0.5, 1]\n")
    argv = with_recipe(["pretrain", str(recipe), "--method.sigma", "3"])
    assert argv == [
        *("pretrain", "--method.sigma", "2", "--method.attentive", "False"),
        *("--data.crop-scale", "0.5", "1", "--method.sigma", "3"),
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method.mask-ratio", "1"], ["method.mask_ratio", "1.0", "[0, 1)", "0.75"]),
        (["--method.mask-ratio", "0.999"], ["no visible patch", "14 x 14"]),
        (["--measure.mask-ratio", "1"], ["measure.mask_ratio", "1.0", "[0, 1)"]),
        (
            ["--data.holdout", "x", "--measure.mask-ratio", "0.999"],
            ["measure.mask_ratio 0.999", "no visible patch"],
        ),
        (["--optim.global-batch", "7", "--run.workers", "2"], ["global_batch", "7", "take 6"]),
        (
            ["--compute.strategy", "single", "--run.workers", "2"],
            ["compute.strategy single", "run.workers=2", "ddp or fsdp2"],
        ),
        (["--run.name", "a/b"], ["run.name", "'a/b'", "run.storage"]),
        ([], ["data.path is not set", "droppos prepare"]),
        (["--data.path", "/no/such/folder"], ["/no/such/folder", "droppos prepare"]),
        (["--data.path", "gs://bucket/x"], ["gs://bucket/x", "s3://"]),
        (["--optim.gobal-batch", "3"], ["--optim.global-batch"]),
        (["--resume", "vit_base_imagenet"], ["'vit_base_imagenet'", "must come first"]),
        (["--tracking.uri", "https://me:secret@host"], ["tracking.uri", "MLFLOW_TRACKING_"]),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    code, text = said(capsys, "pretrain", *flags)
    assert code in (1, 2)
    for word in words:
        assert word in text
    assert "Traceback" not in text


def test_a_batch_larger_than_the_data_is_refused(
    capsys: pytest.CaptureFixture[str], data: str, tmp_path: Path
) -> None:
    storage = ["--run.storage", str(tmp_path)]
    code, text = said(capsys, "pretrain", "--data.path", data, *storage)
    assert code == 1
    assert "optim.global_batch 1024" in text and "72 pictures" in text


def test_an_empty_folder_and_a_folder_without_pictures_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    code, text = said(capsys, "prepare", str(tmp_path / "empty"), str(tmp_path / "out"))
    assert code == 1 and "empty" in text

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    code, text = said(capsys, "prepare", str(tmp_path / "texts"), str(tmp_path / "out2"))
    assert code == 1 and "a.txt" in text


def test_export_and_evaluate_say_what_was_there_instead(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str
) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    code, text = said(capsys, "export", str(tmp_path), str(tmp_path / "out"))
    assert code == 1 and "notes.txt" in text and "checkpoint" in text
    code, text = said(capsys, "evaluate", str(tmp_path / "none"), data)
    assert code == 1 and "none" in text
    code, text = said(capsys, "evaluate", "backbone", data, "--workers", "0")
    assert code == 1 and "--workers must be 1 or more, got 0" in text
    code, text = said(capsys, "finetune", "backbone", data, "--holdout", data, "--mixup", "-1")
    assert code == 1 and "mixup must be 0 or more" in text


def test_what_a_checkpoint_is_to_be_the_best_by_has_to_be_measured(
    capsys: pytest.CaptureFixture[str], data: str, caplog: pytest.LogCaptureFixture
) -> None:
    places = ["--data.path", data, "--data.holdout", data]
    code, text = said(capsys, "pretrain", *places, "--run.keep-best", "holdout/position/skil")
    assert code == 1 and "did you mean holdout/position/skill?" in text
    assert "hold the very pictures of data.path" in caplog.text


def test_a_folder_of_pictures_is_no_data_set_and_is_not_to_become_one(
    capsys: pytest.CaptureFixture[str], photographs: Path
) -> None:
    code, text = said(capsys, "pretrain", "--data.path", str(photographs))
    assert code == 1 and f"`droppos prepare {photographs} DEST`" in text


def test_a_typo_is_answered_by_the_command_it_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "finetune", "b", "d", "--holdout", "h", "--epochs", "2")
    assert code == 2 and "--optim.epochs" in text
    assert "measure" not in text and "search" not in text


def test_a_shard_of_no_size_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for size in ("inf", "nan", "0"):
        code, text = said(capsys, "prepare", str(tmp_path), "out", "--shard-mb", size)
        assert code == 1 and f"--shard-mb must be positive, got {size}" in text


def test_a_recipe_that_is_not_there_names_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, text = said(capsys, "pretrain", "vit_bsae")
    assert code == 1
    assert "vit_bsae" in text and "vit_base_imagenet" in text


@pytest.mark.slow
def test_a_missing_bucket_and_wrong_credentials_are_told_apart(
    capsys: pytest.CaptureFixture[str],
    photographs: Path,
    s3: S3Server,
    s3_env: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, text = said(capsys, "prepare", str(photographs), "s3://no-such-bucket/x")
    assert code == 1
    assert "there is no bucket 'no-such-bucket'" in text and "create it" in text

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    code, text = said(capsys, "pretrain", "--data.path", f"{s3.bucket('cli-test')}/data")
    assert code == 1
    assert "credential" in text or "denied" in text
    assert "wrong-secret-value" not in text


@pytest.mark.parametrize("command", ["export", "evaluate", "look", "finetune"])
def test_what_opens_a_file_of_weights_can_be_told_its_heads(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code, text = said(capsys, command, "--help")
    assert code == 0 and "--heads.encoder" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pretrian"], "no command pretrian; did you mean pretrain?"),
        (["pretrain", "vit_base"], "no recipe vit_base; did you mean vit_base_imagenet?"),
    ],
)
def test_the_name_that_was_meant_is_suggested(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    code, text = said(capsys, *argv)
    assert code == 1 and words in text


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("droppos ")


def test_an_output_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], data: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, text = said(capsys, "prepare", data, str(tmp_path / "file/out"))
    assert code == 1 and str(tmp_path / "file") in text and "Traceback" not in text


def test_whoever_reads_the_output_may_leave() -> None:
    command = f"{sys.executable} -m pipelines.cli plan --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage") and not done.stderr
