"""How fast the smoke core is on this machine: private and public training, sampling, and growth with patients and tokens.

Everything is run at full length with the machine's cores and nothing beside it; a curve is the median of a few steps.
Shape legend: N tokens of a patient's visit.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from medgen_models.adapters import trainable
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, draw, make_unit_loss, make_units, objective_of, patient_losses
from medgen_models.gaussian_prior import fit_gaussian_prior
from medgen_models.layout import Layout
from medgen_models.optimizer import PublicOptimizer
from medgen_models.pretrain import PretrainConfig, train_core
from medgen_models.sampler import sample
from medgen_models.schema import IMAGE_KINDS, Schema
from medgen_models.tasks import states_for
from medgen_models.tokens import TokenBatch
from privacy.noise import system_noise
from privacy.plan import DPPlan, TrainingStage
from privacy.speed import Speed
from privacy.training import train_round
from simulations import phantoms
from simulations.benchmarks.runner import BenchResult, Row, collect

PATIENTS, RATE, STEPS, CHUNK = 400, 0.08, 400, 32
PUBLIC_STEPS, PUBLIC_BATCH = 800, 64
DRAWN, SAMPLER_STEPS = 32, 20
REPEATS = 5
SMOKE = CoreConfig(prior_rank=PretrainConfig().prior_rank)
"""The smoke core as pre-training makes it."""
PATIENT_COUNTS = (8, 16, 32, 64, 128)
COPIES = (1, 2, 4, 8)
"""How often the image slots are repeated for the curve against tokens."""
PRIVATE_BAR_S, PUBLIC_BAR_S, SAMPLE_BAR_S, TOKENS_BAR = 360.0, 300.0, 30.0, 80


def run(plot: Path | None = None) -> BenchResult:
    """Measure; the curves go to ``plot`` where one is named."""
    return collect("core-speed", "medgen bench core-speed", lambda: rows(plot))


def rows(plot: Path | None) -> list[Row]:
    """Bars first, then the two curves."""
    torch.set_num_threads(os.cpu_count() or 1)
    schema = phantoms.demo_schema()
    people = phantoms.to_batch(schema, phantoms.make_patients(PATIENTS, seed=5))
    bank = CodecBank.fit_public(schema, people, seed=5)
    tokens = bank.encode(people)
    core = TokenCore(bank.layout, SMOKE, torch.Generator().manual_seed(5)).requires_grad_(False)
    core.prior.load_state_dict(fit_gaussian_prior(bank.layout, tokens, SMOKE.prior_rank).state_dict())
    size = sum(p.numel() for p in core.parameters())
    out = [
        Row.at_most("tokens of the smoke preset", bank.layout.tokens, TOKENS_BAR, peers={"weights": size}),
        Row.at_most(
            f"{STEPS} private steps of {RATE * PATIENTS:.0f} patients, Poisson, one draw",
            _private_s(core, tokens),
            PRIVATE_BAR_S,
            unit="s",
        ),
        Row.at_most(
            f"{PUBLIC_STEPS} public steps of {PUBLIC_BATCH} patients",
            _seconds(lambda: _public(bank.layout, tokens)),
            PUBLIC_BAR_S,
            unit="s",
        ),
        Row.at_most(
            f"{DRAWN} patients, three image slots given the row, {SAMPLER_STEPS} steps with guidance",
            _seconds(lambda: _sample(core, tokens.select(list(range(DRAWN))))),
            SAMPLE_BAR_S,
            unit="s",
        ),
    ]
    by_patients = {n: _step_s(schema, n) for n in PATIENT_COUNTS}
    by_tokens = {}
    for copies in COPIES:
        wide = _widened(schema, copies)
        by_tokens[Layout.of(wide).tokens] = _step_s(wide, 16)
    out += [
        Row(measure=f"public step of {n} patients, {bank.layout.tokens} tokens", value=s, unit="s")
        for n, s in by_patients.items()
    ]
    out += [Row(measure=f"public step of 16 patients, {n} tokens", value=s, unit="s") for n, s in by_tokens.items()]
    if plot is not None:
        _draw(plot, by_patients, by_tokens)
    return out


def _private_s(core: TokenCore, tokens: TokenBatch) -> float:
    """Wall time of one round of private steps; calibration is not counted."""
    flow = FlowConfig()
    stage = TrainingStage(name="core", sampling_rate=RATE, steps=STEPS, rounds=1, spare_rounds=0, clip=1.0, draws=1)
    plan = DPPlan(stages=(stage,), delta=1e-5).calibrate(8.0)

    def prepare(rows_B: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        part = tokens.select(rows_B)
        return part.as_dict() | draw(core.layout, part.present_BVI, part.visit_BV, flow, generator)

    started = time.monotonic()
    train_round(
        params=trainable(core, "all"),
        unit_loss=make_unit_loss(core, flow),
        patients=len(tokens),
        prepare=prepare,
        stage=plan.training("core"),
        n_decl=len(tokens),
        learning_rate=1e-3,
        speed=Speed(chunk=CHUNK),
        noise=system_noise(),
        optimizer_state=None,
    )
    return time.monotonic() - started


def _public(layout: Layout, tokens: TokenBatch) -> None:
    train_core(layout, tokens, PretrainConfig(steps=PUBLIC_STEPS, batch=PUBLIC_BATCH, core=SMOKE), seed=5)


def _sample(core: TokenCore, tokens: TokenBatch) -> None:
    """An MRI, a PET and a film of each patient, as a release draws them."""
    layout = core.layout
    slots = {"mri.a", "pet.fdg", "cxr.current", "ehr"}
    here = torch.ones_like(tokens.present_BVI) & torch.tensor([key in slots for key in layout.keys])
    rows_B = dataclasses.replace(tokens, present_BVI=here)
    states = states_for("row", layout, here)
    sample(core, layout, rows_B, states, generator=torch.Generator().manual_seed(5), steps=SAMPLER_STEPS, guidance=2.0)


def _step_s(schema: Schema, patients: int) -> float:
    """Median time of a public step on made-up tokens."""
    layout, config = Layout.of(schema), PretrainConfig(core=SMOKE)
    generator = torch.Generator().manual_seed(patients)
    core = TokenCore(layout, config.core, generator)
    empty = TokenBatch.empty(layout, patients)
    tokens = dataclasses.replace(
        empty,
        z_BVNW=torch.randn(empty.z_BVNW.shape, generator=generator) * layout.valid_NW(),
        weight_BVNW=layout.valid_NW().expand(empty.z_BVNW.shape),
        present_BVI=torch.ones_like(empty.present_BVI),
        visit_BV=torch.ones_like(empty.visit_BV),
    )
    objective = objective_of(layout, config.flow)
    optimizer = PublicOptimizer(core, config.matrix_rate, config.learning_rate, config.weight_decay)

    def step() -> None:
        units = make_units(tokens, layout, config.flow, generator)
        optimizer.zero_grad()
        patient_losses(core, units, objective, together=True).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0)

    step()
    return statistics.median(_seconds(step) for _ in range(REPEATS))


def _widened(schema: Schema, copies: int) -> Schema:
    """The schema with each image slot ``copies`` times."""
    slots = []
    for slot in schema.slots:
        repeat = copies if slot.kind in IMAGE_KINDS else 1
        for k in range(repeat):
            name = slot.name if k == 0 else f"{slot.name}{k}"
            own = tuple(
                instance.model_copy(update={"of": f"{name}.current"}) if instance.of else instance
                for instance in slot.instances
            )
            slots.append(slot.model_copy(update={"name": name, "instances": own}))
    return Schema(name=f"{schema.name}-{copies}", slots=tuple(slots), max_visits=schema.max_visits)


def _seconds(work: Callable[[], None]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _draw(path: Path, by_patients: dict[int, float], by_tokens: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, curve, label in zip(axes, (by_patients, by_tokens), ("patients in a step", "tokens"), strict=True):
        axis.loglog(list(curve), list(curve.values()), marker="o", color="#1b5e7a")
        axis.set_xlabel(label)
        axis.set_ylabel("seconds a step")
        axis.set_xticks(list(curve), [str(n) for n in curve])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.suptitle("One public training step of the smoke core")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
