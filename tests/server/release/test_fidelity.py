"""Fidelity reads synthetic and public patients alone: a perfect cohort scores the floor, shuffled pairs lose coherence."""

import dataclasses

import numpy as np
import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.schema import PatientBatch, Schema
from server.release.evidence import Evidence
from server.release.fidelity import Fidelity, measure
from simulations.phantoms import demo_schema, make_patients, to_batch


@pytest.fixture(scope="module")
def parts() -> tuple[Schema, CodecBank, PatientBatch, PatientBatch]:
    whole = demo_schema()
    schema = whole.model_copy(update={"slots": tuple(s for s in whole.slots if s.name in ("mri", "ehr", "vitals"))})
    people = to_batch(schema, make_patients(420, seed=9))
    bank = CodecBank.fit_public(schema, people.select(list(range(100))), seed=1)
    return schema, bank, people.select(list(range(140))), people.select(list(range(140, 420)))


def _value(fidelity: Fidelity, subject: str, measure_name: str) -> tuple[float, float]:
    row = next(r for r in fidelity.rows if (r.subject, r.measure) == (subject, measure_name))
    assert row.floor is not None
    return row.value, row.floor


def test_a_cohort_from_the_same_population_scores_the_floor(parts) -> None:  # type: ignore[no-untyped-def]
    schema, bank, cohort, reference = parts
    fidelity = measure(schema, bank, cohort, reference, seed=2)
    for subject, name, slack in (
        ("ehr", "column shapes", 0.05),
        ("mri.a", "precision", 0.1),
        ("mri.a", "coverage", 0.15),
        ("vitals", "channel marginals", 0.05),
    ):
        value, floor = _value(fidelity, subject, name)
        assert abs(value - floor) < slack, (subject, name)
    for entry in fidelity.marginals:
        assert sum(entry.public) == pytest.approx(1.0)
        assert sum(entry.synthetic) == pytest.approx(1.0)


def test_images_dealt_out_to_other_rows_lose_their_correlations(parts) -> None:  # type: ignore[no-untyped-def]
    schema, bank, cohort, reference = parts
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(cohort)))
    dealt = {key: value if key == "ehr" else value[order] for key, value in cohort.values.items()}
    right, wrong = (
        Evidence(
            study="x", created="2026-01-01", correlations=measure(schema, bank, batch, reference, seed=2).correlations
        ).coherence
        for batch in (cohort, dataclasses.replace(cohort, values=dealt))
    )
    assert right is not None
    assert wrong is not None
    assert right > 0.7
    assert abs(wrong) < 0.5 < right


def test_sheets_name_the_digest_of_what_they_show(parts) -> None:  # type: ignore[no-untyped-def]
    schema, bank, cohort, reference = parts
    fidelity = measure(schema, bank, cohort, reference, seed=2)
    assert {sheet.instance for sheet in fidelity.sheets} == {"mri.a", "mri.b"}
    assert set(fidelity.images) == {name for s in fidelity.sheets for name in (s.synthetic, s.public)}
