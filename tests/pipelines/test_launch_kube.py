"""Launching on Kubernetes: the real kubectl against a stand-in for the API server."""

import base64
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from droppos.config import Compute, Optim
from droppos.errors import ConfigError
from pipelines.launch import manifest
from pipelines.launch.check import Check, Look, Wrong, look
from pipelines.launch.errors import LaunchError
from pipelines.launch.kube import Kube
from pipelines.launch.record import Record, begin
from pipelines.recipe import Data, Recipe, Run, Search
from tests.jobs_server import JobsApi
from tests.kube_api import KubeApi, kube_api

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

RECIPE = Recipe(
    optim=Optim(global_batch=64),
    compute=Compute(device="cuda"),
    data=Data(path="file:///data"),
    run=Run(name="vit", storage="s3://b/runs", workers=8, cpus_per_worker=2),
)


def group(name: str, cpu: Any, gpus: int = 0, **said: Any) -> dict[str, Any]:
    limits = {"cpu": cpu, "memory": "8Gi", **({"nvidia.com/gpu": gpus} if gpus else {})}
    container = {
        "name": "ray",
        "image": "registry.local/droppos:v1",
        "resources": {"limits": limits},
    }
    return {
        **({"groupName": name} if name != "head" else {}),
        "rayStartParams": {"num-cpus": "0"} if name == "head" else {},
        "template": {"spec": {"containers": [container]}},
        **said,
    }


OBJECTS = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "droppos"}},
    {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "droppos-head", "namespace": "droppos"},
    },
    {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "droppos", "namespace": "droppos"},
        "spec": {
            "authOptions": {"mode": "token"},
            "headGroupSpec": group("head", 2),
            "workerGroupSpecs": [
                group("decode", "15500m", minReplicas=0, maxReplicas=4),
                group("gpu", 8, 1, minReplicas=0, maxReplicas=8),
            ],
        },
    },
]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    monkeypatch.setenv("DROPPOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))  # where kubectl keeps what it has discovered
    with kube_api(tmp_path) as (api, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        yield api


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump_all(OBJECTS))
    return file


def backend(source: Path, **changes: Any) -> Kube:
    record = replace(Record(name="vit", on="kube", source=str(source)), **changes)
    record.folder.mkdir(parents=True, exist_ok=True)
    return Kube(record)


def looked(kube: Kube, recipe: Recipe = RECIPE, at_once: int = 1) -> dict[str, Check]:
    places = Look("places", lambda: "all in s3")
    return {check.what: check for check in look([places, *kube.looks(recipe, at_once)])}


def test_all_is_well_where_kuberay_is_and_we_may(api: KubeApi, source: Path) -> None:
    checks = looked(backend(source))
    assert {what: c.state for what, c in checks.items() if c.state != "ok"} == {}
    assert checks["Kubernetes"].found == "v1.32.4"
    assert "registry.local/droppos:v1" in checks["manifest"].found
    assert "needs 8 x gpu" in checks["recipe's fit"].found


def test_trials_that_fit_one_by_one_and_not_together_are_refused(
    api: KubeApi, source: Path
) -> None:
    small = replace(RECIPE, run=replace(RECIPE.run, workers=2))
    search = replace(small, search=Search(space=("method.sigma=grid(0, 1)",), algorithm="grid"))
    assert looked(backend(source), search, 2)["recipe's fit"].state == "ok"
    check = looked(backend(source), search, 9)["recipe's fit"]
    assert check.state == "wrong" and "search.max_concurrent to" in check.way_out


def test_no_kuberay_no_rights_and_no_image_are_told_together(api: KubeApi, source: Path) -> None:
    api.forbidden = {"create", "delete"}
    unfilled = source.read_text().replace("registry.local", "registry.example.org")
    source.write_text(unfilled)
    too_large = replace(RECIPE, run=replace(RECIPE.run, workers=16))
    checks = looked(backend(source), too_large)
    assert (
        checks["manifest"].state == "wrong" and "registry.example.org" in checks["manifest"].found
    )
    source.write_text(unfilled.replace("registry.example.org", "registry.local"))
    checks = looked(backend(source), too_large)
    assert "may not create, delete" in checks["rights"].found
    assert "run.workers to" in checks["recipe's fit"].way_out
    api.kuberay = False
    shutil.rmtree(Path.home() / ".kube", ignore_errors=True)
    assert "no rayclusters.ray.io" in looked(backend(source))["KubeRay"].found


def test_a_context_that_does_not_answer_is_told(
    api: KubeApi, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = (tmp_path / "kubeconfig").read_text().replace("127.0.0.1", "127.0.0.1:1#")
    (tmp_path / "gone").write_text(gone)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "gone"))
    checks = looked(backend(source))
    assert checks["Kubernetes"].state == "wrong" and "--context" in checks["Kubernetes"].way_out
    assert checks["rights"].state == "left out"


def test_up_makes_the_cluster_and_what_is_missing_and_down_ends_the_cluster_alone(
    api: KubeApi, source: Path
) -> None:
    api.answer("POST", "/api/v1/namespaces", {**OBJECTS[0], "metadata": {"name": "droppos"}})
    kube, said = backend(source), list[str]()
    kube.up(said.append)
    assert set(api.named("RayCluster")) == {"vit"}
    assert api.named("RayCluster")["vit"]["spec"] == OBJECTS[2]["spec"]
    assert "made ServiceAccount droppos-head" in said
    assert not any("Namespace" in each for each in said)  # it was there, and is left as it is
    assert "RayCluster vit in droppos" in looked(backend(source))["name"].found
    kube.up(said.append)  # again, as after a crash
    assert kube.down(said.append) == []
    assert not api.named("RayCluster") and api.named("ServiceAccount")
    assert kube.down(said.append) == []


def test_a_pod_that_stays_is_named(
    api: KubeApi, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.launch.kube.DELETE_S", 0.1)
    monkeypatch.setattr("pipelines.launch.kube.LOOK_AGAIN_S", 0.1)
    api.stuck = ["vit-gpu-x"]
    assert backend(source).down(print) == ["pod/vit-gpu-x"]


def test_a_cluster_is_ended_where_it_was_made_whatever_has_changed_since(
    api: KubeApi, source: Path, tmp_path: Path
) -> None:
    made = backend(source)
    made.up(print)
    assert made.place() == {"context": "team", "namespace": "droppos"}
    config = tmp_path / "kubeconfig"
    config.write_text(config.read_text().replace("current-context: team", "current-context: my"))
    assert made._forward(1)[1] == "--context=team"  # in mid-launch, too
    source.unlink()
    later = backend(source, phase="submitted", **made.place())
    assert later.down(print) == [] and not api.named("RayCluster")
    with pytest.raises(ConfigError, match="--namespace"):
        backend(source).down(print)


def test_without_a_namespace_in_the_manifest_the_contexts_is_taken(
    api: KubeApi, source: Path, tmp_path: Path
) -> None:
    source.write_text(source.read_text().replace("namespace: droppos", "annotations: {}"))
    assert backend(source).place()["namespace"] == "default"
    config = tmp_path / "kubeconfig"
    config.write_text(
        config.read_text()
        .replace("cluster: team,", "")
        .replace("    cluster: team\n", "    cluster: team\n    namespace: mine\n")
    )
    assert backend(source).place()["namespace"] == "mine"


def test_only_a_cluster_that_was_kept_here_is_taken_for_ours(api: KubeApi, source: Path) -> None:
    backend(source).up(print)
    kept = begin(Record(name="vit", on="kube", keep=True, context="team", namespace="droppos"))
    for others in (kept.at("ended"), kept.at("up", namespace="another")):
        others.save()
        with pytest.raises(Wrong, match="has not kept"):
            backend(source)._is_free()
    kept.at("up")
    assert "which was kept" in backend(source)._is_free()


def test_a_kept_cluster_is_used_again_only_when_it_is_idle(
    api: KubeApi, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = JobsApi()
    for name, state in {"theirs": "RUNNING"}.items():
        jobs.add(name, state)
    monkeypatch.setattr(Kube, "address", lambda self: jobs.address())  # in place of kubectl's way
    assert "no cluster" in backend(source)._is_idle()
    backend(source).up(print)
    with pytest.raises(Wrong, match="theirs, still running"):
        backend(source)._is_idle()
    jobs.jobs["theirs"]["status"] = "FAILED"
    assert "none runs" in backend(source)._is_idle()


def test_another_namespace_takes_the_cluster_alone(api: KubeApi, source: Path) -> None:
    backend(source, namespace="mine").up(print)
    assert list(api.objects) == ["/apis/ray.io/v1/namespaces/mine/rayclusters/vit"]


def test_the_token_that_kuberay_made_is_read_and_the_heads_service_is_forwarded(
    api: KubeApi, source: Path
) -> None:
    kube = backend(source)
    kube.up(print)
    secret = {"auth_token": base64.b64encode(b"of the cluster").decode()}
    made = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "vit"}, "data": secret}
    api.answer("POST", "/api/v1/namespaces/droppos/secrets", made)
    assert kube._token() == "of the cluster"
    words = ["port-forward", "service/vit-head-svc", "4711:8265"]
    assert kube._forward(4711) == ["kubectl", "--context=team", "--namespace=droppos", *words]
    kube.down(print)
    with pytest.raises(LaunchError, match="not found"), kube.address():
        pass


def test_a_folder_is_built_by_kustomize(api: KubeApi, source: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.move(source, base / "cluster.yaml")
    (base / "kustomization.yaml").write_text("namespace: elsewhere\nresources: [cluster.yaml]\n")
    assert backend(base)._manifest.namespace == "elsewhere"


@pytest.mark.parametrize("count", [0, 2])
def test_a_manifest_must_have_one_ray_cluster(count: int) -> None:
    text = yaml.safe_dump_all([OBJECTS[0], *[OBJECTS[2]] * count])
    with pytest.raises(ConfigError, match=f"{count} objects of kind RayCluster"):
        manifest.read(text, "here", "vit", None)


def test_pods_are_counted_as_kuberay_tells_ray() -> None:
    read = manifest.read(yaml.safe_dump_all(OBJECTS), "here", "vit", None)
    sizes = {pods.name: (pods.cpus, pods.gpus, pods.most) for pods in read.pods}
    assert sizes == {"head": (0, 0, 1), "decode": (16, 0, 4), "gpu": (8, 1, 8)}
    with pytest.raises(Wrong, match="ServiceAccount x"):
        other = {
            "kind": "ServiceAccount",
            "metadata": {"name": "x", "annotations": {"r": "CHANGE"}},
        }
        manifest.check_filled(replace(read, others=[other]))
