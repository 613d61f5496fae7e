"""The bell that ends a search: Tune would end its trials without letting them save.

A module of its own, for the process that holds it imports this and nothing else.
"""


class Bell:
    """Runs in an actor, and tells trials that the search is to end."""

    def __init__(self) -> None:
        self._rung = False

    def ring(self) -> None:
        """Have all trials save a last checkpoint, and end."""
        self._rung = True

    def rung(self) -> bool:
        """Tell whether they are to."""
        return self._rung
