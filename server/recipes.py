"""Deployment recipes of a coordinator: proxy, systemd unit, firewall table, image, log export, wheelhouse, filled in.

Written once from ``server/deploy/*.j2`` with this coordinator's own folder, name and ports, so that an administrator copies files
and edits none. docs/deployment.md says in which order; ``tests/server/test_recipes.py`` hands each file to the program that reads it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from privacy.chain import write_durably

if TYPE_CHECKING:  # that module writes these recipes, and so imports this one
    from server.coordinator import CoordinatorConfig

TEMPLATES = Path(__file__).parent / "deploy"
# These texts are pasted into configurations of five programs, each with its own quoting; plain names need none.
PLAIN = re.compile(r"[A-Za-z0-9._/:@+-]+")


def write_recipes(config: CoordinatorConfig, folder: Path, *, mutual_tls: bool = False) -> tuple[Path, ...]:
    """Write ``folder/deploy/`` for the coordinator whose folder this is, replacing what an earlier call wrote.

    Args:
        mutual_tls: the proxy refuses whoever shows no certificate of the consortium's CA; sites then need the outbound proxy of
            ``medgen site recipes``.

    Returns:
        The files, sorted.

    Raises:
        ValueError: a path or name holds a character that one of the programs would read as more than a name, or the proxy and
            the SuperLink are to have the same port.
    """
    folder = folder.resolve()
    if config.port == config.superlink_port:
        raise ValueError(f"port {config.port}: proxy and SuperLink cannot both have it; give them different ports")
    values = {
        "folder": str(folder),
        "bin": str(Path(sys.executable).parent),
        "name": config.name,
        "host": config.host,
        "port": config.port,
        "superlink_port": config.superlink_port,
        "private_ports": ", ".join(str(port) for port in sorted({config.superlink_port, config.control_port})),
        "mutual_tls": mutual_tls,
        "home": "read-only" if _at_home(folder, Path(sys.executable)) else "yes",
        "version": importlib.metadata.version("medgen"),
        "flower": importlib.metadata.version("flwr"),
        "python": platform.python_version(),
    }
    for key in ("folder", "bin", "name", "host"):
        if not PLAIN.fullmatch(str(values[key])):
            raise ValueError(
                f"{key} {values[key]!r}: expected letters, digits and ._/:@+- only, for it goes into configuration files; "
                "choose another"
            )
    return _write(TEMPLATES, folder / "deploy", values)


def _at_home(*paths: Path) -> bool:
    """Whether a unit needs something that ``ProtectHome=yes`` hides."""
    return any(path.is_relative_to(home) for path in paths for home in ("/home", "/root", "/run/user"))


def _write(templates: Path, out: Path, values: Mapping[str, object]) -> tuple[Path, ...]:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # configurations, not HTML; what goes in was held against PLAIN
    )
    written = []
    for name in sorted(environment.list_templates(extensions=["j2"])):
        path = out / name.removesuffix(".j2")
        write_durably(path, environment.get_template(name).render(values).encode(), mode=0o640)
        written.append(path)
    return tuple(written)
