"""Imports run one way (architecture), and each foreign library appears only in its room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("client", "server", "medgen_models", "privacy", "simulations")
MAY_IMPORT = {
    "medgen_models": set(),
    "privacy": set(),
    "client": {"privacy", "medgen_models"},
    "server": {"privacy", "medgen_models"},
    "simulations": {"client", "server", "privacy", "medgen_models"},
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            names.add(node.module or "")
    return names


def top_level(path: Path) -> set[str]:
    """Roots that a file imports when it is imported (module level only); parts of a command line are light themselves."""
    roots: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not all(alias.name.endswith("_cli") for alias in node.names):
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrow(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    names = imported(path)
    ours = {name.split(".")[0] for name in names} & set(ROOMS)
    bad = ours - MAY_IMPORT[room] - {room}
    assert not bad, f"{path.relative_to(ROOT)} imports {', '.join(sorted(bad))}, which {room} may not"
    roots = {name.split(".")[0] for name in names}
    where = path.relative_to(ROOT).as_posix()
    if "flwr" in roots:
        assert where == "client/app.py" or room in ("server", "simulations"), f"{where} may not import flwr"
        allowed = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.app.user_config"}
        inner = {name for name in names if name.startswith("flwr")} - allowed
        if where != "simulations/grid.py":
            assert not inner, f"{where} imports {inner}: only flwr.app, flwr.clientapp and flwr.serverapp are public"
    if roots & {"opacus", "dp_accounting"}:
        assert room == "privacy", f"{where} may not import opacus or dp_accounting"


PARTS = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).glob("*_cli.py"))
LIGHT = ("client/app.py", "medgen.py", "server/cli.py", "client/cli.py", "simulations/cli.py", *PARTS)


@pytest.mark.parametrize("where", LIGHT)
def test_light_modules_import_no_torch_or_flower_at_the_top(where: str) -> None:
    heavy = {"torch", "medgen_models", "server", "simulations", "client"} if where != "client/app.py" else {"torch"}
    allowed_ours = {"medgen.py": {"client", "server", "simulations"}}.get(where, set())
    assert not (top_level(ROOT / where) & (heavy - allowed_ours)), f"{where} must stay light"
    if where != "client/app.py":
        assert "flwr" not in top_level(ROOT / where)


def test_package_inits_are_empty() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            assert path.read_text() == "", f"{path} must stay empty"


def test_no_init_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
