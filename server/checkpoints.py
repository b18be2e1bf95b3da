"""Rounds on disk: each finished round is one file, written whole or not at all, so a study resumes from the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from privacy.book import Head

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """What a stage had reached after ``round`` (1-based): arrays and public facts about the round."""

    stage: str
    round: int
    arrays: Arrays
    facts: dict[str, Any]


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Checkpoints:
    """The checkpoints of one run, in ``<run>/checkpoints``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, stage: str, round: int, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Store the state after ``round`` of ``stage``; overwrites the same round only."""
        body = save(
            {name: np.ascontiguousarray(value) for name, value in arrays.items()},
            metadata={"facts": json.dumps(dict(facts), sort_keys=True)},
        )
        write_atomically(self._path(stage, round), body)

    def load(self, stage: str, round: int) -> Checkpoint:
        """The state after ``round`` of ``stage``.

        Raises:
            ValueError: if that round was never finished.
        """
        path = self._path(stage, round)
        if not path.is_file():
            raise ValueError(f"no checkpoint of stage {stage}, round {round}; finished rounds: {self.rounds(stage)}")
        with safe_open(str(path), framework="numpy") as handle:
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}
            facts = json.loads((handle.metadata() or {}).get("facts", "{}"))
        return Checkpoint(stage, round, arrays, facts)

    def heads(self) -> dict[str, Head]:
        """Site -> the highest head of its ledger in any finished round; the same whenever a round is asked again."""
        found: dict[str, Head] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            with safe_open(str(path), framework="numpy") as handle:
                facts = json.loads((handle.metadata() or {}).get("facts", "{}"))
            for site, (seq, digest) in facts.get("heads", {}).items():
                head = Head(int(seq), str(digest))
                found[site] = max(head, found.get(site, head))
        return found

    def attempts(self, stage: str) -> int:
        """Attempts at all finished rounds of ``stage``: what its sites were charged at most."""
        return sum(int(self.load(stage, number).facts.get("attempts", 1)) for number in self.rounds(stage))

    def rounds(self, stage: str) -> list[int]:
        """Finished rounds of ``stage``, ascending."""
        return sorted(int(path.stem.rsplit("-", 1)[1]) for path in self._folder.glob(f"{stage}-*.safetensors"))

    def last(self, stage: str) -> Checkpoint | None:
        """The latest finished round of ``stage``, if any."""
        rounds = self.rounds(stage)
        return self.load(stage, rounds[-1]) if rounds else None

    def _path(self, stage: str, round: int) -> Path:
        return self._folder / f"{stage}-{round:04d}.safetensors"
