"""Where the time and the bytes of a finished run went, stage by stage, from its own event file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from server.events import EventLog
from server.runfolder import RunFolder
from simulations.benchmarks.runner import BenchResult, Row, collect


def run(run_dir: Path) -> BenchResult:
    """Read the run in ``run_dir``."""
    return collect("stages", f"medgen bench stages --run {run_dir.name}", lambda: rows(run_dir))


def rows(run_dir: Path) -> list[Row]:
    """Seconds of each phase and stage, and bytes that went into and came out of all sites together.

    Raises:
        ValueError: the run has not finished.
    """
    seconds: dict[str, float] = defaultdict(float)
    bytes_in = bytes_out = 0
    name, since, first, last = "", 0.0, 0.0, 0.0
    for event in EventLog(RunFolder(run_dir).events).read():
        time = float(event["time"])
        first = first or time
        match event["kind"]:
            case "phase" | "stage" | "finished":
                if name:
                    seconds[name] += time - since
                name, since = str(event.get("name", event.get("stage", ""))), time
            case "resumed":
                name = ""  # nobody worked between an interruption and the resume
            case "crossed":
                bytes_in += int(event["bytes_in"])
                bytes_out += int(event["bytes_out"])
            case _:
                pass
        last = time if event["kind"] == "finished" else last
    if not last:
        raise ValueError(f"{run_dir} holds no finished run; give one")
    found = [
        Row(measure=f"time of {stage}", value=round(took, 2), unit="s") for stage, took in seconds.items() if stage
    ]
    return [
        Row(measure="time from first to last event", value=round(last - first, 2), unit="s"),
        *found,
        Row(measure="bytes into all sites", value=float(bytes_in), unit="bytes"),
        Row(measure="bytes out of all sites", value=float(bytes_out), unit="bytes"),
    ]
