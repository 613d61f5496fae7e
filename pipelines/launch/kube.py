"""A cluster on Kubernetes, made by KubeRay from a RayCluster of ours, through kubectl.

kubectl and not a client library: it is what people there have, with whatever way of logging in
their cluster wants.
"""

import base64
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from droppos.errors import ConfigError
from pipelines.launch import fit, jobs, manifest
from pipelines.launch.account import needs_program
from pipelines.launch.backend import Address, Say
from pipelines.launch.check import Look, Wrong
from pipelines.launch.cost import Cost, Kind
from pipelines.launch.errors import LaunchError
from pipelines.launch.manifest import Manifest
from pipelines.launch.record import Record, is_kept, write_private
from pipelines.launch.request import check_data
from pipelines.launch.token import headers
from pipelines.launch.tunnel import tunnel
from pipelines.recipe import Recipe
from pipelines.resources import Fit

CLUSTERS = "rayclusters.ray.io"
PORT = 8265
HEAD_S = 1800.0
"""Seconds that a head has to be scheduled, perhaps on a machine that comes for it, and to start."""
DELETE_S = 300.0
"""Seconds that its pods have to go."""
LOOK_AGAIN_S = 3.0
ANSWER_S = 60.0


class Kube:
    """Backend of `--on kube`."""

    remote = mortal = True

    def __init__(self, record: Record) -> None:
        """Take the launch's record; nothing is asked yet."""
        self._record = record

    @property
    def where(self) -> str:
        """What a person calls it."""
        return f"Kubernetes, context {self._context or 'none'}"

    def place(self) -> Mapping[str, str]:
        """Spell out context and namespace."""
        context = {"context": self._context} if self._context else {}
        return {**context, "namespace": self._namespace}

    # --- before it starts -------------------------------------------------------------------

    def looks(self, recipe: Recipe, at_once: int = 1) -> Sequence[Look]:
        """List what has to be right."""
        there = ("kubectl", "Kubernetes")
        return [
            Look("kubectl", lambda: needs_program("kubectl", "install it")),
            Look("Kubernetes", self._version, after=there[:1]),
            Look("KubeRay", self._has_kuberay, after=there),
            Look("manifest", lambda: manifest.check_filled(self._manifest), after=there[:1]),
            Look("rights", self._may_create, after=(*there, "KubeRay", "manifest")),
            Look("name", self._is_free, after=(*there, "KubeRay", "manifest")),
            Look("jobs", self._is_idle, after=("name",)),
            Look("data", partial(check_data, recipe), after=("places",)),
            Look(
                "recipe's fit",
                lambda: fit.described(self._fit(recipe, at_once)),
                after=("manifest",),
            ),
        ]

    @cached_property
    def _manifest(self) -> Manifest:
        source = Path(self._record.source)
        if source.is_dir():
            text = self._kubectl("kustomize", str(source), anywhere=True)
        else:
            try:
                text = source.read_text()
            except OSError as error:
                raise ConfigError(
                    f"{source} cannot be read ({error.strerror}); run this in the clone, or give "
                    "--cluster (or, for a cluster that is there, --namespace)"
                ) from error
        return manifest.read(text, str(source), self._record.name, self._record.namespace)

    def _version(self) -> str:
        try:
            version = self._kubectl("version", "--output=yaml", anywhere=True)
        except LaunchError as error:
            raise Wrong(
                str(error), "a cluster that answers", "kubectl config get-contexts; --context"
            ) from error
        return yaml.safe_load(version)["serverVersion"]["gitVersion"]

    def _has_kuberay(self) -> str:
        # By discovery, which everybody may do; not everybody may look at definitions.
        known = self._kubectl("api-resources", "--api-group=ray.io", "--output=name", anywhere=True)
        if CLUSTERS not in known.split():
            raise Wrong(
                f"no {CLUSTERS}",
                "KubeRay 1.5.1 or newer on the cluster",
                "install its operator: helm install kuberay-operator kuberay/kuberay-operator",
            )
        return CLUSTERS

    def _may_create(self) -> str:
        verbs = ("create", "get", "patch", "delete")
        no = [verb for verb in verbs if not self._may(verb)]
        if no:
            raise Wrong(
                f"may not {', '.join(no)} {CLUSTERS} in {self._namespace}",
                f"{', '.join(verbs)}",
                "ask whoever keeps the cluster, or take another --namespace",
            )
        return f"may {', '.join(verbs)} {CLUSTERS} in {self._namespace}"

    def _is_free(self) -> str:
        """See that there is no cluster of the launch's name, but one that we kept."""
        name, there = self._record.name, self._is_there()
        if there and not is_kept(replace(self._record, **self.place())):
            raise Wrong(
                f"a RayCluster {name} in {self._namespace}, that this machine has not kept",
                "none of that name",
                f"`droppos attach {name} --on kube` follows its job, `droppos down` ends it; or "
                "take another --name",
            )
        return f"{name}, " + ("which was kept" if there else "new")

    def _is_there(self) -> bool:
        name = self._record.name
        found = self._kubectl("get", CLUSTERS, name, "--ignore-not-found", "--output=name")
        return bool(found.strip())

    def _is_idle(self) -> str:
        """See that nothing runs on a cluster that was kept."""
        if not self._is_there():
            return jobs.NO_CLUSTER
        return jobs.check_idle(self.address(), self._record.name)

    def _may(self, verb: str) -> bool:
        done = self._run("auth", "can-i", verb, CLUSTERS)
        return done.stdout.strip() == "yes"

    def _fit(self, recipe: Recipe, at_once: int) -> Fit:
        return fit.fitted(recipe, self._manifest.cluster, "the manifest", at_once)

    def adapted(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        """Say cuda where the recipe says auto and GPUs come from zero."""
        return fit.adapted(recipe, self._manifest.cluster)

    def job_env(self) -> Mapping[str, str]:
        """Nothing: the manifest's pods have what they need from a secret of the namespace."""
        return {}

    def cost(self) -> Cost:
        """Tell how many pods of what size there may be; their price its keeper knows."""
        kinds = [
            Kind(
                name=pods.name,
                machine=f"pod of {pods.cpus} CPUs" + (f", {pods.gpus} GPUs" if pods.gpus else ""),
                standing=pods.standing,
                most=pods.most,
                dollars=None,
                source="whoever keeps the cluster",
            )
            for pods in self._manifest.pods
        ]
        most = ", ".join(f"{kind.most} {kind.name}" for kind in kinds)
        return Cost(kinds, note=f"pods at most: {most}; the machines' price is not known here")

    # --- up and down ------------------------------------------------------------------------

    def up(self, say: Say) -> None:
        """Apply the RayCluster, and wait for its head.

        What else the manifest has (namespace, accounts, policies, queues) is the team's: it is made
        where it is missing, left as it is where it is there, and never ended.
        """
        for name in self._make_missing():
            say(f"made {name}")
        file = self._record.file("cluster.yaml")
        write_private(file, yaml.safe_dump(self._manifest.ray_cluster, sort_keys=False))
        self._kubectl("apply", "--filename", str(file))
        say(f"waiting for the head of {self._record.name}")
        until = time.monotonic() + HEAD_S
        while not manifest.head_is_ready(self._look()):
            if time.monotonic() > until:
                pods = self._kubectl("get", "pods", "--selector", self._selector)
                raise LaunchError(f"no head after {HEAD_S / 60:.0f} min:\n{pods}")
            time.sleep(LOOK_AGAIN_S)

    def _make_missing(self) -> list[str]:
        made = []
        for other in self._manifest.others:
            kind, name = other["kind"], other["metadata"]["name"]
            space = [f"--namespace={each}"] if (each := other["metadata"].get("namespace")) else []
            found = self._kubectl(
                "get", kind, name, *space, "--ignore-not-found", "--output=name", anywhere=True
            )
            if not found.strip():
                self._kubectl("create", "--filename=-", anywhere=True, given=yaml.safe_dump(other))
                made.append(f"{kind} {name}")
        return made

    def _look(self) -> Mapping[str, Any]:
        return yaml.safe_load(
            self._kubectl("get", CLUSTERS, self._record.name, "--output=yaml") or "{}"
        )

    def down(self, say: Say) -> list[str]:
        """Delete the RayCluster, and wait until its pods have gone."""
        say(f"deleting {self._record.name} in {self._namespace}")
        self._kubectl(
            *("delete", CLUSTERS, self._record.name, "--ignore-not-found", "--wait=false")
        )
        until = time.monotonic() + DELETE_S
        while (left := self._pods()) and time.monotonic() < until:
            time.sleep(LOOK_AGAIN_S)
        return left

    def _pods(self) -> list[str]:
        names = self._kubectl("get", "pods", "--selector", self._selector, "--output=name")
        return names.split()

    @property
    def _selector(self) -> str:
        return f"ray.io/cluster={self._record.name}"

    # --- the way there ----------------------------------------------------------------------

    @contextmanager
    def address(self) -> Iterator[Address]:
        """Forward a port to the head's service."""
        log = self._record.file("tunnel.log")
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tunnel(self._forward, log) as url:
            yield Address(url, headers(self._token()))

    def _forward(self, port: int) -> list[str]:
        service = manifest.head_service(self._look(), self._record.name)
        return self._command("port-forward", f"service/{service}", f"{port}:{PORT}")

    def _token(self) -> str | None:
        """Take the token that KubeRay made, from the secret of the cluster's name."""
        if self._look().get("spec", {}).get("authOptions", {}).get("mode") != "token":
            return None
        path = "jsonpath={.data.auth_token}"
        kept = self._kubectl("get", "secret", self._record.name, f"--output={path}")
        return base64.b64decode(kept).decode() or None

    # --- kubectl ----------------------------------------------------------------------------

    @cached_property
    def _context(self) -> str | None:
        """The context, asked for once: it may be changed while a job runs.

        None where there is none, as in a pod that kubectl takes its rights from.
        """
        if self._record.context is not None:
            return self._record.context
        return _run(["kubectl", "config", "current-context"]).stdout.strip() or None

    @cached_property
    def _namespace(self) -> str:
        """The record's, the manifest's, or the context's, as kubectl itself would take it."""
        if named := self._record.namespace or self._manifest.namespace:
            return named
        view = ("config", "view", "--minify", "--output=jsonpath={..namespace}")
        return self._run(*view, anywhere=True).stdout.strip() or "default"

    def _command(self, *words: str, anywhere: bool = False) -> list[str]:
        context = [f"--context={self._context}"] if self._context else []
        space = [] if anywhere else [f"--namespace={self._namespace}"]
        return ["kubectl", *context, *space, *words]

    def _run(
        self, *words: str, anywhere: bool = False, given: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        return _run(self._command(*words, anywhere=anywhere), given)

    def _kubectl(self, *words: str, anywhere: bool = False, given: str = "") -> str:
        """Run it.

        Raises:
            LaunchError: If it fails; with its own words.
        """
        done = self._run(*words, anywhere=anywhere, given=given)
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise LaunchError(f"kubectl {' '.join(words[:3])}: {said[-1000:]}")
        return done.stdout


def _run(command: Sequence[str], given: str = "") -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=ANSWER_S
        )
    except subprocess.TimeoutExpired as error:
        said = " ".join(command)
        raise LaunchError(f"{said} did not end within {ANSWER_S:.0f} s") from error
    except FileNotFoundError as error:
        raise LaunchError("kubectl is not on this machine's PATH; install it") from error
