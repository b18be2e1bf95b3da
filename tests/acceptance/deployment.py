"""Runs the blocks of docs/deployment.md as written, in order and in one shell, and prints the seconds of each.

    python tests/acceptance/deployment.py [--work FOLDER]

A coordinator behind nginx and three hospitals, from nothing to a finished study, in under thirty minutes. Needs nginx. Whatever
happens, every process that the blocks started is ended by its id: each has a mark in its environment or this trial's own folder in its
command.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from walk import BIN, QUIET, ROOT, Shortfall, Skipped, walk

MOST_S = 1800.0
BLOCK_S = 1500.0
MARK = "MEDGEN_DEPLOYMENT_TRIAL"
BLOCK = re.compile(
    r"\*\*(?P<title>\d+\. [^*]+?)\.?\*\*(?:(?!\n\*\*\d+\. ).)*?<!-- run -->\n```sh\n(?P<text>.*?)```", re.DOTALL
)


def blocks(page: str) -> dict[str, tuple[str, str]]:
    """Number -> title and commands of every block that is marked to be run.

    Raises:
        ValueError: a marked block has no numbered title before it.
    """
    found = {m["title"].partition(".")[0]: (m["title"].partition(". ")[2], m["text"]) for m in BLOCK.finditer(page)}
    if len(found) != page.count("<!-- run -->\n"):
        raise ValueError(f"{page.count('<!-- run -->')} marked blocks, {len(found)} under a numbered title")
    return found


class Shell:
    """One shell for all blocks, as a person would have it open: variables, functions and jobs go on."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.mark = uuid.uuid4().hex
        self.failed = False
        self.seconds = 0.0
        environment = {
            **os.environ,
            **QUIET,
            MARK: self.mark,
            "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PORT": str(free_port()),
            "SUPERLINK": str(free_port()),
            "COLUMNS": "140",
        }
        self._log = (place / "shell.log").open("ab")
        self._shell = subprocess.Popen(
            ["bash", "-eu", "-o", "pipefail"],
            cwd=place,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, number: str, text: str) -> str:
        """Run one block; the last line that it printed.

        Raises:
            Shortfall: a command of it failed, or it took too long; with what it said last.
            Skipped: a block before it fell short.
        """
        if self.failed:
            raise Skipped("a block before it fell short")
        done, begin = self.place / f"block-{number}.done", (self.place / "shell.log").stat().st_size
        script = self.place / f"block-{number}.sh"
        script.write_text(text, encoding="utf-8")
        started = time.monotonic()
        assert self._shell.stdin is not None
        with suppress(BrokenPipeError):
            self._shell.stdin.write(f". '{script}' < /dev/null\ntouch '{done}'\n".encode())
            self._shell.stdin.flush()
        while not done.exists() and self._shell.poll() is None and time.monotonic() - started < BLOCK_S:
            time.sleep(0.2)
        self.seconds += time.monotonic() - started
        said = (self.place / "shell.log").read_bytes()[begin:].decode(errors="replace").strip()
        if not done.exists():
            self.failed = True
            why = "took too long" if self._shell.poll() is None else f"ended with {self._shell.returncode}"
            raise Shortfall(f"{why}; see {self.place}: {said[-1500:]}")
        return said.splitlines()[-1] if said else "said nothing"

    def left(self) -> dict[int, str]:
        """Process id -> command of whatever of it still runs, the shell apart."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                marked = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                if marked or f"{self.place}/" in words:  # nginx wipes its environment, and names our folder
                    found[int(folder.name)] = words[:120]
        found.pop(self._shell.pid, None)
        return {pid: words for pid, words in found.items() if words}

    def end(self) -> None:
        """End the shell and everything that carries the mark."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in [*self.left(), self._shell.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, sign)
            end = time.monotonic() + 20
            while self.left() and time.monotonic() < end:
                time.sleep(0.2)
        self._shell.wait(20)
        self._log.close()


def free_port() -> int:
    """A TCP port of loopback that nobody has at this moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Walk the blocks, then hold the whole against its bar."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    shell: list[Shell] = []

    def block(number: str, title: str, text: str) -> Callable[[Path], str]:
        def check(work: Path) -> str:
            if not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
                raise Skipped("nginx is not installed here")
            if not shell:
                place = work / f"trial-{uuid.uuid4().hex[:8]}"
                place.mkdir(mode=0o700)
                shell.append(Shell(place))
            return shell[0].run(number, text)

        check.__doc__ = title
        return check

    def whole(work: Path) -> str:
        """All blocks together in under thirty minutes; no process is left."""
        if not shell:
            raise Skipped("nothing was run")
        end = time.monotonic() + 30
        while (left := shell[0].left()) and time.monotonic() < end:
            time.sleep(0.2)
        text = f"{shell[0].seconds:.0f} s of {MOST_S:.0f}, files in {shell[0].place}"
        if left or shell[0].failed or shell[0].seconds > MOST_S:
            raise Shortfall(f"{text}; left behind: {left or 'nothing'}")
        return text

    found = {number: block(number, title, text) for number, (title, text) in blocks(page).items()}
    try:
        return walk({**found, "whole": whole}, __doc__, ",".join([*found, "whole"]))
    finally:
        for one in shell:
            one.end()


if __name__ == "__main__":
    sys.exit(main())
