"""What people get wrong before a launch is told in words: files, addresses, tokens, records."""

import io
import json
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)

from droppos.errors import ConfigError
from pipelines.lasting import LastingConsole
from pipelines.launch import clusterfile, manifest, places, record
from pipelines.launch.account import Account, asked
from pipelines.launch.backend import Address
from pipelines.launch.check import Check, Look, Wrong, look
from pipelines.launch.errors import LaunchError, LineLostError
from pipelines.launch.jobs import Jobs
from pipelines.launch.on import On
from pipelines.launch.record import Record
from pipelines.launch.standing import Standing, url_of
from pipelines.launch.terminal import terminal
from pipelines.launch.token import ensure_token_file, headers, read_token

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"
GROUP = {
    "groupName": "cpu",
    "template": {"spec": {"containers": [{"resources": {"limits": {"cpu": 4}}}]}},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DROPPOS_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_look_that_fails_itself_is_one_answer_among_the_others() -> None:
    def broken() -> str:
        raise KeyError("InstanceType")

    first, second, third = look(
        [Look("a", broken), Look("b", lambda: "fine"), Look("c", lambda: "fine", after=("a",))]
    )
    assert first.state == "wrong" and first.found == "KeyError: 'InstanceType'"
    assert (second.state, third.state) == ("ok", "left out")


def _misnamed(config: dict[str, Any]) -> None:
    config["head_node_type"] = "haed"


def _bare(config: dict[str, Any]) -> None:
    del config["available_node_types"]["cpu"]["node_config"]


def _none(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu"] = None


def _list(config: dict[str, Any]) -> None:
    config["available_node_types"] = ["head", "cpu"]


def _text(config: dict[str, Any]) -> None:
    config["provider"] = "aws"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_misnamed, r"head_node_type must be one of .*head.*, got 'haed'"),
        (_bare, r"available_node_types\.cpu\.node_config must be a mapping, got None"),
        (_none, r"available_node_types\.cpu must be a mapping, got None"),
        (_list, r"available_node_types must be a mapping, got \['head', 'cpu'\]"),
        (_text, r"provider must be a mapping, got 'aws'"),
    ],
)
def test_a_cluster_file_of_another_form_is_told_where(
    tmp_path: Path, spoil: Any, said: str
) -> None:
    config = clusterfile.read(CLUSTER)
    kinds = config["available_node_types"]
    kinds["cpu"] = kinds.pop(next(name for name in kinds if name != config["head_node_type"]))
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    assert clusterfile.read(file) == config
    spoil(config)
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=said):
        clusterfile.read(file)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"kind": "RayCluster"}], r"object 1 must be a mapping with kind and metadata"),
        ({"kind": "RayCluster"}, r"object 1 must be a mapping with kind and metadata"),
        (
            {"kind": "RayCluster", "metadata": {}},
            r"spec\.headGroupSpec of the RayCluster .* got nothing",
        ),
        (
            {"kind": "RayCluster", "metadata": {}, "spec": {"headGroupSpec": {"template": {}}}},
            r"spec\.headGroupSpec of the RayCluster must have template\.spec\.containers",
        ),
        (
            {
                "kind": "RayCluster",
                "metadata": {},
                "spec": {"headGroupSpec": GROUP, "workerGroupSpecs": [GROUP, {"template": {}}]},
            },
            r"spec\.workerGroupSpecs\[1\] of the RayCluster must have",
        ),
        (
            {
                "kind": "RayCluster",
                "metadata": {},
                "spec": {
                    "headGroupSpec": GROUP,
                    "workerGroupSpecs": [{"template": GROUP["template"]}],
                },
            },
            r"spec\.workerGroupSpecs\[0\] of the RayCluster has no groupName",
        ),
    ],
)
def test_a_manifest_of_another_form_is_told_where(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        manifest.read(yaml.safe_dump(given), "given.yaml", "vit", None)


@pytest.mark.parametrize(
    "address",
    ["10.0.0.5:abc", "http://h:99999", "http://[::1", "", "http://", "a b", "[10.0.0.5]:8265"],
)
def test_an_impossible_address_is_refused_in_words(address: str) -> None:
    with pytest.raises(ConfigError, match="--on"):
        url_of(address)
    with pytest.raises(ConfigError, match="--on"):
        places.planned("vit", On(on=address), keep=False)


def test_an_impossible_port_does_not_show_the_secret_before_it() -> None:
    with pytest.raises(ConfigError) as error:
        url_of("http://me:secret@h:abc")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("spelt", ["AWS", "Aws", "KUBE"])
def test_a_kind_of_place_is_known_however_it_is_spelt(
    spelt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert places.planned("vit", On(on=spelt), keep=False)[0].on == spelt.lower()


def test_no_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody(io.StringIO):
        """A terminal at which Ctrl-D is pressed."""

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Nobody(""))
    assert terminal(LastingConsole(file=io.StringIO()), yes=False).ask("launch?") is False


def test_a_way_out_can_be_copied_from_a_narrow_screen() -> None:
    command = "ssh-keygen -t ed25519 -f /" + "long-folder/" * 10 + "droppos.pem, and so [on]"
    screen = io.StringIO()
    speaking = terminal(LastingConsole(file=screen, width=80), yes=False)
    speaking.checks([Check("ssh", "wrong", "no key", "a key", command), Check("b", "ok", "fine")])
    assert f"ssh: {command}" in screen.getvalue().splitlines()
    assert screen.getvalue().count("ssh-keygen") == 1


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[]", "a mapping is expected, got"),
        ('{"name": "vit"}', "on"),
        ('{"name": "vit", "on": 3}', "on is 3"),
        ('{"name": "vit", "on": "aws", "phase": "flying"}', "phase is 'flying'"),
        ('{"name": "vit", "on": "aws", "keep": "no"}', "keep is 'no'"),
        ('{"name": "vit", "on": "aws", "started": null}', "started is None"),
        ('{"name": "vit", "on": "aws", "job": ["vit"]}', "job is "),
    ],
)
def test_a_damaged_record_is_told_and_hides_no_other(
    written: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = record.begin(Record(name="good", on="http://h:8265"))
    record.begin(Record(name="vit", on="aws")).file("record.json").write_text(written)
    with pytest.raises(ConfigError, match=rf"record\.json is damaged.*{said}.*--on"):
        record.find("vit")
    assert list(record.all_records()) == [good]
    assert "record.json is damaged" in caplog.text
    with pytest.raises(ConfigError, match="it knows of good"):
        places.found("another", On())


def test_a_file_where_a_records_folder_should_be_is_told(home: Path) -> None:
    record.begin(Record(name="good", on="http://h:8265"))
    (home / "launches" / "vit").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        record.begin(Record(name="vit", on="aws"))
    (home / "launches" / "good" / "record.json").unlink()
    (home / "launches" / "good" / "record.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        record.find("good")


def test_records_of_every_phase_are_read_as_they_were_written() -> None:
    begun = record.begin(Record(name="vit", on="aws", keep=True, account="1"))
    for phase in ("up", "submitted", "ending", "ended"):
        begun = begun.at(phase, job="vit", mark="m")
        assert record.find("vit") == begun
    whole = json.loads(begun.file("record.json").read_text())
    begun.file("record.json").write_text(json.dumps({**whole, "started": 1}))
    assert record.find("vit") == replace(begun, started=1)


def _token(home: Path, content: bytes, mode: int = 0o600) -> Path:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"abc\ndef\n", "2 words on 2 lines"),
        (b"abc def", "2 words"),
        (b"ab\xc3\xbc", "plain letters"),
        (b"\xff\xfe\x00", "holds no text"),
    ],
)
def test_what_can_be_no_token_is_refused_without_being_shown(
    home: Path, content: bytes, said: str
) -> None:
    _token(home, content)
    for ask in (read_token, ensure_token_file):
        with pytest.raises(ConfigError, match=said) as error:
            ask()
        assert "abc" not in str(error.value)


def test_a_folder_in_place_of_the_token_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home))
    for ask in (read_token, ensure_token_file):
        with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
            ask()


def test_a_token_that_others_may_read_is_not_sent(home: Path) -> None:
    file = _token(home, b"t" * 64, 0o644)
    with (
        pytest.raises(ConfigError, match=rf"chmod 600 {file}"),
        Standing("http://localhost:8265").address(),
    ):
        pass
    file.chmod(0o600)
    with Standing("http://localhost:8265").address() as opened:
        assert opened.headers == headers("t" * 64)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_header_that_cannot_be_sent_is_no_broken_line() -> None:
    with pytest.raises(LaunchError, match="no request can be made") as error:
        Jobs(Address("http://127.0.0.1:9", {"Authorization": "Bearer a\nb"}))
    assert not isinstance(error.value, LineLostError)


def test_a_broken_file_of_awss_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "config"
    file.write_text("[default\nregion = eu-west-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    with pytest.raises(ConfigError, match=r"~/\.aws/config"):
        Account(None, "droppos", None)


def _refused(code: str) -> ClientError:
    said: Mapping[str, Any] = {"Error": {"Code": code, "Message": "no"}}
    return ClientError(said, "DescribeInstances")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (EndpointConnectionError(endpoint_url="https://ec2"), "look at the network"),
        (ReadTimeoutError(endpoint_url="https://ec2"), "look at the network"),
        (NoCredentialsError(), "aws sso login"),
        (_refused("ExpiredToken"), "aws sso login"),
        (_refused("UnauthorizedOperation"), "ask for ec2:DescribeInstances"),
    ],
)
def test_a_right_is_the_way_out_only_where_aws_has_answered(error: Exception, helps: str) -> None:
    def ask() -> str:
        raise error

    with pytest.raises(Wrong) as wrong:
        asked(ask, "to see the machines", "ask for ec2:DescribeInstances")
    assert helps in wrong.value.way_out
    assert ("DescribeInstances" in wrong.value.way_out) == (helps.startswith("ask for"))
