"""What the acceptance walks share: verdicts, running a command, printing one line per check."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
Check = Callable[[Path], str]
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


def suite(says: str, *places: str, marker: str = "") -> Check:
    """A line that runs these test files, or the tests of them that ``::name`` names."""

    def check(work: Path) -> str:
        missing = [place for place in places if not (ROOT / place.split("::")[0]).exists()]
        if missing:
            raise Shortfall(f"no such tests: {', '.join(missing)}")
        words = ["-m", marker] if marker else []
        done = sh([str(BIN / "pytest"), "-q", *words, *places], ok=False)
        last = done.stdout.strip().splitlines()[-1]
        skipped = re.findall(r"SKIPPED .*", done.stdout)
        if done.returncode != 0:
            failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, flags=re.MULTILINE)
            raise Shortfall(f"{last}; {'; '.join(failed[:5])}")
        return "; ".join([last, *skipped])

    check.__doc__ = says
    return check


def bench(says: str, name: str) -> Check:
    """A line that runs one benchmark and prints every bar with its figure."""

    def check(work: Path) -> str:
        file = work / f"{name}.json"
        done = sh([str(BIN / "medgen"), "bench", name, "--json", str(file)], ok=False)
        if not file.is_file():
            raise Shortfall(f"no result: {(done.stdout + done.stderr)[-500:]}")
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        barred = [row for row in rows if row["bar"] is not None]
        said = [
            f"{'holds ' if row['holds'] else 'MISSED'} {figure(row)} (bar {row['bar']:g}): {row['measure']}"
            for row in barred
        ]
        text = "\n   ".join([f"{len(rows)} figures, {len(barred)} with a bar", *said])
        if not all(row["holds"] for row in barred):
            raise Shortfall(text)
        return text

    check.__doc__ = says
    return check


def figure(row: dict[str, object]) -> str:
    """A figure in four digits, or that it is undefined."""
    return "undefined" if row["value"] is None else f"{row['value']:.4g}"


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
