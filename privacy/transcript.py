"""A whole ledger as one JSON document that an auditor can check offline, without this program.

Covered: every row with its hash; the rule by which hashes are computed; sums and epsilons as this version computes them,
with unit, relation and sampling assumption beside them.
Not covered: rows that were removed before the export: compare the head with one that somebody else holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from privacy.book import Head
from privacy.chain import GENESIS, ChainError, Link, check
from privacy.ledger import Ledger
from privacy.statement import ACCOUNTANT, RELATION, SAMPLING

FORMAT = "medgen.ledger/1"
HASH_RULE = (
    "hash = SHA-256 of the UTF-8 JSON [seq, at, kind, body, previous] without spaces, non-ASCII escaped; body is the text as "
    f"it stands; previous is the hash of the row before, or {len(GENESIS)} zeros"
)
LIFETIME = (
    "lifetime: Rényi accounting at the order that the block's first private plan fixed; plans that are open count with all "
    "they reserved, closed ones with the rounds that were begun"
)


def transcript(ledger: Ledger) -> dict[str, Any]:
    """The document; it holds no private data: plans, counts, times and digests."""
    rows = ledger.rows()
    return {
        "format": FORMAT,
        "ledger": rows[0].data()["ledger"],
        "head": str(Head(*ledger.head)),
        "hash_rule": HASH_RULE,
        "statement": {
            "unit": "patient",
            "relation": RELATION,
            "sampling": SAMPLING,
            "accountant": ACCOUNTANT,
            "lifetime": LIFETIME,
        },
        "summary": ledger.summary().to_dict(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def check_transcript(document: dict[str, Any]) -> Head:
    """Recompute the chain of an exported document; returns its head.

    Raises:
        ValueError: a row was changed, or the head is not that of the last row.
    """
    try:
        links = [Link(**row) for row in document["rows"]]
        last = check(links)
        head = Head.parse(document["head"])
    except (KeyError, TypeError, ChainError) as error:
        raise ValueError(f"the document is no whole ledger: {error}; export it again") from error
    if document.get("format") != FORMAT or last is None or Head(last.seq, last.hash) != head:
        raise ValueError(f"the last row is not the head {head} that the document names; export it again")
    return head
