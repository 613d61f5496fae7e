import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from droppos.errors import ConfigError, DataError, StorageError
from pipelines import storage
from pipelines.local_s3 import SECRET_KEY, S3Server
from pipelines.storage import Place, open_place


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place that does not exist yet, of each kind."""
    if request.param == "folder":
        return open_place(str(tmp_path / "place"))
    bucket = request.getfixturevalue("s3_env").bucket(f"storage-{os.urandom(4).hex()}")
    return open_place(f"{bucket}/place")


def test_what_was_written_is_read_and_listed(place: Place) -> None:
    (place / "b/deep.bin").write_bytes(b"deep")
    (place / "a").write_bytes(b"first")
    (place / "a").write_bytes(b"second")
    assert (place / "a").read_bytes() == b"second"
    assert (place / "a").size() == 6
    with (place / "b" / "deep.bin").open_input() as file:
        file.seek(2)
        assert file.read() == b"ep"
    assert place.children() == ["a", "b"]
    assert [tuple(entry) for entry in place.files()] == [("a", 6), ("b/deep.bin", 4)]
    assert place.exists()
    assert not place.is_file()
    assert (place / "a").is_file()


def test_a_place_without_objects_does_not_exist(place: Place) -> None:
    assert not place.exists()
    assert place.children() == []
    place.delete()


def test_delete_takes_the_tree_and_nothing_beside_it(place: Place) -> None:
    for name in ("run/a/1", "run/2", "running"):
        (place / name).write_bytes(b"x")
    (place / "run").delete()
    assert place.children() == ["running"]
    assert not (place / "run").exists()
    (place / "running").delete()
    assert place.files() == []


def test_a_missing_object_is_named(place: Place) -> None:
    (place / "there").write_bytes(b"")
    with pytest.raises(DataError, match=f"cannot read {place.uri}/gone: there is no such"):
        (place / "gone").read_bytes()
    with pytest.raises(DataError, match="gone"):
        (place / "gone").open_input()
    with pytest.raises(DataError, match="gone"):
        (place / "gone").size()


def test_it_pickles_by_uri_alone(place: Place) -> None:
    (place / "a").write_bytes(b"1")
    pickled = pickle.dumps(place)
    assert SECRET_KEY.encode() not in pickled
    assert pickle.loads(pickled) == place
    assert (pickle.loads(pickled) / "a").read_bytes() == b"1"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    place = open_place(str(tmp_path / "a"))
    place.write_bytes(b"whole")
    with pytest.raises(TypeError):
        place.write_bytes(["not bytes"])  # pyright: ignore[reportArgumentType]
    assert place.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_relative_path_means_the_folder_it_was_opened_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = open_place("data")
    monkeypatch.chdir("/")
    assert place.uri == str(tmp_path / "data")
    assert place == open_place(f"file://{tmp_path}/data") == open_place(f"{tmp_path}/data/")
    assert place == open_place(f"{tmp_path}/other/../data")


@pytest.mark.parametrize(
    "uri", ["gs://bucket/x", "s3:/bucket/x", "s3://", "file://host/x", "http://x/y"]
)
def test_another_kind_of_uri_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=uri):
        open_place(uri)


def test_a_file_where_a_folder_should_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file/x: part of its path is a file"):
        open_place(str(tmp_path / "file" / "x")).write_bytes(b"x")


def test_a_missing_bucket_is_named_and_not_made(s3_env: S3Server) -> None:
    place = open_place("s3://no-such-bucket/data")
    for act in (place.exists, place.children, place.read_bytes, place.size, place.check_reachable):
        with pytest.raises(DataError, match=r"there is no bucket 'no-such-bucket' at http://127"):
            act()
    with pytest.raises(DataError, match="there is no bucket 'no-such-bucket'"):
        place.write_bytes(b"x")
    buckets = [bucket["Name"] for bucket in s3_env.client().list_buckets()["Buckets"]]
    assert "no-such-bucket" not in buckets


def test_wrong_credentials_are_told_from_none(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = s3_env.bucket("locked")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    for act in (lambda p: p.read_bytes(), lambda p: p.children(), lambda p: p.write_bytes(b"")):
        with pytest.raises(StorageError, match="s3://locked/x: access denied: the cred") as denied:
            act(open_place(f"{bucket}/x"))
        assert "wrong-secret" not in str(denied.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no AWS credentials found; set AWS_ACCESS_KEY_ID"):
        open_place(f"{bucket}/x").read_bytes()


@pytest.mark.slow
def test_a_dead_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and never listening: every connection is refused
        endpoint = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        monkeypatch.setattr(storage, "FIRST_PATIENCE", 2.0)
        start = monotonic()
        with pytest.raises(StorageError, match=f"s3://bucket/x: {endpoint} does not answer"):
            open_place("s3://bucket/x").check_reachable()
        assert monotonic() - start < 8


def test_a_whole_bucket_is_never_deleted(s3_env: S3Server) -> None:
    place = open_place(s3_env.bucket("keep"))
    (place / "a").write_bytes(b"1")
    with pytest.raises(ConfigError, match="will not delete all of s3://keep"):
        place.delete()
    assert place.children() == ["a"]


def test_importing_storage_starts_neither_ray_nor_torch() -> None:
    code = "import sys, pipelines.shards; print({'ray', 'torch', 'boto3'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
