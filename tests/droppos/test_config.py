import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.config import SHAPES, Compute, Grid, Method, Model, Optim
from droppos.errors import ConfigError

RATIOS = st.integers(0, 100).map(lambda percent: percent / 100)


def test_the_papers_counts() -> None:
    counts = Method().counts(Model().grid)
    assert (counts.cells, counts.visible, counts.kept, counts.scored) == (196, 49, 12, 37)


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), mask=RATIOS, positions=RATIOS)
def test_counts_are_right_or_refused(
    rows: int, columns: int, mask: float, positions: float
) -> None:
    grid = Grid(rows, columns)
    try:
        counts = Method(mask_ratio=mask, position_mask_ratio=positions).counts(grid)
    except ConfigError as error:
        assert "method." in str(error) or "single patch" in str(error)
        return
    assert 1 <= counts.visible <= counts.cells
    assert 0 <= counts.kept < counts.visible
    # Exact arithmetic on the ratio as written, in percent.
    assert counts.visible == grid.cells * (100 - round(mask * 100)) // 100
    assert counts.kept == counts.visible * (100 - round(positions * 100)) // 100


def test_reference_keeps_one_less_where_floats_fall_short() -> None:
    grid = Grid(2, 5)
    ratios = {"mask_ratio": 0.0, "position_mask_ratio": 0.8}
    assert Method(**ratios).counts(grid).kept == 2
    assert Method(**ratios, conformance="reference").counts(grid).kept == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Method(mask_ratio=1), ["method.mask_ratio", "1", "[0, 1)", "0.75"]),
        (lambda: Method(mask_ratio=float("nan")), ["method.mask_ratio", "nan"]),
        (lambda: Method(position_mask_ratio=0), ["position_mask_ratio", "no position to predict"]),
        (lambda: Method(sigma=-1), ["method.sigma", "-1"]),
        (lambda: Method(sigma=float("nan")), ["method.sigma", "nan"]),
        (lambda: Method(tau=0), ["method.tau", "0"]),
        (
            lambda: Method(shuffle=True, objective="position_pixels", conformance="reference"),
            ["method.shuffle", "conformance=paper"],
        ),
        (lambda: Model(image_size=(224, 230)), ["width", "230", "multiple", "224"]),
        (lambda: Model(width=100, heads=3), ["model.heads", "divisor"]),
        (lambda: Model(decoder_heads=7), ["decoder_heads", "512"]),
        (lambda: Optim(warmup_epochs=900), ["warmup_epochs", "800"]),
        (lambda: Optim(min_lr=1), ["optim.min_lr", "peak"]),
        (lambda: Optim(global_batch=0), ["optim.global_batch", "positive"]),
        (lambda: Method(mask_ratio=0.999).counts(Grid(6, 6)), ["no visible patch", "6 x 6"]),
        (lambda: Method(mask_ratio=0.999).counts(Grid(14, 14)), ["at most 0.9948 keeps one"]),
        (lambda: Method(mask_ratio=0).counts(Grid(1, 1)), ["single patch"]),
        (
            lambda: Method(objective="pixels", mask_ratio=0).counts(Grid(6, 6)),
            ["hides no patch", "pixels"],
        ),
    ],
)
def test_errors_name_field_value_rule_and_way_out(make: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # pyright: ignore[reportCallIssue]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("size", SHAPES)
def test_standard_grids(size: str) -> None:
    grid = Model(size=size).grid  # pyright: ignore[reportArgumentType]
    assert grid == (Grid(16, 16) if size == "huge" else Grid(14, 14))


def test_peak_rate_scales_with_the_batch() -> None:
    assert Optim(global_batch=1024).peak_lr == pytest.approx(6e-4)


def test_compute_defaults_are_what_a_gpu_cluster_wants() -> None:
    assert (Compute().strategy, Compute().precision) == ("fsdp2", "bf16")
