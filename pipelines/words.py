"""Words that several tell their figures in."""


def counted(number: int, one: str, more: str | None = None) -> str:
    """Say how many there are of something: `1 worker`, `3 workers`.

    Args:
        number: How many.
        one: The noun for one.
        more: The noun for several; with an s when not given.
    """
    return f"{number:,} {one if number == 1 else more or one + 's'}"
