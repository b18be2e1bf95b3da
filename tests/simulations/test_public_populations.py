"""The public stand-ins have the shape of the real studies, say what a textbook says, and depend on the seed alone."""

import numpy as np
import pytest
import torch

from medgen_models.schema import unscale
from simulations.public_populations import ICU_TYPICAL, icu_population, limb_population
from simulations.real_schemas import icu_schema, petmr_schema


def test_icu_values_lie_in_range_and_near_the_textbook() -> None:
    schema = icu_schema()
    batch = icu_population(schema, 800, seed=3)
    vitals = batch.values["vitals"][:, 0].numpy()
    assert np.nanmin(vitals) >= -1.0
    assert np.nanmax(vitals) <= 1.0
    for c, column in enumerate(schema.slot("vitals").columns):
        known = ICU_TYPICAL[column.name]
        seen = unscale(vitals[:, :, c], column.low, column.high)
        assert abs(np.nanmean(seen) - known.mean) < 0.35 * known.sd, column.name
        assert abs(np.isfinite(seen).mean() - known.seen) < 0.12, column.name


def test_icu_severity_reaches_outcome_and_signs() -> None:
    schema = icu_schema()
    batch = icu_population(schema, 3000, seed=4)
    names = [column.name for column in schema.table_columns()]
    died = batch.values["ehr"][:, 0, names.index("died")].numpy()
    assert 0.08 < died.mean() < 0.35
    gcs = np.nanmean(
        batch.values["vitals"][:, 0, :, [c.name for c in schema.slot("vitals").columns].index("gcs")], axis=1
    )
    assert np.nanmean(gcs[died == 1]) < np.nanmean(gcs[died == 0])


def test_limbs_run_along_the_body_and_tumours_take_up_tracer() -> None:
    schema = petmr_schema()
    batch = limb_population(schema, 40, seed=5)
    mri, pet = (batch.values[key][:, 0].numpy() for key in ("mri", "pet"))
    assert mri.shape == (40, *schema.slot("mri").shape)
    along, across = (np.abs(np.diff(mri, axis=axis)).mean() for axis in (3, 1))
    assert along < across
    table = {c.name: i for i, c in enumerate(schema.table_columns())}
    uptake = unscale(batch.values["ehr"][:, 0, table["suv_max"]].numpy(), 0, 60)
    assert np.corrcoef(pet.max(axis=(1, 2, 3)), uptake)[0, 1] > 0.3


@pytest.mark.parametrize(
    "make", [lambda seed: icu_population(icu_schema(), 20, seed), lambda seed: limb_population(petmr_schema(), 5, seed)]
)
def test_the_seed_decides(make) -> None:  # type: ignore[no-untyped-def]
    first, again, other = make(1), make(1), make(2)
    for key in first.values:
        assert torch.equal(torch.nan_to_num(first.values[key]), torch.nan_to_num(again.values[key]))
    assert any(
        not torch.equal(torch.nan_to_num(first.values[k]), torch.nan_to_num(other.values[k])) for k in first.values
    )
