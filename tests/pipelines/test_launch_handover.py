"""A launch's job on a cluster that others use too: handed over or called back, and never mixed up.

Ray's own client talks to a jobs API of ours; test_launch_jobs.py does the most of it on Ray's.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.launch import flow, jobs, recall, record
from pipelines.launch.backend import Address, Say
from pipelines.launch.errors import LaunchError, LineLostError, TakenError
from pipelines.launch.jobs import LAUNCH, MARK, Jobs, Submission
from pipelines.launch.record import Record
from pipelines.launch.request import Request
from pipelines.launch.standing import Standing
from pipelines.recipe import Data, Recipe, Run
from tests.jobs_server import JobsApi
from tests.launch_person import Person

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")

RECIPE = Recipe(data=Data(path="s3://b/data"), run=Run(name="vit", storage="file:///runs"))


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPPOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Standing, "looks", lambda self, recipe, at_once: [])
    monkeypatch.setattr(jobs, "RETRY_S", 0.05)
    monkeypatch.setattr(recall, "AGAIN_S", 0.02)
    monkeypatch.setattr(recall, "ARRIVE_S", 0.3)
    monkeypatch.setattr(jobs, "LOOK_S", 0.5)


@pytest.fixture
def api() -> Iterator[JobsApi]:
    with JobsApi().served() as api:
        yield api


class Kept(Standing):
    """Machines of ours behind the address."""

    mortal = True
    ended = 0

    def down(self, say: Say) -> list[str]:
        self.ended += 1
        return []


def launch(api: JobsApi, person: Person, start: Path, backend: Standing | None = None) -> int:
    where = backend or Standing(api.url)
    made = Record(name="vit", on=where.url, keep=where.mortal)
    return flow.launch(
        Request(recipe=RECIPE), where, made, person.terminal, start=start, detach=True
    )


def kept() -> Record:
    found = record.find("vit")
    assert found is not None
    return found


@pytest.fixture
def start(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize("mortal", [False, True])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), LaunchError("no")])
def test_a_job_that_arrived_though_its_submission_was_broken_off_is_stopped(
    api: JobsApi, start: Path, monkeypatch: pytest.MonkeyPatch, mortal: bool, fault: BaseException
) -> None:
    def broken_off(self: Jobs, job_id: str, submission: Submission) -> None:
        api.add(job_id, "RUNNING", submission.metadata)
        raise fault

    monkeypatch.setattr(Jobs, "submit", broken_off)
    backend = (Kept if mortal else Standing)(api.url)
    person = Person()
    with pytest.raises(type(fault)):
        launch(api, person, start, backend)
    assert api.jobs["vit"]["status"] == "STOPPED"
    assert "job vit has arrived; it is stopped" in person.heard
    assert kept().phase == ("up" if mortal else "ended")
    assert kept().job == "vit"


def test_a_submission_that_did_not_arrive_leaves_the_name_free(
    api: JobsApi, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Jobs, "submit", lambda *given: signal.raise_signal(signal.SIGINT))
    api.add("vit", "RUNNING", {LAUNCH: "vit-of-another", MARK: "theirs"})
    with pytest.raises(KeyboardInterrupt):
        launch(api, Person(), start)
    assert kept().phase == "ended" and api.jobs["vit"]["status"] == "RUNNING"


def test_a_job_that_nobody_can_look_for_is_said_to_run_perhaps_and_is_found_again(
    api: JobsApi, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*given: object) -> list[jobs.Job]:
        raise LineLostError("gone")

    def broken_off(self: Jobs, job_id: str, submission: Submission) -> None:
        api.add(job_id, "RUNNING", submission.metadata)
        monkeypatch.setattr(Jobs, "all", lost)
        raise KeyboardInterrupt

    person = Person()
    with monkeypatch.context() as patched:
        monkeypatch = patched
        patched.setattr(Jobs, "submit", broken_off)
        with pytest.raises(KeyboardInterrupt):
            launch(api, person, start)
    assert "job vit may be running" in person.heard and "droppos stop vit" in person.said[-1]
    assert kept().phase == "up" and kept().job == "vit"
    assert flow.stop(kept(), Standing(api.url), person.terminal) == 0
    assert api.jobs["vit"]["status"] == "STOPPED"
    assert len(person.asked) == 1  # whether to launch; the job is known to be ours


def test_a_job_is_of_the_launch_that_it_says_and_not_of_one_with_such_a_name(
    api: JobsApi, start: Path
) -> None:
    api.add("vit", "RUNNING", {})
    api.add("vit-2", "RUNNING", {LAUNCH: "vit-2", MARK: "theirs"})
    with pytest.raises(LaunchError, match="vit has no job"):
        flow.attach(Record(name="vit", on=api.url), Standing(api.url), Person().terminal)
    person = Person()
    assert launch(api, person, start) == 0
    assert api.jobs["vit-3"]["metadata"][LAUNCH] == "vit"
    assert flow.stop(kept(), Standing(api.url), person.terminal) == 0
    assert {name: job["status"] for name, job in api.jobs.items()} == {
        "vit": "RUNNING",
        "vit-2": "RUNNING",
        "vit-3": "STOPPED",
    }


def test_no_second_job_is_submitted_while_any_of_the_launch_runs(api: JobsApi, start: Path) -> None:
    api.add("vit", "RUNNING", {LAUNCH: "vit"})
    api.add("vit-2", "SUCCEEDED", {LAUNCH: "vit"})
    with pytest.raises(TakenError, match="the job vit is still running"):
        launch(api, Person(), start)
    # Nothing of this machine is there, so its name is not taken.
    assert kept().phase == "ended"
    api.jobs["vit"]["status"] = "FAILED"
    assert launch(api, Person(), start) == 0 and "vit-3" in api.jobs


def test_stop_asks_before_it_ends_a_job_that_another_machine_submitted(api: JobsApi) -> None:
    api.add("vit", "RUNNING", {LAUNCH: "vit", MARK: "theirs"})
    elsewhere = Record(name="vit", on=api.url)
    no = Person(answer=False)
    with pytest.raises(LaunchError, match="goes on"):
        flow.stop(elsewhere, Standing(api.url), no.terminal)
    assert "not submitted by this machine" in no.asked[0]
    assert api.jobs["vit"]["status"] == "RUNNING"
    assert flow.stop(elsewhere, Standing(api.url), Person().terminal) == 0
    assert api.jobs["vit"]["status"] == "STOPPED"


def test_down_lets_a_launch_go_only_when_nothing_of_it_runs_on_a_cluster_that_stands(
    api: JobsApi, start: Path
) -> None:
    person = Person()
    launch(api, person, start)
    assert flow.down(kept(), Standing(api.url), person.terminal) == 1
    assert "job vit still runs" in person.said[-1] and "droppos stop vit" in person.said[-1]
    assert kept().phase == "submitted" and api.jobs["vit"]["status"] == "RUNNING"
    api.jobs["vit"]["status"] = "SUCCEEDED"
    api.add("vit-2", "RUNNING", {LAUNCH: "vit", MARK: "theirs"})
    assert flow.down(kept(), Standing(api.url), person.terminal) == 0
    assert kept().phase == "ended" and len(person.asked) == 1


def test_a_launch_on_a_cluster_that_is_gone_is_let_go_when_a_person_says_so() -> None:
    begun = record.begin(Record(name="vit", on="http://127.0.0.1:9")).at("submitted", job="vit")
    no, yes = Person(answer=False), Person()
    assert flow.down(begun, Standing(begun.on), no.terminal) == 1
    assert "cannot be asked" in no.asked[0] and kept().phase == "submitted"
    assert flow.down(begun, Standing(begun.on), yes.terminal) == 0 and kept().phase == "ended"


def test_down_asks_whenever_a_job_may_run_that_it_cannot_see() -> None:
    class Unreachable(Kept):
        @contextmanager
        def address(self) -> Iterator[Address]:
            raise LaunchError("no way there")
            yield

    def asked(found: Record) -> list[str]:
        person = Person(answer=False)
        flow.down(found, Unreachable("http://h"), person.terminal)
        return person.asked

    elsewhere = Record(name="vit", on="aws")
    assert "whether a job of vit still runs cannot be asked" in asked(elsewhere)[0]
    assert "the job vit" in asked(record.begin(elsewhere).at("submitted", job="vit"))[0]
    kept().at("ended")
    assert asked(record.begin(elsewhere).at("up")) == []  # it has never come to a submission


@pytest.mark.parametrize("fault", [LaunchError("no network"), KeyboardInterrupt(), OSError("bug")])
def test_whatever_breaks_the_ending_off_says_that_machines_may_be_there(
    fault: BaseException,
) -> None:
    class Broken(Kept):
        def down(self, say: Say) -> list[str]:
            raise fault

    begun = record.begin(Record(name="vit", on="aws"))
    person = Person()
    with pytest.raises(type(fault)):
        flow.down(begun, Broken("http://127.0.0.1:9"), person.terminal)
    assert "machines may still be there: `droppos down vit`" in person.said[-1]
    assert kept().phase == "ending"


def test_an_address_that_does_not_answer_is_told_of_at_once_and_given_up_soon() -> None:
    begun = record.begin(Record(name="vit", on="http://127.0.0.1:9")).at("submitted", job="vit")
    person = Person()
    before = time.monotonic()
    with pytest.raises(LaunchError, match=r"no job of vit was found .* none was followed"):
        flow.attach(begun, Standing(begun.on), person.terminal)
    assert time.monotonic() - before < 5
    assert len(person.said) == 1 and "does not answer" in person.said[0]
    assert "tried again for 0 s" in person.said[0]  # of half a second


def test_ctrl_c_before_a_job_was_found_claims_none(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = record.begin(Record(name="vit", on="http://127.0.0.1:9")).at("submitted", job="vit")
    monkeypatch.setattr(jobs.time, "sleep", lambda s: signal.raise_signal(signal.SIGINT))
    person = Person()
    assert flow.stop(begun, Standing(begun.on), person.terminal) == 130
    assert "goes on" not in person.heard
    assert "no job of vit was found" in person.said[-1]
