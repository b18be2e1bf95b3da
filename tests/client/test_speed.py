"""Engine, chunk and threads of a round: typed in, or measured once on made-up patients; never a matter of privacy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client import speed
from client.site import SiteConfig
from privacy.gradients import Speed

SITE = "alder-university"


def loss(params: dict[str, torch.Tensor], unit: dict[str, torch.Tensor]) -> torch.Tensor:
    return ((params["w"] * unit["x"]).sum() - 1.0) ** 2


def made_up(patients: int) -> dict[str, torch.Tensor]:
    return {"x": torch.linspace(0.0, 1.0, patients * 3).reshape(patients, 3)}


@pytest.fixture
def ask(study: Any) -> Callable[..., Speed]:
    """The speed of one stage at a site whose ``[speed]`` says so."""

    def run(deterministic: bool = False, stage: str = "core", **section: Any) -> Speed:
        config = SiteConfig.load(study.site(SITE))
        config = config.model_copy(update={"speed": config.speed.model_copy(update=section)})
        plan = study.plan.model_copy(update={"deterministic": deterministic})
        return speed.speed_for(config, plan, study.task(stage), loss, {"w": torch.ones(3)}, made_up)

    return run


def kept(study: Any, stage: str = "core") -> Path:
    found: Path = study.site(SITE) / "state" / study.task(stage).plan_hash / f"{stage}-speed.json"
    return found


def test_a_measured_engine_is_written_down_and_kept(
    study: Any, ask: Callable[..., Speed], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(threads=1)
    assert json.loads(kept(study).read_bytes()) == {"chunk": first.chunk, "engine": first.engine, "threads": 1}
    kept(study).write_text('{"chunk":3,"engine":"loop","threads":1}')
    monkeypatch.setattr(speed, "measure_speed", lambda *args, **more: pytest.fail("measured again"))
    assert ask(threads=1) == Speed("loop", 3, 1)


def test_what_is_typed_in_is_not_measured(study: Any, ask: Callable[..., Speed]) -> None:
    assert ask(engine="vmap", chunk=5, threads=1) == Speed("vmap", 5, 1)
    assert not kept(study).exists()


def test_the_test_switch_never_measures(study: Any, ask: Callable[..., Speed]) -> None:
    assert ask(deterministic=True, threads=1) == Speed("expand", 16, 1)
    assert not kept(study).exists()


def test_more_threads_only_where_they_are_worth_it(ask: Callable[..., Speed], monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seconds = {1: 1.0, 2: 0.6, 4: 0.55, 8: 0.1}
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(
        speed,
        "measure_speed",
        lambda *args, **more: (seconds[torch.get_num_threads()], Speed("vmap", 4, torch.get_num_threads())),
    )
    try:
        assert ask(threads=None).threads == 2  # four threads saved a twelfth, so eight were not tried
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["ghost", "ew", "functorch", "adaptive", "fast"])
def test_other_engines_are_refused_in_the_configuration(study: Any, name: str) -> None:
    path = study.site(SITE) / "site.toml"
    path.write_text(path.read_text().replace("[speed]\n", f'[speed]\nengine = "{name}"\n'))
    with pytest.raises(ValueError, match="not offered" if name != "fast" else "speed.engine"):
        SiteConfig.load(study.site(SITE))
