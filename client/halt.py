"""The emergency stop of a site: a file. While it is there the agent refuses everything, wherever it runs.

Covered: every request from the moment at which the file appears, in the daemon and in a simulation; an answer that was
being computed then stays in the outbox; presence is all that counts, so an empty or damaged file stops as well.
Not covered: what left before.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from client.rundir import RUN, run_folder
from client.site import SITE_LOG
from privacy.boundary.refusals import Refused
from privacy.chain import ChainFile, canonical, now_utc, sync_folder, write_durably

STOPPED = Path(RUN) / "stopped"


@dataclasses.dataclass(frozen=True)
class Stop:
    """Who stopped the site, when (UTC) and why; empty where the file does not say."""

    by: str = ""
    at: str = ""
    reason: str = ""


def stopped(site_dir: Path) -> Stop | None:
    """The stop in force, or None.

    Raises:
        OSError: it cannot be seen whether there is one; the caller must take that for a stop.
    """
    path = site_dir / STOPPED
    try:
        os.lstat(path)
    except FileNotFoundError:
        return None
    try:
        entry = json.loads(path.read_bytes())
        return Stop(str(entry["by"]), str(entry["at"]), str(entry["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Stop()


def refuse_if_stopped(site_dir: Path) -> None:
    """Let nothing pass while the site is stopped.

    Raises:
        Refused: ``SITE_STOPPED``.
    """
    if (stop := stopped(site_dir)) is not None:
        who = f"by {stop.by} at {stop.at}: {stop.reason}" if stop.at else f"{site_dir / STOPPED} is there"
        raise Refused("SITE_STOPPED", who, "a person lifts it: `medgen site start SITE --clear-stop`")


def set_stop(site_dir: Path) -> None:
    """Stop the site: on return the file is there and on disk. It needs no room but a name, so a full disk does not hinder it.

    Raises:
        AgentError, OSError: the file could not be made.
    """
    folder = run_folder(site_dir)
    os.close(os.open(site_dir / STOPPED, os.O_WRONLY | os.O_CREAT, 0o600))
    sync_folder(folder)


def record_stop(site_dir: Path, by: str, reason: str) -> Stop:
    """Write down who stopped the site and why, in the file and in the site log; the stop holds without it.

    Raises:
        ChainError: the site log was changed; OSError: the disk is full, say.
    """
    stop = Stop(by, now_utc(), reason)
    write_durably(site_dir / STOPPED, canonical(dataclasses.asdict(stop)).encode())
    ChainFile(site_dir / SITE_LOG).append("emergency-stop", {"by": by, "reason": reason}, at=stop.at)
    return stop


def clear_stop(site_dir: Path, by: str) -> Stop | None:
    """Lift the stop, after that is in the site log; returns the one that was lifted, None if there was none.

    Raises:
        ChainError, OSError: it could not be written down; the stop then stays.
    """
    stop = stopped(site_dir)
    if stop is not None:
        body = {"by": by, "stopped_by": stop.by, "stopped_at": stop.at}
        ChainFile(site_dir / SITE_LOG).append("emergency-stop-cleared", body)
        (site_dir / STOPPED).unlink()
        sync_folder((site_dir / STOPPED).parent)
    return stop
