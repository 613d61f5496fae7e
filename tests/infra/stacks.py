"""CloudFormation templates deployed into a mock of AWS, in this process.

The mock (moto) does not model everything: a resource whose kind it does not know is left out, with
a warning, and so is a property. What it leaves out is asserted on the template.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from cfnlint.decode import decode

AWS = Path(__file__).parents[2] / "infra" / "aws"
REGION = "us-east-1"

ACCOUNT = {
    "AdminCidr": "203.0.113.0/24",
    "PublicKey": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8KkzYxk1O0yQ0hB6Jm admin@example.org",
    "BudgetEmail": "admin@example.org",
}
"""The parameters of account.yaml that have no default."""

unknown_kinds_are_left_out = pytest.mark.filterwarnings(
    "ignore:Tried to parse .* but it's not supported by moto:UserWarning"
)
"""For tests that deploy; which kinds those are is a test of each template's own."""


@dataclass(frozen=True)
class Stack:
    """A stack that stands in the mock."""

    outputs: Mapping[str, str]
    made: Mapping[str, str]
    """Physical ids of its resources, by the names they have in the template."""


def template(name: str) -> dict[str, Any]:
    """Read a template of infra/aws, with `!Ref` and the like spelt out."""
    content, errors = decode(AWS / name)
    assert not errors
    return content


def deploy(name: str, parameters: Mapping[str, str], stack: str = "droppos") -> Stack:
    """Deploy a template of infra/aws; inside `mock_aws` only."""
    cloud = boto3.client("cloudformation", REGION)
    cloud.create_stack(
        StackName=stack,
        TemplateBody=(AWS / name).read_text(),
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (found,) = cloud.describe_stacks(StackName=stack)["Stacks"]
    assert found["StackStatus"] == "CREATE_COMPLETE"
    resources = cloud.list_stack_resources(StackName=stack)["StackResourceSummaries"]
    return Stack(
        {output["OutputKey"]: output["OutputValue"] for output in found["Outputs"]},
        {
            resource["LogicalResourceId"]: resource.get("PhysicalResourceId", "")
            for resource in resources
            if resource.get("LogicalResourceId")
        },
    )


def accepts(name: str, parameter: str, value: str) -> bool:
    """Whether CloudFormation would take a value: its pattern, its choices, its bounds."""
    rule = template(name)["Parameters"][parameter]
    if "AllowedValues" in rule and value not in rule["AllowedValues"]:
        return False
    if rule["Type"] == "Number":
        return rule.get("MinValue", 0) <= float(value) <= rule.get("MaxValue", float("inf"))
    return re.fullmatch(rule.get("AllowedPattern", ".*"), value) is not None
