"""Content-addressed parts that a coordinator sends: public weights and candidate cohorts, at most 4 MiB each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from privacy.boundary.refusals import Refused
from privacy.chain import write_durably


class PartStore:
    """Parts of one site, in ``<site>/parts`` under their SHA-256. What does not match its name is never used."""

    def __init__(self, site_dir: Path) -> None:
        self._folder = site_dir / "parts"

    def missing(self, digests: Iterable[str]) -> tuple[str, ...]:
        """Those of ``digests`` that are not here, in order."""
        return tuple(digest for digest in digests if not (self._folder / digest).is_file())

    def put(self, digest: str, data: bytes) -> None:
        """Store one part.

        Raises:
            Refused: ``BAD_MESSAGE`` if the data are not what the digest says.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise Refused("BAD_MESSAGE", "a part does not match its digest")
        write_durably(self._folder / digest, data)

    def join(self, digests: Iterable[str]) -> bytes:
        """The bytes of all parts, one after another, each checked again.

        Raises:
            Refused: ``PARTS_MISSING`` if one is not here or was changed on disk (the changed one is removed).
        """
        pieces = []
        for digest in digests:
            path = self._folder / digest
            data = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(data).hexdigest() != digest:
                path.unlink(missing_ok=True)
                raise Refused("PARTS_MISSING", "a part is not here, or was changed on disk", "send it again")
            pieces.append(data)
        return b"".join(pieces)
