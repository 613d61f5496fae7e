"""Launching on AWS, up to `ray up`: what is looked at, filled in, priced, and left."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.stub import ANY, Stubber
from moto.core.models import DEFAULT_ACCOUNT_ID as ACCOUNT_ID
from moto.ec2.models import ec2_backends

from droppos.config import Compute, Optim
from droppos.errors import ConfigError
from pipelines.launch import clusterfile, flow, mlflow_login, places, quotas, record
from pipelines.launch.account import Account
from pipelines.launch.aws import Aws
from pipelines.launch.backend import Address
from pipelines.launch.check import Check, Look, Note, Wrong, look
from pipelines.launch.fleet import Fleet
from pipelines.launch.on import On
from pipelines.launch.prices import on_demand_price, spot_price
from pipelines.launch.quotas import Use, check_quotas, family_of
from pipelines.launch.record import Record
from pipelines.launch.terminal import Terminal
from pipelines.launch.token import ensure_token_file, read_token, token_file
from pipelines.recipe import Data, Recipe, Run
from tests.cloud_account import (
    AMI_PARAMETER,
    MLFLOW,
    QUOTAS,
    REGION,
    STACK,
    TEMPLATE,
    account,
    deploy,
    push,
)
from tests.jobs_server import JobsApi

CLUSTER_FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's own files: records, token, key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DROPPOS_HOME", str(tmp_path / "droppos"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pipelines.launch.aws.LOOK_AGAIN_S", 0.1)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("rsync", "ssh"):  # looked for, and not run here: a bare machine has neither
        (programs / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    key = tmp_path / ".ssh" / "droppos.pem"
    key.parent.mkdir()
    key.touch(mode=0o600)
    return tmp_path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The repository's own file; only its image parameter is one that moto has."""
    file = tmp_path / "clone" / "cluster.yaml"
    file.parent.mkdir()
    text = CLUSTER_FILE.read_text()
    assert f"resolve:ssm:{clusterfile.AMI}" in text
    file.write_text(text.replace(clusterfile.AMI, AMI_PARAMETER))
    return file


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        optim=Optim(global_batch=64),
        compute=Compute(device="cuda"),
        data=Data(path="file:///data"),
        run=Run(name="vit", storage="s3://studio/runs", workers=8, cpus_per_worker=2),
    )


@pytest.fixture
def empty_account(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with account(monkeypatch):
        yield


@pytest.fixture
def ready_account(empty_account: None) -> str:
    """With the stack and an image; gives the image's digest."""
    deploy(ClusterName="studio")
    push("v1")
    return push("v2", layer="2")


def planned(source: Path, **changes: Any) -> Record:
    return replace(Record(name="vit", on="aws", stack=STACK, source=str(source)), **changes)


def looked(backend: Aws, recipe: Recipe) -> dict[str, Check]:
    places = Look("places", lambda: "all in s3")
    return {check.what: check for check in look([places, *backend.looks(recipe)])}


def test_all_is_well_in_an_account_that_was_set_up(
    ready_account: str, source: Path, recipe: Recipe
) -> None:
    checks = looked(Aws(planned(source)), recipe)
    assert {what: check.state for what, check in checks.items() if check.state != "ok"} == {}
    assert checks["image"].found.endswith(f"/studio@{ready_account}")
    assert "needs 2 x gpu" in checks["recipe's fit"].found


def test_an_empty_account_is_told_all_it_lacks_at_once(
    empty_account: None, home: Path, source: Path, recipe: Recipe
) -> None:
    (home / ".ssh" / "droppos.pem").unlink()
    too_large = replace(recipe, run=replace(recipe.run, workers=16))
    checks = looked(Aws(planned(source)), too_large)
    assert checks["credentials"].state == checks["region"].state == "ok"
    assert "no stack studio in us-west-2" in checks["stack"].found
    assert "infra/aws/account.yaml" in checks["stack"].way_out
    assert checks["ssh"].state == "wrong" and "ssh-keygen" in checks["ssh"].way_out
    assert "run.workers to" in checks["recipe's fit"].way_out
    left_out = {what for what, check in checks.items() if check.state == "left out"}
    assert left_out == {
        *("name", "bucket", "image", "cluster file", "jobs", "machine types", "quota")
    }


def test_a_type_that_no_zone_offers_is_named(
    ready_account: str, source: Path, recipe: Recipe
) -> None:
    source.write_text(source.read_text().replace("m7i.xlarge", "m8gn.metal-24xl"))
    check = looked(Aws(planned(source)), recipe)["machine types"]
    assert check.state == "wrong" and "m8gn.metal-24xl: in none of us-west-2a" in check.found


def test_a_stack_without_an_output_is_named(
    empty_account: None, source: Path, recipe: Recipe
) -> None:
    outputs = {name: out for name, out in TEMPLATE["Outputs"].items() if name != "WorkerProfile"}
    deploy({**TEMPLATE, "Outputs": outputs}, ClusterName="studio")
    assert "no output WorkerProfile" in looked(Aws(planned(source)), recipe)["stack"].found


def test_no_credentials_and_no_region_are_told_with_the_way_out(
    source: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    checks = looked(Aws(planned(source, region=REGION)), recipe)
    assert checks["credentials"].state == "wrong"
    assert "aws sso login" in checks["credentials"].way_out
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert "no region" in looked(Aws(planned(source)), recipe)["credentials"].found


def test_an_account_that_nobody_may_ask_has_no_mlflow(
    monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert Aws(planned(source, region=REGION)).job_env() == {}


def test_the_region_is_found_as_amazons_own_tools_find_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert Account(None, STACK, None).region == "eu-central-1"
    assert Account("eu-north-1", STACK, None).region == "eu-north-1"


def test_the_repositorys_file_is_filled_from_the_stack_and_nothing_is_left(
    ready_account: str, source: Path
) -> None:
    before = clusterfile.read(source)
    assert clusterfile.unfilled(before)  # or this test would show nothing
    filled = Aws(planned(source)).filled
    assert clusterfile.unfilled(filled) == []
    assert filled["cluster_name"] == "studio-vit"  # what the account's rights are held to
    assert filled["provider"]["region"] == REGION
    outputs = {
        each["OutputKey"]: each["OutputValue"]
        for each in boto3.client("cloudformation").describe_stacks()["Stacks"][0]["Outputs"]
    }
    for name, kind in filled["available_node_types"].items():
        role = "Head" if name == "head" else "Worker"
        machine = kind["node_config"]
        assert machine["SubnetIds"] == outputs["SubnetIds"].split(",")
        assert machine["SecurityGroupIds"] == [outputs[f"{role}SecurityGroupId"]]
        assert machine["IamInstanceProfile"] == {"Name": outputs[f"{role}Profile"]}
        assert (machine["KeyName"], machine["ImageId"]) == ("studio", "ami-0123abcd")
        assert (
            machine["UserData"] == before["available_node_types"][name]["node_config"]["UserData"]
        )
    image = f"{outputs['ImageRepository']}@{ready_account}"
    assert filled["docker"]["image"] == image
    assert f"-e AWS_DEFAULT_REGION={REGION}" in filled["docker"]["run_options"]
    (login,) = filled["initialization_commands"]
    assert f"--region {REGION}" in login and login.endswith(image.partition("/")[0])
    assert before == clusterfile.read(source)
    # ssh and Ray read ~ differently where HOME is not the user's home: nothing is left to that.
    assert filled["auth"]["ssh_private_key"] == str(Path("~/.ssh/droppos.pem").expanduser())
    assert filled["file_mounts"] == {"~/.ray/auth_token": str(token_file())}
    *before_it, caretaker = filled["head_start_ray_commands"]
    assert before_it == before["head_start_ray_commands"]
    assert f"pipelines.launch.caretaker {filled['cluster_name']} {REGION} " in caretaker
    untouched = {"worker_start_ray_commands"}
    assert {name: filled[name] for name in untouched} == {name: before[name] for name in untouched}


def test_ray_itself_takes_the_filled_file(ready_account: str, source: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(Aws(planned(source)).filled)
    validate_config(config)


def test_what_is_left_to_change_is_named_with_its_place(
    ready_account: str, source: Path, recipe: Recipe
) -> None:
    source.write_text(source.read_text().replace("ssh_user: ubuntu", "ssh_user: CHANGE-me"))
    check = looked(Aws(planned(source)), recipe)["cluster file"]
    assert (check.state, check.found) == ("wrong", "auth.ssh_user: CHANGE-me")


def test_an_ami_that_the_file_names_stays(ready_account: str, source: Path) -> None:
    text = source.read_text().replace(f"resolve:ssm:{AMI_PARAMETER}", "ami-0fedcba9")
    source.write_text(text)
    filled = Aws(planned(source)).filled
    kinds = filled["available_node_types"].values()
    assert {kind["node_config"]["ImageId"] for kind in kinds} == {"ami-0fedcba9"}


def test_a_team_mlflow_is_told_to_the_job_and_its_password_only_to_the_head(
    ready_account: str, source: Path
) -> None:
    deploy(MLFLOW, "studio-mlflow")
    backend = Aws(planned(source, mlflow_stack="studio-mlflow"))
    assert backend.job_env() == {"MLFLOW_TRACKING_URI": "http://mlflow.studio.internal:5000"}
    (command,) = backend.filled["head_setup_commands"]
    secret = MLFLOW["Outputs"]["MlflowSecretArn"]["Value"]
    assert command == f"python -m pipelines.launch.mlflow_login {secret} {REGION}"
    assert backend.filled["worker_setup_commands"] == []


def test_the_login_is_written_for_mlflow_and_for_nobody_else(
    empty_account: None, home: Path
) -> None:
    words = {"MLFLOW_TRACKING_USERNAME": "jobs", "MLFLOW_TRACKING_PASSWORD": "a%b=c;d"}
    made = boto3.client("secretsmanager").create_secret(Name="x", SecretString=json.dumps(words))
    file = mlflow_login.log_in(made["ARN"], REGION)
    assert file == home / ".mlflow" / "credentials"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    from mlflow.utils.credentials import read_mlflow_creds

    read = read_mlflow_creds()
    assert (read.username, read.password) == ("jobs", "a%b=c;d")


@pytest.mark.parametrize(
    ("machine", "family"),
    [
        ("g6e.2xlarge", "G and VT"),
        ("gr6.4xlarge", "G and VT"),
        ("vt1.3xlarge", "G and VT"),
        ("p5en.48xlarge", "P"),
        ("m7i.xlarge", "standard"),
        ("im4gn.large", "standard"),
        ("inf2.xlarge", None),
        ("trn1.2xlarge", None),
        ("x2idn.16xlarge", None),
    ],
)
def test_a_type_counts_against_its_familys_limit(machine: str, family: str | None) -> None:
    found = family_of(machine)
    assert (found and found.name) == family


def test_quotas_are_held_against_what_the_recipe_needs_and_the_file_allows(
    empty_account: None,
) -> None:
    client = boto3.client("service-quotas")
    vcpus = {"g6e.2xlarge": 8, "m7i.xlarge": 4}

    def gpus(most: int, needed: int) -> list[Use]:
        head = Use("m7i.xlarge", "on demand", 1, 1)
        return [head, Use("g6e.2xlarge", "spot", most, needed)]

    assert QUOTAS["L-3819A6DF"] == 104
    check_quotas(client, gpus(13, 13), vcpus)
    with pytest.raises(Note, match=r"104 vCPUs, the recipe needs 104, the file allows 112 \(L-38"):
        check_quotas(client, gpus(14, 13), vcpus)
    with pytest.raises(Wrong, match=r"104 vCPUs, the recipe needs 112, the file allows 112"):
        check_quotas(client, gpus(14, 14), vcpus)


def test_a_quota_that_cannot_be_asked_hides_none_that_is_too_small(
    empty_account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("service-quotas")
    vcpus = {"g6e.2xlarge": 8, "m7i.xlarge": 4}
    head = Use("m7i.xlarge", "on demand", 1, 1)
    asked = quotas._quota

    def some(client: Any, code: str) -> float:
        if code == "L-1216C47A":
            raise Note(f"{code} cannot be asked for", "look in the console")
        return asked(client, code)

    monkeypatch.setattr(quotas, "_quota", some)
    with pytest.raises(Note, match="L-1216C47A cannot be asked for"):
        check_quotas(client, [head, Use("g6e.2xlarge", "spot", 13, 13)], vcpus)
    with pytest.raises(Wrong, match="the recipe needs 112"):
        check_quotas(client, [head, Use("g6e.2xlarge", "spot", 14, 14)], vcpus)


def test_a_fallback_to_on_demand_needs_that_limit_too_to_grow(
    ready_account: str, source: Path, recipe: Recipe
) -> None:
    uses = Fleet.of(clusterfile.read(source)).uses(recipe)
    gpus = [(use.market, use.most, use.needed) for use in uses if use.machine == "g6e.12xlarge"]
    assert gpus == [("spot", 2, 2), ("on demand", 2, 0)]


def test_the_dearest_spot_price_of_our_zones_counts() -> None:
    client = boto3.client("ec2", region_name=REGION, **_keys())
    day = datetime(2026, 11, 25, tzinfo=UTC)
    history = [
        {"AvailabilityZone": f"{REGION}{zone}", "SpotPrice": price, "Timestamp": day}
        for zone, price in (("a", "0.70"), ("b", "0.90"), ("c", "9.00"))
    ]
    with Stubber(client) as stub:
        asked = {
            "InstanceTypes": ["g6e.2xlarge"],
            "ProductDescriptions": ["Linux/UNIX"],
            "StartTime": ANY,
        }
        stub.add_response("describe_spot_price_history", {"SpotPriceHistory": history}, asked)
        price = spot_price(client, "g6e.2xlarge", [f"{REGION}a", f"{REGION}b"])
    assert price == (0.9, f"spot price in {REGION}b, 2026-11-25")


def test_the_list_price_of_the_region_counts_and_else_the_catalogues() -> None:
    client = boto3.client("pricing", region_name="us-east-1", **_keys())
    offer = {
        "publicationDate": "2026-11-20T10:00:00Z",
        "terms": {
            "OnDemand": {"x": {"priceDimensions": {"y": {"pricePerUnit": {"USD": "2.4990000000"}}}}}
        },
    }
    with Stubber(client) as stub:
        stub.add_response("get_products", {"PriceList": [json.dumps(offer)]})
        stub.add_response("get_products", {"PriceList": []})
        stub.add_client_error("get_products", "AccessDeniedException")
        stub.add_client_error("get_products", "AccessDeniedException")
        said = on_demand_price(client, "g6e.2xlarge", REGION)
        assert said == (2.499, "AWS price list, 2026-11-20")
        for _ in range(2):
            known = on_demand_price(client, "g6e.2xlarge", REGION)
            assert known.dollars and known.dollars == pytest.approx(2.24, abs=0.5)
            assert "catalogue" in known.source and "us-east-1" in known.source
        assert on_demand_price(client, "q9.huge", REGION).dollars is None


def test_the_cost_has_the_head_at_once_and_the_dearest_machines_at_most(
    ready_account: str, source: Path
) -> None:
    cost = Aws(planned(source)).cost()
    kinds = {kind.name: kind for kind in cost.kinds}
    assert kinds["head"].standing == 1 and kinds["gpu"].standing == 0
    head, spot, decode = (kinds[name].dollars for name in ("head", "gpu", "decode"))
    on_demand = kinds["gpu"].dearest
    assert head and spot and decode and on_demand and on_demand > spot
    assert cost.standing == pytest.approx(head)
    # Of each spot machine it may be that only one on demand is to be had.
    single = kinds["gpu_single"].dearest
    assert single
    assert cost.most == pytest.approx(head + 2 * on_demand + single + 4 * decode)
    source.write_text(source.read_text().replace("max_workers: 7", "max_workers: 4"))
    fewer = Aws(planned(source)).cost()
    assert fewer.most == pytest.approx(head + 2 * on_demand + single + decode)
    assert "an hour from the start" in cost.line and "on top" in cost.line


def test_device_auto_becomes_cuda_where_gpus_come_from_zero(source: Path, recipe: Recipe) -> None:
    auto = replace(recipe, compute=replace(recipe.compute, device="auto"))
    backend = Aws(planned(source, region=REGION))
    adapted, said = backend.adapted(auto)
    assert adapted.compute.device == "cuda" and "made cuda" in said[0]
    assert backend.adapted(recipe) == (recipe, [])


def _run(cluster: str, kind: str) -> str:
    made = boto3.client("ec2").run_instances(
        ImageId="ami-12c6146b",
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[
            {
                "ResourceType": "instance",
                "Tags": [
                    {"Key": "ray-cluster-name", "Value": cluster},
                    {"Key": "ray-node-type", "Value": kind},
                ],
            }
        ],
    )
    return made["Instances"][0]["InstanceId"]


def _state(machine: str) -> str:
    found = boto3.client("ec2").describe_instances(InstanceIds=[machine])
    return found["Reservations"][0]["Instances"][0]["State"]["Name"]


def test_down_ends_all_machines_of_the_cluster_and_no_others(
    ready_account: str, source: Path
) -> None:
    ours = [_run("studio-vit", kind) for kind in ("head", "worker", "worker")]
    stopped = _run("studio-vit", "worker")
    boto3.client("ec2").stop_instances(InstanceIds=[stopped])
    others = [_run("studio-vit-2", "head"), _run("studio", "head")]
    said: list[str] = []
    assert Aws(planned(source, phase="submitted")).down(said.append) == []
    assert {_state(each) for each in [*ours, stopped]} == {"terminated"}
    assert {_state(each) for each in others} == {"running"}


def test_what_a_head_starts_while_it_is_shutting_down_is_ended_too(
    ready_account: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EC2 takes its time; in moto a machine is terminated at once."""
    head = _run("studio-vit", "head")
    state = ec2_backends[ACCOUNT_ID][REGION].get_instance(head)._state
    state.name, state.code = "shutting-down", 32
    seen: list[tuple[str, list[str]]] = []
    started: list[str] = []

    def passes(seconds: float) -> None:
        seen.append((_state(head), [_state(each) for each in started]))
        if len(seen) in (1, 4):
            started.append(_run("studio-vit", "worker"))
        if len(seen) == 2:
            state.name, state.code = "terminated", 48

    monkeypatch.setattr("pipelines.launch.aws.time.sleep", passes)
    assert Aws(planned(source)).down(print) == []
    assert [_state(each) for each in started] == ["terminated"] * 2
    assert seen[:4] == [
        ("shutting-down", []),
        ("shutting-down", ["running"]),  # which goes after the head
        ("terminated", ["terminated"]),
        ("terminated", ["terminated"]),  # nothing is left: it is looked once more
    ]


def test_machines_of_the_name_that_were_not_kept_are_left_alone(
    ready_account: str, source: Path, recipe: Recipe
) -> None:
    _run("studio-vit", "worker")  # a head would be asked by ssh whether it is idle
    check = looked(Aws(planned(source)), recipe)["name"]
    assert check.state == "wrong" and "droppos attach vit --on aws" in check.way_out
    kept = record.begin(planned(source, keep=True, region=REGION)).at("up")
    assert "were kept" in looked(Aws(planned(source)), recipe)["name"].found
    for other in (kept.at("ended"), kept.at("up", account="1"), kept.at("up", region="eu-west-1")):
        other.save()  # so what has the name now is a colleague's
        assert looked(Aws(planned(source)), recipe)["name"].state == "wrong"


def test_machines_are_not_looked_for_in_another_account(ready_account: str, source: Path) -> None:
    """Where there are none, which is not to say that none is left."""
    begun = record.begin(planned(source, region=REGION, account="999999999999")).at("submitted")
    said: list[str] = []
    speaking = Terminal(said.append, print, lambda question: True, print, print)
    for command in (flow.down, flow.attach, flow.stop):
        with pytest.raises(ConfigError, match=r"account 999999999999.*account 123456789012"):
            command(begun, Aws(begun), speaking)
    assert said == [] and record.find("vit") == begun
    its_own = begun.at("submitted", account="123456789012")
    assert flow.down(its_own, Aws(its_own), speaking) == 0


def test_the_file_of_an_ended_launch_is_not_used_for_one_elsewhere(
    ready_account: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = record.begin(planned(source)).at("ended")
    record.write_private(ended.file("cluster.yaml"), "cluster_name: of-before\n")
    monkeypatch.setattr(Aws, "_ray", lambda self, *command: pytest.fail("`ray` was run"))
    asked, backend = places.found("vit", On(on="aws", stack=STACK))
    left = _run("studio-vit", "worker")
    speaking = Terminal(print, print, lambda question: True, print, print)
    assert flow.down(asked, backend, speaking) == 0 and _state(left) == "terminated"
    assert record.find("vit") == ended


def test_a_kept_cluster_is_used_again_when_it_is_idle_and_its_ray_goes_on(
    ready_account: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = JobsApi()
    for name, state in {"vit": "SUCCEEDED", "theirs": "RUNNING"}.items():
        jobs.add(name, state)
    monkeypatch.setattr(Aws, "address", lambda self: jobs.address())  # in place of ssh
    monkeypatch.setattr("pipelines.launch.jobs.KEPT_S", 0.0)
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(Aws, "_ray", lambda self, *command: ran.append(command))
    assert "no cluster" in Aws(planned(source))._is_idle()
    record.begin(planned(source, keep=True)).at("up")
    Aws(planned(source)).up(print)
    assert "--no-restart" not in ran[-1]
    _run("studio-vit", "head")
    with pytest.raises(Wrong, match="theirs, still running"):
        Aws(planned(source))._is_idle()
    jobs.jobs["theirs"]["status"] = "STOPPED"
    assert "none runs" in Aws(planned(source))._is_idle()
    file = record.find("vit").file("cluster.yaml")  # type: ignore[union-attr]
    stands = clusterfile.read(file)
    stands["docker"]["image"] = stands["docker"]["image"].partition("@")[0] + "@sha256:" + "7" * 64
    record.write_private(file, clusterfile.to_yaml(stands))
    again = Aws(planned(source))
    assert "which its head runs; the newest is" in again._check_image()
    again.up(print)
    up, care = ran[-2:]
    assert "--no-restart" in up
    assert clusterfile.read(file)["docker"] == stands["docker"]  # late machines run the same code
    # What starts with Ray on a new head would not have started here.
    assert care[0] == "exec" and "pipelines.launch.caretaker studio-vit" in care[2]
    Aws(planned(source, keep=True)).up(print)
    assert ran[-1][0] == "up"
    gone = Address("http://127.0.0.1:9")
    monkeypatch.setattr(Aws, "address", lambda self: nullcontext(gone))
    with pytest.raises(Wrong, match="droppos down vit"):
        Aws(planned(source))._is_idle()


def test_what_cannot_be_ended_is_named(
    ready_account: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.launch.aws.TERMINATE_S", 0.2)
    monkeypatch.setattr("pipelines.launch.aws.LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr(Aws, "_terminate", lambda self, machines: None)  # as if it were protected
    left = _run("studio-vit", "worker")
    assert Aws(planned(source)).down(print) == [f"{left} (running)"]


def test_the_tunnel_goes_to_the_heads_public_address_with_the_files_key(
    ready_account: str, source: Path, home: Path
) -> None:
    head = _run("studio-vit", "head")
    _run("studio-vit", "worker")
    found = boto3.client("ec2").describe_instances(InstanceIds=[head])
    public = found["Reservations"][0]["Instances"][0]["PublicIpAddress"]
    command = Aws(planned(source))._tunnel_command(4711)
    assert command[:4] == ["ssh", "-N", "-L", "127.0.0.1:4711:127.0.0.1:8265"]
    assert command[-1] == f"ubuntu@{public}"
    assert command[command.index("-i") + 1] == str(home / ".ssh" / "droppos.pem")
    assert "StrictHostKeyChecking=accept-new" in command


def test_a_kept_record_needs_neither_the_clone_nor_the_stack(
    ready_account: str, source: Path
) -> None:
    begun = record.begin(planned(source))
    filled = Aws(begun).filled
    record.write_private(begun.file("cluster.yaml"), clusterfile.to_yaml(filled))
    begun = begun.at("submitted")
    source.unlink()
    boto3.client("cloudformation").delete_stack(StackName=STACK)
    assert Aws(begun).filled == filled
    assert yaml.safe_load(begun.file("cluster.yaml").read_text()) == filled
    assert stat.S_IMODE(begun.file("cluster.yaml").stat().st_mode) == 0o600


def test_a_new_launch_is_filled_anew_though_an_old_file_is_there(
    ready_account: str, source: Path
) -> None:
    begun = record.begin(planned(source))
    record.write_private(begun.file("cluster.yaml"), "cluster_name: old\n")
    assert Aws(planned(source)).filled["cluster_name"] == "studio-vit"


def test_the_token_is_made_once_for_its_owner_alone(home: Path) -> None:
    assert "made just now" in ensure_token_file()
    file = home / ".ray" / "auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(file.read_text()) == 64
    before = file.read_text()
    assert ensure_token_file() == str(file) and file.read_text() == before
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ensure_token_file()


def test_requests_and_the_cluster_have_the_same_token_or_nothing_starts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    ensure_token_file()
    assert (home / ".ray" / "auth_token").read_text() == "a" * 64 == read_token()
    ensure_token_file()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    with pytest.raises(ConfigError, match="unset it") as error:
        ensure_token_file()
    assert "b" * 64 not in str(error.value)


def test_another_clouds_file_is_refused(source: Path) -> None:
    source.write_text(source.read_text().replace("InstanceType", "machineType"))
    with pytest.raises(ConfigError, match="has no InstanceType"):
        clusterfile.read(source)


def _keys() -> dict[str, str]:
    return {"aws_access_key_id": "AKIATEST", "aws_secret_access_key": "only-for-the-stub"}
