"""What the supervisor makes of what it hears; that it restarts real workers is test_drill.py's."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from droppos.config import Compute
from droppos.errors import ConfigError, StorageError, TrainingError
from pipelines import supervisor as module
from pipelines.crew import Room
from pipelines.group import STALL_S, Group
from pipelines.news import told
from pipelines.parts import DamagedError
from pipelines.passed import PassedOver
from pipelines.recipe import Data, Recipe, Run
from pipelines.supervisor import Supervisor, cause_of


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def group(hang_timeout_s: float = 600) -> tuple[Group, Clock]:
    clock = Clock()
    return Group(hang_timeout_s, clock), clock


def started(rank: int) -> dict[str, Any]:
    return {"kind": "started", "group": 0, "rank": rank, "node": f"node {rank}", "pid": 10 + rank}


def beat(rank: int, doing: str, step: int, moves: int = 0) -> dict[str, Any]:
    return {
        "kind": "beat",
        "group": 0,
        "rank": rank,
        "node": f"node {rank}",
        "pid": 10 + rank,
        "doing": doing,
        "step": step,
        "moves": moves,
    }


def test_a_group_knows_where_its_workers_are() -> None:
    ours, _ = group()
    for rank in (1, 0):
        ours.event(beat(rank, "starting", 0))
    assert not ours.started
    ours.event(started(1))
    assert ours.started
    assert ours.processes == {0: ("node 0", 10), 1: ("node 1", 11)}
    assert ours.nodes == {"node 0", "node 1"}


def test_one_of_an_earlier_group_is_not_heard() -> None:
    """A machine that was cut off wakes, and its worker beats on: in the next group it is nobody."""
    ours = Group(600, Clock(), number=2)
    events = [beat(0, "training", 7), started(0)]
    for event in events:
        ours.event(event | {"group": 1})
    assert not ours.processes and not ours.started
    for event in events:
        ours.event(event | {"group": 2})
    assert ours.processes and ours.started


def test_a_trial_does_not_leave_the_cluster_under_its_own_feet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.RoomWanted, "close", lambda self: None)
    monkeypatch.setattr(module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(module.ray, "shutdown", lambda: pytest.fail("left"))
    inside = SimpleNamespace(get_actor_id=lambda: "an actor of Tune's")
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: inside)
    supervisor = object.__new__(Supervisor)
    supervisor._room_wanted = module.RoomWanted(Recipe(), gpu=False)
    supervisor._leave()


def test_whoever_leaves_first_takes_back_what_was_asked_of_the_autoscaler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []
    monkeypatch.setattr(module.RoomWanted, "close", lambda self: did.append("no room"))
    monkeypatch.setattr(module.ray, "shutdown", lambda: did.append("left"))
    supervisor = object.__new__(Supervisor)
    supervisor._room_wanted = module.RoomWanted(Recipe(), gpu=False)
    supervisor._leave()
    assert did == ["no room", "left"]


def test_while_one_worker_gets_on_nobody_hangs() -> None:
    ours, clock = group(600)
    for second in range(0, 2000, 10):
        clock.now = second
        ours.event(beat(0, "training", 3))
        ours.event(beat(1, "waiting for pictures", second // 500))
        assert not ours.hangs


def test_when_all_stand_still_who_does_what_and_who_is_mute_is_told() -> None:
    ours, clock = group(600)
    ours.event(beat(0, "training", 7))
    ours.event(beat(1, "saving", 7))
    for clock.now in range(10, 600, 10):
        ours.event(beat(0, "training", 7))  # a sign of life, not of progress
        assert not ours.hangs
        assert bool(ours.stalls) == (clock.now >= STALL_S)
    clock.now = 600
    assert ours.hangs == (
        "no worker got on for 600 s: worker 0 training at step 7, worker 1 saving at step 7; "
        "nothing was heard of worker 1 (hang_timeout_s 600)"
    )


def test_a_checkpoint_that_is_slow_to_write_is_not_taken_to_hang() -> None:
    ours, clock = group(600)
    ours.event(started(0))
    for tensors in range(20):
        ours.event(beat(0, "saving", 8, tensors))
        clock.now += 500
        assert not ours.hangs
    clock.now += 101
    assert "worker 0 saving at step 8" in ours.hangs


def test_workers_that_have_not_begun_are_not_taken_to_hang() -> None:
    """Ray may wait for an autoscaler before them, for as long as that takes."""
    ours, clock = group(600)
    clock.now = 10_000
    assert not ours.hangs


def test_the_cause_is_our_own_error_not_that_a_peer_was_gone() -> None:
    damage = DamagedError("part-00000 is not what was written")
    remote = RuntimeError("task failed")
    remote.__cause__ = damage
    failed = TrainingFailedError.__new__(TrainingFailedError)
    failed.worker_failures = {0: RuntimeError("peer gone"), 1: remote}  # pyright: ignore
    assert cause_of(failed) is damage


def test_what_is_no_error_of_ours_is_one_line() -> None:
    failed = TrainingFailedError.__new__(TrainingFailedError)
    failed.worker_failures = {0: RuntimeError("a\nb\nworker died: OOM")}  # pyright: ignore
    error = cause_of(failed)
    assert isinstance(error, TrainingError)
    assert str(error) == "the workers failed: worker died: OOM"
    advised = (
        "no such picture\nFailed to apply UDF f after 1/1 attempts\nTo change retry attempts, x"
    )
    failed.worker_failures = {0: ValueError(advised)}  # pyright: ignore
    assert str(cause_of(failed)) == "the workers failed: ValueError: no such picture"
    died = WorkerHealthCheckFailedError("one is gone", RuntimeError("the actor died"))
    failed.worker_failures = {0: died}  # pyright: ignore
    assert str(cause_of(failed)) == "the workers failed: the actor died"
    gloo = "[/pytorch/third_party/gloo/pair.cc:561] Connection closed by peer. GLHF!"
    failed.worker_failures = {0: RuntimeError(gloo)}  # pyright: ignore
    assert str(cause_of(failed)) == (
        "the workers failed: a connection between two of them was closed, as when one dies"
    )


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"kind": "lost", "error": "worker 1 died", "step": 8}, "going on from step 8"),
        ({"kind": "notice", "nodes": ["a", "b"]}, "2 nodes are about to go"),
        ({"kind": "leave", "why": "there is room for 4 workers"}, "after a checkpoint"),
        (
            {"kind": "waiting", "workers": 2, "fit": 1},
            "1 worker fits the cluster now, 2 are needed",
        ),
        ({"kind": "rewind", "why": "NaN", "steps": [3, 4], "rewinds": 1}, "steps 3, 4"),
        ({"kind": "not_saved", "error": "no answer"}, "no answer"),
        ({"kind": "ledger_away"}, "does not answer"),
    ],
)
def test_news_say_what_happened_and_what_is_done(event: dict[str, Any], words: str) -> None:
    assert words in (told(event) or "")


def test_ordinary_events_are_no_news() -> None:
    assert told({"kind": "metrics", "step": 1, "values": {}}) is None


@pytest.fixture
def supervisor(tmp_path: Path, ray_cluster: None) -> Supervisor:
    """One whose groups are told by `after`: nothing starts, and nothing is waited for."""
    recipe = Recipe(
        compute=Compute(strategy="fsdp2", device="cpu"),
        data=Data(path=str(tmp_path / "data")),
        run=Run(storage=str(tmp_path), workers=4, min_workers=1, max_failures=2),
    )
    heard = SimpleNamespace(event=lambda event: None, too_many=None)
    schedule = SimpleNamespace(steps=100)
    return Supervisor(recipe, schedule, heard, driver="driver")  # pyright: ignore[reportArgumentType]


LOST = TrainingError("the workers failed")


class Groups:
    """Stands in for real ones: each is (newest step after it, its error, whether it started)."""

    def __init__(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, *groups: Any
    ) -> None:
        self.sizes: list[int] = []
        step, left = 0, list(groups)

        def run(size: int, group: Group, abort: Any) -> TrainingError | None:
            nonlocal step
            self.sizes.append(size)
            step, error, begun = left.pop(0)
            if begun:
                for event in (beat(0, "training", step), started(0)):
                    group.event(event | {"group": group.number})
            return error

        monkeypatch.setattr(supervisor, "_run_group", run)
        monkeypatch.setattr(supervisor, "_newest_step", lambda: step)
        monkeypatch.setattr(Room, "look", classmethod(lambda cls: Room({"n": {"CPU": 9}}, {})))


@pytest.mark.slow
def test_work_that_is_not_done_at_the_last_step_is_tried_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine-tuning's test comes after its last checkpoint, and may lose a worker."""
    heard: list[str] = []
    supervisor._work = module.Work(done=lambda: len(groups.sizes) == 3)
    groups = Groups(
        supervisor, monkeypatch, (100, LOST, True), (100, LOST, True), (100, None, True)
    )
    monkeypatch.setattr(supervisor, "_say", lambda kind, **told: heard.append(kind))
    supervisor.run()
    assert len(groups.sizes) == 3 and heard.count("lost") == 2

    supervisor._work = module.Work(done=lambda: False)
    groups = Groups(supervisor, monkeypatch, *[(100, None, True)] * 9)
    with pytest.raises(TrainingError, match=r"did not say why.* 3 times in a row"):
        supervisor.run()


@pytest.mark.slow
def test_failures_count_only_in_a_row_without_a_newer_checkpoint(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, left = (0, LOST, True), (10, None, True)
    groups = [lost, lost, left, (10, LOST, True), (10, LOST, True), (20, LOST, True)]
    groups += [(20, LOST, True), (100, None, True)]
    told = Groups(supervisor, monkeypatch, *groups)
    supervisor.run()
    assert len(told.sizes) == len(groups)


@pytest.mark.slow
def test_one_failure_too_many_ends_the_run_and_keeps_its_kind(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage = DamagedError("part-00000 is not what was written")
    Groups(supervisor, monkeypatch, (0, LOST, True), (0, LOST, True), (0, damage, True))
    with pytest.raises(DamagedError, match=r"not what .*3 times in a row.*--resume goes on"):
        supervisor.run()


@pytest.mark.slow
def test_groups_that_end_well_without_a_checkpoint_do_not_go_on_for_ever(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    Groups(supervisor, monkeypatch, *[(0, None, True)] * 3)
    with pytest.raises(TrainingError, match=r"ended without a newer checkpoint.*3 times"):
        supervisor.run()


@pytest.mark.slow
def test_what_cannot_be_mended_ends_the_run_at_once(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    Groups(supervisor, monkeypatch, (0, ConfigError("no GPU"), True))
    with pytest.raises(ConfigError, match=r"^no GPU$"):
        supervisor.run()


def away(text: str) -> StorageError:
    error = StorageError("cannot list s3://bucket/runs")
    error.__cause__ = OSError(text)
    return error


@pytest.mark.slow
def test_storage_that_is_away_between_two_groups_is_waited_for(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[StorageError | int] = [away("AWS Error NETWORK_CONNECTION")] * 3
    answers += [10, away("AWS Error ACCESS_DENIED")]

    def newest() -> int:
        answer = answers.pop(0)
        if isinstance(answer, StorageError):
            raise answer
        return answer

    said: list[str] = []
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    monkeypatch.setattr(supervisor, "_newest_step", newest)
    monkeypatch.setattr(supervisor, "_say", lambda kind, **told: said.append(kind))
    abort = threading.Event()
    assert supervisor._await_newest_step(abort) == 10
    assert said == ["stall"] * 3
    with pytest.raises(StorageError):  # it will not be allowed in a moment, either
        supervisor._await_newest_step(abort)
    answers += [away("AWS Error NETWORK_CONNECTION")]
    supervisor._stopped = True
    with pytest.raises(StorageError):
        supervisor._await_newest_step(abort)


@pytest.mark.slow
def test_a_run_whose_checkpoints_all_stop_counting_does_not_begin_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.checkpoints.lost", lambda home: 40)
    told = Groups(supervisor, monkeypatch, (40, None, True), (20, LOST, True), (0, LOST, True))
    with pytest.raises(TrainingError, match=r"no checkpoint .* counts any more, though step 40"):
        supervisor.run()
    assert len(told.sizes) == 3


@pytest.mark.slow
def test_what_ends_rays_own_actor_is_a_failure_as_any_other(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that hiccups while Train's controller starts, or the memory monitor: once it ended
    the run with Ray's traceback, whatever run.max_failures said."""

    class Trainer:
        def fit(self) -> None:
            raise ActorDiedError

    monkeypatch.setattr(supervisor, "_trainer", lambda recipe: Trainer())
    supervisor._heard.drain = lambda *given: None  # pyright: ignore[reportAttributeAccessIssue]
    error = supervisor._run_group(1, group()[0], threading.Event())
    assert isinstance(error, TrainingError) and "the workers failed" in str(error)


@pytest.mark.slow
def test_rays_own_watcher_does_not_end_a_group_that_works_on(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its defaults it would, 120 s after a notice that says no time."""
    from ray.train.v2._internal import constants  # no public place tells the names

    monkeypatch.setattr(module, "Remaining", lambda *_, **__: None)
    for name in (
        constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR,
        constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    ):
        monkeypatch.setenv(name, "")  # and so put back at the end
        assert name in constants.ENV_VARS_TO_PROPAGATE
    supervisor._trainer(supervisor._recipe)
    assert os.environ[constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "0"
    assert float(os.environ[constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR]) < 900


@pytest.mark.slow
def test_a_size_that_cannot_start_is_not_a_failure_while_there_is_a_smaller_one(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job may hold what the nodes have, or a dead node may still be listed."""
    never = (0, LOST, False)
    told = Groups(supervisor, monkeypatch, never, never, (100, None, True))
    supervisor.run()
    assert told.sizes == [4, 2, 1]


@pytest.mark.slow
def test_a_run_that_was_taken_back_too_often_ends_and_says_where_the_pictures_are(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.supervisor.pass_over", lambda *given: PassedOver(rewinds=3))
    bad = group()[0]
    bad.event({"kind": "gave_up", "group": 0, "error": "the gradient was NaN", "bad_steps": [7]})
    with pytest.raises(TrainingError, match=r"NaN; .*2 times \(run.max_rewinds\).*passed_over"):
        supervisor._take_back(bad)
    monkeypatch.setattr("pipelines.supervisor.pass_over", lambda *given: PassedOver(rewinds=2))
    supervisor._take_back(bad)
