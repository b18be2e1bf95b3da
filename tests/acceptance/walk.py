"""What the acceptance walks share: verdicts, running a command, printing one line per check."""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class Shortfall(Exception):
    """The line is not met; the text says by how much."""


class Skipped(Exception):
    """The line cannot be checked here; the text says why."""


def sh(
    command: list[str], cwd: Path = ROOT, timeout: float = 5400, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command and keep its output; a failure is a shortfall with the last lines."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=timeout, check=False
    )
    if ok and done.returncode != 0:
        raise Shortfall(
            f"`{' '.join(command[:4])} …` ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}"
        )
    return done


def walk(checks: Mapping[str, Callable[[Path], str]], description: str, default: str) -> int:
    """Run the chosen checks one after another and print PASS, SHORT or SKIP for each; 1 if one fell short."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--lines", default=default)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="medgen-accept-"))
    work.mkdir(parents=True, exist_ok=True)
    worst = 0
    for name in options.lines.split(","):
        started = time.monotonic()
        try:
            verdict, text = "PASS", checks[name](work)
        except Shortfall as error:
            verdict, text, worst = "SHORT", str(error), 1
        except Skipped as error:
            verdict, text = "SKIP", str(error)
        print(
            f"{name}. {verdict:<5} {checks[name].__doc__}\n   {text}  [{time.monotonic() - started:.0f} s]", flush=True
        )
    return worst
