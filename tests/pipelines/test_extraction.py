"""Features of a whole data set: the same by one process and by many, and taken once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from droppos.encoder import build_encoder
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.measure.features import extract_features
from pipelines import extraction
from pipelines.extraction import extract
from pipelines.holdout import choose, load_pictures, read_chosen
from pipelines.prepare import prepare
from pipelines.shards import load_manifest, read_rows
from pipelines.spread import Spread
from pipelines.storage import open_place
from tests.droppos.tiny import TINY

SIZE = TINY.image_size


@pytest.fixture(scope="module")
def data(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """72 pictures in 14 row groups of at most six, in several shards."""
    folder = tmp_path_factory.mktemp("extraction") / "data"
    prepare(str(photographs), str(folder), shard_bytes=60_000, group_rows=6)
    return str(folder)


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return build_encoder(TINY).eval()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "PIECE", 10)


def kept(cache: Path) -> list[Path]:
    return sorted(cache.rglob("part-*.npz"))


def test_pieces_find_what_all_pictures_at_once_do(data: str, encoder: VisionTransformer) -> None:
    found = extract(encoder, data, SIZE)
    pictures = load_pictures(data, SIZE)
    assert found.keys == pictures.keys
    assert found.labels is not None and found.labels.tolist() == pictures.labels
    assert found.classes == pictures.classes
    whole = extract_features(encoder, pictures.pixels)
    torch.testing.assert_close(found.features, whole)


def test_a_limit_takes_the_pictures_that_a_run_would(data: str, encoder: VisionTransformer) -> None:
    assert extract(encoder, data, SIZE, limit=20).keys == load_pictures(data, SIZE, 20).keys


@pytest.mark.parametrize("limit", [None, 1, 5, 37, 71, 72, 500])
def test_what_is_chosen_is_spread_and_each_picture_once(data: str, limit: int | None) -> None:
    place = open_place(data)
    manifest = load_manifest(place)
    rows = [
        row.key for part in choose(manifest, limit) for row in read_chosen(place, manifest, part)
    ]
    every = [row.key for row in read_rows(place, manifest)]
    assert len(rows) == min(limit or 72, 72)
    assert rows == [key for key in every if key in set(rows)]


def test_pieces_end_with_a_row_group_and_hold_each_one_once(data: str) -> None:
    chosen = choose(load_manifest(open_place(data)))
    pieces = extraction.pieces_of(chosen)
    assert [part for piece in pieces for part in piece] == chosen
    sizes = [sum(len(part.rows) for part in piece) for piece in pieces]
    assert all(size >= 10 for size in sizes[:-1]) and max(sizes) < 16


def test_kept_features_are_read_and_only_missing_ones_are_taken(
    data: str, encoder: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = Spread(cache=str(tmp_path))
    first = extract(encoder, data, SIZE, spread=spread)
    parts = kept(tmp_path)
    assert len(parts) > 4
    parts[1].unlink()
    parts[3].write_bytes(parts[3].read_bytes()[:-40])
    taken: list[int] = []
    take = extraction._Extractor.take

    def counted(self, left):
        taken.extend(left)
        return take(self, left)

    monkeypatch.setattr(extraction._Extractor, "take", counted)
    again = extract(encoder, data, SIZE, spread=spread)
    assert taken == [1, 3]
    assert torch.equal(first.features, again.features) and first.keys == again.keys
    extract(encoder, data, SIZE, spread=spread)
    assert taken == [1, 3]


def test_an_interrupted_evaluation_goes_on(
    data: str, encoder: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupted(*told: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return crop(*told)

    crop = extraction.center_crop
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "center_crop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(encoder, data, SIZE, spread=Spread(cache=str(tmp_path)))
    assert len(kept(tmp_path)) == 2
    whole = extract(encoder, data, SIZE, spread=Spread(cache=str(tmp_path)))
    assert torch.equal(whole.features, extract(encoder, data, SIZE).features)


def test_other_weights_other_pictures_and_other_data_are_kept_apart(
    data: str, encoder: VisionTransformer, tmp_path: Path
) -> None:
    spread = Spread(cache=str(tmp_path))
    extract(encoder, data, SIZE, spread=spread)
    extract(encoder, data, SIZE, limit=20, spread=spread)
    other = build_encoder(TINY).eval()
    extract(other, data, SIZE, spread=spread)
    extract(other, data, SIZE, blocks=len(other.blocks), spread=spread)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_same_weights_with_other_heads_are_other_features(
    data: str, encoder: VisionTransformer, tmp_path: Path
) -> None:
    spread = Spread(cache=str(tmp_path))
    first = extract(encoder, data, SIZE, limit=20, spread=spread)
    other = build_encoder(replace(TINY, heads=1)).eval()
    other.load_state_dict(encoder.state_dict())
    found = extract(other, data, SIZE, limit=20, spread=spread)
    assert not torch.allclose(first.features, found.features)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="--workers must be 1 or more, got 0"):
        Spread(workers=0)


@pytest.mark.slow
def test_workers_find_what_one_process_finds_and_keep_it(
    data: str, encoder: VisionTransformer, tmp_path: Path, ray_cluster: None
) -> None:
    spread = Spread(workers=2, device="cpu", cache=str(tmp_path))
    many = extract(encoder, data, SIZE, spread=spread)
    one = extract(encoder, data, SIZE)
    assert many.keys == one.keys
    torch.testing.assert_close(many.features, one.features)
    assert len(kept(tmp_path)) == len(extraction.pieces_of(choose(load_manifest(open_place(data)))))

    with pytest.raises(ConfigError, match=r"--workers 7.* room for 6"):
        extract(encoder, data, SIZE, spread=Spread(workers=7, device="cpu"))


def test_a_shard_that_is_gone_is_named(
    data: str, encoder: VisionTransformer, tmp_path: Path
) -> None:
    for file in Path(data).glob("*.*"):
        if file.name != "shard-00001.parquet":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="shard-00001"):
        extract(encoder, str(tmp_path), SIZE)


def test_features_that_are_not_finite_are_told(data: str) -> None:
    from droppos.measure.rank import effective_rank

    broken = build_encoder(TINY).eval()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="diverged"):
        effective_rank(extract(broken, data, SIZE).features)
