"""The encoder's weights under other projects' names."""

from collections.abc import Mapping

from torch import Tensor


def name_table(stems: Mapping[str, str], depth: int) -> dict[str, str]:
    """Write out the names of all weights, timm's to another project's.

    Args:
        stems: By timm's beginning of a name. ``{}`` stands for the number of a block; one that
            ends with a dot stands for a weight and a bias.
        depth: Blocks of the encoder.
    """
    table = {}
    for ours, theirs in stems.items():
        for block in range(depth) if "{}" in ours else [0]:
            for tail in ("weight", "bias") if ours.endswith(".") else [""]:
                table[ours.format(block) + tail] = theirs.format(block) + tail
    return table


def renamed(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Give weights their other names; those not in the table have no place there."""
    return {table[name]: value for name, value in weights.items() if name in table}
