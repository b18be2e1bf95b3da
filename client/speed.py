"""Engine, chunk and threads of private steps: as the site typed them in, or measured once on made-up patients and kept.

How fast, never how private. A run keeps its engine, since engines differ by rounding: the trial's result lies in the
site's ``state/<plan>/`` beside the probe's, and rounds, resumes and all backends read it. The trial sees no record.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from client.site import SiteConfig
from privacy.boundary.messages import RoundTask
from privacy.boundary.plan import StudyPlan
from privacy.chain import canonical, write_durably
from privacy.gradients import Speed, UnitLoss, checked_engine, measure_speed

Units = Mapping[str, Tensor]
TRIAL_PATIENTS = 16
TRIAL_CHUNKS = (2, 4, 8, 16)
WORTH = 0.75  # twice the threads have to save a quarter of the time, or the machine is better shared


def speed_for(
    config: SiteConfig,
    plan: StudyPlan,
    task: RoundTask,
    unit_loss: UnitLoss,
    params: Mapping[str, Tensor],
    made_up: Callable[[int], Units],
) -> Speed:
    """The speed settings of this plan and stage, with torch's threads set to them.

    A study under the test switch does not measure: its results have to be the same bits on every backend.

    Args:
        config: ``[speed]`` of it decides; ``engine = "measured"`` asks for the trial.
        plan, task: whose stage it is.
        unit_loss, params: what is differentiated.
        made_up: units of so many made-up patients.
    """
    chosen = config.speed
    threads = chosen.threads or 1
    if chosen.engine != "measured" or plan.deterministic:
        engine = checked_engine("expand" if chosen.engine == "measured" else chosen.engine)
        speed = Speed(engine, chosen.chunk, threads)
    else:
        path = config.folder / "state" / task.plan_hash / f"{task.stage}-speed.json"
        if not path.is_file():
            measured = _measured(chosen.threads, config.limits.cpu_threads, unit_loss, params, made_up(TRIAL_PATIENTS))
            write_durably(path, canonical(dataclasses.asdict(measured)).encode())
        speed = Speed(**json.loads(path.read_bytes()))
    torch.set_num_threads(speed.threads)
    return speed


def _measured(
    threads: int | None, limit: int | None, unit_loss: UnitLoss, params: Mapping[str, Tensor], units: Units
) -> Speed:
    """The trial at the threads typed in, or at 1, 2, 4, … up to the site's limit while doubling them is worth it."""
    most = threads or limit or os.cpu_count() or 1
    best: tuple[float, Speed] | None = None
    count = threads or 1
    while count <= most:
        torch.set_num_threads(count)
        found = measure_speed(unit_loss, params, units, chunk_sizes=TRIAL_CHUNKS, repeats=1)
        if best is not None and found[0] > WORTH * best[0]:
            break
        best, count = found, 2 * count
    assert best is not None  # at least one count of threads was tried
    return best[1]
