"""Checks of soundness that belong to no single module: batches, noise and leaks as a whole round makes them.

The ten properties that an engine of differential privacy must show, and where each is tested:
    1. gradients per patient equal the loop's          test_probe_networks, test_gradients
    2. one patient moves the sum by at most the clip   test_training (any values), test_probe_networks (any network)
    3. canaries: sharp, never above, bugs caught       test_canary_audit, test_seeded_bugs
    4. noise: law, independence, freshness, divisor    test_noise, test_training, here
    5. Poisson batches; empty ones count               test_training, here
    6. accountants agree; k records are not one        test_accounting, here
    7. ledger under kill, replay, rollback             test_ledger, test_spendfile, test_restore
    8. nothing else leaves                             test_messages, test_spy, test_probe_networks (buffers), here
    9. one run reports its lower bound                 test_canary_audit
    10. stages compose into one epsilon                test_plan, test_ledger
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant
from scipy import stats
from torch import Tensor, nn

from privacy import accounting
from privacy.engines import UnitLoss
from privacy.gradients import Speed
from privacy.noise import system_noise, test_noise
from privacy.plan import TrainingStage
from privacy.training import MOMENTS, RoundOutcome, train_round

Round = Callable[..., RoundOutcome]
Stage = Callable[..., TrainingStage]
ROOT = Path(__file__).parents[2]
FAST = Speed("loop", chunk=64)


# --- 4: noise ---------------------------------------------------------------------------------------------------------

RESTART = """
import random, numpy, torch
random.seed(0); numpy.random.seed(0); torch.manual_seed(0)
from privacy.noise import system_noise
source = system_noise()
print(source.gaussian((8,), 1.0).tolist(), source.uniform(4).tolist())
"""


def test_nothing_repeats_across_restarts_under_the_same_seeds() -> None:
    """Two processes with every seed equal, as after a crash: another key, other noise, other coins."""
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run([sys.executable, "-c", RESTART], env=environment, check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    first, second = (output.stdout.strip() for output in outputs)
    assert first.startswith("[")
    assert first != second


def test_noise_is_independent_across_coordinates_parameters_and_rounds(dp_stage: Stage) -> None:
    """Every number of every parameter gets its own N(0, (sigma C)²): no shared draw, no parameter left out."""
    stage, noise = dp_stage(sampling_rate=0.5, clip=2.0), test_noise("covariance")
    rows = []
    for _ in range(1500):
        outcome = train_round(
            params={"a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(())},
            unit_loss=lambda params, unit: params["a"].sum() * 0.0,
            patients=0,
            prepare=lambda rows, generator: {},
            stage=stage,
            n_decl=10,
            learning_rate=1e-3,
            speed=FAST,
            noise=noise,
        )
        rows.append(torch.cat([outcome.optimizer_state[f"exp_avg:{name}"].flatten() for name in "abc"]) / 0.1)
    drawn = torch.stack(rows).double().numpy() * stage.divisor(10) / (stage.sigma * stage.clip)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 1e-3
    for column in drawn.T:
        assert 1e-5 < stats.chi2.cdf(float((column**2).sum()), len(drawn)) < 1 - 1e-5
    off = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])
    assert np.abs(off).max() < 5 / np.sqrt(len(drawn))
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 5 / np.sqrt(drawn.size)


# --- 5: sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "patients"), [(0.1, 8), (0.4, 12)])
def test_batch_sizes_of_a_round_are_binomial_and_empty_ones_are_steps(
    dp_linear_round: Round, dp_stage: Stage, q: float, patients: int
) -> None:
    """Chi-square of the sizes that a real round draws; a step in which nobody was drawn is a step all the same."""
    stage = dp_stage(1.0, sampling_rate=q, steps=2500, spare_rounds=0)
    sizes, here = [], 0

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal here
        assert len(set(rows.tolist())) == len(rows)
        here += len(rows)
        return {"g": torch.zeros(len(rows), 1)}

    def on_step(done: int, steps: int) -> None:
        nonlocal here
        sizes.append(here)
        here = 0

    options = {"prepare": prepare, "on_step": on_step, "stage": stage, "speed": FAST}
    outcome = dp_linear_round(torch.zeros(patients, 1), noise=test_noise("sizes", str(q)), **options)
    assert outcome.steps == len(sizes) == 2500
    assert float(outcome.optimizer_state["step:w"]) == 2500
    counts = np.bincount(sizes, minlength=patients + 1)
    expected = 2500 * stats.binom.pmf(np.arange(patients + 1), patients, q)
    assert counts[0] > 0
    rare = expected < 5
    observed, wanted = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, wanted).pvalue > 1e-4
    successive = np.corrcoef(sizes[:-1], sizes[1:])[0, 1]
    assert abs(successive) < 5 / np.sqrt(len(sizes))


# --- 6: k records are not one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("records", "epsilon"), [(1, 3.90), (2, 8.75), (4, 20.6)])
def test_records_drawn_and_clipped_one_by_one_would_cost_this_much(records: int, epsilon: float) -> None:
    """What a patient with k records loses where the unit is the record: a mixture of Gaussians at 0 to k clips.

    sigma 1, rate 0.02, 1000 steps, delta 1e-5. Here the unit is the patient: the first line holds for any k.
    """
    chances = stats.binom.pmf(np.arange(records + 1), records, 0.02)
    event = MixtureOfGaussiansDpEvent(1.0, list(np.arange(records + 1.0)), chances.tolist())
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(event, 1000)
    assert accountant.get_epsilon(1e-5) == pytest.approx(epsilon, rel=5e-3)
    if records == 1:
        assert accounting.epsilon(accounting.gaussian_event(1.0, 0.02, 1000), 1e-5) == pytest.approx(epsilon, rel=5e-3)


@pytest.mark.parametrize("records", [1, 2, 7])
def test_a_patient_counts_once_however_many_records_there_are(
    dp_stage: Stage, dp_sum: Callable[..., Tensor], records: int
) -> None:
    """All records and draws of a patient are one gradient under one clip."""
    held = torch.full((1, records, 3), 100.0)
    outcome = train_round(
        params={"w": torch.zeros(3)},
        unit_loss=lambda params, unit: (unit["g"] @ params["w"]).mean(),
        patients=1,
        prepare=lambda rows, generator: {"g": held[rows]},
        stage=dp_stage(float("inf"), sampling_rate=1.0, clip=0.5),
        n_decl=1,
        learning_rate=1e-3,
        speed=FAST,
        noise=test_noise("records"),
    )
    assert float(dp_sum(outcome, "w").norm()) == pytest.approx(
        0.5, rel=1e-3
    )  # room for rounding in a chunk of this size
    assert float(dp_sum(outcome, "w").norm()) <= 0.5


# --- 8: leaks ---------------------------------------------------------------------------------------------------------


def test_a_round_gives_back_trained_parameters_and_their_moments_and_nothing_else(
    dp_net: nn.Module,
    dp_net_loss: UnitLoss,
    dp_net_units: Callable[..., dict[str, Tensor]],
    dp_params: Callable[[nn.Module], dict[str, Tensor]],
    dp_stage: Stage,
) -> None:
    units, frozen = dp_net_units(5), dp_params(dp_net)
    trained = {name: value for name, value in frozen.items() if name.startswith("mix")}
    outcome = train_round(
        params=trained,
        unit_loss=dp_net_loss,
        patients=5,
        prepare=lambda rows, generator: {name: value[rows] for name, value in units.items()},
        stage=dp_stage(steps=2),
        n_decl=5,
        learning_rate=1e-3,
        speed=Speed("expand", chunk=2),
        noise=system_noise(),
    )
    assert set(vars(outcome)) == {"params", "optimizer_state", "steps", "deterministic", "spare_TD"}
    assert outcome.spare_TD is None  # noised sums over canaries, of whom there are none here
    assert set(outcome.params) == set(trained)
    assert set(outcome.optimizer_state) == {f"{moment}:{name}" for moment in MOMENTS for name in trained}
    assert all(value.shape == trained[name].shape for name, value in outcome.params.items())
    assert {name: value.tolist() for name, value in dp_params(dp_net).items()} == {
        name: value.tolist() for name, value in frozen.items()
    }


STATISTICS = {
    "std", "var", "mean", "median", "quantile", "percentile", "min", "max", "amin", "amax", "aminmax", "ptp",
    "unique", "nunique", "value_counts", "bincount", "histogram", "fit", "fit_transform", "compute_scale_factor",
}  # fmt: skip
PER_RECORD = {
    ("client/scoring.py", "min"): "distance of one patient to the nearest synthetic one, in the annex that stays",
    ("client/records/images.py", "min"): "window and constancy of one image",
    ("client/records/images.py", "max"): "window and constancy of one image",
    ("client/records/images.py", "mean"): "share of one image's voxels that are finite, in a message that stays",
    ("client/records/images.py", "percentile"): "window of one image",
    ("client/records/series.py", "bincount"): "mean of the events of one patient in one bin",
    ("client/records/series.py", "unique"): "channels of one patient, rows that are named on site",
    ("client/records/tables.py", "unique"): "pairs of row and session of one table, not its values",
}


def test_no_statistic_over_patients_is_taken_outside_the_privacy_room() -> None:
    """A source scan of the hospital's code: means, ranges, vocabularies and scale factors are ledgered queries or absent."""
    found: dict[tuple[str, str], int] = {}
    for path in sorted((ROOT / "client").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in STATISTICS:
                found.setdefault((path.relative_to(ROOT).as_posix(), node.func.attr), node.lineno)
    assert {key: line for key, line in found.items() if key not in PER_RECORD} == {}
