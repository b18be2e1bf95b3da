"""The command line is a promise: its commands and options are frozen here, and asking for help costs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from medgen import app

# command -> its parameters; a change here is a change of the public surface and belongs into CHANGELOG.md
SURFACE: dict[str, tuple[str, ...]] = {
    "simulate": ("scenario", "--backend", "--resume", "--keep-hospitals", "--hospitals", "--runs", "--set"),
    "bench": ("name", "--run", "--json", "--rows", "--data"),
    "pretrain": (
        "--out",
        "--data",
        "--schema",
        "--preset",
        "--dial",
        "--patients",
        "--reference",
        "--steps",
        "--batch",
        "--codec-steps",
        "--seed",
        "--source",
        "--licence",
        "--overlap-check",
        "--weights",
        "--contrastive",
        "--adversarial",
        "--perceptual",
        "--perceptual-weights",
        "--resume",
    ),
    "sample": ("model", "--rows", "--out", "--task", "--key", "--factor", "--steps", "--guidance", "--seed"),
    "site init": ("folder", "--name", "--slot", "--capacity", "--held-out", "--plan-epsilon", "--lifetime-epsilon"),
    "site request": ("folder", "--out", "--fresh-keys"),
    "site join": ("folder", "kit", "--fingerprint"),
    "site peers": ("folder", "site", "--fingerprint"),
    "site pending": ("folder", "--all"),
    "site show": ("folder", "plan"),
    "site approve": ("folder", "plan", "--by", "--key"),
    "site reject": ("folder", "plan", "--by", "--reason"),
    "site approver-key": ("file",),
    "site log show": ("folder", "--export", "--after"),
    "site log verify": ("folder", "--head"),
    "site doctor": ("folder", "--json"),
    "site start": ("folder", "--foreground", "--clear-stop"),
    "site stop": ("folder", "--wait-s", "--emergency", "--reason"),
    "site status": ("folder",),
    "site connect": ("folder", "--outbound"),
    "site check": ("folder", "--schema"),
    "site annex": ("folder", "plan", "--scores"),
    "site recipes": ("folder", "--out", "--proxy", "--gpu", "--outbound-port"),
    "site withdraw": ("folder", "patient", "--list"),
    "site ledger show": ("folder",),
    "site ledger verify": ("folder", "--head"),
    "site ledger forecast": ("folder", "--epsilon", "--plan"),
    "site ledger export": ("folder", "--out"),
    "site ledger close": ("folder", "plan"),
    "site ledger restore": ("folder", "--backup", "--known-head", "--officer-key"),
    "server init": ("folder", "--host", "--port", "--name", "--superlink-port", "--control-port"),
    "server renew": ("folder",),
    "server enrol": ("folder", "request", "--out", "--fingerprint", "--replace"),
    "server kit": ("folder", "site", "--out"),
    "server revoke": ("folder", "site", "--reason"),
    "server roster": ("folder",),
    "server start": ("coordinator", "--foreground"),
    "server stop": ("coordinator",),
    "server doctor": ("folder", "--json"),
    "server recipes": ("folder", "--mutual-tls"),
    "study plan": (
        "study",
        "--coordinator",
        "--public-model",
        "--schema",
        "--run",
        "--sites",
        "--public-batch",
        "--reference",
    ),
    "study sign": ("run", "--coordinator"),
    "study run": ("run", "--coordinator", "--approval-wait"),
    "study resume": ("run", "--coordinator", "--approval-wait"),
    "study status": ("run", "--coordinator"),
    "study stop": ("run", "--coordinator"),
    "release build": ("run", "--out"),
    "release sign": ("bundle", "--key", "--role", "--name", "--reason", "--until"),
    "release verify": ("bundle", "--key", "--revocations", "--required", "--candidate"),
    "release revoke": ("bundle", "--key", "--reason", "--out"),
    "audit report": ("run", "--out", "--pdf", "--template"),
    "audit run": (
        *("--members", "--holdout", "--synthetic", "--out", "--reference", "--table"),
        *("--policy", "--kinds", "--seed"),
    ),
}


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """Every command that does something, by its words."""
    if not isinstance(command, click.Group):
        return {" ".join(path): command}
    found: dict[str, click.Command] = {}
    for name, child in command.commands.items():
        found |= leaves(child, (*path, name))
    return found


def commands() -> dict[str, click.Command]:
    return leaves(typer.main.get_command(app))


def words(parameter: click.Parameter) -> str:
    """An option by its longest name, an argument by its own."""
    return max(parameter.opts, key=len) if isinstance(parameter, click.Option) else str(parameter.name)


def test_the_surface_is_frozen() -> None:
    found = {
        name: tuple(words(p) for p in command.params if not getattr(p, "hidden", False))
        for name, command in commands().items()
    }
    assert found == SURFACE


def test_switches_and_defaults_are_frozen() -> None:
    simulate = {words(p): p for p in commands()["simulate"].params}
    assert simulate["--backend"].default == "inprocess"
    assert set(simulate["--backend"].type.choices) == {"inprocess", "ray"}  # type: ignore[attr-defined]
    assert [name for name, p in simulate.items() if getattr(p, "is_flag", False)] == ["--resume", "--keep-hospitals"]
    assert str(simulate["--runs"].default) == "runs"
    assert simulate["--set"].multiple  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["", "site", "site ledger", "site log", "release", "audit", *SURFACE])
def test_every_command_says_what_it_does(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert len(result.output.strip().splitlines()) > 5


def test_help_imports_no_torch_and_no_flower() -> None:
    """All of ``--help`` in one fresh process, then a look at what it had to import for that."""
    names = ["", "site", "site ledger", "site log", "release", "audit", *SURFACE]
    script = f"""
import json, sys
from typer.testing import CliRunner
from medgen import app
codes = [CliRunner().invoke(app, [*name.split(), "--help"]).exit_code for name in {names!r}]
heavy = [m for m in ("torch", "flwr", "ray", "opacus", "monai", "pandas", "medgen_models", "privacy") if m in sys.modules]
print(json.dumps([codes, heavy]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    codes, heavy = json.loads(result.stdout.splitlines()[-1])
    assert set(codes) == {0}
    assert heavy == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "demo", "--backend", "carrier-pigeon"],
        ["simulate"],
        ["site", "check", "/nowhere", "--schema", "/nowhere"],
        ["release", "verify", "/nowhere", "--key", "/nowhere"],
        ["audit", "report", "/nowhere"],
        ["audit", "run", "--members", "/nowhere"],
        ["bench"],
        ["pretrain"],
        ["pretrain", "--out", "x", "--dial", "3"],
        ["sample", "/nowhere", "--rows", "2", "--out", "x"],
    ],
    ids=" ".join,
)
def test_wrong_words_are_a_usage_error(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_an_unknown_scenario_or_benchmark_is_refused_with_code_1(tmp_path: Path) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    for arguments in (["simulate", "moon", *runs], ["simulate", "demo", "--resume", *runs], ["bench", "moon"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, arguments
        assert "refused" in result.output
    assert not (tmp_path / "runs").exists()
