"""Flower's command line: what it is given, and how its refusals are told apart."""

from __future__ import annotations

import json
import stat
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from server import processes
from server.flower import AlreadyRegistered, Flower, FlowerError, write_bundle

ROOT = Path(__file__).resolve().parents[2]


def test_the_bundle_is_the_installed_apps_and_names_them_as_the_project_does(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "app")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "client/app.py", "server/app.py"}
    for room in ("client", "server"):
        spec = find_spec(f"{room}.app")
        assert spec is not None
        assert spec.origin is not None
        assert (folder / room / "app.py").read_bytes() == Path(spec.origin).read_bytes()
    ours = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    theirs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert ours["tool"]["flwr"] == theirs["tool"]["flwr"]
    for key in ("name", "version", "license"):
        assert ours["project"][key] == theirs["project"][key]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for `flwr`: prints what this file holds, and writes its own words beside it."""
    answer = tmp_path / "answer"
    script = tmp_path / "flwr"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat {answer}\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(processes, "tool", lambda name: str(tmp_path / name))
    return answer


def test_the_connection_names_port_and_authority_and_nobody_else_reads_it(tmp_path: Path) -> None:
    Flower(tmp_path / "home", 4711, tmp_path / "ca.crt").write()
    path = tmp_path / "home" / "config.toml"
    link = tomllib.loads(path.read_text(encoding="utf-8"))["superlink"]
    assert link[link["default"]] == {"address": "127.0.0.1:4711", "root-certificates": str(tmp_path / "ca.crt")}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    Flower(tmp_path / "home", 4711).write()
    assert tomllib.loads(path.read_text(encoding="utf-8"))["superlink"]["medgen"]["insecure"] is True


def test_a_run_is_named_by_its_number_and_lives_until_flower_says_that_it_finished(tmp_path: Path, says: Path) -> None:
    flower = Flower(tmp_path, 4711)
    says.write_text('note\n{"success": true, "run-id": "17"}', encoding="utf-8")
    assert flower.run(tmp_path / "app", {"run-dir": "/x y"}) == "17"
    assert 'run-dir="/x y"' in (tmp_path / "words").read_text(encoding="utf-8")
    for status, alive in (("pending", True), ("running", True), ("finished:failed", False)):
        says.write_text(json.dumps({"success": True, "runs": [{"run-id": "17", "status": status}]}), encoding="utf-8")
        assert flower.alive("17") is alive
    assert flower.alive("18") is False
    says.write_text("connection refused", encoding="utf-8")
    assert flower.alive("17") is True  # who cannot be asked has not said that it ended


def test_a_refusal_says_why_and_a_key_that_is_known_is_told_apart(tmp_path: Path, says: Path) -> None:
    flower = Flower(tmp_path, 4711)
    says.write_text('{"success": false, "error-message": "no such run"}', encoding="utf-8")
    with pytest.raises(FlowerError, match=r"`flwr stop` was refused by 127\.0\.0\.1:4711: no such run"):
        flower.stop("17")
    says.write_text('{"success": false, "error-message": "Public key already in use"}', encoding="utf-8")
    with pytest.raises(AlreadyRegistered):
        flower.register("ecdsa-sha2-nistp384 AAAA", "east")
    assert not list(tmp_path.glob("*.pub"))
