"""Leave to read records, as three kinds of objects that only a ledger makes; see :mod:`privacy.ledger` for what each means.

Covered: a token cannot be made, copied with changes or pickled into being without the ledger's seal, and it names the
data blocks that its charge covers.
Not covered: whether the code that holds a token does what the token says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar

EVERYONE = "all"  # the block that holds every patient of a site; it overlaps with each named block

SEAL = object()  # what `privacy.ledger` shows when it makes a token


@dataclasses.dataclass(frozen=True)
class _Token:
    site: str
    seq: int
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not SEAL:
            raise PermissionError(f"only a ledger makes a {type(self).__name__}; ask it before reading a record")

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(f"a {type(self).__name__} is not picklable: it is leave for the process that asked the ledger")


@dataclasses.dataclass(frozen=True)
class DpToken(_Token):
    """Leave to compute one round of one reserved stage on the patients of ``blocks``; already charged."""

    plan_hash: str
    stage: str
    round: int
    digest: str
    n_decl: int
    blocks: tuple[str, ...] = (EVERYONE,)


@dataclasses.dataclass(frozen=True)
class UncoveredToken(_Token):
    """Leave to answer one query outside the guarantee on the patients of the plan's ``blocks``; already counted."""

    plan_hash: str
    query: str
    digest: str
    blocks: tuple[str, ...] = (EVERYONE,)


@dataclasses.dataclass(frozen=True)
class LocalToken(_Token):
    """Leave to read the records of ``blocks`` for something that stays at the site."""

    purpose: str
    blocks: tuple[str, ...] = (EVERYONE,)


AccessToken = DpToken | UncoveredToken | LocalToken


def need_charge(token: object, kind: type[DpToken] | type[UncoveredToken], plan_hash: str, digest: str) -> None:
    """Refuse to compute what leaves a site unless ``token`` is of this kind and was charged for this very task.

    Raises:
        PermissionError: it is leave for local work, for the other kind, or for another task.
    """
    if type(token) is not kind or (token.plan_hash, token.digest) != (plan_hash, digest):
        raise PermissionError(
            f"expected the {kind.__name__} of this task, got {type(token).__name__}; ask the ledger to charge the task"
        )
