"""The space of a search: which fields of a recipe may vary, and over which values.

A dimension is written `method.sigma=uniform(0, 2)`. All of it is checked before anything starts:
that the field exists, and that every corner of the space is a valid recipe, by the recipe's own
rules. Values are drawn from Ray Tune's domains, so a searcher of Tune's can take the same space.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from itertools import islice, product
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin

import numpy as np
from ray import tune
from ray.tune.search.sample import Domain

from droppos.errors import ConfigError
from pipelines.recipe import Recipe
from pipelines.recipe_file import flatten, from_dict

Kind = Literal["choice", "grid", "uniform", "loguniform"]
Value = float | int | bool | str | None
Point = Mapping[str, Value]
"""A value for each searched field, by its dotted name."""

KINDS: tuple[Kind, ...] = get_args(Kind)

NOT_SEARCHED = {
    "data.path": "all trials learn from the same pictures",
    "data.holdout": "all trials are measured on the same pictures",
    "data.decode_cpus": "CPUs are shared out before the start, equally",
    "data.buffer_mb": "memory is shared out before the start, equally",
    "optim.accumulate": "it changes no step, only its memory",
    "model.image_size": "position skill on another patch grid is another figure",
    "model.patch_size": "position skill on another patch grid is another figure",
    "compute.device": "resources are shared out before the start, equally",
    "run.": "it says where and how often, not what is learnt; only run.seed may vary",
    "measure.": "all trials are measured under one protocol",
    "tracking.": "all trials are recorded in one place",
    "search.": "a search does not search itself",
}
"""Fields, or sections, that must be the same for all trials, and why."""

MOST_CORNERS = 4096
"""Combinations of ends that are tried; one takes about 0.2 ms."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One field and what it may be."""

    field: str
    """Dotted name."""
    kind: Kind
    values: tuple[Value, ...]
    """choice, grid: each value. uniform, loguniform: both ends."""
    grid: int = 0
    """Which of the grids it belongs to, where there are several."""

    @property
    def listed(self) -> bool:
        """Whether its values can be counted."""
        return self.kind in {"choice", "grid"}

    @property
    def domain(self) -> Domain:
        """Ray Tune's name for it; whole numbers include both ends."""
        if self.listed:
            return cast(Domain, tune.choice(list(self.values)))
        low, high = cast(tuple[float, float], self.values)
        if isinstance(low, int):
            draw = tune.randint if self.kind == "uniform" else tune.lograndint
            return cast(Domain, draw(low, int(high) + 1))
        return cast(Domain, getattr(tune, self.kind)(low, high))

    def draw(self, random: np.random.RandomState) -> Value:
        """Draw a value, of four significant digits: a name and a YAML file tell all of it."""
        return self.rounded(self.domain.sample(random_state=random))

    def rounded(self, value: Any) -> Value:
        """Bring what was drawn or computed into the dimension, with four significant digits."""
        if self.listed:
            return value
        low, high = cast(tuple[float, float], self.values)
        near = round(value) if isinstance(low, int) else float(f"{value:.4g}")
        return min(max(near, low), high)


Space = tuple[Dimension, ...]


def parse_space(recipe: Recipe) -> Space:
    """Read recipe.search.space, and check its corners.

    Raises:
        ConfigError: As `read_space`, or if a corner of the space is no valid recipe.
    """
    space = read_space(recipe)
    for corner in corners(space):
        apply(recipe, corner)
    return space


def read_space(recipe: Recipe) -> Space:
    """Read recipe.search.space.

    Raises:
        ConfigError: If a dimension cannot be read, or its field does not exist or may not vary.
    """
    space = tuple(_dimensions(recipe.search.space))
    if not space:
        raise ConfigError(
            "search.space is empty; name a field, such as 'method.sigma=uniform(0, 2)'"
        )
    names = [dimension.field for dimension in space]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"search.space names {', '.join(sorted(twice))} twice; keep one of them")
    if space[-1].grid > 0 and recipe.search.algorithm != "grid":
        raise ConfigError(
            "search.space has several grids ('or FIELD=grid(...)'), which search.algorithm "
            f"{recipe.search.algorithm} does not take; take grid, or leave 'or' out"
        )
    return space


def corners(space: Space) -> Iterator[Point]:
    """List the combinations of ends and listed values, as many as may be tried."""
    names = [dimension.field for dimension in space]
    for corner in islice(product(*(dimension.values for dimension in space)), MOST_CORNERS):
        yield dict(zip(names, corner, strict=True))


def apply(recipe: Recipe, point: Point) -> Recipe:
    """Put a point's values into a recipe.

    Raises:
        ConfigError: If the recipe's own rules refuse them.
    """
    content = asdict(recipe)
    for name, value in point.items():
        section, field = name.split(".")
        content[section][field] = value
    try:
        return from_dict(content)
    except ConfigError as error:
        said = ", ".join(f"{name}={value}" for name, value in point.items())
        raise ConfigError(f"search.space allows {said}, which is no valid run: {error}") from error


def grid_points(space: Space, recipe: Recipe) -> list[Point]:
    """List every combination of each grid, the last field changing fastest.

    Fields of the other grids keep the recipe's value, so several grids are several ablations.

    Raises:
        ConfigError: If a field is not listed value by value.
    """
    for dimension in space:
        if not dimension.listed:
            raise ConfigError(
                f"search.algorithm grid needs grid(...) or choice(...), got {dimension.field}="
                f"{dimension.kind}(...); list the values to try, or take search.algorithm random"
            )
    own = flatten(recipe)
    points: list[Point] = []
    for grid in range(1 + space[-1].grid):
        ranges = [
            dimension.values if dimension.grid == grid else (own[dimension.field],)
            for dimension in space
        ]
        for values in product(*ranges):
            point = dict(zip([dimension.field for dimension in space], values, strict=True))
            if point not in points:
                points.append(point)
    return points


def random_points(space: Space, number: int, seed: int) -> list[Point]:
    """Draw distinct points; a larger number begins with the same ones.

    Returns:
        ``number`` points, or fewer where the space has not so many.
    """
    points: list[Point] = []
    for point in islice(_draws(space, seed), 100 * number):
        if point not in points:
            points.append(point)
        if len(points) == number:
            break
    return points


def to_tune(space: Space) -> dict[str, Domain]:
    """Write the space as Ray Tune's, for a searcher that chooses as it learns."""
    return {dimension.field: dimension.domain for dimension in space}


def _draws(space: Space, seed: int) -> Iterator[Point]:
    random = np.random.RandomState(seed)  # what Tune's domains draw from
    while True:
        yield {dimension.field: dimension.draw(random) for dimension in space}


def _dimensions(texts: Sequence[str]) -> Iterator[Dimension]:
    """Read each dimension; `or` before one begins another grid."""
    grid = 0
    for number, text in enumerate(texts):
        begins = re.match(r"\s*or\s+", text)
        grid += begins is not None and number > 0
        dimension = _dimension(text[begins.end() :] if begins else text)
        yield replace(dimension, grid=grid)


def _dimension(text: str) -> Dimension:
    match = re.fullmatch(r"\s*([\w.-]+)\s*=\s*(\w+)\s*\((.*)\)\s*", text)
    if match is None:
        raise ConfigError(
            f"search.space has {text!r}, expected FIELD=KIND(VALUES), such as "
            "'method.sigma=uniform(0, 2)' or 'method.mask_ratio=choice(0.5, 0.75)'"
        )
    name, kind, arguments = match.groups()
    name = name.replace("-", "_")
    _require_searchable(name)
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"search.space: {name}={kind}(...) must be {', '.join(KINDS)}{hint}")
    texts = [part.strip().strip("'\"") for part in arguments.split(",")]
    values = tuple(_value(name, part) for part in texts if part)
    dimension = Dimension(name, kind, values)
    if dimension.listed:
        _require_distinct(dimension)
    else:
        _require_range(dimension)
    return dimension


def _require_searchable(name: str) -> None:
    names = flatten(Recipe())
    if name not in names:
        raise ConfigError(f"search.space: there is no field {name}; {_suggest(name, list(names))}")
    if isinstance(names[name], list) and name not in NOT_SEARCHED:
        raise ConfigError(f"search.space: {name} holds several values; only single ones may vary")
    section = name.partition(".")[0] + "."
    for fixed, reason in NOT_SEARCHED.items():
        if fixed in (name, section) and name != "run.seed":
            raise ConfigError(f"search.space: {name} may not vary: {reason}")


def _suggest(name: str, names: Sequence[str]) -> str:
    last = {full.rpartition(".")[2]: full for full in names}
    near = get_close_matches(name, names, 1) or [
        last[part] for part in get_close_matches(name.rpartition(".")[2], last, 1)
    ]
    return f"did you mean {near[0]}?" if near else "`droppos pretrain --help` lists all"


def _value(name: str, text: str) -> Value:
    """Read one value as its field's type."""
    section, field = name.split(".")
    sections = {entry.name: cast(Any, entry.type) for entry in fields(Recipe)}
    kind = next(entry.type for entry in fields(sections[section]) if entry.name == field)
    for option in get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if option is NoneType and text.lower() in {"none", "null"}:
            return None
        if option is bool and text.lower() in {"true", "false"}:
            return text.lower() == "true"
        if get_origin(option) is Literal and text in get_args(option):
            return text
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    raise ConfigError(f"search.space: {name} is {_expected(kind)}, got {text!r}")


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return " or ".join(names.get(option, str(option)) for option in options)


def _require_distinct(dimension: Dimension) -> None:
    if not dimension.values or len(set(dimension.values)) < len(dimension.values):
        raise ConfigError(
            f"search.space: {dimension.field}={dimension.kind}(...) needs distinct values, "
            f"got {list(dimension.values)}"
        )


def _require_range(dimension: Dimension) -> None:
    said = f"search.space: {dimension.field}={dimension.kind}(low, high)"
    ends = [end for end in dimension.values if type(end) in (int, float)]
    if len(ends) != 2 or len(dimension.values) != 2:
        raise ConfigError(f"{said} needs two numbers, got {list(dimension.values)}; or use choice")
    low, high = cast(list[float], ends)
    if not (low < high and isfinite(low) and isfinite(high)):
        raise ConfigError(f"{said} needs low < high, got {low:g} and {high:g}")
    if dimension.kind == "loguniform" and low <= 0:
        raise ConfigError(f"{said} needs a low end above 0, got {low:g}; or use uniform")
