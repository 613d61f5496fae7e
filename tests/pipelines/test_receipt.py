"""Receipts of a run that was written by hand: the truth passes, each planted change is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from droppos.config import Model, Optim
from droppos.errors import DataError, StorageError
from droppos.export.timm_vit import HEAD, WEIGHTS
from droppos.model import DropPos
from pipelines import chain, checkpoints, receipt, stored_state
from pipelines.check import Check, differences
from pipelines.checkpoints import COMPLETE, Saved
from pipelines.cli import main
from pipelines.export import export_checkpoint
from pipelines.facts import facts
from pipelines.likeness import differing_weights
from pipelines.receipt_check import verify
from pipelines.recipe import Data, Recipe, Run, Tracking
from pipelines.shards import MANIFEST, Manifest, Picture, ShardWriter
from pipelines.storage import open_place

TINY = Model(
    size="tiny",
    image_size=(32, 32),
    patch_size=8,
    width=32,
    depth=1,
    heads=2,
    decoder_width=32,
    decoder_heads=2,
)
STEPS = (2, 4, 6)
PASSWORD = "hunter2hunter2"


def write_data(folder: Path) -> Manifest:
    """Two shards of pictures that nobody decodes."""
    writer = ShardWriter(open_place(str(folder)), group_rows=5)
    shards = []
    for shard in range(2):
        for row in range(10):
            writer.add(Picture(b"picture %d %02d" % (shard, row), f"{shard}-{row}.jpg", 0, 8, 8))
        shards.append(writer.close_shard())
    manifest = Manifest(shards=tuple(shards), classes=("cat",))
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


def save(recipe: Recipe, step: int, before: Saved | None, manifest: Manifest) -> Saved:
    torch.manual_seed(step)
    told = {
        **facts(recipe, manifest),
        "origin": {"command": f"droppos pretrain, start {step // 4}"},
        "previous": before and {"step": before.step, "sha256": before.sha256},
        "metrics": {"holdout/position/skill": step / 10},
    }
    state = {"model": DropPos(recipe.model, recipe.method).state_dict()}
    return stored_state.save(open_place(recipe.home), step, state, told, checkpoints.Retention(1))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run of three checkpoints of which one is left, and its export."""
    folder = tmp_path_factory.mktemp("original")
    manifest = write_data(folder / "data")
    recipe = Recipe(
        model=TINY,
        optim=Optim(epochs=3, global_batch=4, warmup_epochs=1),
        data=Data(path=str(folder / "data")),
        run=Run(name="run", storage=str(folder), seed=7),
        tracking=Tracking(uri=f"http://mlflow:5000/?token={PASSWORD}"),
    )
    saved = None
    for step in STEPS:
        saved = save(recipe, step, saved, manifest)
    export_checkpoint(recipe.home, str(folder / "backbone"))
    return folder


@dataclass(frozen=True)
class Handed:
    """What a third party was given: a copy of everything, and the receipt."""

    folder: Path
    receipt: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "step-00000006"

    def link(self, step: int) -> Path:
        (found,) = (self.run / chain.FOLDER).glob(f"step-{step:08d}.*")
        return found

    def verify(self, **other: Any) -> list[Check]:
        places = {name: str(self.folder / name) for name in ("run", "data", "backbone")}
        return verify(self.receipt, **{**places, **other})

    @property
    def differing(self) -> dict[str, str]:
        return {check.what: check.told for check in self.verify() if check.state == "differs"}


@pytest.fixture
def handed(original: Path, tmp_path: Path) -> Handed:
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    saved = checkpoints.at(str(original / "run"))
    made, notes = receipt.make(saved, str(original / "backbone"))
    assert notes == []
    return Handed(folder, made)


def rewritten(handed: Handed, change: Callable[[dict[str, Any]], None]) -> Handed:
    """Change a receipt as somebody would who knows how its hash is made."""
    forged = json.loads(json.dumps(handed.receipt))
    change(forged)
    return replace(handed, receipt={**forged, "sha256": receipt.digest(forged)})


def flip(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


def test_the_truth_passes(handed: Handed) -> None:
    checks = handed.verify()
    assert {check.state for check in checks} <= {"ok", "note"}
    assert [check.what for check in checks if check.state == "note"] in (
        [],
        ["code revision here"],
    )
    assert {"backbone, its weights", "data, its shards", "chain in the run's folder"} <= {
        check.what for check in checks
    }


def test_it_tells_where_the_backbone_came_from(handed: Handed) -> None:
    told = handed.receipt
    assert [link["step"] for link in told["chain"]] == [2, 4, 6]
    assert told["chain"][0]["previous"] is None
    assert told["chain"][2]["metrics"] == {"holdout/position/skill": 0.6}
    assert told["seeds"]["run.seed"] == 7 and "measure.seed" in told["seeds"]
    assert told["recipe"]["model.width"] == 32
    assert [(o["first_checkpoint"], o["command"][-1]) for o in told["code"]] == [(2, "0"), (4, "1")]
    assert len(told["data"]["shards"]) == 2
    assert told["backbone"]["files"].keys() >= {WEIGHTS, HEAD}


def test_no_secret_is_in_it_and_what_was_blotted_out_is_no_difference(handed: Handed) -> None:
    assert PASSWORD not in json.dumps(handed.receipt)
    assert handed.receipt["recipe"]["tracking.uri"] == "http://mlflow:5000/?token=***"
    assert not list(differences("uri", "http://***@mlflow", "http://ann:pw@mlflow"))
    assert list(differences("uri", "http://***@mlflow", "http://ann:pw@elsewhere"))
    assert list(differences("sigma", "***", 2.0))


@pytest.mark.parametrize("shard", ["shard-00000.parquet", "shard-00001.parquet"])
def test_a_byte_in_a_shard_is_found(handed: Handed, shard: str) -> None:
    file = handed.folder / "data" / shard
    flip(file, file.read_bytes().index(b"picture"))
    assert handed.differing.keys() == {f"data, {shard}"}


def test_a_picture_changed_with_all_checksums_made_anew_is_found(handed: Handed) -> None:
    """The manifest says the old content of a file that has another."""
    folder = handed.folder / "data"
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    writer = ShardWriter(open_place(str(folder)), group_rows=5)
    for row in range(10):
        writer.add(Picture(b"picture 0 %02d" % (row + row // 9), f"0-{row}.jpg", 0, 8, 8))
    shard = writer.close_shard()
    lying = replace(shard, content=manifest.shards[0].content)
    lie = replace(manifest, shards=(lying, manifest.shards[1]))
    (folder / MANIFEST).write_text(lie.to_json())
    assert lie.digest == manifest.digest
    assert handed.differing.keys() == {"data, shard-00000.parquet"}
    assert "content: expected" in handed.differing["data, shard-00000.parquet"]
    unread = handed.verify(shards=False)
    assert not any(check.state == "differs" for check in unread)
    assert ("data, its shards", "not reachable") in [check[:2] for check in unread]


def test_another_data_set_is_named_with_its_shard(handed: Handed) -> None:
    folder = handed.folder / "data"
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    other = replace(manifest.shards[1], content="0" * 64)
    (folder / MANIFEST).write_text(replace(manifest, shards=(manifest.shards[0], other)).to_json())
    assert handed.differing.keys() == {"data, its manifest", "data, shard-00001.parquet"}
    assert "content: pictures" in handed.differing["data, its manifest"]


def test_the_same_pictures_in_another_file_are_a_note(handed: Handed) -> None:
    file = handed.folder / "data" / "shard-00000.parquet"
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"parquet-cpp-arrow", b"parquet-cpp-other"))
    assert file.read_bytes() != raw
    assert not handed.differing
    notes = [check.what for check in handed.verify() if check.state == "note"]
    assert "data, shard-00000.parquet" in notes


def test_an_edited_link_is_found(handed: Handed) -> None:
    link = handed.link(4)
    link.write_bytes(link.read_bytes().replace(b'"world_size": 1', b'"world_size": 8'))
    (named,) = handed.differing
    assert named == "chain, step 4" and "was changed: expected sha256" in handed.differing[named]


def test_a_missing_link_is_found(handed: Handed) -> None:
    handed.link(4).unlink()
    assert handed.differing.keys() == {"chain, step 4"}
    assert "there is no such file" in handed.differing["chain, step 4"]


def test_a_missing_link_hides_no_forged_field(handed: Handed) -> None:
    handed.link(2).unlink()
    forged = rewritten(handed, lambda told: told["recipe"].update({"method.sigma": 9.0}))
    assert forged.differing.keys() == {"chain, step 2", "recipe.method.sigma"}


def test_a_link_left_out_of_the_receipt_is_found(handed: Handed) -> None:
    forged = rewritten(handed, lambda told: told["chain"].pop(1))
    assert {"chain, before step 6"} <= forged.differing.keys()
    found = forged.differing["chain, before step 6"]
    assert found.startswith("expected step 4") and "found step 2" in found


def test_a_past_cut_off_is_found(handed: Handed) -> None:
    forged = rewritten(handed, lambda told: told["chain"].pop(0))
    assert "found no checkpoint" in forged.differing["chain, before step 4"]


def test_another_end_of_the_chain_is_found(handed: Handed) -> None:
    forged = rewritten(handed, lambda told: told["chain"].pop())
    assert "expected step 6" in forged.differing["chain, its end"]


Forgery = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("recipe.method.sigma", lambda told: told["recipe"].update({"method.sigma": 9.0})),
        ("seeds.run.seed", lambda told: told["seeds"].update({"run.seed": 0})),
        ("code[1].command", lambda told: told["code"][1].update(command="droppos demo")),
        (
            "chain[0].metrics.holdout/position/skill",
            lambda told: told["chain"][0]["metrics"].update({"holdout/position/skill": 0.9}),
        ),
        ("chain[1].world_size", lambda told: told["chain"][1].update(world_size=64)),
        ("data.facts.pictures", lambda told: told["data"]["facts"].update(pictures=5)),
        ("data.manifest", lambda told: told["data"].update(manifest="0" * 64)),
        (
            "checkpoint.files.index.json.sha256",
            lambda told: told["checkpoint"]["files"]["index.json"].update(sha256="0" * 64),
        ),
        ("shards in the receipt", lambda told: told["data"]["shards"][0].update(content="0" * 64)),
        ("shards in the receipt", lambda told: told["data"]["shards"][0].update(rows=99)),
        ("shards in the receipt", lambda told: told["data"]["shards"].pop()),
        (
            f"backbone/{WEIGHTS}",
            lambda told: told["backbone"]["files"][WEIGHTS].update(sha256="0" * 64),
        ),
    ],
)
def test_a_forged_field_is_found_though_the_receipts_hash_was_made_anew(
    handed: Handed, name: str, forge: Forgery
) -> None:
    forged = rewritten(handed, forge)
    assert name in forged.differing
    plain = replace(forged, receipt={**forged.receipt, "sha256": handed.receipt["sha256"]})
    assert plain.differing.keys() == {"receipt", *forged.differing}


def test_a_changed_file_of_the_checkpoint_is_found(handed: Handed) -> None:
    flip(handed.checkpoint / "part-00000.safetensors", -1)
    checks = {check.what: check for check in handed.verify()}
    assert checks["step-00000006/part-00000.safetensors"].state == "differs"
    assert checks["backbone, its weights"].state == "not reachable"
    flip(handed.checkpoint / "part-00000.safetensors", -1)
    flip(handed.checkpoint / COMPLETE, -2)
    assert handed.differing.keys() == {f"step-00000006/{COMPLETE}"}


@pytest.mark.parametrize(("file", "tensor"), [(WEIGHTS, "norm.weight"), (HEAD, "")])
def test_other_weights_in_the_backbone_are_found_to_the_last_bit(
    handed: Handed, file: str, tensor: str
) -> None:
    path = handed.folder / "backbone" / file
    weights = load_file(path)
    name = next(name for name in weights if name.startswith(tensor))
    weights[name].view(torch.int32).view(-1)[0] ^= 1  # the smallest change there is
    save_file(weights, path, metadata={"format": "pt"})
    found = handed.differing
    assert found.keys() == {f"backbone/{file}", "backbone, its weights"}
    assert name in found["backbone, its weights"]
    assert f"1 of {weights[name].numel():,} values" in found["backbone, its weights"]


def test_weights_are_told_by_name_shape_and_sign(handed: Handed) -> None:
    saved = checkpoints.at(str(handed.run))
    folder = handed.folder / "backbone"
    assert differing_weights(saved, open_place(str(folder))) == []
    weights = load_file(folder / WEIGHTS)
    weights["norm.bias"] = weights["norm.bias"][:-1].clone()
    weights["new"] = weights.pop("cls_token")
    weights["patch_embed.proj.bias"] = torch.full_like(weights["patch_embed.proj.bias"], -0.0)
    save_file(weights, folder / WEIGHTS)
    found = " ".join(differing_weights(saved, open_place(str(folder))))
    for words in ("cls_token is not in the export", "new is not in the checkpoint", "(31,)"):
        assert words in found


def test_a_file_more_in_the_backbone_is_found(handed: Handed) -> None:
    (handed.folder / "backbone" / "hubconf.py").write_text("print('hello')")
    assert handed.differing.keys() == {"backbone/hubconf.py"}


def test_what_is_gone_is_not_reachable_and_no_lie(handed: Handed) -> None:
    shutil.rmtree(handed.folder)
    handed.folder.mkdir()
    checks = handed.verify()
    assert not any(check.state == "differs" for check in checks)
    gone = {check.what for check in checks if check.state == "not reachable"}
    assert gone == {"chain in the run's folder", "checkpoint step-00000006", "data", "backbone"}
    assert ("chain in the receipt", "ok") in [check[:2] for check in checks]


def test_a_checkpoint_that_retention_deleted_is_still_vouched_for_by_its_link(
    handed: Handed,
) -> None:
    shutil.rmtree(handed.checkpoint)
    forged = rewritten(handed, lambda told: told["recipe"].update({"model.width": 64}))
    assert forged.differing.keys() == {"recipe.model.width"}


def test_storage_that_is_away_is_not_reachable(
    handed: Handed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> chain.Link:
        raise StorageError("s3://bucket cannot be reached")

    monkeypatch.setattr(chain, "read", away)
    checks = {check.what: check for check in handed.verify()}
    assert checks["chain in the run's folder"].state == "not reachable"


def test_no_receipt_is_made_of_a_run_whose_past_is_not_whole(handed: Handed) -> None:
    handed.link(2).unlink()
    with pytest.raises(DataError, match="step-00000002"):
        receipt.make(checkpoints.at(str(handed.run)))


def test_no_receipt_is_made_for_another_runs_backbone(handed: Handed) -> None:
    path = handed.folder / "backbone" / WEIGHTS
    weights = load_file(path)
    save_file({name: value + 1 for name, value in weights.items()}, path)
    with pytest.raises(DataError, match=r"was not exported from .*step-00000006: encoder\."):
        receipt.make(checkpoints.at(str(handed.run)), str(handed.folder / "backbone"))


def test_a_run_of_an_older_droppos_is_told_as_far_as_it_is_known(tmp_path: Path) -> None:
    manifest = write_data(tmp_path / "data")
    recipe = Recipe(
        model=TINY, data=Data(path=str(tmp_path / "data")), run=Run(storage=str(tmp_path))
    )
    old = stored_state.save(
        open_place(recipe.home),
        2,
        {"model": DropPos(recipe.model, recipe.method).state_dict()},
        facts(recipe, manifest),
        checkpoints.Retention(1),
    )
    (old.home / chain.FOLDER).delete()
    made, notes = receipt.make(old)
    assert len(notes) == 1 and "before step 2" in notes[0]
    checks = verify(made)
    assert not any(check.state == "differs" for check in checks)
    assert ("chain in the receipt", "not reachable") in [check[:2] for check in checks]


def test_a_receipt_says_so_when_the_data_are_gone(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original / "run", tmp_path / "run")
    text = (tmp_path / "run/checkpoints/step-00000006" / COMPLETE).read_text()
    moved = text.replace(str(original / "data"), str(tmp_path / "nowhere"))
    (tmp_path / "run/checkpoints/step-00000006" / COMPLETE).write_text(moved)
    made, notes = receipt.make(checkpoints.at(str(tmp_path / "run")))
    assert "shards" not in made["data"] and made["data"]["manifest"]
    assert len(notes) == 1 and "not a prepared data set" in notes[0]


def test_the_command_writes_and_verifies(
    handed: Handed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "receipt.json")
    places = [
        *("--run", str(handed.run)),
        *("--data", str(handed.folder / "data"), "--backbone", str(handed.folder / "backbone")),
    ]
    main(["receipt", str(handed.run), "--out", out, *places[4:]])
    assert "3 checkpoints from step 2 on" in capsys.readouterr().err
    assert receipt.load(out)["chain"] == handed.receipt["chain"]
    main(["receipt", str(handed.run), "--out", out, *places[4:]])  # of the same checkpoint
    theirs = json.loads(Path(out).read_text())
    theirs["checkpoint"] |= {"step": 2, "sha256": "another"}
    other = tmp_path / "theirs.json"
    other.write_text(json.dumps(theirs))
    with pytest.raises(SystemExit):
        main(["receipt", str(handed.run), "--out", str(other)])
    assert "is the receipt of step 2 of" in capsys.readouterr().err
    assert json.loads(other.read_text()) == theirs
    main(["receipt", "--verify", out, *places])
    assert "bit for bit the checkpoint's" in " ".join(capsys.readouterr().err.split())
    handed.link(4).unlink()
    with pytest.raises(SystemExit) as ended:
        main(["receipt", "--verify", out, *places])
    assert ended.value.code == 1
    assert "chain, step 4" in capsys.readouterr().err
    for wrong in ([], [str(handed.run), "--verify", out]):
        with pytest.raises(SystemExit):
            main(["receipt", *wrong])
        assert "one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["no json", "[]", "{}", '{"format": "droppos-receipt/1", "chain": []}']
)
def test_what_is_no_receipt_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match="is no receipt of format droppos-receipt/1"):
        receipt.load(str(tmp_path / "r.json"))


def test_a_receipt_that_lacks_a_part_is_refused_by_name(handed: Handed) -> None:
    del handed.receipt["checkpoint"]["files"]
    with pytest.raises(DataError, match=r"damaged.*files"):
        handed.verify()
