"""cluster.yaml, filled from the account: what a person would otherwise do at each CHANGE."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from droppos.errors import ConfigError
from pipelines.launch.stack import Stack
from pipelines.launch.token import token_file

AMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""Public parameter of the newest image with drivers and Docker, when the file names no other."""
RESOLVE = "resolve:ssm:"
TOKEN = ".ray/auth_token"
"""Where a machine keeps the cluster's token, below its home."""
_UNFILLED = re.compile(r"CHANGE|(?:ami|subnet|sg|vpc)-0{8}|\b0{12}\b|sha256:0{64}|s3://BUCKET\b")


@dataclass(frozen=True, slots=True)
class Facts:
    """What goes into the file."""

    name: str
    """Of the cluster."""
    region: str
    stack: Stack
    zones: tuple[str, ...]
    """Of the subnets."""
    image: str
    """Repository and digest."""
    ami: str | None
    """Of the machines, where the file leaves it to a parameter or to us."""
    ends_itself: bool = False
    """Whether its head is to end it when nobody follows its jobs any more."""


def read(file: Path) -> dict[str, Any]:
    """Read a file for Ray's cluster launcher.

    Raises:
        ConfigError: If there is none, or it is not one.
    """
    try:
        loaded = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); run this in the clone, or give --cluster"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    needed = {"provider", "auth", "head_node_type", "available_node_types"}
    if not isinstance(loaded, dict) or not needed <= loaded.keys():
        raise ConfigError(
            f"{file} is no file for Ray's cluster launcher, which has {', '.join(sorted(needed))}"
        )
    _check_types(loaded, file)
    head = loaded["available_node_types"][loaded["head_node_type"]]
    if "InstanceType" not in head["node_config"]:
        raise ConfigError(
            f"{file}: the head's node_config has no InstanceType, so its machines are not EC2's; "
            "bring another cloud's cluster up by `ray up`, and use it by --on ADDRESS"
        )
    # Anchors share one object among types; what is filled in must not reach through it.
    return json.loads(json.dumps(loaded))


def _check_types(loaded: Mapping[str, Any], file: Path) -> None:
    """See that what a launch reads of a file is of the form that Ray's launcher takes."""

    def mapping(value: Any, place: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(
                f"{file}: {place} must be a mapping, got {value!r}; see Ray's cluster YAML "
                "reference, or the cluster.yaml of the clone"
            )
        return value

    for part in ("provider", "auth"):
        mapping(loaded[part], part)
    types = mapping(loaded["available_node_types"], "available_node_types")
    for name, kind in types.items():
        place = f"available_node_types.{name}"
        mapping(mapping(kind, place).get("node_config"), f"{place}.node_config")
    if loaded["head_node_type"] not in types:
        raise ConfigError(
            f"{file}: head_node_type must be one of available_node_types "
            f"({', '.join(map(str, types))}), got {loaded['head_node_type']!r}; correct its name"
        )


def key_of(config: Mapping[str, Any]) -> Path:
    """Find the private key of a file's machines."""
    return Path(config["auth"].get("ssh_private_key", "~/.ssh/droppos.pem")).expanduser()


def fill(config: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """Put the account's names into a file.

    Args:
        config: As :func:`read` gives it; it is left as it is.
        facts: Of the account.
    """
    filled = json.loads(json.dumps(config))
    before = filled["provider"].get("region", "us-east-1")
    filled["cluster_name"] = facts.name
    filled["provider"]["region"] = facts.region
    # ssh takes ~ for the user's home, whatever HOME says.
    filled["auth"]["ssh_private_key"] = str(key_of(config))
    filled["file_mounts"] = {
        there: str(token_file()) if there.endswith(TOKEN) else here
        for there, here in filled.get("file_mounts", {}).items()
    }
    if "availability_zone" in filled["provider"]:
        filled["provider"]["availability_zone"] = ",".join(facts.zones)
    for name, kind in filled["available_node_types"].items():
        role = "Head" if name == filled["head_node_type"] else "Worker"
        _fill_machine(kind["node_config"], role, facts)
    for of_type in (filled, *filled["available_node_types"].values()):
        if "docker" in of_type:
            of_type["docker"]["image"] = facts.image
            options = of_type["docker"].get("run_options", [])
            of_type["docker"]["run_options"] = [
                _moved(option, before, facts.region) for option in options
            ]
    registry = facts.image.partition("/")[0]
    filled["initialization_commands"] = [
        re.sub(r"\S+\.dkr\.ecr\.\S+", registry, _moved(command, before, facts.region))
        for command in filled.get("initialization_commands", [])
    ]
    if secret := facts.stack.outputs.get("MlflowSecretArn"):
        # On the head alone, where the jobs' drivers are, and which alone may read the secret.
        login = shlex.join(["python", "-m", "pipelines.launch.mlflow_login", secret, facts.region])
        filled["head_setup_commands"] = [*filled.get("head_setup_commands", []), login]
    if facts.ends_itself:
        filled["head_start_ray_commands"] = [
            *filled["head_start_ray_commands"],
            caretaker(facts.name, facts.region),
        ]
    return filled


def caretaker(cluster: str, region: str) -> str:
    """Write the command that has a head end its cluster when nobody follows its jobs."""
    care = shlex.join(["python", "-m", "pipelines.launch.caretaker", cluster, region])
    # In a session of its own, or it ends with the ssh that started it.
    return f"nohup setsid {care} >> ~/caretaker.log 2>&1 < /dev/null &"


def _fill_machine(machine: dict[str, Any], role: str, facts: Facts) -> None:
    outputs = facts.stack.outputs
    machine["SubnetIds"] = facts.stack.subnets(role)
    machine["SecurityGroupIds"] = [facts.stack.group(role)]
    machine["IamInstanceProfile"] = {"Name": outputs[f"{role}Profile"]}
    machine["KeyName"] = outputs["KeyName"]
    if facts.ami is not None and leaves_ami(machine):
        machine["ImageId"] = facts.ami


def _moved(text: str, before: str, region: str) -> str:
    """Name another region in a command."""
    return re.sub(rf"(?<![\w-]){re.escape(before)}(?![\w-])", region, text)


def falls_back(config: Mapping[str, Any]) -> bool:
    """Tell whether a spot machine that cannot be had is bought on demand."""
    return config["provider"].get("module", "").endswith(".SpotFirst")


def leaves_ami(machine: Mapping[str, Any]) -> bool:
    """Tell whether a machine's image is to be looked up."""
    image = str(machine.get("ImageId", ""))
    return not image or image.startswith(RESOLVE) or _UNFILLED.search(image) is not None


def ami_parameter(config: Mapping[str, Any]) -> str | None:
    """Name the public parameter of the machines' image; None if the file names the image itself."""
    for kind in config["available_node_types"].values():
        if leaves_ami(kind["node_config"]):
            image = str(kind["node_config"].get("ImageId", ""))
            return image.removeprefix(RESOLVE) if image.startswith(RESOLVE) else AMI
    return None


def unfilled(config: Mapping[str, Any]) -> list[str]:
    """Name the places where something is still to be filled in, with what stands there."""
    return [
        f"{place}: {value}"
        for place, value in _values(config)
        if isinstance(value, str) and _UNFILLED.search(value)
    ]


def _values(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _values(inner, f"{place}[{index}]")
    else:
        yield place, value


def to_yaml(config: Mapping[str, Any]) -> str:
    """Write a filled file."""
    return yaml.safe_dump(dict(config), sort_keys=False, width=100)
