"""The run's event file: the only source of progress, live views, comparison and resume.

One JSON object per line in ``<run>/events.jsonl``. Every field is public: nothing that a site did not send is in it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to one file; a half-written last line (a killed process) is ignored by readers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event of ``kind`` with JSON-able ``fields`` and the time in seconds since the epoch."""
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}, sort_keys=True)
        with self._path.open("ab+") as handle:
            handle.seek(max(handle.seek(0, os.SEEK_END) - 1, 0))
            torn = handle.read(1) not in (b"", b"\n")  # by a writer that was killed; it must not take this line with it
            handle.write(b"\n" * torn + line.encode() + b"\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """All complete events, oldest first."""
        yield from self.read_after(0)[0]

    def read_after(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """Complete events behind a byte ``position``, and the position behind them; a torn line is skipped once it is followed."""
        if not self._path.is_file():
            return [], position
        with self._path.open("rb") as handle:
            handle.seek(position)
            text = handle.read()
        whole = text[: text.rfind(b"\n") + 1]
        events = []
        for line in whole.splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events, position + len(whole)
