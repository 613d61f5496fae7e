"""What an account has for us: the outputs of its CloudFormation stack (infra/aws/account.yaml)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from pipelines.launch.check import Wrong

NEEDED = (
    "Bucket",
    "SubnetIds",
    "SecurityGroupId",
    "HeadProfile",
    "WorkerProfile",
    "KeyName",
    "ImageRepository",
)
"""Outputs without which no cluster starts."""
APART = ("SubnetIds", "SecurityGroupId")
"""Of these, those that head and workers may have one each of: HeadSubnetIds, WorkerSubnetIds."""
ROLES = ("Head", "Worker")
MLFLOW = ("MlflowUri", "MlflowSecretArn")
"""Outputs of the team's MLflow; of the account's stack, or of one of their own."""
READY = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
"""Codes of AWS for credentials that were good."""
LOG_IN = "`aws sso login`, or set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
TEMPLATE = "infra/aws/account.yaml"


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack that is there."""

    name: str
    outputs: Mapping[str, str]
    cluster: str
    """What its machines' rights are held to: the beginning of a cluster's name."""

    def of(self, role: str, output: str) -> str:
        """Take an output of the Head or of the Worker; that of both where there is one."""
        return self.outputs.get(role + output) or self.outputs.get(output, "")

    def subnets(self, role: str) -> list[str]:
        """List the subnets of the Head or of the Worker."""
        return [each.strip() for each in self.of(role, "SubnetIds").split(",") if each.strip()]

    def group(self, role: str) -> str:
        """Name the security group of the Head or of the Worker."""
        return self.of(role, "SecurityGroupId")


def read_stack(client: Any, name: str) -> Stack:
    """Read a stack.

    Args:
        client: boto3's, of CloudFormation.
        name: Of the stack.

    Raises:
        Wrong: If there is none, or it is being made, or it failed.
    """
    region = client.meta.region_name
    try:
        (found,) = client.describe_stacks(StackName=name)["Stacks"]
    except (ClientError, BotoCoreError) as error:
        if "does not exist" not in str(error):
            raise Wrong(
                reason(error),
                "to read the stack",
                way_out(error, "ask for cloudformation:Describe*"),
            ) from error
        raise Wrong(
            f"no stack {name} in {region}",
            f"the account's stack, made of {TEMPLATE}",
            f"aws cloudformation deploy --stack-name {name} --template-file {TEMPLATE} "
            "--capabilities CAPABILITY_NAMED_IAM --parameter-overrides ...; or --stack, --region",
        ) from error
    if found["StackStatus"] not in READY:
        raise Wrong(
            f"stack {name} is {found['StackStatus']}",
            " or ".join(READY),
            "wait for it, or look at its events in the console",
        )
    outputs = {each["OutputKey"]: each["OutputValue"] for each in found.get("Outputs", [])}
    parameters = {
        each["ParameterKey"]: each["ParameterValue"] for each in found.get("Parameters", [])
    }
    return Stack(name, outputs, parameters.get("ClusterName", name))


def check_complete(stack: Stack) -> str:
    """See that nothing is missing that a cluster needs.

    Raises:
        Wrong: Naming the outputs.
    """
    missing = [
        role + name
        for name in NEEDED
        for role in (ROLES if name in APART else ("",))
        if not stack.of(role, name)
    ]
    if missing:
        raise Wrong(
            f"stack {stack.name} has no output {', '.join(missing)}",
            f"all outputs of {TEMPLATE}",
            "update the stack with the template of this version",
        )
    return f"{stack.name}: bucket {stack.outputs['Bucket']}"


def reason(error: Exception) -> str:
    """Say what AWS said, in its own words, without the name of the call."""
    if isinstance(error, ClientError):
        told = error.response.get("Error", {})
        return f"{told.get('Code', 'error')}: {told.get('Message', error)}"
    assert isinstance(error, BotoCoreError)
    return str(error)


def way_out(error: Exception, right: str) -> str:
    """Say what helps against an error of AWS: a right does only where AWS has answered."""
    if isinstance(error, (HTTPClientError, NoConnectionError)):
        return "AWS was not reached: look at the network, and do the same again"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return LOG_IN
    if isinstance(error, ClientError) and error.response.get("Error", {}).get("Code") in EXPIRED:
        return LOG_IN
    return right
