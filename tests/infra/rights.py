"""What IAM would answer: an evaluator of a role's policies, as they were deployed into the mock.

As IAM does: a request is allowed if a statement allows it and none denies it, and a condition on
what the request does not carry is not met. Of the operators, those that our policies use. EC2 asks
IAM once for each thing that a new machine is made of; all have to be allowed.
"""

from ast import literal_eval
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import boto3

from tests.infra.stacks import REGION

IAM = "arn:aws:iam::123456789012"
EC2 = f"arn:aws:ec2:{REGION}:123456789012"
"""Where things of the mock's account are."""
RESOLVE = "resolve:ssm:"
OPERATORS = {"StringEquals": str.__eq__, "StringLike": fnmatchcase, "ArnEquals": fnmatchcase}


def statements(role: str) -> list[Mapping[str, Any]]:
    """All statements of a role, of policies of its own and of those attached to it."""
    iam = boto3.client("iam")
    documents = [
        iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
    ]
    for attached in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        arn = attached["PolicyArn"]
        version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
        found = iam.get_policy_version(PolicyArn=arn, VersionId=version)
        documents.append(found["PolicyVersion"]["Document"])
    # The mock keeps what CloudFormation deployed as Python writes a dict.
    plain = [
        literal_eval(document) if isinstance(document, str) else document for document in documents
    ]
    return [statement for document in plain for statement in document["Statement"]]


def allowed(
    policy: Sequence[Mapping[str, Any]],
    action: str,
    resource: str,
    context: Mapping[str, str] | None = None,
) -> bool:
    """Whether a request is allowed.

    Args:
        policy: The statements of who asks.
        action: As `ec2:RunInstances`.
        resource: Its ARN.
        context: What the request carries, by IAM's keys, as `aws:RequestTag/ray-cluster-name`.
    """
    met = {
        statement["Effect"]
        for statement in policy
        if any(fnmatchcase(action, pattern) for pattern in listed(statement["Action"]))
        and any(fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
        and _holds(statement.get("Condition", {}), context or {})
    }
    return met == {"Allow"}


def _holds(condition: Mapping[str, Mapping[str, Any]], known: Mapping[str, str]) -> bool:
    return all(
        key in known and any(OPERATORS[operator](known[key], wanted) for wanted in listed(values))
        for operator, keys in condition.items()
        for key, values in keys.items()
    )


def listed(value: str | list[str]) -> list[str]:
    """A policy's actions and resources: one, or a list of them."""
    return value if isinstance(value, list) else [value]


def refused(
    policy: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], cluster: str
) -> set[str]:
    """What keeps a machine from being started as Ray's AWS provider asks for one.

    Args:
        policy: The statements of who asks.
        machine: A node type's `node_config`, filled.
        cluster: Name of the cluster, which the provider puts into the machine's tag.

    Returns:
        ARNs of what is not allowed; nothing if the machine would come up.
    """
    profile = machine["IamInstanceProfile"]["Name"]
    instance = {
        "aws:RequestTag/ray-cluster-name": cluster,
        "ec2:MetadataHttpTokens": machine["MetadataOptions"]["HttpTokens"],
        "ec2:InstanceProfile": f"{IAM}:instance-profile/{profile}",
    }
    run, tag = "ec2:RunInstances", {"ec2:CreateAction": "RunInstances"}
    asked: list[tuple[str, str, Mapping[str, str]]] = [
        (run, f"{EC2}:instance/*", instance),
        ("ec2:CreateTags", f"{EC2}:instance/*", tag),
        (run, f"{EC2}:network-interface/*", {}),
        (run, f"{EC2}:volume/*", {}),
        (run, f"{EC2}:key-pair/{machine['KeyName']}", {}),
        (run, f"arn:aws:ec2:{REGION}::image/ami-1", {}),
        *((run, f"{EC2}:subnet/{subnet}", {}) for subnet in machine["SubnetIds"]),
        *((run, f"{EC2}:security-group/{group}", {}) for group in machine["SecurityGroupIds"]),
        # A profile bears the role of its name (test_account.py).
        ("iam:PassRole", f"{IAM}:role/{profile}", {"iam:PassedToService": "ec2.amazonaws.com"}),
    ]
    if "InstanceMarketOptions" in machine:
        asked.append((run, f"{EC2}:spot-instances-request/*", {}))
    if machine["ImageId"].startswith(RESOLVE):
        name = machine["ImageId"].removeprefix(RESOLVE)
        asked.append(("ssm:GetParameters", f"arn:aws:ssm:{REGION}::parameter{name}", {}))
    return {what for action, what, said in asked if not allowed(policy, action, what, said)}
