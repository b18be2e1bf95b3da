"""A whole study between many simulated hospitals in one process: what it costs as they become more.

Hospitals hold a small table each; the model is tiny, so that what is seen is the protocol (roll call, approvals, ledgers,
masks between all pairs, unmasking) and not the training. Each size runs in a process of its own.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from medgen_models.core import CoreConfig
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.schema import Schema
from server.checkpoints import write_atomically
from server.events import EventLog
from server.preparation import use_public_model, write_public
from server.runfolder import RunFolder
from simulations import hospitals, preparation
from simulations.backends import run
from simulations.benchmarks.runner import Row
from simulations.phantoms import demo_schema
from simulations.scenario import Scenario

SITES = (10, 30, 100)
PATIENTS = 5
LINEAR = 1.0
MARGIN = 0.1  # of an exponent, for timing on a machine that does other work


@dataclass(frozen=True)
class Cost:
    """Processor seconds of the coordinator and all its sites from first message to verdict, and peak resident MiB."""

    sites: int
    seconds: float
    mebibytes: float


def rows(sites: Sequence[int] = SITES) -> list[Row]:
    """Time and memory of each size and the exponent with which they grow between the two largest."""
    costs = [measured(number) for number in sites]
    last, before = costs[-1], costs[-2]
    others = costs[:-1]
    return [
        Row(
            measure=f"processor time of a study of {last.sites} sites in one process",
            value=last.seconds,
            unit="s",
            peers={f"{cost.sites} sites": cost.seconds for cost in others},
        ),
        Row.at_most(
            f"growth of that time with the sites, exponent between {before.sites} and {last.sites}",
            exponent(before.sites, before.seconds, last.sites, last.seconds),
            LINEAR + MARGIN,
        ),
        Row(
            measure=f"peak memory of a study of {last.sites} sites in one process",
            value=last.mebibytes,
            unit="MiB",
            peers={f"{cost.sites} sites": cost.mebibytes for cost in others},
        ),
        Row.at_most(
            f"growth of that memory with the sites, exponent between {before.sites} and {last.sites}",
            exponent(before.sites, before.mebibytes, last.sites, last.mebibytes),
            LINEAR,
        ),
    ]


def exponent(small: float, low: float, large: float, high: float) -> float:
    """K of a growth as ``sites ** k``.

    >>> round(exponent(10, 3.0, 100, 300.0), 6)
    2.0
    """
    return math.log(high / low) / math.log(large / small)


def measured(sites: int) -> Cost:
    """One size, in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"from simulations.benchmarks.federation_sites import study; study({sites})"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"the study of {sites} sites failed: {done.stderr[-800:]}")
    seconds, mebibytes = map(float, done.stdout.split()[-2:])
    return Cost(sites, seconds, mebibytes)


def study(sites: int) -> None:
    """Prepare and run a study of so many sites; prints its processor seconds, preparation left out, and peak MiB."""
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="medgen-sites-") as place:
        folder = RunFolder(Path(place) / "run")
        folder.path.mkdir()
        prepare(folder, Path(place) / "hospitals", sites)
        started = time.process_time()
        run("inprocess", folder.path, Path(place) / "hospitals", sites, lambda: True)
        seconds = time.process_time() - started
        last = list(EventLog(folder.events).read())[-1]
        if last["kind"] != "finished":
            raise ValueError(f"the study did not finish: {last}")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # what the system counts in: bytes, or KiB
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def prepare(folder: RunFolder, hospitals_dir: Path, sites: int) -> None:
    """Hospitals, a tiny public model, plan and approvals."""
    schema = tiny_schema()
    scenario = Scenario.model_validate(
        {
            "schema": "demo",
            "study": {
                "name": "many-sites",
                "table": {"pairs": 1},
                "recentre": {"enabled": False},
                "core": {"rounds": 1, "steps": 1},
                "release": {"patients": 2, "steps": 2},
                "audit": {"enabled": False},
            },
            "public": {"population": "phantoms", "patients": 16, "reference": 8, "steps": 1, "batch": 8},
            "hospitals": {"preset": "demo"},
        }
    )
    preparation.write_study(folder, scenario, schema)
    for site in hospitals.make_hospitals(
        hospitals_dir, specs(sites), schema, 11, policy=preparation.site_policy(scenario)
    ):
        rules = site / "site.toml"  # the trial of engines would hide the protocol
        rules.write_text(
            rules.read_text(encoding="utf-8").replace("[speed]", '[speed]\nengine = "loop"'), encoding="utf-8"
        )
    public, reference = scenario.population(schema)
    place = folder.path / "public"
    model = pretrain(schema, public, PretrainConfig(core=CoreConfig(width=16, layers=1, heads=2), steps=1, batch=8), 7)
    write_public(model, place)
    use_public_model(folder, place, reference, schema)
    write_atomically(folder.sites_dir, str(hospitals_dir.resolve()).encode())
    events = EventLog(folder.events)
    preparation.plan_and_approve(scenario, schema, model, public, hospitals_dir, folder, events)


def specs(sites: int) -> list[hospitals.HospitalSpec]:
    """So many hospitals with a table of five patients each."""
    return [
        hospitals.HospitalSpec(
            name=f"site-{number:03d}",
            prefix=f"S{number:03d}x",
            patients=PATIENTS,
            declared_capacity=PATIENTS - 1,
            declared_held_out=1,
            slots=("ehr",),
        )
        for number in range(sites)
    ]


def tiny_schema() -> Schema:
    """Four columns of the demo's table and nothing else."""
    kept = ("age_years", "diabetes", "pathology", "outcome")
    table = next(slot for slot in demo_schema().slots if slot.name == "ehr")
    columns = tuple(column for column in table.columns if column.name in kept)
    return Schema(name="tiny", slots=(table.model_copy(update={"columns": columns}),))
