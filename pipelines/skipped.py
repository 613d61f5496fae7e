"""Pictures that could not be had when their turn came: named, counted, and too many at some point.

A picture that is damaged or gone costs no run: another of its window stands in, and training
goes on. But each is told once by name, all are kept in the run's folder as skipped.jsonl, and
above data.skip_limit of the data set the run ends with a last checkpoint, since then it is the
data that is broken. Kept by the driver alone.
"""

import json
import logging
from collections.abc import Mapping
from time import monotonic

from droppos.errors import DataError
from pipelines.storage import Place

FILE = "skipped.jsonl"
NAMED = 20
"""Pictures named in the log; a vanished shard has hundreds."""
AGAIN_S = 30.0
"""Seconds until storage that refused the list is tried again."""
PATIENCE_S = 3.0
"""Seconds of patience with storage while workers run: whoever waits passes notices on, too."""

_log = logging.getLogger(__name__)


class Skipped:
    """The distinct pictures a run had to skip.

    Those that it met before it was resumed stay listed, but only count when they are met again:
    whoever resumes may have restored them.
    """

    def __init__(self, home: Place, pictures: int, limit: float, *, resumed: bool) -> None:
        """Read what an earlier part of the run left.

        Args:
            home: Folder of the run.
            pictures: Pictures of the data set.
            limit: Fraction of them that may be skipped.
            resumed: Whether that part trained on this very data set; else its list is dropped.
        """
        self._file = home / FILE
        self._pictures = pictures
        self._limit = limit
        self._problems: dict[int, str] = {}
        self._before: dict[int, str] = {}
        self._unwritten = False
        self._not_before = 0.0
        if resumed and self._file.exists():
            lines = self._file.read_bytes().splitlines()
            self._before = {entry["row"]: entry["problem"] for entry in map(json.loads, lines)}
        elif not resumed:
            self._file.delete()

    def __len__(self) -> int:
        return len(self._problems)

    def add(self, step: int, problems: Mapping[int, str]) -> None:
        """Take what a worker met in a step, and name what is new."""
        new = {row: problem for row, problem in problems.items() if row not in self._problems}
        for row, problem in new.items():
            self._problems[row] = problem
            if len(self) <= NAMED:
                _log.warning("step %d: a picture is skipped, row %d: %s", step, row, problem)
            if len(self) == NAMED:
                _log.warning("further pictures that are skipped are only listed in %s", self._file)
        self._unwritten = self._unwritten or bool(new)

    def write(self, *, last: bool = False) -> bool:
        """Bring the list in the run's folder up to date; storage that refuses is a warning.

        Args:
            last: Try also where storage has just refused: there is no later.

        Returns:
            Whether there was anything new, and it is written.
        """
        if not self._unwritten or (monotonic() < self._not_before and not last):
            return False
        try:
            self._file.write_bytes(self.text().encode(), None if last else PATIENCE_S)
            self._unwritten = False
        except DataError as error:
            _log.warning("the list of skipped pictures is not written now: %s", error)
            self._not_before = monotonic() + AGAIN_S
            return False
        return True

    def text(self) -> str:
        """Write a line of JSON for each picture, in the order of their rows."""
        every = self._before | self._problems
        entries = [{"row": row, "problem": every[row]} for row in sorted(every)]
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)

    @property
    def too_many(self) -> DataError | None:
        """Say why the run must end, once the limit is passed."""
        if len(self) <= self._limit * self._pictures:
            return None
        row, problem = next(reversed(self._problems.items()))
        return DataError(
            f"{len(self)} of {self._pictures} pictures could not be had, more than "
            f"data.skip_limit {self._limit:g} allows; the last one is row {row}: {problem}; all "
            f"are listed in {self._file}: restore the shards or prepare the data set again, or "
            "raise data.skip_limit, then go on with --resume"
        )
