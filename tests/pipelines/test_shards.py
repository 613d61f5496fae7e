import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droppos.errors import DataError
from pipelines.shards import (
    MANIFEST,
    SCHEMA,
    Manifest,
    Picture,
    Shard,
    ShardWriter,
    load_manifest,
    read_row_group,
    read_rows,
)
from pipelines.storage import Place, open_place


def _pictures(count: int, size: int = 100) -> list[Picture]:
    return [Picture(bytes([i]) * size, f"{i:03d}.jpg", i % 2 or None, 8, 6) for i in range(count)]


def _write(place: Place, pictures: list[Picture], shard_bytes: int, group_rows: int) -> Manifest:
    writer = ShardWriter(place, shard_bytes=shard_bytes, group_rows=group_rows)
    shards: list[Shard] = []
    for picture in pictures:
        writer.add(picture)
        if writer.is_full:
            shards.append(writer.close_shard())
    if not writer.is_empty:
        shards.append(writer.close_shard())
    manifest = Manifest(tuple(shards), ("a", "b"))
    (place / MANIFEST).write_bytes(manifest.to_json().encode())
    return manifest


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return open_place(str(tmp_path / "data"))


@settings(deadline=None, max_examples=25)  # the first example pays for starting Arrow
@given(count=st.integers(1, 40), shard_rows=st.integers(1, 15), group_rows=st.integers(1, 15))
def test_every_picture_is_read_back_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, shard_rows: int, group_rows: int
) -> None:
    place = open_place(str(tmp_path_factory.mktemp("shards")))
    manifest = _write(place, _pictures(count), shard_rows * 100, group_rows)
    assert load_manifest(place) == manifest
    assert list(read_rows(place, manifest)) == _pictures(count)
    assert list(read_rows(place, manifest, 7)) == _pictures(count)[:7]
    assert manifest.rows == count
    starts = [group.start for group in manifest.groups]
    assert starts == [sum(g.rows for g in manifest.groups[:i]) for i in range(len(starts))]
    assert all(0 < group.rows <= group_rows for group in manifest.groups)
    assert all(shard.rows <= shard_rows for shard in manifest.shards)


def test_a_shard_is_plain_parquet_of_the_stated_columns(place: Place) -> None:
    manifest = _write(place, _pictures(10), 10**6, 4)
    file = pq.ParquetFile(f"{place.path}/shard-00000.parquet")
    assert file.schema_arrow == SCHEMA
    assert file.metadata.num_row_groups == 3
    assert file.metadata.row_group(0).column(0).compression == "UNCOMPRESSED"
    assert manifest.size == (place / "shard-00000.parquet").size()


def test_columns_can_be_chosen(place: Place) -> None:
    manifest = _write(place, _pictures(10), 10**6, 4)
    table = read_row_group(place, manifest.shards[0], 1, ["key", "label"])
    assert table.column_names == ["key", "label"]
    assert table["key"].to_pylist() == ["004.jpg", "005.jpg", "006.jpg", "007.jpg"]


def test_the_digest_changes_with_all_that_decides_the_order(place: Place) -> None:
    def digest(pictures: list[Picture], shard_bytes: int = 400, group_rows: int = 3) -> str:
        return _write(place, pictures, shard_bytes, group_rows).digest

    base = _pictures(10)
    swapped = [base[1], base[0], *base[2:]]
    relabelled = [base[0]._replace(label=1), *base[1:]]
    redrawn = [base[0]._replace(image=b"other"), *base[1:]]
    others = [digest(p) for p in (swapped, relabelled, redrawn, base[:-1])]
    others += [digest(base, shard_bytes=500), digest(base, group_rows=2)]
    assert digest(base) == digest(base)
    assert len({digest(base), *others}) == 1 + len(others)


def test_a_folder_without_manifest_is_no_data_set(place: Place) -> None:
    with pytest.raises(DataError, match=r"is not a prepared data set.*run `droppos prepare SOURCE"):
        load_manifest(place)


@pytest.mark.parametrize("key", ["schema_version", "rows", "digest", "classes", "shards"])
def test_a_missing_key_is_named(place: Place, key: str) -> None:
    loaded = json.loads(_write(place, _pictures(3), 400, 3).to_json())
    del loaded[key]
    with pytest.raises(DataError, match=f"lacks the key '{key}'"):
        Manifest.from_json(json.dumps(loaded))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("schema_version", 99, "schema_version 99.*upgrade droppos"),
        ("rows", 4, "says rows 4, but its shards make it 3"),
        ("digest", "0", "changed by hand or damaged"),
        ("shards", {}, "shards has the wrong type"),
        ("shards", [1], "a shard must be an object"),
    ],
)
def test_a_wrong_value_is_named(place: Place, key: str, value: object, says: str) -> None:
    loaded = json.loads(_write(place, _pictures(3), 400, 3).to_json())
    loaded[key] = value
    with pytest.raises(DataError, match=says):
        Manifest.from_json(json.dumps(loaded))


def test_text_that_is_no_manifest_is_refused() -> None:
    for text in ("", "[]", "{}", '"x"'):
        with pytest.raises(DataError):
            Manifest.from_json(text)


def test_a_shard_that_is_not_the_manifests_is_refused(place: Place) -> None:
    shard = _write(place, _pictures(10), 10**6, 4).shards[0]
    with pytest.raises(DataError, match="its row groups hold"):
        read_row_group(place, replace(shard, row_groups=(5, 5)), 0)
    with pytest.raises(DataError, match="bytes, not 7"):
        read_row_group(place, replace(shard, bytes=7), 0)
    with pytest.raises(DataError, match=r"other\.parquet: there is no such file"):
        read_row_group(place, replace(shard, name="other.parquet"), 0)


def test_a_flipped_bit_is_noticed(place: Place) -> None:
    shard = _write(place, _pictures(10), 10**6, 4).shards[0]
    data = bytearray((place / shard.name).read_bytes())
    data[data.index(b"\x02" * 50) + 20] ^= 1
    (place / shard.name).write_bytes(bytes(data))
    with pytest.raises(DataError, match="is not the shard its manifest speaks of"):
        read_row_group(place, shard, 0)
