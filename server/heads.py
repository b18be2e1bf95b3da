"""What the coordinator remembers of each site's ledger: heads that came with approvals and answers.

A site whose ledger was put back to an earlier state, or that runs twice, shows a head that is lower than the last one
known, or another hash under a known number. It sits out: its numbers are used in no sum.

The file ``coordinator/heads.json`` holds every head that was ever seen in this run, so that a stored answer that is sent
again is told from a ledger that was put back. It is also where an officer who restores a ledger finds the head to name.
"""

from __future__ import annotations

import json
from pathlib import Path

from privacy.book import Head
from server.checkpoints import Checkpoints, write_atomically

LOWER = "its ledger ends before the last head known here: it was put back, or is a copy"
CONTRADICTS = "its ledger has another row where a head is known here: it was changed, or runs twice"


class KnownHeads:
    """Heads by site; what is learned is on disk when :meth:`learn` returns."""

    def __init__(self, path: Path, checkpoints: Checkpoints) -> None:
        self._path = path
        self._heads: dict[str, dict[int, str]] = {}
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self._heads = {site: {int(seq): digest for seq, digest in rows.items()} for site, rows in stored.items()}
        for site, head in checkpoints.heads().items():
            self._heads.setdefault(site, {}).setdefault(head.seq, head.hash)

    def last(self, site: str) -> Head | None:
        """The highest head known of a site."""
        rows = self._heads.get(site)
        return Head(max(rows), rows[max(rows)]) if rows else None

    def objection(self, site: str, head: Head, above: Head | None, *, replay: bool = False) -> str:
        """Why a head cannot be believed; empty if it can.

        Args:
            site: who sent it.
            head: what it sent.
            above: a head that the sender's ledger is known to hold below this one, if any.
            replay: it may have come with an answer that was stored before later heads were seen.
        """
        rows = self._heads.get(site, {})
        if head.seq in rows:
            return "" if rows[head.seq] == head.hash else CONTRADICTS
        last = above if replay else max([known for known in (above, self.last(site)) if known], default=None)
        return LOWER if last is not None and head.seq <= last.seq else ""

    def learn(self, heads: dict[str, Head]) -> None:
        """Remember these heads."""
        for site, head in heads.items():
            if head.seq:
                self._heads.setdefault(site, {})[head.seq] = head.hash
        rows = {site: {str(seq): digest for seq, digest in sorted(rows.items())} for site, rows in self._heads.items()}
        write_atomically(self._path, json.dumps(rows, indent=1, sort_keys=True).encode())
