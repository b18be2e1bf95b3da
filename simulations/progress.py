"""Live progress of a run, read from its event file: the same view whoever carries the messages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.events import EventLog
from server.runfolder import RunFolder

PERIOD_S = 0.3


class _View:
    """Turns events into progress bars: one per phase or stage, with the epsilon that has been spent so far."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._seen = 0

    def update(self, events: list[dict[str, Any]]) -> None:
        """Show every event after those already shown."""
        for event in events[self._seen :]:
            self._show(event)
        self._seen = len(events)

    def _show(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "phase":
                self._begin(str(event["name"]), None, "")
            case "public-step":
                self._advance("public model", event["step"], event["steps"], f"loss {event['loss']:.3f}")
            case "stage":
                self._begin(str(event["stage"]), int(event["rounds"]), "")
            case "round":
                self._advance(str(event["stage"]), event["round"] + 1, event["rounds"], str(event["note"]))
            case "finished" | "failed":
                self._finish_all()
            case _:
                pass

    def _begin(self, name: str, total: int | None, note: str) -> None:
        self._finish_all()
        self._tasks[name] = self._progress.add_task(name, total=total, note=note)

    def _advance(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._begin(name, total, note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)

    def _finish_all(self) -> None:
        for task in self._tasks.values():
            entry = self._progress.tasks[task]
            if not entry.finished:
                total = entry.total if entry.total is not None else 1
                self._progress.update(task, total=total, completed=total)


@contextmanager
def watching(folder: RunFolder, console: Console) -> Iterator[None]:
    """Show progress while the body runs; the view ends with it, however it ends."""
    stop = threading.Event()
    log = EventLog(folder.events)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        view = _View(progress)
        old = len(list(log.read()))
        view._seen = old

        def follow() -> None:
            while not stop.wait(PERIOD_S):
                view.update(list(log.read()))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            view.update(list(log.read()))
