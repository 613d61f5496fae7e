"""Pictures that `droppos prepare` puts aside."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from droppos.errors import ConfigError, DataError
from pipelines.cli import main
from pipelines.prepare import PrepareReport, prepare, read_set_aside
from pipelines.shards import Picture, load_manifest, read_rows
from pipelines.sides import Side
from pipelines.storage import open_place


def _prepare(source: Path, out: Path, share: float = 0.3, **changes: Any) -> PrepareReport:
    return prepare(
        str(source),
        str(out / "train"),
        shard_bytes=100_000,
        group_rows=5,
        workers=2,
        holdout=str(out / "held-out"),
        holdout_share=share,
        **changes,
    )


def _rows(dest: Path) -> list[Picture]:
    place = open_place(str(dest))
    return list(read_rows(place, load_manifest(place)))


def _keys(dest: Path) -> set[str]:
    return {row.key for row in _rows(dest)}


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_each_picture_is_on_one_side(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("cat", "rocket", "coffee"):
        shutil.copytree(photographs / name, tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("x")
    report = _prepare(tmp_path / "in", tmp_path)
    train, held_out = _rows(tmp_path / "train"), _rows(tmp_path / "held-out")
    prepare(str(tmp_path / "in"), str(tmp_path / "all"))
    everything = sorted(_rows(tmp_path / "all"))
    assert sorted(train + held_out) == everything
    assert report.holdout is not None
    assert (report.pictures, report.holdout.pictures) == (len(train), len(held_out))
    assert report.classes == report.holdout.classes == ("cat", "coffee", "rocket")
    assert 0.1 < len(held_out) / len(everything) < 0.5
    # What is no picture is on no side, and named once.
    assert [entry.key for entry in read_set_aside(open_place(str(tmp_path / "train")))] == [
        "notes.txt"
    ]
    assert report.holdout.set_aside == {}


def test_a_picture_stays_on_its_side_whatever_else_there_is(
    photographs: Path, tmp_path: Path
) -> None:
    for name in ("cat", "rocket"):
        shutil.copytree(photographs / name, tmp_path / "in" / name)
    _prepare(tmp_path / "in", tmp_path / "less")
    shutil.copytree(photographs / "coffee", tmp_path / "in/coffee")
    _prepare(tmp_path / "in", tmp_path / "more")
    _prepare(tmp_path / "in", tmp_path / "larger", share=0.6)
    assert _keys(tmp_path / "less/held-out") < _keys(tmp_path / "more/held-out")
    assert _keys(tmp_path / "more/held-out") < _keys(tmp_path / "larger/held-out")
    # An archive, and a data set that is prepared already, are divided as the folder is.
    archive = shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path / "in")
    _prepare(Path(archive), tmp_path / "archive")
    assert _keys(tmp_path / "archive/held-out") == _keys(tmp_path / "more/held-out")
    prepare(str(tmp_path / "in"), str(tmp_path / "all"))
    _prepare(tmp_path / "all", tmp_path / "again")
    assert _keys(tmp_path / "again/held-out") == _keys(tmp_path / "more/held-out")


def test_what_is_in_one_folder_can_be_put_aside_together(photographs: Path, tmp_path: Path) -> None:
    for number in range(12):
        shutil.copytree(photographs / "cat", tmp_path / f"in/film-{number}")
    _prepare(tmp_path / "in", tmp_path, holdout_by="folder")
    train, held_out = (
        {key.split("/")[0] for key in _keys(tmp_path / side)} for side in ("train", "held-out")
    )
    assert train and held_out and not train & held_out and len(train | held_out) == 12


def test_stopped_and_continued_both_end_with_the_same_bytes(
    photographs: Path, tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    whole, again = tmp_path / "whole", tmp_path / "again"
    _prepare(photographs, whole)
    for after in (9, 17, 40, 71):

        def stop(done: int, _: int, after: int = after) -> None:
            if done > after:
                raise StoppedError

        with pytest.raises(StoppedError):
            _prepare(photographs, again, on_progress=stop)
    assert not _prepare(photographs, again).nothing_to_do
    assert _contents(again) == _contents(whole)
    report = _prepare(photographs, again)
    assert report.nothing_to_do and report.holdout is not None and report.holdout.nothing_to_do


def test_another_division_is_another_data_set(photographs: Path, tmp_path: Path) -> None:
    _prepare(photographs, tmp_path)
    with pytest.raises(
        DataError,
        match=r"it is of the rest of a share of 0\.3 held out by picture, now the rest of a share "
        r"of 0\.2 held out by picture is asked",
    ):
        _prepare(photographs, tmp_path, share=0.2)
    with pytest.raises(DataError, match=r"it is of the rest of .* now all pictures is asked"):
        prepare(str(photographs), str(tmp_path / "train"), shard_bytes=100_000, group_rows=5)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_impossible_shares_are_refused(photographs: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="--holdout-share must be between 0 and 1"):
        _prepare(photographs, tmp_path, share=share)
    assert not list(tmp_path.iterdir())


def test_two_data_sets_are_not_in_one_folder(photographs: Path, tmp_path: Path) -> None:
    for holdout in ("train", "train/held-out", "."):
        with pytest.raises(ConfigError, match="lie in one another"):
            prepare(str(photographs), str(tmp_path / "train"), holdout=str(tmp_path / holdout))
    with pytest.raises(ConfigError, match="is inside of source"):
        prepare(str(photographs), str(tmp_path), holdout=str(photographs / "held-out"))


def test_a_side_without_pictures_is_told(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(photographs / "cat/00.jpg", tmp_path / "in")
    side = Side(0.5, "picture", held_out=True)
    empty = "the rest of a" if side.takes("00.jpg") else "a"
    with pytest.raises(DataError, match=f"of the 1 pictures .* none for {empty} share of 0.5"):
        _prepare(tmp_path / "in", tmp_path, share=0.5)


def test_the_command_line_puts_pictures_aside(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = str(tmp_path / "train"), str(tmp_path / "held-out")
    with pytest.raises(SystemExit):
        main(["prepare", str(photographs), train, "--holdout-share", "0.2"])
    assert "nothing says where: give --holdout a folder" in " ".join(
        capsys.readouterr().err.split()
    )
    main(["prepare", str(photographs), train, "--holdout", held_out, "--holdout-share", "0.2"])
    told = " ".join(capsys.readouterr().err.split())
    assert "Held out" in told
    assert f"--data.path {train} --data.holdout {held_out}" in told
    asked = json.loads((tmp_path / "held-out/prepare.json").read_text())
    assert asked["side"] == "a share of 0.2 held out by picture"
    assert _keys(tmp_path / "train").isdisjoint(_keys(tmp_path / "held-out"))


def test_a_refusal_leaves_no_held_out_pictures(photographs: Path, tmp_path: Path) -> None:
    prepare(str(photographs), str(tmp_path / "train"), shard_bytes=100_000, group_rows=5)
    with pytest.raises(DataError, match="it is of all pictures, now the rest of a share"):
        _prepare(photographs, tmp_path)
    assert not (tmp_path / "held-out").exists()
