"""A spot machine that can't be had is bought on demand; everything else stays as Ray has it."""

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.node_launch_exception import NodeLaunchException

from pipelines.spot_first import SpotFirst
from tests.infra.test_cluster_yaml import FILE

REGION = "us-east-1"
SPOT = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
SOLD_OUT = "InsufficientInstanceCapacity"
EVENT = "provide-client-params.ec2.RunInstances"


@pytest.fixture
def subnets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        answer = boto3.client("ec2", REGION).describe_subnets()
        yield [subnet["SubnetId"] for subnet in answer["Subnets"]][:2]


def provider(sold_out: str = "", refusal: str = SOLD_OUT) -> tuple[Any, list[tuple[str, str]]]:
    """Make cluster.yaml's provider, and a list of the requests that it sends.

    Args:
        sold_out: Markets in which EC2 refuses.
        refusal: What it says then.
    """
    config = yaml.safe_load(FILE.read_text())["provider"] | {"region": REGION}
    made = _get_node_provider(config, "droppos")
    assert isinstance(made, SpotFirst)
    asked: list[tuple[str, str]] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        market = "spot" if "InstanceMarketOptions" in params else "on-demand"
        asked.append((market, params["SubnetId"]))
        if market in sold_out.split():
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
    assert len(aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), {}, 1)) == 1
    assert asked == [("spot", subnets[0])]
    assert markets() == ["spot"]


def test_spot_is_asked_for_in_every_zone_before_the_same_on_demand(subnets: list[str]) -> None:
    aws, asked = provider(sold_out="spot")
    assert len(aws.create_node(machine(subnets, InstanceMarketOptions=SPOT), {}, 1)) == 1
    zones = [subnet for market, subnet in asked if market == "spot"]
    assert set(zones) == set(subnets)
    assert asked[len(zones) :] == [("on-demand", subnets[0])]
    assert markets() == ["on-demand"]


@pytest.mark.parametrize(
    ("options", "sold_out", "refusal"),
    [
        ({"InstanceMarketOptions": SPOT}, "spot on-demand", SOLD_OUT),
        ({}, "on-demand", SOLD_OUT),
        ({"InstanceMarketOptions": SPOT}, "spot", "UnauthorizedOperation"),
    ],
)
def test_what_money_does_not_mend_is_told(
    subnets: list[str], options: dict[str, object], sold_out: str, refusal: str
) -> None:
    aws, _ = provider(sold_out, refusal)
    with pytest.raises(NodeLaunchException) as told:
        aws.create_node(machine(subnets, **options), {}, 1)
    assert told.value.category == refusal
    assert markets() == []


def test_the_rest_is_rays_own() -> None:
    assert set(vars(SpotFirst)) - {"__doc__", "__module__", "_create_node"} == set(
        vars(type("Empty", (AWSNodeProvider,), {}))
    ) - {"__doc__", "__module__"}
