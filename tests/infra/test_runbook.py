"""The runbook in infra/README.md: its commands are run by a shell, and what they ask for is done.

`aws`, `docker` and the like are stand-ins that write down how they were called and answer as the
mock of AWS would; the stacks that were asked for are then deployed into it.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jmespath
import pytest
import yaml
from moto import mock_aws

from tests.infra.stacks import (
    ACCOUNT,
    AWS,
    REGION,
    Stack,
    deploy,
    template,
    unknown_kinds_are_left_out,
)

pytestmark = unknown_kinds_are_left_out

ROOT = Path(__file__).parents[2]
RUNBOOK = ROOT / "infra" / "README.md"
DIGEST = f"sha256:{'1' * 64}"
ADDRESS = "203.0.113.7"
STAND_IN = """#!{python}
import json, sys
from pathlib import Path
import jmespath

here = Path(__file__).parent
name, *words = [Path(sys.argv[0]).name, *sys.argv[1:]]
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
if name == "ssh-keygen":
    Path(words[words.index("-f") + 1] + ".pub").write_text("{key}\\n")
elif name == "curl":
    print("{address}")
elif "--query" in words:
    sys.path.append("{packages}")
    import jmespath

    answer = json.loads((here / "answers.json").read_text())[words[1]]
    found = jmespath.search(words[words.index("--query") + 1], answer)
    print(found if isinstance(found, str) else "\\t".join(found))
"""
"""It prints lists as `--output text` does, the one form that the runbook takes: tabs between. It is
called a dozen times, so it starts without what packages have Python do at its start (-S)."""


def block(heading: str) -> str:
    """The first commands under a heading."""
    section = RUNBOOK.read_text().split(f"\n## {heading}\n")[1]
    return section.split("```\n")[1]


TEN = block("From an empty account to a running pre-training")


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    with mock_aws():
        yield deploy("account.yaml", ACCOUNT)


@pytest.fixture(scope="module")
def calls(account: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Run the ten commands in an empty home; give what was called, in order."""
    here = tmp_path_factory.mktemp("runbook")
    (here / ".ssh").mkdir()
    stack = boto3.client("cloudformation", REGION).describe_stacks(StackName="droppos")
    answers = {
        "describe-stacks": {"Stacks": [{"Outputs": stack["Stacks"][0]["Outputs"]}]},
        "describe-images": {"imageDetails": [{"imageDigest": DIGEST}]},
    }
    (here / "answers.json").write_text(json.dumps(answers))
    stand_in = STAND_IN.format(
        python=sys.executable,
        packages=Path(jmespath.__file__).parents[1],
        key=ACCOUNT["PublicKey"],
        address=ADDRESS,
    )
    for program in ("aws", "curl", "docker", "droppos", "git", "ssh-keygen"):
        (here / program).write_text(stand_in)
        (here / program).chmod(0o755)
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", TEN],
        env={"HOME": str(here), "PATH": f"{here}:/usr/bin:/bin"},
        cwd=ROOT,
        check=True,
    )
    return [json.loads(line) for line in (here / "calls.jsonl").read_text().splitlines()]


def of(calls: list[list[str]], *beginning: str) -> list[list[str]]:
    return [call for call in calls if call[: len(beginning)] == list(beginning)]


def stacks(calls: list[list[str]]) -> dict[str, list[str]]:
    """Calls that deploy a template, by its name."""
    deploys = of(calls, "aws", "cloudformation", "deploy")
    return {Path(option(call, "--template-file")).name: call for call in deploys}


def option(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


def parameters(call: list[str]) -> dict[str, str]:
    words = call[call.index("--parameter-overrides") + 1 :]
    return dict(word.split("=", 1) for word in words)


def test_there_are_ten_commands() -> None:
    assert re.findall(r"^# (\d+)  ", TEN, re.MULTILINE) == [str(n) for n in range(1, 11)]
    commands = re.split(r"^# \d+  .*\n", TEN, flags=re.MULTILINE)[1:]
    assert all(command.strip() and "\n#" not in command for command in commands)


@pytest.mark.parametrize("name", ["account.yaml", "mlflow.yaml"])
def test_a_stack_is_given_what_it_needs_and_nothing_it_does_not_know(
    name: str, calls: list[list[str]]
) -> None:
    rules = template(name)["Parameters"]
    given = set(parameters(stacks(calls)[name]))
    assert {parameter for parameter in rules if "Default" not in rules[parameter]} <= given
    assert given <= set(rules)


def test_the_account_is_made_of_what_the_commands_before_found(
    account: Stack, calls: list[list[str]]
) -> None:
    call = stacks(calls)["account.yaml"]
    given = parameters(call)
    assert given["AdminCidr"] == f"{ADDRESS}/32"
    assert given["PublicKey"] == ACCOUNT["PublicKey"]
    assert option(call, "--stack-name") == "droppos"
    assert option(call, "--capabilities") == "CAPABILITY_NAMED_IAM"
    deploy("account.yaml", {**given, "ClusterName": "again"}, "again")


def test_mlflow_is_made_of_the_accounts_outputs_and_the_images_digest(
    account: Stack, calls: list[list[str]]
) -> None:
    call = stacks(calls)["mlflow.yaml"]
    given = parameters(call)
    assert given.pop("Image") == f"{account.outputs['ImageRepository']}@{DIGEST}"
    assert given == {name: account.outputs[name] for name in given}
    made = deploy("mlflow.yaml", parameters(call), option(call, "--stack-name"))
    assert "MlflowUri" in made.outputs


def test_the_templates_that_are_deployed_are_those_there_are(calls: list[list[str]]) -> None:
    assert set(stacks(calls)) == {file.name for file in AWS.iterdir()}
    for call in stacks(calls).values():
        assert (ROOT / option(call, "--template-file")).is_file()


def test_quotas_are_asked_for_all_machines_that_the_cluster_may_have(
    calls: list[list[str]],
) -> None:
    """EC2 counts vCPUs, which is what a type's CPUs are; the head's have to be looked up."""
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    most = {
        name: kind["resources"]["CPU"] * kind.get("max_workers", 1) for name, kind in types.items()
    }
    assert types["head"]["node_config"]["InstanceType"] == "m7i.xlarge"
    asked = {
        option(call, "--quota-code"): int(option(call, "--desired-value"))
        for call in of(calls, "aws", "service-quotas")
    }
    gpus = most["gpu"] + most["gpu_single"]
    assert asked == {
        "L-3819A6DF": gpus,
        "L-DB2E81BA": gpus,  # where there is none on spot
        "L-1216C47A": most["decode"] + 4,
    }


def test_the_image_is_built_of_the_dockerfile_for_the_machines_and_pushed_to_the_account(
    account: Stack, calls: list[list[str]]
) -> None:
    repository = account.outputs["ImageRepository"]
    login, build = of(calls, "docker")
    assert login[-1] == repository.partition("/")[0]
    assert option(build, "-t").startswith(f"{repository}:")
    assert option(build, "--platform") == "linux/amd64"
    assert "--push" in build
    dockerfile = (ROOT / option(build, "-f")).read_text()
    assert f"ARG {option(build, '--build-arg').partition('=')[0]}" in dockerfile
    (looked_up,) = of(calls, "aws", "ecr", "describe-images")
    tag = option(build, "-t").partition(":")[2]
    assert option(looked_up, "--image-ids") == f"imageTag={tag}"
    assert option(looked_up, "--repository-name") == repository.partition("/")[2]


def test_the_key_is_where_cluster_yaml_looks_for_it(calls: list[list[str]]) -> None:
    auth = yaml.safe_load((ROOT / "cluster.yaml").read_text())["auth"]
    (made,) = of(calls, "ssh-keygen")
    assert Path(option(made, "-f")).name == Path(auth["ssh_private_key"]).name
    assert option(made, "-N") == ""


def test_the_run_reads_what_was_prepared_and_writes_to_the_bucket(
    account: Stack, calls: list[list[str]]
) -> None:
    bucket = f"s3://{account.outputs['Bucket']}"
    train, val = (call[-1] for call in of(calls, "droppos", "prepare"))
    (plan,) = of(calls, "droppos", "plan")
    (launch,) = of(calls, "droppos", "launch")
    assert calls[-1] == launch
    assert option(plan, "--data.path") == option(launch, "--data.path") == train
    assert option(launch, "--data.holdout") == val
    assert all(place.startswith(f"{bucket}/") for place in (train, val))
    assert option(launch, "--run.storage") == f"{bucket}/runs"
    assert option(launch, "--mlflow-stack") == option(stacks(calls)["mlflow.yaml"], "--stack-name")


def test_the_way_to_delete_a_bucket_with_versions_leaves_none(account: Stack) -> None:
    found = re.findall(r'^python -c ("import boto3.*")$', RUNBOOK.read_text(), re.MULTILINE)
    (code,) = [shlex.split(line)[0] for line in found]
    bucket = account.outputs["Bucket"]
    s3 = boto3.client("s3", REGION)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for content in (b"first", b"second"):
        s3.put_object(Bucket=bucket, Key="a", Body=content)
    s3.delete_object(Bucket=bucket, Key="a")
    assert len(s3.list_object_versions(Bucket=bucket)["Versions"]) == 2
    exec(code.replace("$Bucket", bucket))  # in this process, where the mock is
    left: dict[str, Any] = s3.list_object_versions(Bucket=bucket)
    assert "Versions" not in left
    assert "DeleteMarkers" not in left


def test_every_file_that_the_runbook_links_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", RUNBOOK.read_text())
    assert links
    for link in links:
        assert (RUNBOOK.parent / link).exists(), link
