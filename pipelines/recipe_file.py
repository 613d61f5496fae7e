"""Recipes as files: YAML in, YAML out, and the flags they become.

A YAML file becomes flags and goes through the command line's parser, so a typo in a file gets
the same answer as one on the command line, with the right name suggested.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from droppos.errors import ConfigError
from pipelines.recipe import Recipe

SHIPPED = files("droppos") / "recipes"


def shipped() -> list[str]:
    """Name the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in SHIPPED.iterdir()
        if entry.name.endswith(".yaml")
    )


def read(name: str) -> dict[str, Any]:
    """Read a recipe by its file, or by the name of a shipped one.

    Raises:
        ConfigError: If there is none, or it is no YAML of sections and fields.
    """
    path = Path(name)
    if not path.is_file() and name in shipped():
        path = Path(str(SHIPPED / f"{name}.yaml"))
    if not path.is_file():
        near = get_close_matches(name, shipped(), 1, 0.5)
        raise ConfigError(
            f"there is no recipe {name}; "
            + (f"did you mean {near[0]}? " if near else "")
            + f"Give a YAML file, or one that is shipped: {', '.join(shipped())}"
        )
    try:
        content = yaml.load(path.read_text(), _Once)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not YAML: {error}") from error
    if content is None:
        raise ConfigError(
            f"{name} is empty, so all would be as by default: the whole of ViT-B's training; begin "
            f"with a copy of one that is shipped: {', '.join(shipped())}"
        )
    if not isinstance(content, dict) or not all(isinstance(s, dict) for s in content.values()):
        raise ConfigError(
            f"{name} must hold sections with fields, such as `method:` and below it "
            "`  mask_ratio: 0.75`"
        )
    return content


class _Once(yaml.SafeLoader):
    """Takes no field twice: YAML has the last one count, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a name that was there."""
        # Before `<<` brings in others, which a field may well replace.
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [self.construct_object(key, deep=True) for key in keys]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} comes twice", keys[i].start_mark
                )
        return super().construct_mapping(node, deep)


def flags(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Turn sections and fields into the flags that mean the same."""
    for name, value in content.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from flags(value, f"{dotted}.")
            continue
        yield f"--{dotted.replace('_', '-')}"
        yield from map(str, value if isinstance(value, list | tuple) else [value])


def flatten(recipe: Recipe | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """List every field by its dotted name; tuples as lists, as JSON has them."""
    content = asdict(recipe) if is_dataclass(recipe) else recipe
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe that :func:`read` reads and `droppos pretrain` takes as it is."""
    return yaml.safe_dump(plain(asdict(recipe)), sort_keys=False)


def plain(value: Any) -> Any:
    """Write a value as YAML and JSON read it back: tuples as lists."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """Make a recipe of what :func:`dataclasses.asdict` or JSON made of one.

    Raises:
        ConfigError: If a field is unknown here (another version wrote it) or out of its range.
    """
    try:
        return Recipe(
            **{
                section.name: section.type(  # pyright: ignore[reportCallIssue]
                    **{
                        name: tuple(value) if isinstance(value, list) else value
                        for name, value in content.get(section.name, {}).items()
                    }
                )
                for section in fields(Recipe)
            }
        )
    except TypeError as error:
        raise ConfigError(
            f"the recipe was written by another version of droppos: {error}; use that version"
        ) from error
