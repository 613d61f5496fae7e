"""KubeRay manifests: what kustomize makes of them, and what Kubernetes and Ray would say."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.scripts.scripts import drain_node

from droppos.errors import ConfigError
from pipelines.cli import main as droppos
from pipelines.recipe import Recipe

ROOT = Path(__file__).parents[2]
CLUSTERS, JOBS = ("base", "spot"), ("job", "job-spot")
KUBERNETES = "1.31"
"""The oldest version whose pods we check for; fields go in and seldom out."""
OWN_KINDS = ("RayCluster", "RayJob", "ResourceFlavor", "ClusterQueue", "LocalQueue")
"""Kinds that operators bring; the others are Kubernetes' own."""

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


@cache
def built(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send; needs no server."""
    command = ["kubectl", "kustomize", str(ROOT / "infra" / "kuberay" / folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return list(yaml.safe_load_all(text))


def one(folder: str, kind: str) -> dict[str, Any]:
    (found,) = [resource for resource in built(folder) if resource["kind"] == kind]
    return deepcopy(found)


def cluster_spec(folder: str) -> dict[str, Any]:
    if folder in JOBS:
        return one(folder, "RayJob")["spec"]["rayClusterSpec"]
    return one(folder, "RayCluster")["spec"]


def pods(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Specs of all pods, by what they are."""
    spec = cluster_spec(folder)
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    if folder in JOBS:
        yield "submitter", one(folder, "RayJob")["spec"]["submitterPodTemplate"]["spec"]


def pod(folder: str, name: str) -> dict[str, Any]:
    return dict(pods(folder))[name]


def complaints(resource: Mapping[str, Any]) -> list[str]:
    """Hold a resource against the fields that its operator knows."""
    known = yaml.safe_load((ROOT / "tests" / "data" / "kuberay_fields.yaml").read_text())
    schema = {**known["kinds"][resource["kind"]], "$defs": known["$defs"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(resource)]


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_operators_know_every_field(folder: str) -> None:
    for resource in built(folder):
        if resource["kind"] in OWN_KINDS:
            assert complaints(resource) == [], resource["kind"]


def test_kubernetes_knows_every_field_of_its_own_kinds() -> None:
    own = [resource for resource in built("base") if resource["kind"] not in OWN_KINDS]
    for resource in own:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    for folder in ("spot", *JOBS):
        assert all(resource in built(folder) for resource in own), folder


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_kubernetes_takes_every_pod(folder: str) -> None:
    for name, spec in pods(folder):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("spec.workerGroupSpecs.0.minReplica", 1),
        ("spec.workerGroupSpecs.0.minReplicas", "0"),
        ("spec.workerGroupSpecs.0.groupName", "head"),
        ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.autoscalerOptions.version", "v3"),
        ("spec.authOptions.mode", "tokens"),
        ("spec.enableInTreeAutoscaling", "true"),
    ],
)
def test_a_wrong_field_is_found(at: str, value: object) -> None:
    cluster = one("base", "RayCluster")
    inner: Any = cluster
    *path, last = at.split(".")
    for name in path:
        inner = inner[int(name) if name.isdigit() else name]
    inner[last] = value
    assert complaints(cluster) != []


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_rays_autoscaler_reads_the_cluster_as_it_is_meant(folder: str) -> None:
    named = {"metadata": {"name": "droppos", "namespace": "droppos"}, "spec": cluster_spec(folder)}
    types = _derive_autoscaling_config_from_ray_cr(named)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["decode"]["resources"]["CPU"] == 16
    assert types["gpu"]["resources"] | {"memory": 0} == {"CPU": 8, "GPU": 1, "memory": 0}
    for name in ("decode", "gpu"):
        assert types[name]["min_workers"] == 0, name
        assert types[name]["max_workers"] > 0, name


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_no_pod_runs_as_root_or_may_raise_its_rights(folder: str) -> None:
    for name, spec in pods(folder):
        whole = spec["securityContext"]
        assert whole["runAsNonRoot"], name
        assert whole["runAsUser"] == whole["runAsGroup"] == 1000, name
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC", "volumes"} & set(spec), name
        (container,) = spec["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
    sidecar = cluster_spec(folder)["autoscalerOptions"]["securityContext"]
    assert sidecar["allowPrivilegeEscalation"] is False
    labels = one(folder, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_every_pod_has_one_pinned_image_and_says_what_it_needs(folder: str) -> None:
    images = {spec["containers"][0]["image"] for _, spec in pods(folder)}
    assert len(images) == 1
    tag = images.pop().rpartition(":")[2]
    assert tag not in {"", "latest", "droppos"}
    for name, spec in pods(folder):
        resources = spec["containers"][0]["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert {"cpu", "memory"} <= set(resources["limits"]), name


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_ray_asks_for_a_token_and_is_the_version_of_the_lock(folder: str) -> None:
    spec = cluster_spec(folder)
    assert spec["authOptions"] == {"mode": "token"}
    assert f"ray=={spec['rayVersion']}" in (ROOT / "requirements.lock").read_text().splitlines()
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_only_the_head_can_speak_to_kubernetes(folder: str) -> None:
    accounts = {
        resource["metadata"]["name"]: resource
        for resource in built(folder)
        if resource["kind"] == "ServiceAccount"
    }
    for name, spec in pods(folder):
        account = accounts[spec["serviceAccountName"]]
        may = account.get("automountServiceAccountToken", True)
        assert may == (name == "head"), name
    for rule in one(folder, "Role")["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        assert not {"create", "delete", "update"} & set(rule["verbs"])
    assert not any(resource["kind"].startswith("ClusterRole") for resource in built(folder))


def test_only_members_and_the_operator_come_in_and_nobody_reaches_the_metadata() -> None:
    policies = {
        resource["metadata"]["name"]: resource["spec"]
        for resource in built("base")
        if resource["kind"] == "NetworkPolicy"
    }
    members, operator = policies["only-members"], policies["operator-to-head"]
    assert members["podSelector"] == {}
    assert members["ingress"] == [{"from": [{"podSelector": {}}]}]
    (out,) = members["egress"]
    blocks = [to["ipBlock"] for to in out["to"] if "ipBlock" in to]
    assert blocks == [{"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}]
    assert operator["podSelector"] == {"matchLabels": {"ray.io/node-type": "head"}}
    assert operator["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8265}]


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS])
def test_the_queue_takes_the_cluster_at_its_largest(folder: str) -> None:
    kind = "RayJob" if folder in JOBS else "RayCluster"
    metadata = one(folder, kind)["metadata"]
    queue = one(folder, "LocalQueue")
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    # Without it Kueue refuses a cluster that scales by itself.
    assert metadata["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert queue["metadata"]["namespace"] == metadata["namespace"]
    whole = one(folder, "ClusterQueue")
    assert queue["spec"]["clusterQueue"] == whole["metadata"]["name"]
    (group,) = whole["spec"]["resourceGroups"]
    quota = {entry["name"]: entry["nominalQuota"] for entry in group["flavors"][0]["resources"]}
    assert set(quota) == set(group["coveredResources"])
    spec = cluster_spec(folder)
    for resource in ("cpu", "nvidia.com/gpu"):
        asked = sum(
            workers["maxReplicas"]
            * int(
                workers["template"]["spec"]["containers"][0]["resources"]["requests"].get(
                    resource, 0
                )
            )
            for workers in spec["workerGroupSpecs"]
        )
        assert asked <= quota[resource], resource


@pytest.mark.parametrize("folder", JOBS)
def test_a_job_brings_its_own_cluster_and_leaves_none(folder: str) -> None:
    job = one(folder, "RayJob")["spec"]
    assert job["shutdownAfterJobFinishes"] is True
    assert not any(resource["kind"] == "RayCluster" for resource in built(folder))
    standing = "spot" if folder == "job-spot" else "base"
    assert job["rayClusterSpec"] == cluster_spec(standing)


@pytest.mark.parametrize("folder", JOBS)
def test_a_job_is_a_command_that_droppos_takes(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[Recipe, bool]] = []

    def start(recipe: Recipe, *, resume: bool, **_: object) -> None:
        taken.append((recipe, resume))
        raise ConfigError("far enough")

    monkeypatch.setattr("pipelines.pretrain.pretrain", start)
    monkeypatch.setattr("sys.argv", shlex.split(one(folder, "RayJob")["spec"]["entrypoint"]))
    with pytest.raises(SystemExit):
        droppos()
    ((recipe, resume),) = taken
    assert resume  # or a job that is made again would refuse its own run
    assert recipe.run.name == one(folder, "RayJob")["metadata"]["name"]
    gpus = cluster_spec(folder)["workerGroupSpecs"][1]
    assert recipe.run.workers == gpus["maxReplicas"]


def test_spot_differs_from_the_base_in_its_gpus_alone() -> None:
    base, spot = one("base", "RayCluster"), one("spot", "RayCluster")
    groups = {group["groupName"]: group for group in spot["spec"]["workerGroupSpecs"]}
    for group in base["spec"]["workerGroupSpecs"]:
        assert (groups[group["groupName"]] == group) == (group["groupName"] != "gpu")
    base["spec"].pop("workerGroupSpecs")
    spot["spec"].pop("workerGroupSpecs")
    assert spot == base


def test_gpus_are_asked_for_on_spot_machines() -> None:
    gpu = pod("spot", "gpu")
    assert gpu["nodeSelector"] == {"eks.amazonaws.com/capacityType": "SPOT"}
    tolerated = {toleration["key"] for toleration in gpu["tolerations"]}
    assert tolerated == {
        *("nvidia.com/gpu", "eks.amazonaws.com/capacityType"),
        "cloud.google.com/gke-spot",
    }


def prestop() -> str:
    (container,) = pod("spot", "gpu")["containers"]
    shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("bash", "-lc")
    return script


def test_rays_own_command_takes_what_is_asked_before_a_pod_ends() -> None:
    first = prestop().replace("\\\n", " ").splitlines()[0]
    ray, name, *arguments = shlex.split(first)
    assert (ray, name) == ("ray", "drain-node")
    told = drain_node.make_context(name, arguments).params
    assert told["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert told["deadline_remaining_seconds"] < pod("spot", "gpu")["terminationGracePeriodSeconds"]
    # AWS gives two minutes, and the machine needs a few seconds to hear of it.
    assert pod("spot", "gpu")["terminationGracePeriodSeconds"] <= 115


RAYS_OWN = "10 ray::IDLE\n11 ray::DashboardAgent\n12 ray::RuntimeEnvAgent\n"


@pytest.mark.parametrize(
    ("processes", "looks"),
    [
        (["", ""], 1),
        ([RAYS_OWN], 1),
        (
            [f"{RAYS_OWN}13 ray::RayTrainWorker.execute\n", f"{RAYS_OWN}13 ray::train\n", RAYS_OWN],
            3,
        ),
    ],
)
def test_a_pod_that_is_evicted_waits_for_the_run_to_leave_and_no_longer(
    processes: list[str], looks: int, tmp_path: Path
) -> None:
    """Programs in the place of `ray` and `pgrep`: what is on this machine is not in a pod."""
    seen = tmp_path / "looks"
    seen.mkdir()
    for i, text in enumerate(processes):
        (tmp_path / f"processes-{i}").write_text(text)
    programs = {
        "ray": f'echo "$@" > {tmp_path}/drained',
        "pgrep": f"n=$(ls {seen} | wc -l); touch {seen}/$n; cat {tmp_path}/processes-$n",
        "sleep": ":",
    }
    for name, body in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_ADDRESS": "head:6379"}
    # Without -l, which would read the PATH of this machine's profile.
    subprocess.run(["bash", "-c", prestop()], env=environment, check=True, timeout=60)
    assert "--address head:6379" in (tmp_path / "drained").read_text()
    assert len(list(seen.iterdir())) == looks
