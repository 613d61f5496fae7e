"""The checker behind jaxtyping in tests: shapes of every annotated call are checked.

PEP 484's numeric tower, or ``sigma=1`` would be refused where a ``float`` is meant.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
