"""A cluster that nobody follows ends by itself, and what its job said stays."""

import json
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from droppos.errors import ConfigError
from pipelines.launch import caretaker
from pipelines.launch.caretaker import GRACE_S, START_S, due, watch
from pipelines.notices import Metadata

REGION, CLUSTER = "us-west-2", "studio-vit"
NOW = 1_800_000_000.0


def job(status: str, *, ended_s_ago: float = 0, name: str = "vit", run: str = "") -> dict[str, Any]:
    ended = None if status in caretaker.RUNNING else int((NOW - ended_s_ago) * 1000)
    return {
        "submission_id": name,
        "status": status,
        "end_time": ended,
        "metadata": {"run": run} if run else {},
    }


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_a_cluster_is_due_some_time_after_its_last_jobs_end(status: str) -> None:
    old = job("FAILED", ended_s_ago=9 * GRACE_S)
    assert due([old, job(status, ended_s_ago=GRACE_S + 1)], 0, NOW)
    assert not due([old, job(status, ended_s_ago=GRACE_S - 1)], 0, NOW)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_job_that_is_there_keeps_its_cluster(status: str) -> None:
    assert not due([job("SUCCEEDED", ended_s_ago=9e6), job(status)], 0, NOW)


def test_a_cluster_that_never_had_a_job_is_due_after_an_hour() -> None:
    assert not due([], NOW - START_S + 1, NOW)
    assert due([], NOW - START_S - 1, NOW)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        yield boto3.client("ec2", region_name=REGION)


def machine(ec2: Any, cluster: str, kind: str) -> str:
    tags = [{"Key": "ray-cluster-name", "Value": cluster}, {"Key": "ray-node-type", "Value": kind}]
    made = ec2.run_instances(
        ImageId="ami-12c6146b",
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )
    return made["Instances"][0]["InstanceId"]


def states(ec2: Any) -> dict[str, str]:
    found = ec2.describe_instances()["Reservations"]
    return {i["InstanceId"]: i["State"]["Name"] for r in found for i in r["Instances"]}


def long_ago() -> Callable[[], float]:
    """A clock that is first looked at long before all else."""
    times = chain([NOW - 10 * GRACE_S], repeat(NOW))
    return lambda: next(times)


class Own(Metadata):
    """Of the head."""

    def __init__(self, instance: str) -> None:
        super().__init__("http://nowhere")
        self.instance = instance

    def get(self, path: str) -> str | None:
        return self.instance if path == "instance-id" else None


class Answers:
    """A jobs API that answers so, one thing after the other."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, path: str) -> Any:
        self.asked.append(path)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_cluster_that_is_used_again_is_not_ended_for_jobs_of_before() -> None:
    before = [job("SUCCEEDED", ended_s_ago=50 * GRACE_S)]
    assert not due(before, NOW, NOW)
    assert not due(before, NOW - GRACE_S + 1, NOW)
    assert due(before, NOW - GRACE_S - 1, NOW)


def test_machines_that_cannot_be_ended_yet_are_ended_later(account: Any) -> None:
    """Nobody starts it again, and they cost money as long as they stand."""
    head = machine(account, CLUSTER, "head")
    troubles = [OSError("no metadata")]

    class Slow(Own):
        def get(self, path: str) -> str | None:
            if troubles:
                raise troubles.pop(0)
            return super().get(path)

    ended = [job("SUCCEEDED", ended_s_ago=GRACE_S + 1)]
    back = [*ended, job("RUNNING", name="another")]
    odd = ConfigError("the token file is not one")
    answers: list[Any] = [IncompleteRead(b""), odd, "no list", ended, back, ended]

    waits: list[float] = []
    ask = Answers(answers)
    watch(CLUSTER, REGION, ask=ask, metadata=Slow(head), clock=long_ago(), wait=waits.append)
    assert len(waits) == 5  # for the jobs, for the metadata, for who had come back
    assert states(account)[head] == "terminated"


def test_the_output_is_kept_and_then_every_machine_of_the_cluster_is_ended(
    account: Any, tmp_path: Path
) -> None:
    head, worker = machine(account, CLUSTER, "head"), machine(account, CLUSTER, "worker")
    other = machine(account, "studio-other", "worker")
    answers: list[Any] = [
        OSError("not up yet"),
        [job("RUNNING")],
        [job("SUCCEEDED", ended_s_ago=GRACE_S + 1, run=str(tmp_path / "vit"))],
        {"logs": "step 1\nstep 2\n"},
    ]
    ask = Answers(answers)
    waits: list[float] = []
    watch(CLUSTER, REGION, ask=ask, metadata=Own(head), clock=long_ago(), wait=waits.append)
    assert ask.asked == ["", "", "", "vit/logs"]
    assert len(waits) == 2
    assert (tmp_path / "vit/launches/vit.log").read_text() == "step 1\nstep 2\n"
    now = states(account)
    assert {now[head], now[worker]} == {"terminated"}
    assert now[other] == "running"


def test_machines_end_though_the_output_cannot_be_kept(account: Any) -> None:
    head = machine(account, CLUSTER, "head")
    ended = job("FAILED", ended_s_ago=GRACE_S + 1, run="gs://not/ours")
    answers: list[Any] = [[ended], {"logs": "..."}]
    watch(
        CLUSTER,
        REGION,
        ask=lambda path: answers.pop(0),
        metadata=Own(head),
        clock=long_ago(),
    )
    assert states(account)[head] == "terminated"


def test_it_reads_what_rays_jobs_api_says() -> None:
    """As Ray 2.60 writes it: times in milliseconds, names of states in capitals."""
    from ray.job_submission import JobDetails, JobStatus, JobType

    details = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="vit",
        status=JobStatus.SUCCEEDED,
        entrypoint="true",
        metadata={"run": "s3://b/runs/vit"},
        end_time=int((NOW - GRACE_S - 1) * 1000),
    )
    told = json.loads(details.model_dump_json())
    assert due([told], 0, NOW)
    assert {status.value for status in JobStatus if not status.is_terminal()} == caretaker.RUNNING
