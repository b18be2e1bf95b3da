"""How tables spell things: "not recorded", numbers, identifiers and sessions. Each function looks at one cell alone."""

from __future__ import annotations

MISSING = frozenset({"", "n/a", "na", "nan", "null", "none", "<na>", "nat"})
"""Spellings of "not recorded", compared in lower case; ``n/a`` is the one of BIDS."""


def canonical_text(value: object) -> str:
    """Shortest spelling of a cell: no blanks around it, whole numbers without a decimal point.

    >>> canonical_text(" 2.0 "), canonical_text(2), canonical_text("T1w")
    ('2', '2', 'T1w')
    """
    text = str(value).strip()
    if "." in text:
        head, _, tail = text.partition(".")
        if head.lstrip("-").isdigit() and tail and not tail.strip("0"):
            return head
    return text


def canonical_id(value: object) -> str:
    """A patient's identifier without the ``sub-`` that BIDS puts before it, for joining tables.

    >>> canonical_id("sub-007"), canonical_id(132539.0)
    ('007', '132539')
    """
    return canonical_text(value).removeprefix("sub-")


def session_label(value: object) -> str:
    """A session as its folder is called: ``ses-01`` for ``01`` and ``ses-01``, empty for nothing."""
    text = canonical_text(value)
    return text if not text or text.lower() in MISSING or text.startswith("ses-") else f"ses-{text}"
