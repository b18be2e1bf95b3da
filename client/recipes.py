"""Deployment recipes of a hospital: systemd units, users, firewall table, outbound proxy, image, log export, filled in.

Written from ``client/deploy/*.j2`` with this site's own folder and the coordinator of its kit. Nothing in them is read from records.
``tests/client/test_recipes.py`` hands each file to the program that reads it.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import platform
import re
import sys
from pathlib import Path

import jinja2

from client.site import SiteConfig
from privacy.chain import write_durably

TEMPLATES = Path(__file__).parent / "deploy"
OUTBOUND_PORT = 9444
# These texts are pasted into configurations of five programs, each with its own quoting; plain names need none.
PLAIN = re.compile(r"[A-Za-z0-9._/:@+-]+")


def write_recipes(
    site_dir: Path,
    out: Path,
    *,
    proxy: str = "",
    gpu: bool = False,
    outbound_port: int = OUTBOUND_PORT,
) -> tuple[Path, ...]:
    """Write the recipes of a site that has joined into ``out``, replacing what an earlier call wrote.

    Args:
        out: a folder that the agent's account cannot write: root's service manager reads it.
        proxy: the hospital's own way out, ``http://host:port``; empty where there is none.
        gpu: the agent may open NVIDIA devices.
        outbound_port: where the outbound proxy listens on loopback.

    Returns:
        The files, sorted.

    Raises:
        ValueError: ``site.toml`` does not read, the site has not joined, ``out`` is inside the site folder, or a path or name
            holds a character that one of the programs would read as more than a name.
    """
    site_dir, out = site_dir.resolve(), out.resolve()
    if out.is_relative_to(site_dir):
        raise ValueError(
            f"out {out}: it is inside the site folder, where the agent's account may write; name another folder"
        )
    config = SiteConfig.load(site_dir)
    host, port = _endpoint(site_dir)
    address = _address(host)
    data = config.data_root.resolve()
    values = {
        "folder": str(site_dir),
        "data": str(data),
        "out": str(out),
        "bin": str(Path(sys.executable).parent),
        "site": config.site.name,
        "host": host,
        "port": port,
        "address": address,
        "authority": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "family": "ip6" if ":" in address else "ip",
        "proxy": proxy,
        "gpu": gpu,
        "listen": outbound_port,
        "home": "read-only" if _at_home(site_dir, data, out, Path(sys.executable)) else "yes",
        "version": importlib.metadata.version("medgen"),
        "flower": importlib.metadata.version("flwr"),
        "python": platform.python_version(),
    }
    for key in ("folder", "data", "out", "bin", "site", "host", "proxy"):
        if values[key] and not PLAIN.fullmatch(str(values[key])):
            raise ValueError(
                f"{key} {values[key]!r}: expected letters, digits and ._/:@+- only, for it goes into configuration files; "
                "choose another"
            )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # configurations, not HTML; what goes in was held against PLAIN
    )
    out.mkdir(mode=0o755, parents=True, exist_ok=True)
    written = []
    for name in sorted(environment.list_templates(extensions=["j2"])):
        path = out / name.removesuffix(".j2")
        # A company's proxy may want a password; all else is read by other accounts than the one that copies it.
        mode = 0o640 if path.name == "flower.env" else 0o644
        write_durably(path, environment.get_template(name).render(values).encode(), mode=mode)
        written.append(path)
    return tuple(written)


def _endpoint(site_dir: Path) -> tuple[str, int]:
    path = site_dir / "supernode" / "endpoint.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["host"]), int(found["port"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no endpoint to read ({error}); join first, with the kit from the coordinator"
        ) from None


def _address(host: str) -> str:
    """The host if it is an address, empty if it is a name: a firewall table knows addresses only."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ""


def _at_home(*paths: Path) -> bool:
    """Whether a unit needs something that ``ProtectHome=yes`` hides."""
    return any(path.is_relative_to(home) for path in paths for home in ("/home", "/root", "/run/user"))
