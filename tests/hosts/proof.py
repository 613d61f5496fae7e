"""The proof of the launch: an empty account, a cluster, a run that loses a machine, nothing left.

    make test-cluster        # as root; needs the Debian packages that tests/hosts/host.py names

Real are: `droppos launch`, Ray's launcher, autoscaler and node provider, ssh, rsync, the machines'
network and firewall, Ray and the training on them, S3, the CloudFormation template and the
metadata service's protocol. Played are: AWS's API (moto), machines (namespaces of this one) and
Docker (a mount namespace). All of it lives in namespaces that end with this process.

So it does not prove: IAM's rights (moto grants all, and each machine's role may do anything in the
bucket; tests/infra/rights.py holds the policies against the requests), Docker's own flags and
isolation, the image's build, GPUs, and the metadata service's hop limit.

The last line is for scripts. What differs from cluster.yaml is in :func:`_cluster_file`.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import yaml
from PIL import Image as Picture

from pipelines.local_s3 import REGION
from pipelines.prepare import prepare
from tests.hosts import network
from tests.hosts.cloud import Cloud, cloud, wait_for
from tests.hosts.host import NEEDED, PROJECT, Image

STACK, NAME = "droppos", "proof"
CLUSTER = f"{STACK}-{NAME}"
NOTICE_S = 30
"""Seconds from the notice to the end; EC2 gives 120."""
PICTURES = 224


class NotPermittedError(Exception):
    """This machine does not permit what the proof is made of."""


def check_machine() -> None:
    """See that namespaces may be made here, and that the programs are there.

    Raises:
        NotPermittedError: Otherwise, with the reason.
    """
    if os.geteuid() != 0:
        raise NotPermittedError("only root may make network namespaces")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        raise NotPermittedError(
            f"not installed: {', '.join(missing)}; on Debian: apt-get install iproute2 nftables "
            "openssh-client openssh-server procps rsync tini util-linux"
        )
    probe = "ip link add name probe0 type veth peer name probe1 && nft list ruleset"
    done = network.run("unshare", "--net", "--mount", "sh", "-c", probe, check=False)
    if done.returncode:
        raise NotPermittedError(f"namespaces are not permitted here: {done.stderr.strip()}")


class Operator:
    """The laptop of whoever launches: a home of its own, in a place that ssh may come from."""

    def __init__(self, folder: Path, aws: Cloud) -> None:
        self.home, self.folder = folder / "laptop", folder / "laptop/clone"
        (self.home / ".ssh").mkdir(parents=True)
        self.folder.mkdir()
        self.key = self.home / ".ssh/droppos.pem"
        network.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = (
            os.environ
            | aws.env
            | {
                "HOME": str(self.home),
                "PATH": path,
                "PYTHONPATH": str(PROJECT),
            }
        )

    def droppos(self, *words: str, log: str) -> "subprocess.Popen[bytes]":
        """Start a command, as typed in the clone; what it says goes to a file."""
        with (self.folder / log).open("w") as file:
            return subprocess.Popen(
                ["droppos", *words],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def said(self, log: str) -> str:
        return (self.folder / log).read_text()

    def run(self, *words: str, log: str) -> None:
        """Run a command to its end; it must go well."""
        if code := self.droppos(*words, log=log).wait():
            raise AssertionError(f"droppos {' '.join(words)}: {code}\n{self.said(log)}")


class Proof:
    """The steps, in order; each leaves what the next one needs."""

    def __init__(self, folder: Path, aws: Cloud) -> None:
        self.aws = aws
        self.operator = Operator(folder, aws)
        self.began = time.monotonic()
        self.took: dict[str, float] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def waited(self, holds: Callable[[], bool], limit_s: float, what: str) -> float:
        """Wait for something; the seconds that it took."""
        start = time.monotonic()

        def holds_or_fails() -> bool:
            if self.aws.trouble is not None:
                raise RuntimeError("the cloud of our own failed") from self.aws.trouble
            return holds()

        wait_for(holds_or_fails, limit_s, what)
        return time.monotonic() - start

    def make_account(self) -> None:
        """Deploy the account's stack, push the image, pack pictures: the runbook's first half."""
        parameters = {
            "AdminCidr": network.OPERATORS,
            "PublicKey": self.operator.key.with_suffix(".pem.pub").read_text().strip(),
            "BudgetEmail": "proof@example.org",
        }
        formation = self.aws.client("cloudformation")
        formation.create_stack(
            StackName=STACK,
            TemplateBody=(PROJECT / "infra/aws/account.yaml").read_text(),
            Parameters=[
                {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()
            ],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        (stack,) = formation.describe_stacks(StackName=STACK)["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE", stack
        self.outputs = {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]}
        self._add_what_the_mock_lacks(parameters["PublicKey"])
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "layers": []})
        image = self.aws.client("ecr").put_image(
            repositoryName=self.outputs["ImageRepository"].split("/", 1)[1],
            imageManifest=manifest,
            imageTag="latest",
        )["image"]
        digest = image["imageId"]["imageDigest"]
        self.aws.image = Image.of_the_dockerfile(
            f"{self.outputs['ImageRepository']}@{digest}", **self.aws.image_env
        )
        # The template's bucket is in the mock; the same one in a server that checks credentials.
        boto3.client("s3").create_bucket(Bucket=self.outputs["Bucket"])
        self.bucket = f"s3://{self.outputs['Bucket']}"
        with tempfile.TemporaryDirectory() as pictures:
            rng = np.random.default_rng(0)
            for number in range(PICTURES):
                noise = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
                Picture.fromarray(noise).save(f"{pictures}/{number}.png")
            prepare(pictures, f"{self.bucket}/data", shard_bytes=100_000, group_rows=16)

    def _add_what_the_mock_lacks(self, public_key: str) -> None:
        """Do by hand what moto 5.2 reads over in the template."""
        ec2 = self.aws.client("ec2")
        for subnet in self.outputs["SubnetIds"].split(","):
            public = {"MapPublicIpOnLaunch": {"Value": True}}
            ec2.modify_subnet_attribute(SubnetId=subnet, **public)
        if not ec2.describe_key_pairs(
            Filters=[{"Name": "key-name", "Values": [self.outputs["KeyName"]]}]
        )["KeyPairs"]:
            ec2.import_key_pair(
                KeyName=self.outputs["KeyName"], PublicKeyMaterial=public_key.encode()
            )

    def launch(self) -> None:
        """Launch, and wait until the job is handed over."""
        (self.operator.folder / "cluster.yaml").write_text(_cluster_file())
        shutil.copy(PROJECT / "tests/hosts/proof.yaml", self.operator.folder)
        data = ["--data.path", f"{self.bucket}/data", "--run.storage", f"{self.bucket}/runs"]
        where = ["--stack", STACK, "--region", REGION]
        words = ["launch", "proof.yaml", "--name", NAME, *where, "--keep", "--yes", *data]
        self.follower = self.operator.droppos(*words, log="launch.log")

        def handed_over() -> bool:
            said = self.operator.said("launch.log")
            assert self.follower.poll() is None, said
            return "is handed over" in said

        self.took["up_s"] = self.waited(handed_over, 300, "the job is handed over")

    def scale_up(self) -> None:
        """Wait for the first steps of training, on machines that came for them."""
        self.took["scale_up_s"] = self.waited(self._trains_on_both, 300, "it trains on both")
        workers = self._workers()
        assert len(workers) == 2, workers
        assert {w.get("InstanceLifecycle") for w in workers.values()} == {"spot"}
        assert len({w["SubnetId"] for w in workers.values()}) == 1

    def _trains_on_both(self) -> bool:
        said = self.operator.said("launch.log")
        assert self.follower.poll() is None, said
        return re.search(r"2 workers begin[\s\S]*\nstep +\d", said) is not None

    def _workers(self) -> dict[str, dict[str, Any]]:
        return self.aws.machines(ray_cluster_name=CLUSTER, ray_node_type="worker")

    def closed(self) -> None:
        """See that the cluster is closed: to other ports than ssh, and without the token."""
        (head,) = self.aws.machines(ray_cluster_name=CLUSTER, ray_node_type="head").values()
        assert _opens(head["PublicIpAddress"], 22)
        assert not _opens(head["PublicIpAddress"], 22, network.STRANGER)
        for port in (6379, 8076, 8265):
            assert not _opens(head["PublicIpAddress"], port), port
        for worker in self._workers().values():
            assert not _opens(worker["PublicIpAddress"], 22)
        inside = self.aws.host(head["InstanceId"]).cable
        ask = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]
        answer = inside.inside(*ask, "http://127.0.0.1:8265/api/jobs/")
        assert answer.stdout == "401", answer.stdout

    def interrupt(self) -> None:
        """Take a spot machine back while there are no others, and see the run go on."""
        kind = next(iter(self._workers().values()))["InstanceType"]
        self.aws.sell_out(f"spot:{kind}")
        lost = min(self._workers())
        self.aws.interrupt(lost, NOTICE_S)

        def replaced() -> bool:
            markets = [w.get("InstanceLifecycle") for w in self._workers().values()]
            return lost not in self._workers() and sorted(map(str, markets)) == ["None", "spot"]

        self.waited(replaced, 240, "a machine on demand is there for the spot machine")

    def finish(self) -> None:
        """Wait for the job's end, and hold what it trained on against the schedule."""
        assert self.follower.wait(timeout=420) == 0, self.operator.said("launch.log")
        said = self.operator.said("launch.log")
        fewer = "1 worker fits on the others: the workers leave after a checkpoint"
        again = "there is room for 2 workers now, not only 1: the workers leave after a checkpoint"
        # The second worker comes back only if its room is asked for while the other trains.
        went_on = rf"about to go: saving a checkpoint[\s\S]*{fewer}[\s\S]*{again}[\s\S]*step +\d"
        assert re.search(went_on, said), said
        self.operator.run("audit", f"{self.bucket}/runs/{NAME}", log="audit.log")

    def scale_down(self) -> None:
        """Wait until the cluster is its head again."""
        workers = {"ray_cluster_name": CLUSTER, "ray_node_type": "worker"}
        self.took["scale_down_s"] = self.waited(
            lambda: not self.aws.machines(on=False, **workers), 240, "idle workers are ended"
        )

    def down(self) -> int:
        """End the cluster; the number of machines that are left."""
        start = time.monotonic()
        self.operator.run("down", NAME, "--yes", log="down.log")
        self.took["down_s"] = time.monotonic() - start
        return len(self.aws.machines(on=False))

    def check_requests(self) -> None:
        """Hold what EC2 was asked for against what cluster.yaml promises."""
        head, *workers = self.aws.requests()
        types = yaml.safe_load(_cluster_file())["available_node_types"]
        kinds = {name: kind["node_config"] for name, kind in types.items()}
        groups = {
            "head": [self.outputs["HeadSecurityGroupId"]],
            "worker": [self.outputs["WorkerSecurityGroupId"]],
        }
        for request in (head, *workers):
            tags = {tag["Key"]: tag["Value"] for tag in request["TagSpecifications"][0]["Tags"]}
            assert tags["ray-cluster-name"] == CLUSTER
            kind = tags["ray-node-type"]
            assert request["SecurityGroupIds"] == groups[kind]
            assert request["InstanceType"] == kinds[tags["ray-user-node-type"]]["InstanceType"]
            profile = self.outputs[f"{kind.title()}Profile"]
            assert request["IamInstanceProfile"] == {"Name": profile}
            assert request["SubnetId"] in self.outputs["SubnetIds"].split(",")
            assert request["MetadataOptions"]["HttpTokens"] == "required"
            assert request["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
            assert all(disk["Ebs"]["Encrypted"] for disk in request["BlockDeviceMappings"])
            assert request["ImageId"] == head["ImageId"]  # looked up once, then the same for all
            assert request["ImageId"].startswith("ami-")
        assert "InstanceMarketOptions" not in head
        markets = ["spot" if "InstanceMarketOptions" in r else "on-demand" for r in workers]
        assert markets[0] == "spot"
        # The replacement was asked for beside the other worker: on spot, and then on demand.
        bought = markets.index("on-demand")
        assert markets[bought - 1] == "spot"
        assert len({workers[at]["SubnetId"] for at in (0, bought - 1, bought)}) == 1
        commands = [line.split()[0] for line in self.docker]
        assert commands.index("login") < commands.index("pull") < commands.index("run")

    def look_at_the_head(self) -> None:
        (head,) = self.aws.machines(ray_cluster_name=CLUSTER, ray_node_type="head")
        self.docker = self.aws.host(head).pulled()


def _opens(address: str, port: int, source: str = network.OPERATOR) -> bool:
    """Tell whether the operator's laptop, or somebody else, can open a connection."""
    try:
        with socket.create_connection((address, port), 2, (source, 0)):
            return True
    except OSError:
        return False


def _cluster_file() -> str:
    """Take cluster.yaml, with what two CPUs and a few minutes ask for."""
    config = yaml.safe_load((PROJECT / "cluster.yaml").read_text())
    config["idle_timeout_minutes"] = 0.5
    kinds = config["available_node_types"]
    kinds["decode"]["max_workers"] = kinds["gpu"]["max_workers"] = 0
    kinds["gpu_single"]["max_workers"] = 2
    # A training worker takes two; one is left to decode.
    kinds["gpu_single"]["resources"]["CPU"] = 3
    return yaml.safe_dump(config, sort_keys=False)


def prove(folder: Path) -> str:
    """Do all of it, and give the line for scripts."""
    with ExitStack() as stack:
        aws = stack.enter_context(cloud(folder))
        proof = Proof(folder, aws)
        proof.say("AWS answers; deploying the account's stack, packing pictures")
        proof.make_account()
        proof.say("launching")
        proof.launch()
        proof.say(f"the job is handed over, after {proof.took['up_s']:.0f} s")
        proof.scale_up()
        proof.say(f"it trains on two spot machines, after {proof.took['scale_up_s']:.0f} s more")
        proof.closed()
        proof.look_at_the_head()
        proof.say("closed but for ssh, and to whoever has no token; taking a machine back")
        proof.interrupt()
        proof.say("a machine on demand came for it")
        proof.finish()
        proof.say("the job has finished; no picture was lost or came twice")
        proof.scale_down()
        proof.say(f"idle machines are ended, after {proof.took['scale_down_s']:.0f} s")
        left = proof.down()
        proof.say(f"down, after {proof.took['down_s']:.0f} s")
        proof.check_requests()
        took = proof.took
        return (
            f"cluster up_s={took['up_s']:.1f} scale_up_s={took['scale_up_s']:.1f} job=ok "
            f"interrupted=ok scale_down_s={took['scale_down_s']:.1f} left={left}"
        )


def main() -> None:
    """Prove it in namespaces of its own."""
    inside = "--inside"
    if inside not in sys.argv:
        try:
            check_machine()
        except NotPermittedError as refusal:
            sys.exit(f"cluster skipped: {refusal}")
        spaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        again = [sys.executable, "-m", "tests.hosts.proof", inside, *sys.argv[1:]]
        sys.exit(subprocess.run(["unshare", *spaces, *again], cwd=PROJECT, check=False).returncode)
    folder = Path(tempfile.mkdtemp(prefix="droppos-cluster-", dir="/var/tmp"))
    folder.chmod(0o755)  # the machines' users, who are not root, have their homes below it
    try:
        line = prove(folder)
    except BaseException:
        print(f"what everything said is in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
    print(line)


if __name__ == "__main__":
    main()
