"""The stack of a team's MLflow: deployed into a mock of AWS on the account's outputs."""

from collections.abc import Iterator, Mapping
from typing import Any

import boto3
import pytest
from cfnlint.api import lint_file
from moto import mock_aws

from tests.infra.rights import allowed, statements
from tests.infra.stacks import (
    ACCOUNT,
    AWS,
    REGION,
    Stack,
    accepts,
    deploy,
    template,
    unknown_kinds_are_left_out,
)

pytestmark = unknown_kinds_are_left_out

NAME = "mlflow.yaml"
SECRETS = f"arn:aws:secretsmanager:{REGION}:123456789012:secret:droppos/mlflow"


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    with mock_aws():
        yield deploy("account.yaml", ACCOUNT)


@pytest.fixture(scope="module")
def mlflow(account: Stack) -> Stack:
    outputs = account.outputs
    parameters = {
        "Image": f"{outputs['ImageRepository']}:v1",
        "Bucket": outputs["Bucket"],
        "VpcId": outputs["VpcId"],
        "SubnetIds": outputs["WorkerSubnetIds"],
        "ClusterSecurityGroupId": outputs["SecurityGroupId"],
    }
    return deploy(NAME, parameters, "droppos-mlflow")


@pytest.fixture(scope="module")
def container(mlflow: Stack) -> dict[str, Any]:
    ecs = boto3.client("ecs", REGION)
    task = ecs.describe_task_definition(taskDefinition=mlflow.made["Task"])["taskDefinition"]
    (found,) = task["containerDefinitions"]
    return found


def properties(resource: str) -> dict[str, Any]:
    return template(NAME)["Resources"][resource]["Properties"]


def test_the_linter_has_nothing_to_say() -> None:
    assert lint_file(AWS / NAME) == []


def test_only_what_the_mock_does_not_know_was_left_out(mlflow: Stack) -> None:
    secrets = {"AdminSecret", "JobsSecret", "FlaskSecret", "DatabaseSecret"}
    assert set(template(NAME)["Resources"]) - set(mlflow.made) == secrets | {"Name", "Names"}


def test_the_launch_is_told_address_and_secret(mlflow: Stack) -> None:
    assert mlflow.outputs["MlflowUri"] == "http://mlflow.droppos.internal:5000"
    assert mlflow.outputs["MlflowSecretArn"] == f"{SECRETS}/jobs"
    assert properties("JobsSecret")["Name"] == {"Fn::Sub": "${ClusterName}/mlflow/jobs"}
    assert properties("Names")["Name"] == {"Fn::Sub": "${ClusterName}.internal"}
    assert properties("Name")["Name"] == "mlflow"


def test_the_head_may_read_the_secret_it_is_told_and_not_the_administrators(mlflow: Stack) -> None:
    head = statements("droppos-ray-head")
    read = "secretsmanager:GetSecretValue"
    assert allowed(head, read, f"{mlflow.outputs['MlflowSecretArn']}-AbCdEf")
    assert not allowed(head, read, f"{mlflow.outputs['AdminSecretArn']}-AbCdEf")


def test_the_database_is_encrypted_private_and_backed_up(mlflow: Stack, account: Stack) -> None:
    (database,) = boto3.client("rds", REGION).describe_db_instances()["DBInstances"]
    assert database["Engine"] == "postgres"
    assert database["StorageEncrypted"]
    assert not database["PubliclyAccessible"]
    assert database["BackupRetentionPeriod"] == 14
    subnets = {subnet["SubnetIdentifier"] for subnet in database["DBSubnetGroup"]["Subnets"]}
    assert subnets == set(account.outputs["WorkerSubnetIds"].split(","))
    assert mlflow.outputs["DatabaseEndpoint"] == database["Endpoint"]["Address"]


def test_the_database_outlives_its_stack() -> None:
    resource = template(NAME)["Resources"]["Database"]
    assert resource["DeletionPolicy"] == resource["UpdateReplacePolicy"] == "Snapshot"
    assert resource["Properties"]["DeletionProtection"] is True
    assert resource["Properties"]["VPCSecurityGroups"] == [
        {"Fn::GetAtt": ["DatabaseGroup", "GroupId"]}
    ]


def ingress(group: str) -> list[tuple[str, int, int, str]]:
    """Rules of a group, as protocol, ports, and the one group they let in."""
    ec2 = boto3.client("ec2", REGION)
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    for rule in found["IpPermissions"]:
        assert rule["IpRanges"] == rule["Ipv6Ranges"] == []
    return [
        (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], source["GroupId"])
        for rule in found["IpPermissions"]
        for source in rule["UserIdGroupPairs"]
    ]


def test_the_cluster_reaches_the_server_and_only_the_server_the_database(
    mlflow: Stack, account: Stack
) -> None:
    server, cluster = mlflow.made["ServerGroup"], account.outputs["SecurityGroupId"]
    assert ingress(server) == [("tcp", 5000, 5000, cluster)]
    assert ingress(mlflow.made["DatabaseGroup"]) == [("tcp", 5432, 5432, server)]
    network = properties("Service")["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert network["AssignPublicIp"] == "DISABLED"
    assert network["SecurityGroups"] == [{"Fn::GetAtt": ["ServerGroup", "GroupId"]}]


def test_the_server_keeps_files_in_its_own_folder(mlflow: Stack, account: Stack) -> None:
    role = statements(mlflow.made["ServerRole"])
    bucket = f"arn:aws:s3:::{account.outputs['Bucket']}"
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        assert allowed(role, action, f"{bucket}/mlflow/1/run/artifacts/note.txt")
        assert not allowed(role, action, f"{bucket}/runs/a/checkpoint")
    assert allowed(role, "s3:ListBucket", bucket, {"s3:prefix": "mlflow/1/"})
    assert not allowed(role, "s3:ListBucket", bucket, {"s3:prefix": "runs/"})
    assert not allowed(role, "s3:ListBucket", bucket)
    assert not allowed(role, "secretsmanager:GetSecretValue", f"{SECRETS}/admin-AbCdEf")


def test_what_starts_the_server_reads_its_four_secrets_and_its_image(mlflow: Stack) -> None:
    role = statements(mlflow.made["StartRole"])
    for name in ("admin", "jobs", "flask", "database"):
        assert allowed(role, "secretsmanager:GetSecretValue", f"{SECRETS}/{name}-AbCdEf"), name
    assert not allowed(role, "secretsmanager:GetSecretValue", f"{SECRETS}/another-AbCdEf")
    images = f"arn:aws:ecr:{REGION}:123456789012:repository"
    assert allowed(role, "ecr:BatchGetImage", f"{images}/droppos")
    assert not allowed(role, "ecr:BatchGetImage", f"{images}/another")


def test_the_container_is_told_where_things_are(
    container: Mapping[str, Any], mlflow: Stack, account: Stack
) -> None:
    told = {entry["name"]: entry["value"] for entry in container["environment"]}
    assert told["PGHOST"] == mlflow.outputs["DatabaseEndpoint"]
    assert told["PGSSLMODE"] == "require"
    assert told["MLFLOW_ARTIFACTS"] == f"s3://{account.outputs['Bucket']}/mlflow"
    address = mlflow.outputs["MlflowUri"].removeprefix("http://")
    assert told["MLFLOW_SERVER_ALLOWED_HOSTS"] == f"{address},localhost:5000"
    assert container["image"] == f"{account.outputs['ImageRepository']}:v1"
    assert container["user"] == "1000"
    assert container["linuxParameters"]["capabilities"]["drop"] == ["ALL"]


def test_no_password_is_in_the_template_or_in_plain_environment(
    container: Mapping[str, Any],
) -> None:
    plain = {entry["name"] for entry in container["environment"]}
    secret = {entry["name"] for entry in container["secrets"]}
    assert secret == {
        *("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_JOBS_PASSWORD"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
    }
    assert not secret & plain
    for resource in template(NAME)["Resources"].values():
        if resource["Type"] == "AWS::SecretsManager::Secret":
            assert resource["Properties"]["GenerateSecretString"]["PasswordLength"] >= 40
            assert "SecretString" not in resource["Properties"]
    password = properties("Database")["MasterUserPassword"]["Fn::Sub"]
    assert password.startswith("{{resolve:secretsmanager:${DatabaseSecret}")


def test_one_server_at_a_time() -> None:
    rule = properties("Service")["DeploymentConfiguration"]
    assert (rule["MinimumHealthyPercent"], rule["MaximumPercent"]) == (0, 100)
    assert properties("Service")["DesiredCount"] == 1


@pytest.mark.parametrize(
    ("parameter", "right", "wrong"),
    [
        ("Image", "1.dkr.ecr.us-east-1.amazonaws.com/droppos:v1", "droppos"),
        ("Image", "droppos:v1-cpu", "droppos:latest"),
        ("Image", f"droppos@sha256:{'0' * 64}", "droppos@sha256:0"),
        ("Bucket", "droppos-bucket-1", "s3://droppos-bucket-1"),
        ("DatabaseClass", "db.m7g.large", "m7g.large"),
        ("SecondZone", "true", "yes"),
        ("ClusterName", "vision-team", "vision_team"),
    ],
)
def test_a_wrong_parameter_is_refused(parameter: str, right: str, wrong: str) -> None:
    assert accepts(NAME, parameter, right)
    assert not accepts(NAME, parameter, wrong)
