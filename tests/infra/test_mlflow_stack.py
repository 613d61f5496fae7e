"""The stack of a team's MLflow: deployed into a mock of AWS on the account's outputs."""

import json
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
DIGEST = f"sha256:{'0' * 64}"


def given_by_the_account() -> set[str]:
    """Parameters that have to be given, beside the image."""
    rules = template(NAME)["Parameters"]
    return {name for name, rule in rules.items() if "Default" not in rule} - {"Image"}


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    with mock_aws():
        yield deploy("account.yaml", ACCOUNT)


@pytest.fixture(scope="module")
def mlflow(account: Stack) -> Stack:
    outputs = account.outputs
    parameters = {
        "Image": f"{outputs['ImageRepository']}@{DIGEST}",
        **{name: outputs[name] for name in given_by_the_account()},
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


def test_its_parameters_have_the_names_of_the_accounts_outputs(account: Stack) -> None:
    assert given_by_the_account() == {
        *("Bucket", "VpcId", "SubnetIds", "HeadSecurityGroupId", "WorkerSecurityGroupId"),
    }
    assert given_by_the_account() <= set(account.outputs)


@pytest.mark.parametrize("parameter", ["ClusterName", "VpcPrefix"])
def test_what_both_stacks_are_told_has_the_same_default_and_form(parameter: str) -> None:
    ours, accounts = (template(name)["Parameters"][parameter] for name in (NAME, "account.yaml"))
    for same in ("Default", "AllowedPattern", "ConstraintDescription"):
        assert ours[same] == accounts[same]


def test_only_what_the_mock_does_not_know_was_left_out(mlflow: Stack) -> None:
    secrets = {"AdminSecret", "JobsSecret", "FlaskSecret", "DatabaseSecret"}
    assert set(template(NAME)["Resources"]) - set(mlflow.made) == secrets | {"Name", "Names"}


def test_the_launch_is_told_address_and_secret(mlflow: Stack) -> None:
    assert mlflow.outputs["MlflowUri"] == "http://mlflow.droppos.internal:5000"
    assert mlflow.outputs["MlflowSecretArn"] == f"{SECRETS}/jobs"
    assert properties("JobsSecret")["Name"] == {"Fn::Sub": "${ClusterName}/mlflow/jobs"}
    # `droppos launch` has the head look for these two.
    made = properties("JobsSecret")["GenerateSecretString"]
    assert json.loads(made["SecretStringTemplate"]) == {"MLFLOW_TRACKING_USERNAME": "jobs"}
    assert made["GenerateStringKey"] == "MLFLOW_TRACKING_PASSWORD"
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
    assert subnets == {mlflow.made[f"DatabaseSubnet{zone}"] for zone in "ABC"}
    assert not subnets & set(account.outputs["SubnetIds"].split(","))
    assert mlflow.outputs["DatabaseEndpoint"] == database["Endpoint"]["Address"]


def test_the_databases_subnets_are_in_three_zones_and_lead_nowhere(mlflow: Stack) -> None:
    ec2 = boto3.client("ec2", REGION)
    ids = [mlflow.made[f"DatabaseSubnet{zone}"] for zone in "ABC"]
    found = ec2.describe_subnets(SubnetIds=ids)["Subnets"]
    assert len({subnet["AvailabilityZone"] for subnet in found}) == 3
    table = mlflow.made["DatabaseRoutes"]
    (routes,) = ec2.describe_route_tables(RouteTableIds=[table])["RouteTables"]
    assert [route["GatewayId"] for route in routes["Routes"]] == ["local"]
    for zone in "ABC":
        association = properties(f"DatabaseRoutes{zone}")
        assert association["SubnetId"] == {"Ref": f"DatabaseSubnet{zone}"}
        assert association["RouteTableId"] == {"Ref": "DatabaseRoutes"}
        assert properties(f"DatabaseSubnet{zone}")["MapPublicIpOnLaunch"] is False


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
    server = mlflow.made["ServerGroup"]
    cluster = {account.outputs[f"{kind}SecurityGroupId"] for kind in ("Head", "Worker")}
    assert set(ingress(server)) == {("tcp", 5000, 5000, group) for group in cluster}
    assert ingress(mlflow.made["DatabaseGroup"]) == [("tcp", 5432, 5432, server)]
    network = properties("Service")["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert network["AssignPublicIp"] == "ENABLED"  # or it has no way to its image
    assert network["Subnets"] == {"Ref": "SubnetIds"}
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
    assert container["image"] == f"{account.outputs['ImageRepository']}@{DIGEST}"
    assert container["user"] == "1000"
    assert container["linuxParameters"]["capabilities"]["drop"] == ["ALL"]


def test_each_password_is_taken_from_a_key_that_its_secret_has() -> None:
    for given in properties("Task")["ContainerDefinitions"][0]["Secrets"]:
        if "Ref" in given["ValueFrom"]:  # the whole of a secret that is no JSON
            made = properties(given["ValueFrom"]["Ref"])["GenerateSecretString"]
            assert "GenerateStringKey" not in made
            continue
        name, key = given["ValueFrom"]["Fn::Sub"].removesuffix("::").split(":")
        made = properties(name.strip("${}"))["GenerateSecretString"]
        assert key == made["GenerateStringKey"], name


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
        ("ClusterName", "vision2", "vision-team"),
        ("VpcPrefix", "10.7", "10.256"),
    ],
)
def test_a_wrong_parameter_is_refused(parameter: str, right: str, wrong: str) -> None:
    assert accepts(NAME, parameter, right)
    assert not accepts(NAME, parameter, wrong)
