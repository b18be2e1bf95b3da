"""Public films through other scanners: one power per patient and slot, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from medgen_models.scanners import through_other_scanners
from medgen_models.schema import PatientBatch, Schema


def test_films_of_one_patient_share_one_power_and_everything_else_stays(
    models_schema: Schema, models_public: PatientBatch
) -> None:
    public = models_public
    varied = through_other_scanners(models_schema, public, 0.2, 7)
    powers = []
    for key in ("film.now", "film.before"):
        old, new = ((part.values[key].double() + 1) / 2 for part in (public, varied))
        inside = (old > 0.05) & (old < 0.95)
        power = torch.where(inside, new.log() / old.log(), torch.nan).flatten(1)
        median = power.nanmedian(dim=1, keepdim=True).values
        assert torch.allclose(power[inside.flatten(1)], median.expand_as(power)[inside.flatten(1)], rtol=1e-3)
        powers.append(median[:, 0])
    both = ~(powers[0].isnan() | powers[1].isnan())
    assert both.any()
    torch.testing.assert_close(powers[0][both], powers[1][both], rtol=1e-3, atol=0)
    assert powers[0][both].std() > 0.05
    for slot, instance in models_schema.instances():
        if slot.kind != "image":
            key = slot.key(instance)
            torch.testing.assert_close(varied.values[key], public.values[key], equal_nan=True, rtol=0, atol=0)
    assert torch.equal(varied.present_BVI, public.present_BVI)


def test_no_spread_changes_nothing_and_a_negative_one_is_refused(
    models_schema: Schema, models_public: PatientBatch
) -> None:
    still = through_other_scanners(models_schema, models_public, 0.0, 7)
    assert all(
        torch.equal(still.values[key], value) or value.isnan().any() for key, value in models_public.values.items()
    )
    with pytest.raises(ValueError, match="spread >= 0, got -1"):
        through_other_scanners(models_schema, models_public, -1.0, 7)
