"""A site folder appears whole or not at all, private, with a commented site.toml that its own reader takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import client.founding
from client.enrolment import load_keys, node_line
from client.founding import make_site
from client.policy import SiteConfig
from medgen import app


def made(folder: Path, **changes: Any) -> SiteConfig:
    values: dict[str, Any] = {"name": "alder", "slots": ("mri", "ehr"), "capacity": 160, "held_out": 40}
    return make_site(folder, **(values | changes))


def test_the_folder_is_private_but_for_what_the_supernode_reads(tmp_path: Path) -> None:
    config = made(tmp_path / "alder", plan_epsilon=4.0)
    assert (config.site.name, config.site.slots) == ("alder", ("mri", "ehr"))
    assert (config.site.declared_capacity, config.site.declared_held_out) == (160, 40)
    assert (config.ceiling.plan_epsilon, config.ceiling.lifetime_epsilon) == (4.0, 2.0)
    assert (config.ceiling.uncovered_queries, config.policy.deterministic_noise) == (0, False)
    modes = {
        path.relative_to(config.folder).as_posix(): path.stat().st_mode & 0o777 for path in config.folder.rglob("*")
    }
    assert config.folder.stat().st_mode & 0o777 == 0o710  # its group passes through and lists nothing
    assert modes.pop("supernode") == 0o750
    assert (modes.pop("supernode/flower.key"), modes.pop("supernode/flower.pub")) == (0o640, 0o640)
    assert not {name: oct(mode) for name, mode in modes.items() if mode & 0o077}
    load_keys(config.folder)
    node_line(config.folder)
    assert list(tmp_path.iterdir()) == [config.folder]


def test_the_template_explains_every_line_and_its_offers_are_taken_too(tmp_path: Path) -> None:
    config = made(tmp_path / "alder")
    toml = config.folder / "site.toml"
    lines = toml.read_text().splitlines()
    assert all("#" in line for line in lines if "=" in line and not line.startswith(("name", "format")))
    toml.write_text(
        "\n".join(line.removeprefix("# ") if "=" in line or line == "# [limits]" else line for line in lines)
    )
    with pytest.raises(ValueError, match="approvals = 2 needs as many approvers"):  # the one that needs people
        SiteConfig.load(config.folder)
    toml.write_text(toml.read_text().replace("approvals = 2", "approvals = 1"))
    offered = SiteConfig.load(config.folder)
    assert (offered.data.format, offered.limits.cpu_threads, len(offered.policy.quiet_hours)) == ("tables", 4, 1)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    config = made(tmp_path / "alder")
    keys = load_keys(config.folder).identity.secret_bytes()
    with pytest.raises(ValueError, match="not an empty folder, and nothing in it is overwritten"):
        made(tmp_path / "alder", capacity=10)
    assert load_keys(config.folder).identity.secret_bytes() == keys
    (tmp_path / "empty").mkdir()
    made(tmp_path / "empty")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 'a"\nb = 1'},
        {"name": "two words"},
        {"slots": ()},
        {"capacity": 0},
        {"held_out": -1},
        {"plan_epsilon": 0},
    ],
    ids=str,
)
def test_values_that_do_not_fit_leave_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="keys do not fit"):
        made(tmp_path / "alder", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["make_keys", "make_node_key_file", "sync_folder"])
def test_an_interruption_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.founding, step, fail)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "alder")
    if step != "sync_folder":  # after that the folder is whole
        assert list(tmp_path.iterdir()) == []
    else:
        SiteConfig.load(tmp_path / "alder")


def test_a_place_that_cannot_be_written_is_named_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"/proc/alder: .*one that this user may write"):
        made(Path("/proc/alder"))


def test_the_command_says_what_to_do_next(tmp_path: Path) -> None:
    arguments = ["site", "init", str(tmp_path / "alder"), "--name", "alder", "--capacity", "160"]
    result = CliRunner().invoke(app, [*arguments, "--slot", "mri", "--slot", "ehr"])
    assert result.exit_code == 0, result.output
    assert "medgen site request" in result.output
    assert SiteConfig.load(tmp_path / "alder").site.slots == ("mri", "ehr")
    assert CliRunner().invoke(app, arguments).exit_code == 2  # no slot
    again = CliRunner().invoke(app, [*arguments, "--slot", "mri"])
    assert (again.exit_code, "refused" in again.output) == (1, True)
