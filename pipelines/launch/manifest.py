"""A RayCluster among Kubernetes manifests: named after a launch, and read as machines."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from droppos.errors import ConfigError
from pipelines.launch.check import Wrong
from pipelines.machines import Cluster, Limits, Machine, cluster_of

GPU = "nvidia.com/gpu"
_UNFILLED = re.compile(r"CHANGE|example\.(?:org|com)|\b(?:0{12}|123456789012)\b")


@dataclass(frozen=True, slots=True)
class Pods:
    """Pods of one kind."""

    name: str
    cpus: int
    gpus: int
    standing: int
    most: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is applied for one launch."""

    source: str
    ray_cluster: Mapping[str, Any]
    others: Sequence[Mapping[str, Any]]
    """What the cluster stands on: namespace, accounts, policies, queues."""

    @property
    def namespace(self) -> str | None:
        """Of the cluster; None leaves it to kubectl's context."""
        return self.ray_cluster["metadata"].get("namespace")

    @property
    def pods(self) -> list[Pods]:
        """Its pods, the head's first."""
        spec = self.ray_cluster["spec"]
        head = _pods("head", spec["headGroupSpec"], 1, 1)
        return [
            head,
            *(
                _pods(
                    group["groupName"], group, group.get("minReplicas", 0), group.get("maxReplicas")
                )
                for group in spec.get("workerGroupSpecs", [])
            ),
        ]

    @property
    def cluster(self) -> Cluster:
        """As `droppos pretrain` sees it, before anything has grown."""
        head, *groups = self.pods
        kinds = tuple(
            Machine(pods.name, {"CPU": pods.cpus, "GPU": pods.gpus}, pods.most) for pods in groups
        )
        return cluster_of([Machine("head", {"CPU": head.cpus})], [], Limits(kinds))


def read(text: str, source: str, name: str, namespace: str | None) -> Manifest:
    """Find the RayCluster, and name it after the launch.

    Args:
        text: YAML of one or more objects.
        source: Where it comes from, for errors.
        name: Of the launch.
        namespace: Of all of it, in place of its own. What else the manifest has is left out then.

    Raises:
        ConfigError: If there is no RayCluster, or more than one.
    """
    try:
        # Anchors share objects; what is changed below must not reach through them.
        objects = json.loads(json.dumps([each for each in yaml.safe_load_all(text) if each]))
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{source} is not a Kubernetes manifest: {error}") from error
    for number, each in enumerate(objects, 1):
        if not isinstance(each, dict) or not isinstance(each.get("metadata"), dict):
            raise ConfigError(
                f"{source}: object {number} must be a mapping with kind and metadata, as kubectl "
                f"takes it, got {_shortly(each)}; put --- between objects, not a list around them"
            )
    clusters = [each for each in objects if each.get("kind") == "RayCluster"]
    if len(clusters) != 1:
        raise ConfigError(
            f"{source} has {len(clusters)} objects of kind RayCluster, expected 1; give --cluster "
            "a manifest, or a folder for kustomize such as infra/kuberay/base"
        )
    (cluster,) = clusters
    _check_groups(cluster, source)
    cluster["metadata"]["name"] = name
    if namespace is not None:
        cluster["metadata"]["namespace"] = namespace
        return Manifest(source, cluster, [])
    return Manifest(source, cluster, [each for each in objects if each is not cluster])


def _check_groups(cluster: Mapping[str, Any], source: str) -> None:
    """See that each group of a RayCluster has a pod with a container.

    Raises:
        ConfigError: Naming the group.
    """
    spec = cluster.get("spec")
    spec = spec if isinstance(spec, dict) else {}
    groups: dict[str, Any] = {"headGroupSpec": spec.get("headGroupSpec")}
    workers = spec.get("workerGroupSpecs") or []
    workers = workers if isinstance(workers, list) else [workers]
    groups |= {f"workerGroupSpecs[{index}]": group for index, group in enumerate(workers)}
    for place, group in groups.items():
        try:
            complete = isinstance(group["template"]["spec"]["containers"][0], dict)
        except (KeyError, IndexError, TypeError):
            complete = False
        if not complete:
            raise ConfigError(
                f"{source}: spec.{place} of the RayCluster must have "
                f"template.spec.containers with one at least, got {_shortly(group)}; "
                "infra/kuberay/base has an example"
            )
        if place != "headGroupSpec" and "groupName" not in group:
            raise ConfigError(
                f"{source}: spec.{place} of the RayCluster has no groupName; give it one"
            )


def _shortly(value: Any) -> str:
    return "nothing" if value is None else textwrap.shorten(repr(value), 80)


def check_filled(manifest: Manifest) -> str:
    """See that nothing stands there that somebody should have changed.

    Raises:
        Wrong: Naming the places.
    """
    objects = [manifest.ray_cluster, *manifest.others]
    left = [
        f"{each['kind']} {each['metadata']['name']}: {place} is {value}"
        for each in objects
        for place, value in _texts(each)
        if _UNFILLED.search(value)
    ]
    if left:
        raise Wrong(
            "; ".join(left), "your own image and names", f"write them into {manifest.source}"
        )
    images = sorted({value for place, value in _texts(manifest.ray_cluster) if place == "image"})
    return f"{manifest.source}, image {', '.join(images)}"


def head_is_ready(cluster: Mapping[str, Any]) -> bool:
    """Tell from a RayCluster's status whether its head serves."""
    status = cluster.get("status", {})
    conditions = {each["type"]: each["status"] for each in status.get("conditions", [])}
    return conditions.get("HeadPodReady") == "True" or status.get("state") == "ready"


def head_service(cluster: Mapping[str, Any], name: str) -> str:
    """Name the service of a RayCluster's head."""
    return cluster.get("status", {}).get("head", {}).get("serviceName") or f"{name}-head-svc"


def _pods(name: str, group: Mapping[str, Any], standing: int, most: int | None) -> Pods:
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    said = group.get("rayStartParams", {}).get("num-cpus")
    cpus = int(said) if said is not None else _cpus(limits.get("cpu", 0))
    # Without a limit of its own, KubeRay takes a group to have no more than stand.
    bound = group.get("replicas", standing) if most is None else most
    return Pods(name, cpus, int(limits.get(GPU, 0)), standing, bound)


def _cpus(said: Any) -> int:
    """Read Kubernetes' CPUs, rounded up as KubeRay tells them to Ray: 1500m are 2."""
    text = str(said)
    return -(-int(text[:-1]) // 1000) if text.endswith("m") else -int(-float(text) // 1)


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """List the texts of an object, each with the name of its field."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, place)
    elif isinstance(value, str):
        yield place, value
