"""Also a program, one rank of a group: `python test_checkpoints.py ACTION HOME RANK WORLD PORT`."""

import hashlib
import json
import logging
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from droppos.errors import DataError, TrainingError
from pipelines import checkpoints, stored_state
from pipelines.checkpoints import COMPLETE, Retention, Saved
from pipelines.storage import Place, open_place

FACTS = {"cursor": {"epoch": 1, "batch": 2, "step": 3}, "seed": 5, "global_batch": 8}


def trained(mesh: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after one step; the third layer's rows don't divide by two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    images = torch.randn(4, 6)
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    model(images).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "step": 3, "half": torch.ones(3).bfloat16() / 3}


def save(home: Place, step: int, keep: int = 3) -> Saved:
    return stored_state.save(home, step, state_of(*trained()), FACTS, Retention(keep))


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """The state without sharding, by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        nested = whole(value) if isinstance(value, dict) else None
        flat |= {name: value} if nested is None else {f"{name}.{k}": v for k, v in nested.items()}
    return flat


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal to the last bit."""
    ours, theirs = whole(ours), whole(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name


def spoilt(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with every tensor zero, in place, to be loaded into."""
    for value in state.values():
        if isinstance(value, dict):
            spoilt(value)
        elif isinstance(value, Tensor):
            value.zero_()
    return state


@pytest.fixture
def home(tmp_path: Path) -> Place:
    return open_place(str(tmp_path / "run"))


def test_what_is_loaded_is_what_was_saved(home: Place) -> None:
    saved = save(home, 3)
    model, optimizer = trained()
    expected = state_of(model, optimizer)
    state = spoilt(state_of(*trained()))
    state["step"] = 0
    stored_state.load(saved, state)
    assert_equal(state, expected)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_the_marker_tells_what_the_run_was(home: Place) -> None:
    saved = save(home, 120)
    assert checkpoints.newest(home) == saved
    assert saved.uri == f"{home}/checkpoints/step-00000120"
    assert (saved.step, saved.cursor, saved.record["seed"]) == (120, FACTS["cursor"], 5)
    assert saved.record["world_size"] == 1
    parts = [entry for entry in saved.place.files() if entry.name != COMPLETE]
    assert saved.size == sum(entry.size for entry in parts)


def test_whole_tensors_are_read_without_a_model(home: Place) -> None:
    saved = save(home, 3)
    assert_equal(stored_state.load_full(saved), state_of(*trained()))
    assert stored_state.load_full(saved, {"model"}).keys() == {"model"}


def test_a_part_opens_with_plain_safetensors(home: Place) -> None:
    saved = save(home, 3)
    weights = trained()[0].state_dict()
    with safe_open(f"{saved.uri}/part-00000.safetensors", "pt") as part:
        for name, weight in weights.items():
            assert torch.equal(part.get_tensor(f"model.{name}"), weight)


def test_a_person_may_name_the_folder_the_run_or_what_is_between(home: Place) -> None:
    save(home, 3)
    saved = save(home, 6)
    assert checkpoints.at(home.uri) == saved
    assert checkpoints.at(f"{home}/checkpoints/") == saved
    assert checkpoints.at(f"{home}/checkpoints/step-00000003").step == 3


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda folder: (folder / COMPLETE).unlink(), "only unfinished step-00000003"),
        (lambda folder: folder.rename(folder.parent.parent / "photos"), "there is nothing"),
    ],
)
def test_where_there_is_no_checkpoint_the_error_says_what_there_is(
    home: Place, spoil: Any, found: str
) -> None:
    spoil(Path(save(home, 3).uri))
    with pytest.raises(DataError, match=found):
        checkpoints.at(f"{home}/checkpoints")


def test_a_runs_name_alone_is_told_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(open_place("droppos-runs/mine"), 3)
    with pytest.raises(DataError, match=r"did you mean droppos-runs/mine\?"):
        checkpoints.at("mine")


def test_the_newest_stay_and_all_that_does_not_count_goes(home: Place) -> None:
    for step in (1, 2):
        save(home, step, keep=5)
    (Path(save(home, 3, keep=5).uri) / COMPLETE).unlink()
    os.truncate(f"{home}/checkpoints/step-00000002/part-00000.safetensors", 10)
    save(home, 4, keep=2)
    assert (home / "checkpoints").children() == ["step-00000001", "step-00000004"]
    save(home, 5, keep=1)
    assert (home / "checkpoints").children() == ["step-00000005"]


def test_a_truncated_file_does_not_count(home: Place, caplog: pytest.LogCaptureFixture) -> None:
    save(home, 1)
    os.truncate(f"{save(home, 2).uri}/part-00000.safetensors", 100)
    newest = checkpoints.newest(home)
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002/part-00000.safetensors is damaged: expected" in caplog.text


def test_a_flipped_bit_is_found_and_named(home: Place) -> None:
    saved = save(home, 1)
    part = Path(saved.uri) / "part-00000.safetensors"
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    expected = saved.files[part.name].sha256
    with pytest.raises(TrainingError, match=rf"{part.name} is not .* expected sha256 {expected}"):
        stored_state.load_full(saved)


def test_what_a_machine_reads_wrongly_still_counts(home: Place) -> None:
    """Its memory may be bad: what storage has is right, and the next machine will read it so."""
    save(home, 1).place.delete()
    saved = save(home, 2)
    checkpoints.set_aside_if_damaged(home, "part-00000.safetensors is not what was written")
    assert checkpoints.newest(home) == saved
    part = saved.place / "part-00000.safetensors"
    part.write_bytes(bytes(part.size()))  # of the same length
    assert checkpoints.newest(home) == saved
    checkpoints.set_aside_if_damaged(home, "part-00000.safetensors is not what was written")
    assert checkpoints.newest(home) is None
    assert checkpoints.lost(home) == 2


def test_a_checkpoint_is_lost_that_counted_once_and_not_one_that_was_cut_short(home: Place) -> None:
    assert checkpoints.lost(home) is None
    saved = save(home, 7)
    (saved.place / COMPLETE).delete()  # as where its process dies just before it is written
    assert checkpoints.lost(home) is None
    saved.place.delete()
    assert checkpoints.lost(home) is None  # the only one: as little is lost as before it
    save(home, 8).place.delete()
    assert checkpoints.lost(home) == 8


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["DROPPOS_BOMB"],)


@pytest.mark.parametrize("file", ["index.json", "part-00000.safetensors", ".metadata"])
def test_a_planted_pickle_never_runs(
    home: Place, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the bucket may make sizes and hashes agree, too."""
    monkeypatch.setenv("DROPPOS_BOMB", str(tmp_path / "boom"))
    saved = save(home, 1)
    planted = pickle.dumps(Bomb())
    if file == "part-00000.safetensors":
        planted += bytes(saved.files[file].bytes - len(planted))
    (saved.place / file).write_bytes(planted)
    record = json.loads((saved.place / COMPLETE).read_bytes())
    record["files"][file] = {"bytes": len(planted), "sha256": hashlib.sha256(planted).hexdigest()}
    (saved.place / COMPLETE).write_bytes(json.dumps(record).encode())
    saved = checkpoints.newest(home)
    assert saved is not None
    if file == "index.json":
        with pytest.raises(TrainingError, match=r"index.json is damaged"):
            stored_state.load_full(saved)
    else:
        stored_state.load_full(saved)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(6, 8)], "only the checkpoint has model.1.bias"),
        (
            [nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(3, 1)],
            "only this run has model.3.bias",
        ),
        ([nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)], "model.2"),
    ],
)
def test_another_model_is_refused(home: Place, layers: list[nn.Module], message: str) -> None:
    saved = save(home, 1)
    with pytest.raises(TrainingError, match=message):
        stored_state.load(saved, {"model": nn.Sequential(*layers).state_dict()})


def test_what_cannot_be_kept_is_refused_by_name(home: Place) -> None:
    with pytest.raises(TrainingError, match="when in the state is a object"):
        stored_state.save(home, 1, {"when": object()}, FACTS, Retention(1))
    assert checkpoints.newest(home) is None


@pytest.mark.shares
def test_s3_keeps_loads_and_prunes_as_a_folder_does(s3_env: Any) -> None:
    home = open_place(f"{s3_env.bucket('checkpoints')}/run")
    for step in (1, 2, 3):
        save(home, step, keep=2)
    assert (home / "checkpoints").children() == ["step-00000002", "step-00000003"]
    saved = checkpoints.at(home.uri)
    assert saved.step == 3
    state = spoilt(state_of(*trained()))
    stored_state.load(saved, state)
    assert_equal(state, state_of(*trained()))
    (saved.place / COMPLETE).delete()
    newest = checkpoints.newest(home)
    assert newest is not None
    assert newest.step == 2


@pytest.mark.shares
def test_state_moves_between_one_and_two_ranks_to_the_last_bit(home: Place) -> None:
    save(home, 3)
    run_ranks("reshard", home, 2)  # from one to two, and two to two
    saved = checkpoints.newest(home)
    assert saved is not None
    assert (saved.step, saved.record["world_size"]) == (6, 2)
    assert {"part-00000.safetensors", "part-00001.safetensors"} < saved.files.keys()
    state = spoilt(state_of(*trained()))
    stored_state.load(saved, state)  # from two to one
    assert_equal(state, stored_state.load_full(saved))
    assert_equal(state, stored_state.load_full(checkpoints.at(f"{home}/checkpoints/step-00000003")))


@pytest.mark.shares
@pytest.mark.parametrize("when", ["die-writing", "die-before-marker"])
def test_a_process_killed_in_mid_save_leaves_the_older_one(
    home: Place, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    save(home, 1)
    died = start(when, home, 0, 1, 0).wait(timeout=120)
    assert -died in {signal.SIGKILL, signal.SIGXFSZ}
    assert (home / "checkpoints").children() == ["step-00000001", "step-00000002"]
    newest = checkpoints.newest(home)
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002 is unfinished" in caplog.text
    save(home, 3)
    assert (home / "checkpoints").children() == ["step-00000001", "step-00000003"]


def run_ranks(action: str, home: Place, world: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(action, home, rank, world, port) for rank in range(world)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * world


def start(action: str, home: Place, *numbers: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, action, home.uri, *map(str, numbers)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


class Deadly(UserDict[str, Any]):
    """Facts that kill the process when they are read, to be written into the marker."""

    def keys(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def main(action: str, uri: str, rank: int, world: int, port: int) -> None:
    home = open_place(uri)
    if action == "die-before-marker":
        stored_state.save(home, 2, state_of(*trained()), Deadly(), Retention(3))
    if action == "die-writing":
        # The kernel ends the process in the middle of a write, as kill -9 would.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        stored_state.save(home, 2, {"big": torch.zeros(1 << 20)}, FACTS, Retention(3))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    state = spoilt(state_of(*trained(init_device_mesh("cpu", (world,)))))
    single = checkpoints.at(uri)
    stored_state.load(single, state)
    assert_equal(state, stored_state.load_full(single))
    saved = stored_state.save(home, 6, state, FACTS, Retention(3))
    dist.barrier()
    assert saved == checkpoints.newest(home)
    expected = stored_state.load_full(saved)
    stored_state.load(saved, spoilt(state))
    assert_equal(state, expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
