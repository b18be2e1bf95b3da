"""``medgen site init``, ``request`` and ``join``: how a hospital comes into a consortium."""

from __future__ import annotations

import typer


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen site``."""
