"""Commitments to the sites' canary coins: the file of a run in which the first one told by each site stands."""

from __future__ import annotations

import json
from pathlib import Path

from server.checkpoints import write_atomically


class Commitments:
    """Site -> SHA-256 of its coins, as first told; what is learned is on disk when :meth:`learn` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, str]:
        """All commitments of the run."""
        return dict(json.loads(self._path.read_text(encoding="utf-8"))) if self._path.is_file() else {}

    def learn(self, site: str, commitment: str) -> None:
        """Keep a site's commitment, if it is the first."""
        known = self.read()
        if commitment and site not in known:
            body = {**known, site: commitment}
            write_atomically(self._path, json.dumps(body, indent=1, sort_keys=True).encode())
