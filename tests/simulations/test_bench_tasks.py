from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from simulations import phantoms
from simulations.benchmarks import tasks, tasks_world
from simulations.benchmarks.task_figures import Figure
from simulations.benchmarks.tasks import Done, Job, known_parts, read_results, seed_interval, summarise
from simulations.benchmarks.tasks_world import HELD_CELLS, VARIANTS, Place, Sizes, pretrain_config, without, world
from simulations.phantom_population import PATHOLOGIES, SEQUENCES

TINY = Sizes.tiny()


def test_every_row_has_what_the_benchmark_reads() -> None:
    for part in tasks.PARTS:
        module = tasks.module_of(part)
        assert module.PRIVACIES, part
        assert set(module.PRIVACIES) <= set(tasks.PRIVACY_LABEL), part
        assert isinstance(module.USES_THE_WORLD, bool), part
        assert callable(module.figures), part
        assert set(getattr(module, "VARIANTS", ())) <= set(VARIANTS), part


def test_rows_by_name() -> None:
    assert known_parts(["update", "joint"]) == ("update", "joint")
    with pytest.raises(ValueError, match="row 'nonsense': unknown; known are joint"):
        known_parts(["nonsense"])


def test_interval_of_three_seeds_by_hand() -> None:
    """Mean 2, deviation 1, t(.975, 2) = 4.3027: half width 4.3027 / sqrt(3)."""
    found = seed_interval(np.array([1.0, 2.0, 3.0]))
    assert found is not None
    assert found == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert seed_interval(np.array([1.0])) is None
    assert seed_interval(np.array([1.0, math.nan])) is None


def test_a_figure_is_the_mean_over_seeds_and_its_bar_is_held_by_the_mean() -> None:
    jobs = [Job("impute", "inf", seed) for seed in (0, 1)]
    figures = {
        jobs[0]: Done((Figure("PSNR", 20.0, "dB", {"ridge": 21.0}, bar=22.0, at="least"),), 1.0),
        jobs[1]: Done((Figure("PSNR", 26.0, "dB", {"ridge": 23.0}, bar=22.0, at="least"),), 1.0),
    }
    (row,) = summarise(jobs, figures)
    assert (row.value, row.bar, row.holds, row.unit) == (23.0, 22.0, True, "dB")
    assert row.peers == {"ridge": 22.0}
    assert row.measure == "impute, federated, not private: PSNR"
    single = {
        job: Done((Figure("error", value, bar=1.0, at="most"),), 1.0)
        for job, value in zip(jobs, (0.5, 2.0), strict=True)
    }
    assert summarise(jobs, single)[0].holds is False


def test_a_bar_needs_a_direction() -> None:
    with pytest.raises(ValueError, match="expected bar and at together"):
        Figure("x", 1.0, bar=2.0)


def test_finished_calls_are_read_again_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    lines, job = tmp_path / "x.cells.jsonl", Job("joint", "8", 1)
    done = Done((Figure("kept", 0.5, peers={"real": 1.0}), Figure("not defined", math.nan)), 12.0)
    tasks._append(lines, job, TINY, done)
    with lines.open("a") as handle:
        handle.write('{"key": "half')
    found = read_results(lines, [job, Job("joint", "8", 2)], TINY)
    assert list(found) == [job]
    assert found[job].figures[0] == done.figures[0]
    assert math.isnan(found[job].figures[1].value)
    assert read_results(lines, [job], Sizes()) == {}
    assert json.loads(lines.read_text().splitlines()[0])["part"] == "joint"


def test_nobody_trains_on_the_held_cells_and_the_test_sets_have_them() -> None:
    patients = world(TINY, 3)
    wanted = {(PATHOLOGIES.index(p), SEQUENCES.index(s)) for p, s in HELD_CELLS}

    def cells(truth: phantoms.Phantoms) -> set[tuple[int, int]]:
        found = set()
        for k in range(2):
            found |= set(zip(truth.latents.pathology.tolist(), truth.sequence_B2[:, k].tolist(), strict=True))
        return found

    assert not cells(patients.public_truth) & wanted
    assert wanted <= cells(phantoms.make_patients(300, seed=4))  # the population of the test sets


def test_a_variant_lacks_one_thing() -> None:
    schema = phantoms.demo_schema()
    batch = phantoms.to_batch(schema, phantoms.make_patients(6, seed=1))
    for name, gone in (
        ("no ehr", {"ehr", "vitals", "note"}),
        ("no text", {"note"}),
        ("no reference", {"cxr.prior"}),
        ("full", set()),
        ("no hinge", set()),
    ):
        left = without(schema, batch, name)  # type: ignore[arg-type]
        lost = {
            key
            for i, key in enumerate(schema.keys())
            if bool(batch.present_BVI[:, 0, i].any()) and not bool(left.present_BVI[:, 0, i].any())
        }
        assert lost == gone, name
    full = pretrain_config(TINY)
    assert pretrain_config(TINY, "no fusion").core.fusion == "mean"
    assert pretrain_config(TINY, "no hinge").hinge == 0.0 != full.hinge
    assert pretrain_config(TINY, "no label").flow.label == 0.0 != full.flow.label
    assert pretrain_config(TINY, "no biomarker").flow.biomarker == 0.0 != full.flow.biomarker


def test_one_set_of_weights_is_made_once_and_moves_with_the_hospitals(tmp_path: Path) -> None:
    places = {privacy: Place(tmp_path, TINY, 0, privacy) for privacy in ("public", "inf", "8")}
    public, private = places["public"].model(), places["8"].model()
    name = "trunk.mix.weight"
    assert not torch.equal(public.core.state_dict()[name], private.core.state_dict()[name])
    again = places["8"].model()
    assert torch.equal(again.core.state_dict()[name], private.core.state_dict()[name])
    epsilon, sigma = tasks_world.spent(tmp_path, 0, "8")
    assert epsilon <= 8.0
    assert sigma > 0.3
    assert math.isinf(tasks_world.spent(tmp_path, 0, "inf")[0]) if (places["inf"].model()) else False
    rows = places["8"].rows(5, 1)
    assert len(rows) == 5
    assert bool(torch.isfinite(rows.values["ehr"]).any())
    assert len(places["public"].test()) == TINY.test
    assert len(places["8"].test()) == 3 * TINY.held_out
