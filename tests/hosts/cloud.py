"""A cloud of our own: the machines that the mock of EC2 says there are can be used."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3

from pipelines.local_s3 import ACCESS_KEY, REGION, SECRET_KEY, LocalS3
from tests.hosts import ec2, network
from tests.hosts.host import PROJECT, Host, Image

PORT = 5000
ROLE = "droppos-machine"
LOOK_S = 0.3


@dataclass(frozen=True, slots=True)
class Change:
    """A machine came or went."""

    at: float
    came: bool
    instance: str
    kind: str
    market: str


class Cloud:
    """Follows the mock: starts and ends machines, and holds them to their security groups."""

    def __init__(self, folder: Path, s3: LocalS3) -> None:
        self._folder = folder
        self._s3 = s3
        self._hosts: dict[str, Host] = {}
        self._about: dict[str, tuple[str, str]] = {}
        self._seen: set[str] = set()
        self._started = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="cloud")
        self.image = Image("")
        """What `docker pull` finds; set it before the first machine comes."""
        self.changes: list[Change] = []
        self.trouble: BaseException | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{network.PROVIDER}:{PORT}"

    @property
    def env(self) -> dict[str, str]:
        """What leads a client of AWS here; its credentials are those of the S3 server."""
        return self._s3.server.env | {"AWS_ENDPOINT_URL": self.endpoint}

    @property
    def image_env(self) -> dict[str, str]:
        """What leads a container here; it has no credentials but its machine's."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self._s3.server.endpoint,
            "PYTHONPATH": str(PROJECT),
        }

    def client(self, service: str) -> Any:
        return boto3.client(service, REGION, endpoint_url=self.endpoint)

    def host(self, instance: str) -> Host:
        return self._hosts[instance]

    def machines(self, *, on: bool = True, **tags: str) -> dict[str, dict[str, Any]]:
        """What EC2 says of machines, by identifier.

        Args:
            on: Only those that are on, or about to be; else all that are not gone, for a machine
                that is off pays for its disks.
            tags: Only those whose tags have these values; _ stands for - in the names.
        """
        wanted = {name.replace("_", "-"): value for name, value in tags.items()}
        answer = self.client("ec2").describe_instances()
        found = {
            instance["InstanceId"]: instance
            for reservation in answer["Reservations"]
            for instance in reservation["Instances"]
            if instance["State"]["Name"] in {"pending", "running"}
            or (not on and instance["State"]["Name"] != "terminated")
        }
        return {
            name: instance
            for name, instance in found.items()
            if wanted.items() <= {t["Key"]: t["Value"] for t in instance.get("Tags", [])}.items()
        }

    def requests(self) -> list[dict[str, Any]]:
        """What RunInstances was asked, in order."""
        file = self._folder / ec2.REQUESTS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def sell_out(self, *what: str) -> None:
        """Have no more machines of these: `spot:TYPE` or `on-demand:TYPE`."""
        (self._folder / ec2.SOLD_OUT).write_text(json.dumps(what))

    def interrupt(self, instance: str, notice_s: float) -> None:
        """Take a spot machine back: its metadata says when, and then it is gone."""
        at = datetime.fromtimestamp(time.time() + notice_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.host(instance).tell({"spot/instance-action": {"action": "terminate", "time": at}})
        take = self.client("ec2").terminate_instances
        timer = threading.Timer(notice_s, take, kwargs={"InstanceIds": [instance]})
        timer.daemon = True
        timer.start()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        for host in self._hosts.values():
            host.kill()

    def _follow(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                self._look()
            except BaseException as error:
                self.trouble = error
                raise

    def _look(self) -> None:
        alive = self.machines()
        for name in set(self._hosts) - set(alive):
            self._hosts.pop(name).kill()
            self._note(name, came=False)
        # A machine's profile is added by the mock just after it is there: what is known of it at
        # the second look is the whole.
        new = [name for name in alive if name in self._seen and name not in self._hosts]
        self._seen = set(alive)
        for name in new:
            about = alive[name]
            self._about[name] = (about["InstanceType"], about.get("InstanceLifecycle", "on-demand"))
            self._hosts[name] = self._bring_up(name, about)
            self._note(name, came=True)
        if new:
            self._guard(alive)

    def _note(self, name: str, *, came: bool) -> None:
        self.changes.append(Change(time.monotonic(), came, name, *self._about[name]))

    def _bring_up(self, name: str, about: dict[str, Any]) -> Host:
        addresses = [about["PrivateIpAddress"]]
        if public := about.get("PublicIpAddress"):
            addresses.append(public)
        ec2_client = self.client("ec2")
        (key,) = ec2_client.describe_key_pairs(KeyNames=[about["KeyName"]], IncludePublicKey=True)[
            "KeyPairs"
        ]
        self._started += 1
        return Host(
            self._folder / "machines" / name,
            number=self._started,
            addresses=addresses,
            public_key=key["PublicKey"],
            metadata=self._metadata(name, about),
            image=self.image,
        )

    def _metadata(self, name: str, about: dict[str, Any]) -> dict[str, Any]:
        rights = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": ACCESS_KEY,
            "SecretAccessKey": SECRET_KEY,
            "Token": "",
            "LastUpdated": "2026-01-01T00:00:00Z",
            "Expiration": "2036-01-01T00:00:00Z",
        }
        has_role = {
            "iam/security-credentials": ROLE,
            f"iam/security-credentials/{ROLE}": rights,
        }
        return {
            "instance-id": name,
            "local-ipv4": about["PrivateIpAddress"],
            "placement/region": REGION,
            "placement/availability-zone": about["Placement"]["AvailabilityZone"],
        } | (has_role if "IamInstanceProfile" in about else {})

    def _guard(self, alive: dict[str, dict[str, Any]]) -> None:
        """Hold every machine to its groups, as they are now that machines have come."""
        groups = self.client("ec2").describe_security_groups()["SecurityGroups"]
        of = {name: {g["GroupId"] for g in each["SecurityGroups"]} for name, each in alive.items()}
        members = {
            group["GroupId"]: [
                each["PrivateIpAddress"]
                for name, each in alive.items()
                if group["GroupId"] in of[name]
            ]
            for group in groups
        }
        for name, host in self._hosts.items():
            own = [group for group in groups if group["GroupId"] in of[name]]
            host.cable.guard(network.rules_of(own, members))


@contextmanager
def cloud(folder: Path) -> Iterator[Cloud]:
    """Run the mock, an S3 server, and machines as they are asked for, until the block ends."""
    network.set_up()
    s3 = LocalS3(folder / "s3", network.PROVIDER)
    s3.start()
    log = (folder / "aws.log").open("w")
    module = [sys.executable, "-m", "tests.hosts.ec2", network.PROVIDER, str(PORT), str(folder)]
    mock = subprocess.Popen(module, stdout=log, stderr=log)
    made = Cloud(folder, s3)
    os.environ.update(made.env)
    try:
        wait_for(lambda: _answers(made, mock), 60, "the mock of AWS answers")
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        mock.kill()
        mock.wait()
        log.close()
        s3.kill()


def _answers(made: Cloud, mock: "subprocess.Popen[bytes]") -> bool:
    if mock.poll() is not None:
        raise RuntimeError(f"the mock of AWS ended with {mock.returncode}")
    probe = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import urllib.request as u; u.urlopen('{made.endpoint}/moto-api/')",
        ],
        capture_output=True,
        check=False,
    )
    return probe.returncode == 0


def wait_for(holds: Callable[[], bool], limit_s: float, what: str) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: If it is not so in time.
    """
    until = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {limit_s:.0f} s for this to be so: {what}")
        time.sleep(0.2)
