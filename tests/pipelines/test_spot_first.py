"""A spot machine that can't be had is bought on demand; everything else stays as Ray has it."""

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import node_provider, utils
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_NODE_KIND

from pipelines.spot_first import SpotFirst
from tests.infra.test_cluster_yaml import FILE

REGION = "us-east-1"
SPOT = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
SOLD_OUT = "InsufficientInstanceCapacity"
WORKER = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
EVENT = "provide-client-params.ec2.RunInstances"


@pytest.fixture
def subnets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(node_provider, "BOTO_CREATE_MAX_RETRIES", 1)  # as cluster.yaml has it
    with mock_aws():
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        answer = boto3.client("ec2", REGION).describe_subnets()
        yield [subnet["SubnetId"] for subnet in answer["Subnets"]][:2]


def provider(*sold_out: tuple[str, str], refusal: str = SOLD_OUT) -> tuple[Any, list[Any]]:
    """Make cluster.yaml's provider, and a list of the requests that it sends.

    Args:
        sold_out: Markets and subnets in which EC2 refuses.
        refusal: What it says then.
    """
    config = yaml.safe_load(FILE.read_text())["provider"] | {"region": REGION}
    made = _get_node_provider(config, "droppos")
    assert isinstance(made, SpotFirst)
    asked: list[tuple[str, str]] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        market = "spot" if "InstanceMarketOptions" in params else "on-demand"
        asked.append((market, params["SubnetId"]))
        if asked[-1] in sold_out:
            raise refused(refusal)

    events = made.ec2_fail_fast.meta.client.meta.events
    events.unregister(EVENT, unique_id=EVENT)  # Ray keeps its clients while the process lives
    events.register(EVENT, note, unique_id=EVENT)
    return made, asked


def refused(code: str) -> Exception:
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code, "Message": "said EC2"}}, "RunInstances")


def machine(subnets: list[str], **also: object) -> dict[str, Any]:
    return {
        "InstanceType": "g6e.2xlarge",
        "ImageId": "ami-12c6146b",
        "SubnetIds": list(subnets),
        **also,
    }


def markets() -> list[str]:
    found = boto3.client("ec2", REGION).describe_instances()["Reservations"]
    return [i.get("InstanceLifecycle", "on-demand") for r in found for i in r["Instances"]]


def test_a_spot_machine_that_is_there_is_taken(subnets: list[str]) -> None:
    aws, asked = provider()
    assert len(aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), WORKER, 1)) == 1
    assert asked == [("spot", subnets[0])]
    assert markets() == ["spot"]


def test_spot_is_asked_for_in_every_zone_before_the_same_on_demand(subnets: list[str]) -> None:
    spot = [("spot", subnet) for subnet in subnets]
    aws, asked = provider(*spot)
    assert len(aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), WORKER, 1)) == 1
    assert asked == [*spot, ("on-demand", subnets[0])]
    assert markets() == ["on-demand"]


def test_a_zone_that_has_not_the_type_does_not_hide_that_others_are_sold_out(
    subnets: list[str],
) -> None:
    aws, asked = provider(*[("spot", subnet) for subnet in subnets], refusal="Unsupported")
    aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), WORKER, 1)
    assert asked[-1] == ("on-demand", subnets[0])


def test_machines_are_asked_for_beside_those_that_stand(subnets: list[str]) -> None:
    first, second = subnets
    aws, _ = provider(("spot", first))
    spot = machine(subnets, InstanceMarketOptions=SPOT)
    aws.create_node(spot, WORKER, 1)  # stands in the second zone

    aws, asked = provider()
    aws.create_node(spot, WORKER, 1)
    assert asked == [("spot", second)]

    aws, asked = provider(("spot", second))
    aws.create_node(spot, WORKER, 1)
    assert asked == [("spot", second), ("on-demand", second)]

    aws, asked = provider(("spot", second), ("on-demand", second))
    aws.create_node(spot, WORKER, 1)
    assert asked == [("spot", second), ("on-demand", second), ("spot", first)]


def test_a_head_draws_nobody_to_its_zone(subnets: list[str]) -> None:
    aws, _ = provider()
    aws.create_node(machine([subnets[1]]), {TAG_RAY_NODE_KIND: NODE_KIND_HEAD}, 1)
    aws, asked = provider()
    aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), WORKER, 1)
    assert asked == [("spot", subnets[0])]


def test_a_quota_of_one_market_does_not_hide_the_other_elsewhere(subnets: list[str]) -> None:
    first, second = subnets
    aws, _ = provider()
    aws.create_node(machine([first]), WORKER, 1)
    aws, asked = provider(
        ("spot", first), ("on-demand", first), ("on-demand", second), refusal="VcpuLimitExceeded"
    )
    aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), WORKER, 1)
    assert asked == [("spot", first), ("on-demand", first), ("spot", second)]


@pytest.mark.parametrize("refusal", [SOLD_OUT, "UnauthorizedOperation"])
def test_what_neither_money_nor_another_zone_mends_is_told(
    subnets: list[str], refusal: str
) -> None:
    nowhere = [(market, subnet) for market in ("spot", "on-demand") for subnet in subnets]
    aws, asked = provider(*nowhere, refusal=refusal)
    with pytest.raises(NodeLaunchException) as told:
        aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), WORKER, 1)
    assert told.value.category == refusal
    assert asked == (nowhere if refusal == SOLD_OUT else nowhere[:1])
    assert markets() == []


def test_a_type_on_demand_is_never_asked_for_twice(subnets: list[str]) -> None:
    aws, asked = provider(("on-demand", subnets[0]))
    aws.create_node(machine(subnets), WORKER, 1)
    assert asked == [("on-demand", subnets[0]), ("on-demand", subnets[1])]
