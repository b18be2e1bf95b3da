"""The site's side of the in-training audit: coins that stay here until training is over, and scores made of noise and coins.

Coins are drawn once for a plan, when its approval is first told to the coordinator, and their commitment leaves with it.
Every attempt at a training round stores what it adds to the scores; an attempt that is computed again replaces its own. The
opening is stored before it leaves: from then on training runs without canaries, and asking again gives the same bytes.

No record is read here, and nothing that is written or sent depends on one.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.policy import dp_plan
from client.site import SiteConfig
from privacy.audit.in_training import Coins, Floats, draw_coins, score
from privacy.boundary.messages import Arrays, CanaryOpening, RoundTask, to_bytes
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.chain import create_durably, write_durably
from privacy.noise import system_noise, test_noise
from privacy.spare import SpareCanaries
from privacy.stages import TrainingStage


def commitment(config: SiteConfig, plan: StudyPlan) -> str:
    """The commitment to this site's coins, which are drawn now if they never were; empty where the plan has no canaries."""
    coins = _coins(config, plan)
    return "" if coins is None else coins.commitment


def spare(config: SiteConfig, plan: StudyPlan, task: RoundTask, stage: TrainingStage) -> SpareCanaries | None:
    """The canaries of one attempt at a training round; None where the plan has none, or its coins were shown."""
    if stage.sigma == 0 or _opened_path(config, plan).exists():
        return None
    coins = _coins(config, plan)
    if coins is None:
        return None
    known = (plan.study, config.site.name, task.stage, task.round, task.attempt, "canaries")
    return SpareCanaries(coins.enrolled_D, test_noise(*known) if plan.deterministic else system_noise())


def keep(config: SiteConfig, plan: StudyPlan, task: RoundTask, stage: TrainingStage, spare_TD: Floats) -> None:
    """Store what this attempt adds to the scores."""
    out = io.BytesIO()
    np.save(out, score(spare_TD, stage), allow_pickle=False)
    name = f"{task.stage}-{task.round:04d}-{task.attempt:04d}.npy"
    write_durably(_folder(config, plan) / "scores" / name, out.getvalue())


def opening(config: SiteConfig, plan: StudyPlan) -> bytes:
    """The opening as it leaves: made once, then the same bytes.

    Raises:
        Refused: ``CANARIES`` if the plan has none.
    """
    path = _opened_path(config, plan)
    if not path.exists():
        coins = _coins(config, plan)
        if coins is None:
            raise Refused("CANARIES", "the plan has none")
        total, rounds = _scores(config, plan, coins.enrolled_D.size)
        arrays: Arrays = {"coins": coins.enrolled_D.astype(np.uint32), "scores": total.astype(np.float32)}
        create_durably(path, to_bytes(CanaryOpening(plan.hash, coins.salt, rounds, arrays)))
    return path.read_bytes()


def _coins(config: SiteConfig, plan: StudyPlan) -> Coins | None:
    asked = plan.audit.canaries
    if asked is None or not dp_plan(plan).private:
        return None
    path = _folder(config, plan) / "coins.json"
    if not path.exists():
        noise = test_noise(plan.study, config.site.name, "canary coins") if plan.deterministic else system_noise()
        create_durably(path, draw_coins(plan.hash, config.site.name, asked.per_site, noise).to_bytes())
    return Coins.from_bytes(path.read_bytes(), plan.hash, config.site.name)


def _scores(config: SiteConfig, plan: StudyPlan, canaries: int) -> tuple[NDArray[np.float64], dict[str, int]]:
    """The summed scores, and how many attempts of each training stage they are made of."""
    total, rounds = np.zeros(canaries), Counter({stage.name: 0 for stage in dp_plan(plan).training_stages})
    for path in sorted((_folder(config, plan) / "scores").glob("*.npy")):
        total += np.load(path, allow_pickle=False)
        rounds[path.stem.rsplit("-", 2)[0]] += 1
    return total, dict(rounds)


def _folder(config: SiteConfig, plan: StudyPlan) -> Path:
    return config.folder / "state" / plan.hash / "canaries"


def _opened_path(config: SiteConfig, plan: StudyPlan) -> Path:
    return _folder(config, plan) / "opened.bin"
