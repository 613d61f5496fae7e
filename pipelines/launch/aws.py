"""Machines of EC2, brought up and ended by Ray's cluster launcher.

`ray up` and `ray down` run as programs of their own, on the filled file in the launch's record:
they are well kept, and keep state in globals. What they leave is looked for by the tag that Ray
gives each machine, since a cluster of which a machine is left is one that is paid for.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pipelines.launch import clusterfile, fit, jobs, stack
from pipelines.launch.account import Account, asked, needs_program
from pipelines.launch.backend import Address, Say
from pipelines.launch.check import Look, Wrong
from pipelines.launch.cost import Cost
from pipelines.launch.errors import LaunchError
from pipelines.launch.fleet import Fleet
from pipelines.launch.quotas import check_quotas
from pipelines.launch.record import Record, is_kept, write_private
from pipelines.launch.request import check_data
from pipelines.launch.tagged import ALIVE, tagged
from pipelines.launch.token import ensure_token_file, headers, private_token
from pipelines.launch.tunnel import tunnel
from pipelines.recipe import Recipe

GOING = "shutting-down"
"""State of one that has been ended; a head may still ask for machines in it."""
RUNNING = ("pending", "running")
HEAD = {"ray-node-type": "head"}
PORT = 8265
TERMINATE_S = 600.0
"""Seconds that machines have to end."""
LOOK_AGAIN_S = 3.0


class Aws:
    """Backend of `--on aws`."""

    remote = mortal = True

    def __init__(self, record: Record, *, verbose: bool = False) -> None:
        """Take the launch's record; nothing is asked yet."""
        self._record, self._verbose = record, verbose
        self._wrote_file = False  # another launch's may lie where this one's would
        filled = self._kept or {"provider": {}}
        region = record.region or filled["provider"].get("region")
        self._account = Account(region, record.stack or "droppos", record.mlflow_stack)
        self.where = f"AWS, stack {record.stack}"

    def place(self) -> Mapping[str, str]:
        """Spell out region, and account by who asks."""
        return {"region": self._account.region, "account": self._account.number}

    # --- before it starts -------------------------------------------------------------------

    def looks(self, recipe: Recipe, at_once: int = 1) -> Sequence[Look]:
        """List what has to be right."""
        account = self._account
        here = ("credentials", "region", "stack")
        return [
            Look("credentials", account.identity),
            Look("region", account.region_is_there, after=("credentials",)),
            Look("stack", lambda: stack.check_complete(account.stack), after=here[:2]),
            Look("name", self._is_free, after=here),
            Look("bucket", account.bucket_is_ours, after=here),
            Look("data", partial(check_data, recipe), after=("credentials", "places")),
            Look("image", self._check_image, after=here),
            Look("cluster file", self._check_file, after=(*here, "image")),
            Look("ssh", self._check_key),
            Look("token", ensure_token_file),
            Look("jobs", self._is_idle, after=("name", "cluster file", "ssh", "token")),
            Look("recipe's fit", lambda: fit.described(self._fleet.fit(recipe, at_once))),
            Look("machine types", lambda: account.offered(self._fleet.types), after=here),
            Look(
                "quota", partial(self._check_quotas, recipe, at_once), after=(*here, "recipe's fit")
            ),
        ]

    @cached_property
    def _source(self) -> dict[str, Any]:
        return clusterfile.read(Path(self._record.source))

    @cached_property
    def _fleet(self) -> Fleet:
        return Fleet.of(self._source)

    @cached_property
    def filled(self) -> dict[str, Any]:
        """The cluster's file, filled from the account; from the record once it is there."""
        if self._kept is not None:
            return self._kept
        account, parameter = self._account, clusterfile.ami_parameter(self._source)
        facts = clusterfile.Facts(
            name=self._name,
            region=account.region,
            stack=account.stack,
            zones=account.zones,
            image=self._image,
            ami=None if parameter is None else self._standing_ami or account.ami(parameter),
            ends_itself=not self._record.keep,
        )
        return clusterfile.fill(self._source, facts)

    @cached_property
    def _standing(self) -> dict[str, Any] | None:
        """The file that a head which stands was made with: its other machines are to be the same.

        Ray leaves the container of a head that runs as it is, whatever the file says.
        """
        file = self._record.file("cluster.yaml")
        if not file.exists() or not self._machines(RUNNING, **HEAD):
            return None
        return clusterfile.read(file)

    @property
    def _image(self) -> str:
        standing = self._standing
        return self._account.image if standing is None else standing["docker"]["image"]

    @property
    def _standing_ami(self) -> str | None:
        if (standing := self._standing) is None:
            return None
        head = standing["available_node_types"][standing["head_node_type"]]
        return head["node_config"].get("ImageId")

    def _check_image(self) -> str:
        newest = self._account.image
        if self._image == newest:
            return newest
        return (
            f"{self._image}, which its head runs; the newest is {newest}: "
            f"`droppos down {self._record.name}` first takes that"
        )

    @cached_property
    def _kept(self) -> dict[str, Any] | None:
        """The file that the cluster was made with; None while its launch is only planned."""
        kept = self._record.file("cluster.yaml")
        planned = self._record.phase == "starting"
        return clusterfile.read(kept) if kept.exists() and not planned else None

    @cached_property
    def _name(self) -> str:
        """Of the cluster: it begins as the account's rights say, which end no others' machines."""
        if self._kept is not None:
            return self._kept["cluster_name"]
        return f"{self._account.stack.cluster}-{self._record.name}"

    def _is_free(self) -> str:
        """See that no machines have the cluster's name already, but those that we kept."""
        there = self._left()
        if there and not is_kept(replace(self._record, **self.place())):
            raise Wrong(
                f"{', '.join(_named(there))} of {self._name}, which this machine has not kept",
                "none of that name",
                f"`droppos attach {self._record.name} --on aws` follows its job, `droppos down` "
                "ends them; or take another --name",
            )
        return f"{self._name}, " + ("whose machines were kept" if there else "new")

    def _is_idle(self) -> str:
        """See that nothing runs on a cluster that was kept."""
        if not self._machines(RUNNING, **HEAD):
            return jobs.NO_CLUSTER
        return jobs.check_idle(self.address(), self._record.name)

    def _check_file(self) -> str:
        if left := clusterfile.unfilled(self.filled):
            raise Wrong(
                "; ".join(left),
                "nothing left to fill in",
                f"write it into {self._record.source}",
            )
        return f"{self._record.source}, filled for {self._name}"

    def _check_key(self) -> str:
        needs_program("ssh", "install OpenSSH's client")
        needs_program("rsync", "install rsync; `ray up` copies files with it")
        key = clusterfile.key_of(self._source)
        if not key.is_file():
            raise Wrong(
                f"no {key}",
                "the private half of the stack's key",
                f"ssh-keygen -t ed25519 -f {key}, and its public half into the stack's PublicKey",
            )
        if mode := key.stat().st_mode & 0o077:
            raise Wrong(
                f"{key} may be read by others (mode ...{mode:02o})", "mode 600", f"chmod 600 {key}"
            )
        return str(key)

    def _check_quotas(self, recipe: Recipe, at_once: int) -> str:
        uses = self._fleet.uses(recipe, at_once)
        vcpus = self._account.vcpus([use.machine for use in uses])
        return check_quotas(self._account.client("service-quotas"), uses, vcpus)

    def adapted(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        """Say cuda where the recipe says auto and GPUs come from zero."""
        return fit.adapted(recipe, self._fleet.cluster)

    def job_env(self) -> Mapping[str, str]:
        """Tell jobs where the team's MLflow is; its password is on the head: mlflow_login.py."""
        try:
            outputs = self._account.stack.outputs
        except Wrong:
            return {}  # told by the look at the stack
        return {"MLFLOW_TRACKING_URI": outputs["MlflowUri"]} if "MlflowUri" in outputs else {}

    def cost(self) -> Cost:
        """Ask for the price of each kind of machine."""
        return self._fleet.cost(self._account)

    # --- up and down ------------------------------------------------------------------------

    def up(self, say: Say) -> None:
        """Run `ray up` on the filled file; on a cluster that was kept, Ray and its jobs go on."""
        file = self._record.file("cluster.yaml")
        write_private(file, clusterfile.to_yaml(self.filled))
        self._wrote_file = True
        say(f"bringing the head of {self._name} up, in minutes; what is done: {self._log('up')}")
        # Without it Ray is stopped on a head that stands, with all that runs there.
        kept = ["--no-restart"] if self._machines(RUNNING, **HEAD) else []
        code = self._ray("up", str(file), "--yes", "--no-config-cache", *kept)
        if code:
            raise LaunchError(f"`ray up` ended with {code}: {_last_lines(self._log('up'))}")
        if kept and not self._record.keep:
            # What starts with Ray on a new head does not start on one where Ray goes on.
            care = clusterfile.caretaker(self._name, self._account.region)
            if self._ray("exec", str(file), care):
                say(
                    "the head could not be told to end itself when nobody follows "
                    f"({self._log('exec')}): end it by `droppos down {self._record.name}`"
                )

    def down(self, say: Say) -> list[str]:
        """Run `ray down`, and end what it leaves.

        Without a filled file of this machine, machines are ended by their tag alone, the head
        first: it would start new ones.
        """
        file = self._record.file("cluster.yaml")
        if self._kept is not None or self._wrote_file:
            say(f"ending the machines of {self._name}; what is done: {self._log('down')}")
            if code := self._ray("down", str(file), "--yes"):
                say(f"`ray down` ended with {code}; what it left is ended by its tag")
        until = time.monotonic() + TERMINATE_S
        left = self._end_tagged(until)
        if not left:
            time.sleep(LOOK_AGAIN_S)  # what a head asked for last is seen some time after
            left = self._end_tagged(until)
        return _named(left)

    def _end_tagged(self, until: float) -> list[Any]:
        """End what has the cluster's tag; gives what is left at a time of the monotonic clock."""
        while left := self._left():
            self._terminate([each for each in left if _state(each) != GOING])
            if time.monotonic() > until:
                break
            time.sleep(LOOK_AGAIN_S)
        return left

    def _left(self) -> list[Any]:
        """Find the head until it has gone, for it starts others anew; then the others."""
        return self._machines((*ALIVE, GOING), **HEAD) or self._machines(ALIVE)

    def _ray(self, *command: str) -> int:
        """Run one of Ray's commands; it says what it does to a file, and here if asked to."""
        program = [Path(sys.executable).with_name("ray"), *command]
        folder = Path(self._record.source).parent  # which file_mounts are meant from
        with (
            self._log(command[0]).open("ab") as log,
            subprocess.Popen(
                program,
                cwd=folder if folder.is_dir() else None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as running,
        ):
            assert running.stdout is not None
            try:
                for line in running.stdout:
                    log.write(line)
                    log.flush()
                    if self._verbose:
                        with suppress(OSError):  # of a terminal that is gone
                            sys.stderr.buffer.write(line)
                            sys.stderr.flush()
            except KeyboardInterrupt:
                running.kill()  # a signal to this process alone has not reached it
                raise
        return running.returncode

    def _log(self, what: str) -> Path:
        self._record.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._record.file(f"{what}.log")

    def _machines(self, states: Sequence[str], **tags: str) -> list[Any]:
        return asked(
            lambda: tagged(self._account.client("ec2"), self._name, states, **tags),
            "to see the cluster's machines",
            "ask for ec2:DescribeInstances",
        )

    def _terminate(self, machines: Sequence[Any]) -> None:
        ids = [each["InstanceId"] for each in machines]
        if not ids:
            return
        ec2 = self._account.client("ec2")
        asked(
            lambda: ec2.terminate_instances(InstanceIds=ids),
            f"to end {', '.join(ids)}",
            "ask for ec2:TerminateInstances",
        )

    # --- the way there ----------------------------------------------------------------------

    @contextmanager
    def address(self) -> Iterator[Address]:
        """Open a tunnel by ssh to the head; nothing of the cluster listens outside it."""
        with tunnel(self._tunnel_command, self._log("tunnel")) as url:
            yield Address(url, headers(private_token()))

    def _tunnel_command(self, port: int) -> list[str]:
        """Make the tunnel's command, for the head as it is now."""
        heads = self._machines(["running"], **HEAD)
        if not heads:
            raise LaunchError(
                f"no head of {self._name} is running on {self.where}; a launch without --keep ends "
                "its machines by itself a quarter of an hour after its job, and leaves what that "
                "said in the run's folder, in launches/"
            )
        auth = self.filled["auth"]
        inside = self.filled["provider"].get("use_internal_ips", False)
        host = heads[0]["PrivateIpAddress" if inside else "PublicIpAddress"]
        options = {
            # Its key is new with each head. At first sight it is believed, and from then on only
            # that one: `ray up`, which asked for it through AWS, has just been there.
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": self._record.file("known_hosts"),
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
            "ConnectTimeout": 10,
            # A line that is silent for 30 s is given up, and opened again.
            "ServerAliveInterval": 10,
            "ServerAliveCountMax": 3,
            "IdentitiesOnly": "yes",
        }
        if proxy := auth.get("ssh_proxy_command"):
            options["ProxyCommand"] = proxy
        forward = f"127.0.0.1:{port}:127.0.0.1:{PORT}"
        return [
            *("ssh", "-N", "-L", forward, "-i", str(clusterfile.key_of(self.filled))),
            *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
            *("-p", str(auth.get("ssh_port", 22)), f"{auth['ssh_user']}@{host}"),
        ]


def _named(machines: Sequence[Any]) -> list[str]:
    return [f"{each['InstanceId']} ({_state(each)})" for each in machines]


def _state(machine: Mapping[str, Any]) -> str:
    return machine["State"]["Name"]


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " / ".join(lines[-5:]) + f" (all of it: {log})"
