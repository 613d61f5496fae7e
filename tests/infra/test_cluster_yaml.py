"""cluster.yaml: what Ray and EC2 would say of it, without either."""

import os
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines import recipe_file

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def ec2_complaints(node_config: dict[str, Any]) -> str:
    """Hold a node's settings against the shape of RunInstances, as botocore does before it sends.

    SubnetIds is Ray's: it sends one of them at a time.
    """
    ec2 = botocore.session.get_session().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    request = {**node_config, "MinCount": 1, "MaxCount": 1}
    request["SubnetId"] = request.pop("SubnetIds")[0]
    return ParamValidator().validate(request, shape).generate_report()


def test_ray_takes_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_ec2_takes_every_machine(config: dict[str, Any]) -> None:
    for name, node in config["available_node_types"].items():
        assert ec2_complaints(node["node_config"]) == "", name


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("max_workers", "many"),
        ("idle_timeout", 5),
        ("head_node_type", "haed"),
        ("available_node_types.gpu.min_worker", 0),
        ("available_node_types.head.resources.CPU", -1),
    ],
)
def test_ray_refuses_what_is_wrong(config: dict[str, Any], at: str, value: object) -> None:
    *path, last = at.split(".")
    inner = config
    for name in path:
        inner = inner[name]
    inner[last] = value
    with pytest.raises((ValidationError, ValueError)):
        validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("InstanceMarketOptions", {"SpotOption": {}}, "Unknown parameter in InstanceMarketOptions"),
        ("InstanceTyp", "g6e.2xlarge", "Unknown parameter in input"),
        ("SecurityGroupIds", "sg-1", "Invalid type for parameter SecurityGroupIds"),
    ],
)
def test_ec2_refuses_what_is_wrong(
    config: dict[str, Any], field: str, value: object, complaint: str
) -> None:
    machine = deepcopy(config["available_node_types"]["gpu"]["node_config"])
    assert complaint in ec2_complaints({**machine, field: value})


def test_nothing_runs_on_the_head_and_nothing_else_stays(config: dict[str, Any]) -> None:
    nodes = dict(config["available_node_types"])
    head = nodes.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert all(node["min_workers"] == 0 for node in nodes.values())
    assert sum(node["max_workers"] for node in nodes.values()) == config["max_workers"]
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert config["provider"]["cache_stopped_nodes"] is False


def test_only_the_head_is_in_the_group_that_ssh_reaches(config: dict[str, Any]) -> None:
    nodes = dict(config["available_node_types"])
    head = nodes.pop(config["head_node_type"])["node_config"]
    for node in nodes.values():
        machine = node["node_config"]
        assert not set(machine["SecurityGroupIds"]) & set(head["SecurityGroupIds"])
        assert machine["IamInstanceProfile"] != head["IamInstanceProfile"]


def test_ray_speaks_to_nobody_without_the_token(config: dict[str, Any]) -> None:
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_the_image_is_pinned_by_its_digest(config: dict[str, Any]) -> None:
    assert "@sha256:" in config["docker"]["image"]


def test_every_worker_watches_for_the_notice_of_its_end(config: dict[str, Any]) -> None:
    (watcher,) = [c for c in config["worker_start_ray_commands"] if "watch-spot" in c]
    assert watcher.startswith("nohup setsid ")  # or it ends with the ssh that started it


def test_a_machine_without_ray_ends_itself(config: dict[str, Any], tmp_path: Path) -> None:
    """With stand-ins for a machine's programs, and a minute of no time."""
    machines = [node["node_config"] for node in config["available_node_types"].values()]
    assert {node["InstanceInitiatedShutdownBehavior"] for node in machines} == {"terminate"}
    (boots,) = {node["UserData"] for node in machines}
    said = tmp_path / "said"
    programs = {
        "systemd-run": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "sleep": f"echo slept >> {said}",
        # Ray runs in the third look, and never again.
        "pgrep": f'[ "$*" = "-x raylet" ] && [ $(wc -l < {said}) = 3 ]',
        "poweroff": f"echo off >> {said}; kill $PPID",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "boots").write_text(boots)  # as root, once
    assert boots.startswith("#!/bin/sh\n")
    subprocess.run(["sh", tmp_path / "boots"], env=path, timeout=60, check=False)  # it is off
    assert said.read_text().split() == ["slept"] * 33 + ["off"]


def test_machines_are_closed(config: dict[str, Any]) -> None:
    for node in config["available_node_types"].values():
        machine = node["node_config"]
        assert machine["SecurityGroupIds"]
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"])
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert not any("0.0.0.0" in command for command in starts)


@pytest.mark.parametrize("name", ["vit_base_imagenet", "vit_large_imagenet"])
def test_the_shipped_recipes_fit(config: dict[str, Any], name: str) -> None:
    recipe = recipe_file.read(name)
    nodes = config["available_node_types"].values()
    gpus = sum(n["resources"].get("GPU", 0) * n.get("max_workers", 1) for n in nodes)
    cpus = sum(n["resources"].get("CPU", 0) * n.get("max_workers", 1) for n in nodes)
    assert recipe["run"]["workers"] <= gpus
    assert recipe["run"]["workers"] * recipe["run"]["cpus_per_worker"] < cpus
