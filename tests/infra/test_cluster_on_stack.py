"""cluster.yaml and the account's stack agree: what the one asks for, the other allows, and no more.

The stack is deployed into a mock of AWS, the file filled from its outputs, and every request for a
machine that Ray would then make on the head is held against the policies of the head's role.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from pipelines.spot_first import MARKET
from tests.infra.rights import EC2, IAM, allowed, refused, statements
from tests.infra.stacks import ACCOUNT, REGION, Stack, deploy, template, unknown_kinds_are_left_out

pytestmark = unknown_kinds_are_left_out

CONFIG = yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text())
HEAD = CONFIG["head_node_type"]
WORKERS = sorted(set(CONFIG["available_node_types"]) - {HEAD})
CLUSTERS = (CONFIG["cluster_name"], f"{CONFIG['cluster_name']}-vit-base-imagenet")
"""By hand, and as `droppos launch` calls it."""


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    with mock_aws():
        yield deploy("account.yaml", ACCOUNT)


@pytest.fixture(scope="module")
def head(account: Stack) -> list[Any]:
    """Rights of the head, on which the autoscaler runs."""
    return statements(account.outputs["HeadProfile"])


def filled(kind: str, outputs: Mapping[str, str]) -> dict[str, Any]:
    """A node type's machine, with the stack's names where the file says CHANGE."""
    role = "Head" if kind == HEAD else "Worker"
    return CONFIG["available_node_types"][kind]["node_config"] | {
        "SubnetIds": outputs["SubnetIds"].split(","),
        "SecurityGroupIds": [outputs[f"{role}SecurityGroupId"]],
        "IamInstanceProfile": {"Name": outputs[f"{role}Profile"]},
        "KeyName": outputs["KeyName"],
    }


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("kind", WORKERS)
def test_the_head_may_start_every_kind_of_worker(
    kind: str, cluster: str, account: Stack, head: list[Any]
) -> None:
    assert refused(head, filled(kind, account.outputs), cluster) == set()


def test_the_head_may_buy_on_demand_what_is_sold_out_on_spot(
    account: Stack, head: list[Any]
) -> None:
    machines = [filled(kind, account.outputs) for kind in WORKERS]
    bought = [machine for machine in machines if machine.pop(MARKET, None)]
    assert bought
    assert all(refused(head, machine, CLUSTERS[0]) == set() for machine in bought)


def test_the_head_may_start_no_other_head(account: Stack, head: list[Any]) -> None:
    outputs = account.outputs
    assert refused(head, filled(HEAD, outputs), CLUSTERS[0]) == {
        f"{EC2}:instance/*",
        f"{EC2}:security-group/{outputs['HeadSecurityGroupId']}",
        f"{IAM}:role/{outputs['HeadProfile']}",
    }


@pytest.mark.parametrize("kind", WORKERS)
def test_no_worker_comes_up_with_the_rights_or_the_open_port_of_the_head(
    kind: str, account: Stack, head: list[Any]
) -> None:
    worker, outputs = filled(kind, account.outputs), account.outputs
    as_head = worker | {"IamInstanceProfile": {"Name": outputs["HeadProfile"]}}
    assert refused(head, as_head, CLUSTERS[0])
    for groups in ("HeadSecurityGroupId",), ("HeadSecurityGroupId", "WorkerSecurityGroupId"):
        reachable = worker | {"SecurityGroupIds": [outputs[group] for group in groups]}
        assert refused(head, reachable, CLUSTERS[0])


def test_the_head_starts_no_worker_of_another_cluster_or_with_the_old_metadata_service(
    account: Stack, head: list[Any]
) -> None:
    for kind in WORKERS:
        worker = filled(kind, account.outputs)
        assert refused(head, worker, "another")
        assert refused(head, worker | {"MetadataOptions": {"HttpTokens": "optional"}}, CLUSTERS[0])


def test_a_worker_starts_nothing(account: Stack) -> None:
    worker = statements(account.outputs["WorkerProfile"])
    assert f"{EC2}:instance/*" in refused(worker, filled(WORKERS[0], account.outputs), CLUSTERS[0])


def test_the_head_ends_the_clusters_machines_and_no_others(head: list[Any]) -> None:
    def may_end(tags: Mapping[str, str]) -> bool:
        carried = {f"aws:ResourceTag/{name}": value for name, value in tags.items()}
        return allowed(head, "ec2:TerminateInstances", f"{EC2}:instance/i-1", carried)

    assert all(may_end({"ray-cluster-name": cluster}) for cluster in CLUSTERS)
    assert not may_end({"ray-cluster-name": "another"})
    assert not may_end({"Name": CLUSTERS[0]})
    assert not may_end({})


def test_ssh_from_outside_reaches_the_head_and_no_worker(account: Stack) -> None:
    ec2 = boto3.client("ec2", REGION)

    def from_outside(kind: str) -> list[tuple[int, int, str]]:
        groups = filled(kind, account.outputs)["SecurityGroupIds"]
        return [
            (rule["FromPort"], rule["ToPort"], source["CidrIp"])
            for group in ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"]
            for rule in group["IpPermissions"]
            for source in rule["IpRanges"]
        ]

    assert from_outside(HEAD) == [(22, 22, ACCOUNT["AdminCidr"])]
    assert [from_outside(kind) for kind in WORKERS] == [[]] * len(WORKERS)


def test_machines_get_the_addresses_that_they_are_reached_by(account: Stack) -> None:
    """Public ones: without, `ray up` waits for the head's for ever."""
    assert CONFIG["provider"]["use_internal_ips"] is False
    given = set(account.outputs["SubnetIds"].split(","))
    resources = template("account.yaml")["Resources"]
    subnets = [resources[name] for name, made in account.made.items() if made in given]
    assert len(subnets) == 3
    assert all(subnet["Properties"]["MapPublicIpOnLaunch"] is True for subnet in subnets)


def test_the_files_names_are_those_of_a_stack_with_the_usual_name(account: Stack) -> None:
    outputs = account.outputs
    for kind, node in CONFIG["available_node_types"].items():
        named, from_stack = node["node_config"], filled(kind, outputs)
        assert named["IamInstanceProfile"] == from_stack["IamInstanceProfile"]
        assert named["KeyName"] == from_stack["KeyName"]
    repository = outputs["ImageRepository"].partition("/")[2]
    assert CONFIG["docker"]["image"].partition("/")[2].startswith(f"{repository}@sha256:")
    assert (
        CONFIG["cluster_name"] == template("account.yaml")["Parameters"]["ClusterName"]["Default"]
    )
