"""What is wrong with a site's files, in a form that a data manager can act on, and the only exceptions of this room.

Problems stay at the site. The texts of the exceptions below are fixed sentences without a path, name, count or value,
so that even a caller that forwards ``str(error)`` by mistake tells nothing about a patient.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file.

    Attributes:
        file: path below the data folder (or the setting concerned).
        field: column, header field or property.
        value: what was found there, shortened.
        rule: what was expected.
        remedy: what the data manager can do.
        patient: pseudonym of the patient who became a null patient because of it; empty when nobody did.
    """

    file: str
    field: str
    value: str
    rule: str
    remedy: str
    patient: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.field} = {self.value}: {self.rule}; {self.remedy}"


class RecordsError(ValueError):
    """Base of everything that this room raises; ``problems`` hold the details and stay at the site."""

    sentence = "the site's records cannot be used; `medgen site check` names the reason"

    def __init__(self, *problems: Problem) -> None:
        super().__init__(self.sentence)
        self.problems = problems


class BadRecord(RecordsError):
    """One record cannot be used; readers raise it and the loader turns it into a null patient."""

    sentence = "a record cannot be used"


class BadSite(RecordsError):
    """Nothing can be read at this site: no participants file, no id column, a filter on a column that is not there."""


class NoPatients(BadSite):
    """No patient of this site has a usable record of the study's slots."""

    sentence = "no patient at this site has a usable record; `medgen site check` names the reason"


class NoAccess(RecordsError):
    """Records were asked for without one of the ledger's access tokens."""

    sentence = "records are read only with an access token from the site's ledger"


def short(value: object, limit: int = 60) -> str:
    """``value`` as one line of at most ``limit`` characters.

    >>> short("a" * 5, limit=4)
    'aaa…'
    """
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
