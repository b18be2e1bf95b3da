"""CTGAN and TVAE (Xu et al. (2019)) as peers of our tables, run where they live: in an environment of their own.

Their package has a licence (Business Source) that is not ours, so it is no dependency: the benchmark makes a virtual
environment in a folder that the caller gives, installs the package there and hands tables over as files. Where that is
not possible, the peers are absent, with the reason.

Gaps are handed over as in the peers' own tool chain: a numeric gap takes the column's median and a column that says so,
a categorical gap is a level of its own. Shape legend: B rows · C columns.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.metrics.table import Kind

F64 = NDArray[np.float64]
PeerName = Literal["CTGAN", "TVAE"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)
PACKAGE = "ctgan==0.12.1"
EPOCHS = 300
"""The package's default for both."""
_PROGRAM = Path(__file__).with_name("table_peers_fit.py")
_PATIENCE_S = 900.0


class PeersAbsent(ValueError):
    """The peers cannot be run here; the message says why."""


def interpreter(folder: Path, package: str = PACKAGE) -> Path:
    """Python of the peers' environment in ``folder``, made on the first call (over a gigabyte, mostly torch).

    The torch of that environment is the release that runs here, so that both sides count with the same kernels.

    Raises:
        PeersAbsent: the environment cannot be made, for example without a package index.
    """
    return environment(folder, (package,), (f"torch=={torch.__version__.split('+')[0]}",))


def environment(folder: Path, packages: Sequence[str], beside: Sequence[str] = ()) -> Path:
    """Python of a virtual environment in ``folder`` that holds these packages, made on the first call.

    Args:
        folder: of the environment.
        packages: requirements by which a finished environment is known.
        beside: requirements that are installed with them and may differ between machines.

    Raises:
        PeersAbsent: the environment cannot be made.
    """
    python, ready, mark = folder / "bin" / "python", folder / "ready", " ".join(packages)
    if ready.is_file() and ready.read_text(encoding="utf-8") == mark:
        return python
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # rows of the benchmark run beside each other; one makes it, the others wait
        if not ready.is_file() or ready.read_text(encoding="utf-8") != mark:
            _run([sys.executable, "-m", "venv", str(folder)], "making an environment")
            _run([str(python), "-m", "pip", "install", "--quiet", *beside, *packages], f"installing {mark}")
            ready.write_text(mark, encoding="utf-8")
    return python


def peer_rows(
    python: Path, peer: PeerName, rows_BC: F64, kinds: Sequence[Kind], rows: int, seed: int, epochs: int = EPOCHS
) -> F64:
    """Rows that ``peer``, fitted on ``rows_BC``, draws: scaled numbers, level indices, NaN where missing.

    Raises:
        PeersAbsent: the fit failed.
    """
    table, discrete = fill_gaps(rows_BC, kinds)
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.npy"
        asked = {"peer": peer, "epochs": epochs, "seed": seed, "rows": rows, "discrete": discrete}
        request.write_text(json.dumps(asked), encoding="utf-8")
        np.save(request.with_suffix(".npy"), table)
        _run([str(python), "-P", str(_PROGRAM), str(request), str(answer)], f"fitting {peer}")
        return open_gaps(np.load(answer), kinds)


def fill_gaps(rows_BC: F64, kinds: Sequence[Kind]) -> tuple[F64, list[int]]:
    """The table without gaps, one gap column per numeric column behind it, and the places of discrete columns.

    A gap column that never varies is kept: the peers take constants, and all tables of a study keep one shape.
    """
    filled = rows_BC.copy()
    for c, kind in enumerate(kinds):
        known_B = np.isfinite(rows_BC[:, c])
        stand_in = -1.0 if kind == "categorical" else float(np.median(rows_BC[known_B, c])) if known_B.any() else 0.0
        filled[:, c] = np.where(known_B, rows_BC[:, c], stand_in)
    numeric = [c for c, kind in enumerate(kinds) if kind == "numeric"]
    gaps = np.isnan(rows_BC[:, numeric]).astype(np.float64)
    discrete = [c for c, kind in enumerate(kinds) if kind == "categorical"]
    return np.concatenate([filled, gaps], axis=1), discrete + list(range(len(kinds), len(kinds) + len(numeric)))


def open_gaps(table: F64, kinds: Sequence[Kind]) -> F64:
    """Inverse of :func:`fill_gaps`, numbers clipped to the public range."""
    rows_BC = table[:, : len(kinds)].copy()
    numeric = [c for c, kind in enumerate(kinds) if kind == "numeric"]
    for gap, c in enumerate(numeric):
        rows_BC[:, c] = np.where(table[:, len(kinds) + gap] > 0.5, np.nan, np.clip(rows_BC[:, c], -1.0, 1.0))
    for c, kind in enumerate(kinds):
        if kind == "categorical":
            rows_BC[:, c] = np.where(rows_BC[:, c] < 0, np.nan, rows_BC[:, c])
    return rows_BC


def _run(command: Sequence[str], doing: str) -> None:
    """Run a command quietly, on one core.

    Raises:
        PeersAbsent: it failed, with the last line that it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeersAbsent(f"{doing} did not work ({error}); the peers are left out") from error
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise PeersAbsent(f"{doing} did not work ({said[-1] if said else done.returncode}); the peers are left out")
