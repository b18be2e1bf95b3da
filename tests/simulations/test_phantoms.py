"""The phantoms' known relations hold in what was drawn and in what is measured from the pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from medgen_models.schema import PatientBatch, Schema
from simulations import phantom_brain as brain
from simulations.phantoms import (
    ATTRIBUTES,
    PATHOLOGIES,
    SEQUENCES,
    Phantoms,
    Profile,
    attributes,
    autoencoder_schema,
    contact_sheet,
    demo_schema,
    make_patients,
    to_batch,
)


@pytest.fixture(scope="module")
def schema() -> Schema:
    return demo_schema()


@pytest.fixture(scope="module")
def people() -> Phantoms:
    return make_patients(400, seed=7)


@pytest.fixture(scope="module")
def batch(schema: Schema, people: Phantoms) -> PatientBatch:
    return to_batch(schema, people)


@pytest.fixture(scope="module")
def measured(schema: Schema, batch: PatientBatch) -> dict[str, np.ndarray]:
    return attributes(schema, batch)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = np.asarray(x, float), np.asarray(y, float)
    both = np.isfinite(x) & np.isfinite(y)
    assert both.sum() > 30
    return float(np.corrcoef(x[both], y[both])[0, 1])


def column(people: Phantoms, name: str) -> np.ndarray:
    return people.table[name].to_numpy(float)


@pytest.mark.parametrize(
    ("attribute", "name", "low", "high"),
    [
        ("ventricle_ml", "mmse", -0.97, -0.85),
        ("fdg_suvr", "mmse", 0.70, 0.90),
        ("hippocampus_ml", "mmse", 0.60, 0.90),
        ("av45_suvr", "mmse", -0.55, -0.08),
        ("heart_ratio", "bnp_pg_ml", 0.50, 0.90),
        ("effusion", "bnp_pg_ml", 0.30, 0.80),
        ("consolidation", "crp_mg_l", 0.75, 1.00),
    ],
)
def test_pictures_carry_the_columns(
    measured: dict[str, np.ndarray], people: Phantoms, attribute: str, name: str, low: float, high: float
) -> None:
    assert low <= correlation(measured[attribute], column(people, name)) <= high


@pytest.mark.parametrize(
    ("attribute", "truth", "at_least"),
    [
        ("ventricle_ml", "ventricle_ml", 0.96),
        ("hippocampus_ml", "hippocampus_ml", 0.70),
        ("fdg_suvr", "fdg_suvr", 0.75),
        ("av45_suvr", "av45_suvr", 0.85),
        ("heart_ratio", "heart_ratio", 0.55),
        ("effusion", "fluid_current_l", 0.80),
        ("congestion", "fluid_current_l", 0.90),
        ("prior_congestion", "fluid_prior_l", 0.90),
        ("consolidation", "pneumonia", 0.95),
    ],
)
def test_measures_find_the_truth(
    measured: dict[str, np.ndarray], people: Phantoms, attribute: str, truth: str, at_least: float
) -> None:
    assert correlation(measured[attribute], getattr(people.latents, truth)) >= at_least


def test_ventricles_are_measured_in_millilitres(measured: dict[str, np.ndarray], people: Phantoms) -> None:
    error = measured["ventricle_ml"] - people.latents.ventricle_ml
    assert abs(np.nanmedian(error)) < 4.0


def test_fluid_between_the_films_moves_the_film_and_fluid_before_does_not(
    measured: dict[str, np.ndarray], people: Phantoms
) -> None:
    fluid = people.events[people.events["channel"] == "fluid_ml_h"]
    taken = (48.0 - people.gap_hours_B[fluid["patient"]]) * 60.0
    after = fluid["minute"].to_numpy() >= taken
    means = [fluid[side].groupby("patient")["value"].mean().reindex(range(len(people))) for side in (after, ~after)]
    change = measured["congestion"] - measured["prior_congestion"]
    assert correlation(change, means[0].to_numpy() * people.gap_hours_B) > 0.8
    assert correlation(measured["effusion_change"], means[0].to_numpy() * people.gap_hours_B) > 0.6
    assert abs(correlation(change, means[1].to_numpy())) < 0.25
    overloaded = means[0].to_numpy() * people.gap_hours_B > 1000.0
    assert np.nanmean(measured["effusion_change"][overloaded]) > 0.02


def test_amyloid_is_bimodal_and_partly_discordant(measured: dict[str, np.ndarray], people: Phantoms) -> None:
    suvr = measured["av45_suvr"]
    suvr = suvr[np.isfinite(suvr)]
    low, valley, high = (np.mean((suvr > a) & (suvr < a + 0.1)) for a in (0.89, 1.09, 1.24))
    assert low > 3 * valley
    assert high > 1.2 * valley
    dementia = people.latents.pathology == PATHOLOGIES.index("dementia")
    assert (people.latents.amyloid[dementia] == 0).mean() > 0.05
    assert (people.latents.amyloid[~dementia] == 1).mean() > 0.05


def test_inflammation_is_bimodal(people: Phantoms) -> None:
    crp = np.log(column(people, "crp_mg_l"))
    crp = crp[np.isfinite(crp)]
    assert np.mean((crp > 2.8) & (crp < 3.5)) < 0.3 * min(np.mean(crp < 2.1), np.mean(crp > 4.2))


def test_blood_pressure_rises_and_falls_with_cardiac_load(people: Phantoms) -> None:
    load, pressure = people.latents.cardiac, column(people, "systolic_mmhg")
    groups = [np.nanmean(pressure[(load > a) & (load <= b)]) for a, b in ((0.0, 0.15), (0.25, 0.5), (0.75, 1.0))]
    assert groups[1] > groups[0] + 3
    assert groups[1] > groups[2] + 3


def test_values_are_missing_not_at_random(people: Phantoms) -> None:
    missing, truth = people.table.isna(), people.latents
    healthy_heart = truth.cardiac < 0.25
    assert missing["bnp_pg_ml"][healthy_heart].mean() > 2 * missing["bnp_pg_ml"][~healthy_heart].mean()
    assert missing["crp_mg_l"][truth.pneumonia == 0].mean() > 3 * missing["crp_mg_l"][truth.pneumonia == 1].mean()
    grave = truth.neurodegeneration > 0.55
    assert missing["adas"][grave].mean() > 1.3 * missing["adas"][~grave].mean()
    assert not missing[["age_years", "sex", "pathology", "outcome"]].to_numpy().any()


def test_the_note_tells_what_nothing_else_tells(people: Phantoms, batch: PatientBatch) -> None:
    alone = people.latents.lives_alone
    for name in people.table.columns.drop("outcome"):
        if people.table[name].dtype.kind == "f":
            assert abs(correlation(column(people, name), alone)) < 0.2, name
    rows = np.flatnonzero([bool(note) for note in people.notes])
    code = batch.values["note"][rows, 0].flatten(1).double().numpy()
    code = np.concatenate([code, np.ones((len(code), 1))], axis=1)
    guess = code @ np.linalg.lstsq(code, alone[rows], rcond=None)[0] > 0.5
    assert (guess == alone[rows]).mean() > 0.95
    died = people.latents.outcome
    assert died[alone == 1].mean() > died[alone == 0].mean() + 0.05


def test_lesions_show_where_they_belong(measured: dict[str, np.ndarray], people: Phantoms) -> None:
    load = [np.nanmean(measured["lesion_load"][people.latents.pathology == k]) for k in range(4)]
    assert load[PATHOLOGIES.index("glioma")] > 5 * load[PATHOLOGIES.index("healthy")]
    assert load[PATHOLOGIES.index("sclerosis")] > 1.5 * load[PATHOLOGIES.index("healthy")]
    site, lesions = people.lesions.site, people.lesions
    assert set(site[site >= 0]) == set(range(6))
    away = lesions.centre_B3[site >= 0] - np.asarray(brain.LESION_SITES_MM)[site[site >= 0]]
    assert 2.0 < away.std() < 6.0
    assert not lesions.plaque_B6[people.latents.pathology != PATHOLOGIES.index("sclerosis")].any()


def test_a_tumour_looks_different_in_every_sequence(people: Phantoms) -> None:
    row = int(np.flatnonzero(people.lesions.site >= 0)[0])
    part = people.latents.select(np.asarray([row]))
    spots = brain.Lesions(
        **{f.name: getattr(people.lesions, f.name)[[row]] for f in dataclasses.fields(people.lesions)}
    )
    fractions = brain.tissue_fractions(part, spots, np.zeros((1, 3), np.float32))
    rim = fractions[0, brain.TISSUES.index("rim")] > 0.6
    white = fractions[0, brain.TISSUES.index("white")] > 0.97
    shown = {}
    for k, sequence in enumerate(SEQUENCES):
        image = brain.render_mri(fractions, np.asarray([k]), SEQUENCES, Profile(), np.random.default_rng(0))[0]
        shown[sequence] = float(image[rim].mean() / image[white].mean())
    assert shown["T1ce"] > 1.0 > 0.9 > shown["T1w"]  # only contrast agent makes the rim bright on T1
    assert shown["FLAIR"] > 1.4
    assert fractions.sum(axis=1).max() <= 1.0 + 1e-5


def test_tolerates_blur_and_noise(schema: Schema, batch: PatientBatch, measured: dict[str, np.ndarray]) -> None:
    few = batch.select(list(range(200)))
    values, noise = dict(few.values), torch.Generator().manual_seed(0)
    for key in ("mri.a", "mri.b", "pet.fdg", "pet.av45", "cxr.current", "cxr.prior"):
        image = values[key]
        for axis in range(2, image.ndim):
            image = 0.25 * image.roll(1, axis) + 0.5 * image + 0.25 * image.roll(-1, axis)
        values[key] = image + 0.04 * torch.randn(image.shape, generator=noise)
    again = attributes(schema, dataclasses.replace(few, values=values))
    for name in ("ventricle_ml", "fdg_suvr", "av45_suvr", "heart_ratio", "effusion", "congestion"):
        assert correlation(again[name], measured[name][:200]) > 0.93, name


def test_measures_are_blind_to_everything_but_images(
    schema: Schema, batch: PatientBatch, measured: dict[str, np.ndarray]
) -> None:
    values = dict(batch.values) | {
        key: torch.full_like(batch.values[key], float("nan")) for key in ("ehr", "vitals", "note")
    }
    again = attributes(schema, dataclasses.replace(batch, values=values))
    assert tuple(again) == ATTRIBUTES
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(again[name], measured[name])


def test_absent_images_measure_as_nan(batch: PatientBatch, measured: dict[str, np.ndarray]) -> None:
    keys = demo_schema().keys()
    present = {key: batch.present_BVI[:, 0, k].numpy() for k, key in enumerate(keys)}
    np.testing.assert_array_equal(np.isfinite(measured["ventricle_ml"]), present["mri.a"] | present["mri.b"])
    np.testing.assert_array_equal(np.isfinite(measured["fdg_suvr"]), present["pet.fdg"])
    np.testing.assert_array_equal(np.isfinite(measured["effusion_change"]), present["cxr.prior"])


def test_a_schema_without_pet_is_served(schema: Schema, people: Phantoms) -> None:
    part = schema.model_copy(update={"slots": tuple(slot for slot in schema.slots if slot.name != "pet")})
    again = to_batch(part, people)
    assert "pet.fdg" not in again.values
    assert np.isnan(attributes(part, again)["fdg_suvr"]).all()


def test_batch_obeys_the_record_type(schema: Schema, batch: PatientBatch, people: Phantoms) -> None:
    assert len(batch) == len(people)
    for place, (slot, instance) in enumerate(schema.instances()):
        value, there = batch.values[slot.key(instance)], batch.present_BVI[:, 0, place]
        assert tuple(value.shape) == (len(people), 1, *slot.raw_shape())
        assert value.dtype == torch.float32
        if slot.kind in ("volume", "image"):
            assert bool(torch.isfinite(value).all())
            assert float(value.abs().max()) <= 1.0
            assert float(value[~there].abs().max()) == 0.0
            assert float(value[there].std()) > 0.2
        for axis, factor in enumerate(schema.factors()):
            level = batch.factor_BVIF[:, 0, place, axis]
            assert bool((level[~there] == 0).all())
            if factor in slot.factors:
                assert bool((level[there] > 0).all())
    numeric = [k for k, c in enumerate(schema.table_columns()) if c.kind == "numeric"]
    assert float(batch.values["ehr"][..., numeric].nan_to_num().abs().max()) <= 1.0
    prior = schema.keys().index("cxr.prior")
    gap = batch.gap_hours_BVI[:, 0, prior]
    assert bool(((gap > 0) == batch.present_BVI[:, 0, prior]).all())
    assert bool((batch.gap_hours_BVI.sum(dim=2)[:, 0] == gap).all())


def test_patients_have_one_or_two_sequences_and_not_everything(batch: PatientBatch, people: Phantoms) -> None:
    count = (people.sequence_B2 >= 0).sum(axis=1)
    assert set(count) == {0, 1, 2}
    two = people.sequence_B2[count == 2]
    assert (two[:, 0] < two[:, 1]).all()
    share = batch.present_BVI[:, 0].float().mean(dim=0)
    assert bool((share[:6] > 0.3).all())
    assert bool((share[:6] < 0.99).all())
    assert not (people.film_present_B2[:, 1] & ~people.film_present_B2[:, 0]).any()
    assert people.events["minute"].between(0, 48 * 60 - 1).all()


def test_vitals_are_irregular(batch: PatientBatch) -> None:
    observed = torch.isfinite(batch.values["vitals"][batch.present_BVI[:, 0, 7], 0]).float().mean()
    assert 0.5 < float(observed) < 0.97


def test_a_seed_is_a_population(schema: Schema) -> None:
    one, two, other = (to_batch(schema, make_patients(9, seed)) for seed in (3, 3, 4))
    for key, value in one.values.items():
        assert torch.equal(value.nan_to_num(9.0), two.values[key].nan_to_num(9.0)), key
        assert not torch.equal(value.nan_to_num(9.0), other.values[key].nan_to_num(9.0)), key


def test_sites_differ_as_their_profiles_say(schema: Schema) -> None:
    profile = Profile(age_years=75, severity_shift=1.0, pet_gain=0.85, contrast=0.8, bias_field=0.2, mri_share=1.0)
    plain, shifted = make_patients(60, 1, Profile(mri_share=1.0)), make_patients(60, 1, profile)
    assert shifted.table["age_years"].mean() > plain.table["age_years"].mean() + 8
    assert shifted.latents.severity.mean() > plain.latents.severity.mean() + 0.1
    assert shifted.pet_B2XYZ[shifted.pet_present_B2].mean() < 0.93 * plain.pet_B2XYZ[plain.pet_present_B2].mean()
    assert shifted.mri_B2XYZ[:, 0].mean() > plain.mri_B2XYZ[:, 0].mean()
    none = make_patients(5, 1, Profile(fdg_share=0.0, av45_share=0.0, cxr_share=0.0, note_share=0.0))
    assert not bool(to_batch(schema, none).present_BVI[:, 0, 2:6].any())


def test_withheld_cells_never_occur() -> None:
    cells = tuple(("glioma", sequence) for sequence in ("FLAIR", "T2w"))
    people = make_patients(80, 2, Profile(withheld_cells=cells, fdg_share=0, av45_share=0))
    glioma = people.sequence_B2[people.latents.pathology == PATHOLOGIES.index("glioma")]
    assert not np.isin(glioma, [SEQUENCES.index("FLAIR"), SEQUENCES.index("T2w")]).any()
    assert (people.sequence_B2 == SEQUENCES.index("FLAIR")).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"mri_share": 1.2},
        {"pathology_mix": (0.0, 0.0, 0.0, 0.0)},
        {"sequence_mix": (-1.0, 1.0, 1.0, 1.0, 1.0)},
        {"withheld_cells": (("glioma", "CT"),)},
    ],
)
def test_impossible_profiles_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="profile"):
        Profile(**wrong)  # type: ignore[arg-type]


def test_a_negative_population_is_refused() -> None:
    with pytest.raises(ValueError, match="patients >= 0"):
        make_patients(-1, 0)


def test_nobody_is_a_population(schema: Schema) -> None:
    assert len(to_batch(schema, make_patients(0, 0))) == 0


def test_schemas_are_small_and_alike() -> None:
    demo, trained = demo_schema(), autoencoder_schema()
    assert demo.keys() == trained.keys()
    assert len(demo.table_columns()) >= 12
    assert sum(column.outcome for column in demo.table_columns()) == 1
    tokens = sum(
        len(slot.columns) if slot.kind == "table" else slot.bins if slot.kind == "series" else slot.tokens
        for slot, _ in demo.instances()
    )
    assert tokens <= 80


def test_contact_sheet_is_a_picture(schema: Schema, batch: PatientBatch, tmp_path: object) -> None:
    path = tmp_path / "sheet.png"  # type: ignore[operator]
    contact_sheet(schema, batch, path, patients=3)
    with Image.open(path) as image:
        assert min(image.size) > 200
        assert np.asarray(image.convert("L")).std() > 30
