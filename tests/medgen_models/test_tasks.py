from __future__ import annotations

import dataclasses

import pytest
import torch

from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE
from medgen_models.layout import Layout
from medgen_models.tasks import states_for, withheld
from medgen_models.tokens import TokenBatch

# Instances: scan.a, scan.b, film.now, film.before, scope, ehr, vitals, note
A, G, N, R = ABSENT, GIVEN, NOISED, REFERENCE


def _all(layout: Layout) -> torch.Tensor:
    return torch.ones(1, 2, layout.instances, dtype=torch.bool)


def test_each_task_is_its_pattern(models_layout: Layout) -> None:
    present = _all(models_layout)
    known = present.clone()
    known[..., [0, 4]] = False
    cases = {
        "joint": [N, N, N, N, N, N, N, A],
        "row": [N, N, N, N, N, G, N, A],
        "impute": [N, G, G, R, N, G, G, G],
        "conditional": [A, N, A, A, A, A, A, A],
        "update": [G, G, N, R, G, G, G, G],
    }
    assert states_for("joint", models_layout, present)[0, 0].tolist() == cases["joint"]
    assert states_for("row", models_layout, present)[0, 0].tolist() == cases["row"]
    assert states_for("impute", models_layout, present, known_BVI=known)[0, 0].tolist() == cases["impute"]
    assert states_for("conditional", models_layout, present, keys=("scan.b",))[0, 0].tolist() == cases["conditional"]
    assert states_for("update", models_layout, present)[0, 0].tolist() == cases["update"]


def test_what_is_not_there_stays_absent(models_layout: Layout) -> None:
    present = torch.zeros_like(_all(models_layout))
    for task in ("joint", "row", "update"):
        assert int(states_for(task, models_layout, present).max()) == ABSENT  # type: ignore[arg-type]


def test_missing_arguments_are_named(models_layout: Layout) -> None:
    present = _all(models_layout)
    with pytest.raises(ValueError, match="known_BVI is missing"):
        states_for("impute", models_layout, present)
    with pytest.raises(ValueError, match="give keys"):
        states_for("conditional", models_layout, present)
    with pytest.raises(ValueError, match="unknown instance"):
        states_for("conditional", models_layout, present, keys=("scan.z",))


def test_who_lacks_the_row_sees_nothing_of_it(models_layout: Layout) -> None:
    """Two patients, the second without the row: his tokens and the label that a column carries are gone, his scan is not."""
    tokens = TokenBatch.empty(models_layout, 2)
    full = dataclasses.replace(
        tokens,
        z_BVNW=torch.ones_like(tokens.z_BVNW),
        weight_BVNW=torch.ones_like(tokens.weight_BVNW),
        present_BVI=torch.ones_like(tokens.present_BVI),
        factor_BVIF=torch.ones_like(tokens.factor_BVIF),
    )
    known = torch.ones_like(full.present_BVI)
    known[1, :, models_layout.place("ehr")] = False
    shown = withheld(full, models_layout, known)
    row = models_layout.span(models_layout.place("ehr"))
    assert torch.equal(shown.z_BVNW[0], full.z_BVNW[0])
    assert float(shown.z_BVNW[1, :, row].abs().max()) == float(shown.weight_BVNW[1, :, row].max()) == 0.0
    assert float(shown.z_BVNW[1, :, models_layout.span(0)].min()) == 1.0
    assert shown.factor_BVIF[1, 0, 0].tolist() == [1, 0]
    assert shown.factor_BVIF[0, 0, 0].tolist() == [1, 1]
    assert torch.equal(shown.present_BVI, full.present_BVI)
