"""Hospitals on disk: real formats, read back unchanged by the code that reads a real hospital's."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch

from client.policy import SiteConfig
from client.records.load import Everyone, read_everyone
from client.records.problems import NoPatients
from medgen_models.schema import Schema
from privacy.ledger import Ledger
from simulations.hospital_faults import FAULTS, Fault, plant_bad_input
from simulations.hospitals import (
    HospitalSpec,
    SitePolicy,
    demo_hospitals,
    make_hospitals,
    population,
    two_owner_hospitals,
)
from simulations.phantoms import demo_schema, to_batch

SEED, SHARE = 5, 0.06
IMAGE_SLOTS = ("mri", "pet", "cxr")


@pytest.fixture(scope="module")
def schema() -> Schema:
    return demo_schema()


@pytest.fixture(scope="module")
def sites(schema: Schema, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return make_hospitals(tmp_path_factory.mktemp("sites"), demo_hospitals(), schema, SEED, share=SHARE)


def read(site: Path, schema: Schema, tmp_path: Path) -> Everyone:
    config = SiteConfig.load(site)
    with Ledger.open(tmp_path / f"{config.site.name}.sqlite", config.site.name) as ledger:
        return read_everyone(config.data, site, schema, config.site.slots, ledger.local("check"))


def owners(specs: tuple[HospitalSpec, ...]) -> Counter[str]:
    return Counter(slot for spec in specs for slot in spec.slots)


def test_the_demo_has_five_hospitals_with_three_owners_or_more_of_every_image() -> None:
    specs = demo_hospitals()
    assert len(specs) == 5
    assert all(owners(specs)[slot] >= 3 for slot in IMAGE_SLOTS)
    assert sum("pet" not in spec.slots for spec in specs) >= 2
    assert any(not {"mri", "pet"} & set(spec.slots) and "cxr" in spec.slots for spec in specs)
    assert {spec.film_format for spec in specs} == {"dicom", "png"}
    assert {spec.table_format for spec in specs} == {"csv", "parquet"}
    assert len({spec.profile for spec in specs}) == 5


def test_the_small_scenario_has_a_group_with_two_owners() -> None:
    count = owners(two_owner_hospitals())
    assert count["pet"] == 2
    assert count["mri"] == 3


@pytest.mark.parametrize("k", range(5))
def test_what_is_read_is_what_was_drawn(k: int, sites: tuple[Path, ...], schema: Schema, tmp_path: Path) -> None:
    spec = demo_hospitals()[k].scaled(SHARE)
    found = read(sites[k], schema, tmp_path)
    assert found.problems == ()
    expected = to_batch(schema, population(spec, SEED))
    assert found.batch.ids == expected.ids
    rounding = {"mri": 0.0011, "pet": 0.00026, "cxr": 0.00026 if spec.film_format == "dicom" else 0.004}
    for place, (slot, instance) in enumerate(schema.instances()):
        here = found.batch.present_BVI[:, :, place]
        if slot.name not in spec.slots:
            assert not bool(here.any())
            continue
        assert torch.equal(here, expected.present_BVI[:, :, place])
        assert torch.equal(found.batch.factor_BVIF[:, :, place], expected.factor_BVIF[:, :, place])
        assert torch.equal(found.batch.gap_hours_BVI[:, :, place], expected.gap_hours_BVI[:, :, place])
        torch.testing.assert_close(
            found.batch.values[slot.key(instance)],
            expected.values[slot.key(instance)],
            rtol=0.0,
            atol=rounding.get(slot.name, 1e-6),
            equal_nan=True,
        )


def test_site_toml_says_what_the_spec_says(sites: tuple[Path, ...]) -> None:
    for site, spec in zip(sites, demo_hospitals(), strict=True):
        config, small = SiteConfig.load(site), spec.scaled(SHARE)
        assert config.site.name == site.name == spec.name
        assert config.site.slots == spec.slots
        assert config.site.declared_capacity == small.declared_capacity
        assert config.site.declared_held_out == small.declared_held_out
        assert config.policy.min_contributors == 3
        assert not config.policy.deterministic_noise


def test_policy_reaches_site_toml(schema: Schema, tmp_path: Path) -> None:
    policy = SitePolicy(
        plan_epsilon=float("inf"), lifetime_epsilon=float("inf"), min_contributors=1, deterministic_noise=True
    )
    (site, *_) = make_hospitals(tmp_path, demo_hospitals()[4:], schema, 1, share=0.03, policy=policy)
    config = SiteConfig.load(site)
    assert config.ceiling.plan_epsilon == float("inf")
    assert config.policy.min_contributors == 1
    assert config.policy.deterministic_noise


def digests(site: Path) -> dict[str, str]:
    return {
        path.relative_to(site).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(site.rglob("*"))
        if path.is_file()
    }


def test_the_seed_fixes_every_byte_whoever_else_takes_part(
    sites: tuple[Path, ...], schema: Schema, tmp_path: Path
) -> None:
    specs = demo_hospitals()
    for k in (2, 4):
        (again,) = make_hospitals(tmp_path / str(k), specs[k : k + 1], schema, SEED, share=SHARE)
        assert digests(again) == {n: d for n, d in digests(sites[k]).items() if not n.startswith("ledger")}
    (other,) = make_hospitals(tmp_path / "other", specs[4:], schema, SEED + 1, share=SHARE)
    assert digests(other)["data/ehr.csv"] != digests(sites[4])["data/ehr.csv"]


def test_a_site_writes_its_own_slots_only(sites: tuple[Path, ...]) -> None:
    for site, spec in zip(sites, demo_hospitals(), strict=True):
        for slot, pattern in (("mri", "*/anat/*.nii.gz"), ("pet", "*/pet/*.nii.gz"), ("cxr", "*/xray/*")):
            assert bool(list((site / "data").glob(pattern))) == (slot in spec.slots)
        assert (site / "data" / "notes.csv").exists() == ("note" in spec.slots)
        assert bool(list((site / "data").glob("vitals.*"))) == ("vitals" in spec.slots)
        assert (site / "data" / "dataset_description.json").is_file()
        volumes = list((site / "data").rglob("*.nii.gz"))
        assert all(v.with_name(v.name.removesuffix(".nii.gz") + ".json").is_file() for v in volumes)


def test_films_are_digital_x_rays(sites: tuple[Path, ...]) -> None:
    film = next(iter(sorted((sites[0] / "data").glob("*/xray/prior.dcm"))))
    prior, current = (pydicom.dcmread(film.with_name(f"{role}.dcm")) for role in ("prior", "current"))
    assert current.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1.1"
    assert (current.Modality, current.PhotometricInterpretation, current.BitsStored) == ("DX", "MONOCHROME2", 12)
    assert current.pixel_array.max() > 2500
    assert current.SOPInstanceUID != prior.SOPInstanceUID
    assert current.AcquisitionDateTime > prior.AcquisitionDateTime
    assert str(current.PatientName) == film.parent.parent.name


def test_one_hospital_keeps_its_own_names_and_codes(sites: tuple[Path, ...]) -> None:
    table = pd.read_csv(sites[4] / "data" / "ehr.csv", dtype=str)
    assert {"sbp", "nt_bnp", "ward_code"} <= set(table.columns)
    assert set(table["sex"]) == {"0", "1"}
    assert (pd.to_numeric(table["crp_mg_l"]) == -1).any()


FAULT_RULES: dict[Fault, str] = {
    "truncated-nifti": "read to its end",
    "nan-volume": "finite",
    "four-dimensional": "3 axes",
    "wrong-modality": "MR",
    "out-of-range": "from 18 to 100",
    "unknown-column": "known to the study",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_planted_faults_are_found_and_cost_one_patient_at_most(kind: Fault, schema: Schema, tmp_path: Path) -> None:
    (site,) = make_hospitals(tmp_path, demo_hospitals()[:1], schema, 3, share=0.03)
    before = read(site, schema, tmp_path)
    touched = plant_bad_input(site, kind)
    assert touched.is_relative_to(site / "data")
    if kind == "no-patients":
        with pytest.raises(NoPatients):
            read(site, schema, tmp_path)
        return
    after = read(site, schema, tmp_path)
    assert before.problems == ()
    assert len(after.problems) == 1
    assert FAULT_RULES[kind] in after.problems[0].rule
    lost = int(before.batch.visit_BV.sum() - after.batch.visit_BV.sum())
    assert lost == (0 if kind == "unknown-column" else 1)


def test_faults_need_a_fitting_file(schema: Schema, tmp_path: Path) -> None:
    (site,) = make_hospitals(tmp_path, demo_hospitals()[4:], schema, 3, share=0.03)
    with pytest.raises(ValueError, match="no volume"):
        plant_bad_input(site, "nan-volume")


def test_nothing_is_overwritten(sites: tuple[Path, ...], schema: Schema) -> None:
    with pytest.raises(ValueError, match="exists already"):
        make_hospitals(sites[0].parent, demo_hospitals()[:1], schema, SEED, share=SHARE)


def test_twins_are_refused(schema: Schema, tmp_path: Path) -> None:
    spec = demo_hospitals()[0]
    with pytest.raises(ValueError, match="names repeat"):
        make_hospitals(tmp_path, [spec, spec], schema, 1)
    with pytest.raises(ValueError, match="share"):
        spec.scaled(0.0)


def test_populations_differ(schema: Schema) -> None:
    people = {spec.name: population(spec.scaled(0.2), SEED) for spec in demo_hospitals()}
    age = {name: p.table["age_years"].mean() for name, p in people.items()}
    assert max(age.values()) - min(age.values()) > 12
    assert age["dune-neurology"] == min(age.values())
    ids = [name for p in people.values() for name in p.ids]
    assert len(set(ids)) == len(ids)
    dementia = {name: float(np.mean(p.table["pathology"] == "dementia")) for name, p in people.items()}
    assert dementia["birch-memory"] > dementia["dune-neurology"] + 0.25
