"""Ends a cluster that nobody follows any more, once its job has ended.

Whoever follows a launch's job ends its machines. A laptop that stays closed does not; so a filled
cluster.yaml without --keep starts this on the head: `python -m pipelines.launch.caretaker CLUSTER
REGION`. It leaves what the job said beside the run, and ends the workers, and then its own machine.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.request import Request

import boto3

from droppos.errors import ConfigError
from pipelines.launch.tagged import ALIVE, tagged
from pipelines.launch.token import headers, read_token
from pipelines.notices import NEARBY, Metadata, only_one
from pipelines.storage import open_place

JOBS = "http://127.0.0.1:8265/api/jobs/"
"""Ray's jobs API, on the head."""
GRACE_S = 900.0
"""Seconds after a job's end in which whoever comes back still finds the cluster."""
START_S = 3600.0
"""Seconds in which the first job has to come."""
LOOK_S = 30.0
ANSWER_S = 20.0
RUNNING = frozenset({"PENDING", "RUNNING"})

Job = Mapping[str, Any]
"""As the jobs API tells it; times are milliseconds since 1970."""

_log = logging.getLogger(__name__)


def due(jobs: list[Job], began: float, now: float) -> bool:
    """Tell whether a cluster has had nothing to do for so long that it should end.

    Args:
        jobs: All that it had.
        began: When it was first asked for them, in seconds since 1970.
        now: Seconds since 1970.
    """
    if any(job["status"] in RUNNING for job in jobs):
        return False
    if not jobs:
        return now - began > START_S
    # On a cluster that is used again the jobs of before ended long ago, and the next is to come.
    return now - max(began, *((job.get("end_time") or 0) / 1000 for job in jobs)) > GRACE_S


def watch(
    cluster: str,
    region: str,
    *,
    ask: Callable[[str], Any] | None = None,
    metadata: Metadata | None = None,
    clock: Callable[[], float] = time.time,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the cluster is due, and end it.

    An API that does not answer ends nothing: training may be going on beside a dashboard that is
    gone.

    Args:
        cluster: Name by which its machines are tagged.
        region: Where they are.
        ask: Asks the jobs API; this machine's by default.
        metadata: Tells which machine this is; EC2's by default.
        clock: Seconds since 1970.
        wait: Lets so many seconds pass.
    """
    ask, metadata, began, trouble = ask or _asked, metadata or Metadata(), clock(), ""
    kept: set[str] = set()
    while True:
        try:
            jobs = ask("")
            if due(jobs, began, clock()):
                for job in jobs:
                    if (name := str(job.get("submission_id"))) not in kept:
                        kept.add(name)
                        _keep_output(job, ask)
                return _end(cluster, region, metadata.get("instance-id"))
            trouble = ""
        except Exception as error:
            # Whatever it is, this goes on: nobody else would end them. Meanwhile somebody may have
            # come back with another job.
            if trouble != str(error):
                trouble = str(error)
                _log.warning("jobs or machines do not answer, trying again: %s", trouble)
        wait(LOOK_S)


def _asked(path: str) -> Any:
    request = Request(JOBS + path, headers=dict(headers(read_token())))
    with NEARBY.open(request, timeout=ANSWER_S) as answer:
        return json.loads(answer.read())


def _keep_output(job: Job, ask: Callable[[str], Any]) -> None:
    """Write what a job said beside its run; the head's copy goes with the head."""
    run, name = (job.get("metadata") or {}).get("run"), job.get("submission_id")
    if not run or not name:
        return
    try:
        said = ask(f"{name}/logs")["logs"]
        (open_place(run) / "launches" / f"{name}.log").write_bytes(said.encode())
    except Exception as error:  # whatever it is, machines that cost money are to end
        _log.warning("the output of %s is lost: %s", name, error)


def _end(cluster: str, region: str, own: str | None) -> None:
    """End the workers, and then the head, which this is."""
    ec2 = boto3.client("ec2", region_name=region)
    found = [machine["InstanceId"] for machine in tagged(ec2, cluster, ALIVE)]
    if workers := [machine for machine in found if machine != own]:
        _log.warning("nobody follows the jobs of %s, which have ended: ending it", cluster)
        ec2.terminate_instances(InstanceIds=workers)
    if own in found:
        ec2.terminate_instances(InstanceIds=[own])


def main(cluster: str, region: str) -> None:
    """Be the one caretaker of this machine: a cluster that is used again is given another."""
    try:
        with only_one("caretaker"):
            watch(cluster, region)
    except ConfigError as error:
        _log.warning("%s", error)


if __name__ == "__main__":
    main(*sys.argv[1:])
