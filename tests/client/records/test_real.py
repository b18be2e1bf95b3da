"""The real sets that lie beside the project, read in place; and generated hospitals, read back."""

import gzip
import os
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from client.records.check import check
from client.records.config import DataConfig
from client.records.load import load, read_everyone
from medgen_models.schema import unscale
from simulations.hospitals import demo_hospitals, make_hospitals, population
from simulations.phantoms import demo_schema, to_batch
from simulations.real_schemas import icu_schema, icu_sites, petmr_schema, petmr_sites

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
PETMR, ICU = DATA / "petmr_sts_bids", DATA / "ehr_physionet2012_set_a"
needs_petmr = pytest.mark.skipif(not PETMR.is_dir(), reason="needs ../shared/data/petmr_sts_bids")
needs_icu = pytest.mark.skipif(not ICU.is_dir(), reason="needs ../shared/data/ehr_physionet2012_set_a")
needs_films = pytest.mark.skipif(not (DATA / "cxr_covid_ccby").is_dir(), reason="needs ../shared/data/cxr_covid_ccby")
needs_dicom = pytest.mark.skipif(not (DATA / "dicom_petmr_sts").is_dir(), reason="needs ../shared/data/dicom_petmr_sts")
needs_odd = pytest.mark.skipif(not (DATA / "bids_skeleton").is_dir(), reason="needs ../shared/data/bids_skeleton")
realdata = pytest.mark.realdata


@realdata
@needs_petmr
def test_petmr_sites(tmp_path: Path, token: Any, split_key: bytes) -> None:
    sizes = {}
    for name, toml in petmr_sites(PETMR).items():
        config, held_out = DataConfig.model_validate(toml["data"]), toml["site"]["declared_held_out"]
        records = load(config, tmp_path, petmr_schema(), toml["site"]["slots"], token, split_key, held_out)
        sizes[name] = (len(records.members), len(records.held_out))
        assert not [p for p in records.problems if p.patient]
        assert bool(records.members.present_BVI.all())
        for key in ("mri", "pet"):
            image = records.members.values[key]
            assert -1.0 <= float(image.min()) < float(image.max()) <= 1.0
        # The data were cropped around the tumour: the middle holds more tracer than the whole.
        pet = records.members.values["pet"][:, 0]
        assert float(pet[:, 11:21, 11:21, 11:21].mean()) > float(pet.mean()) + 0.05
    assert sizes == {"ge": (10, 3), "philips": (4, 1), "siemens": (3, 0)}


@realdata
@needs_petmr
def test_a_resampled_volume_keeps_its_uptake(tmp_path: Path, token: Any) -> None:
    """The total uptake inside the grid agrees with the file's own voxels inside the same box."""
    config = DataConfig.model_validate(petmr_sites(PETMR)["siemens"]["data"])
    batch = read_everyone(config, tmp_path, petmr_schema(), ["pet"], token).batch
    for row, name in enumerate(batch.ids):
        image: Any = nib.load(PETMR / name / "pet" / f"{name}_trc-FDG_pet.nii.gz")
        sizes = np.sqrt((image.affine[:3, :3] ** 2).sum(axis=0))
        inside = [np.abs(np.arange(n) - (n - 1) / 2) * mm <= 80.0 for n, mm in zip(image.shape, sizes, strict=True)]
        native = np.clip(image.get_fdata(dtype=np.float32), 0, 20)[np.ix_(*inside)].sum() * sizes.prod() / 1000
        ours = float(unscale(batch.values["pet"][row, 0], 0.0, 20.0).sum()) * 0.125
        assert ours == pytest.approx(native, rel=0.06)


@realdata
@needs_icu
def test_icu_sites(tmp_path: Path, token: Any, split_key: bytes) -> None:
    schema, total = icu_schema(), 0
    for toml in icu_sites(ICU).values():
        config, slots = DataConfig.model_validate(toml["data"]), toml["site"]["slots"]
        start = time.perf_counter()
        records = load(config, tmp_path, schema, slots, token, split_key, toml["site"]["declared_held_out"])
        assert time.perf_counter() - start < 10.0  # about half a second on an idle core
        assert len(records.held_out) == 200
        assert {p.field for p in records.problems} == {"Height"}  # 16 heights such as 1.8 or 431.8 cm
        total += len(records.members) + len(records.held_out)
        died = records.members.values["ehr"][:, 0, 5]
        assert 0.03 < float(died.nanmean()) < 0.25
    assert total == 4000


@realdata
@needs_icu
def test_icu_values_agree_with_a_plain_reading(tmp_path: Path, token: Any) -> None:
    toml = icu_sites(ICU)["coronary"]
    batch = read_everyone(
        DataConfig.model_validate(toml["data"]), tmp_path, icu_schema(), ["ehr", "vitals"], token
    ).batch
    statics = pd.read_csv(ICU / "static_outcomes.csv").set_index("RecordID")
    long = pd.read_csv(ICU / "timeseries_long.csv.gz")
    slot = icu_schema().slot("vitals")
    rng = np.random.default_rng(0)
    for row in rng.choice(len(batch), 12, replace=False):
        if not bool(batch.visit_BV[row, 0]):
            continue
        record = int(batch.ids[row])
        assert float(unscale(batch.values["ehr"][row, 0, 0], 10, 110)) == pytest.approx(statics.Age[record], abs=1e-4)
        assert float(batch.values["ehr"][row, 0, 5]) == statics["In-hospital_death"][record]
        mine = long[long.RecordID == record]
        for c, (names, column) in enumerate(zip(({"HR"}, {"SysABP", "NISysABP"}), slot.columns, strict=False)):
            for t in range(12):
                cell = mine[mine.param.isin(names) & (mine.minute >= 240 * t) & (mine.minute < 240 * (t + 1))]
                values = cell.value[(cell.value >= column.low) & (cell.value <= column.high)]
                found = float(unscale(batch.values["vitals"][row, 0, t, c], column.low, column.high))
                if t < 11:
                    assert found == pytest.approx(float(values.mean()), nan_ok=True, abs=1e-3)


@realdata
@needs_films
def test_real_films(tmp_path: Path, site: Any, schema: Any) -> None:
    """Web-harvested films of many sizes; the offset in days gives the gap."""
    table = pd.read_csv(DATA / "cxr_covid_ccby" / "metadata.csv").sort_values(["patientid", "offset"])
    table = table[table.groupby("patientid").offset.transform("count") >= 2].groupby("patientid").head(2)
    rows, ids = [], []
    for patient, pair in table.groupby("patientid"):
        ids.append(str(patient))
        gap = float(pair.offset.iloc[1] - pair.offset.iloc[0]) * 24
        (site.data / f"sub-{patient}" / "xray").mkdir(parents=True)
        for role, image in zip(("prior", "current"), pair.image, strict=True):
            os.symlink(
                DATA / "cxr_covid_ccby" / "images" / image, site.data / f"sub-{patient}" / "xray" / f"{role}.png"
            )
            rows.append(
                {
                    "participant_id": patient,
                    "file": f"{role}.png",
                    "role": role,
                    "hours_before": gap if role == "prior" else 0,
                }
            )
    site.participants(*ids)
    site.table("xrays.csv", rows)
    members = site.load("cxr").members
    assert len(members) == len(ids) >= 10
    assert bool(members.present_BVI[:, 0, 4:6].all())
    assert float(members.gap_hours_BVI[:, 0, 5].min()) >= 0.0
    assert float(members.values["cxr.current"].std()) > 0.2


@realdata
@needs_dicom
def test_a_real_mr_slice_is_no_film(site: Any) -> None:
    slices = sorted((DATA / "dicom_petmr_sts").rglob("*.dcm"))
    site.participants("1", "2")
    for patient, path in zip("12", (slices[0], slices[-1]), strict=True):
        (site.data / f"sub-{patient}" / "xray").mkdir(parents=True)
        os.symlink(path, site.data / f"sub-{patient}" / "xray" / "current.dcm")
    report = check(DataConfig(), site.folder, demo_schema(), ["cxr"], site.token)
    assert not report.usable
    assert {p.field for p in report.problems if p.patient} == {"Modality"}


@realdata
@needs_odd
@pytest.mark.parametrize("name", ["ds003", "ds011", "pet001", "pet004", "pet005"])
def test_skeletons_without_image_data_are_named_not_crashed_on(tmp_path: Path, token: Any, name: str) -> None:
    root = DATA / "bids_skeleton" / name
    report = check(DataConfig(root=str(root)), tmp_path, demo_schema(), ["mri", "pet"], token)
    assert not report.usable
    assert report.problems


def test_generated_hospitals_are_read_back(tmp_path: Path, token: Any) -> None:
    """What is on disk equals what was drawn, up to the rounding of the file formats."""
    schema = demo_schema()
    made = make_hospitals(tmp_path / "hospitals", demo_hospitals(), schema, seed=7, share=0.04)
    rounding = {"mri": 2e-3, "pet": 2e-3, "cxr": 5e-3, "ehr": 1e-6, "vitals": 1e-6, "note": 1e-5}
    for spec, folder in zip(sorted(demo_hospitals(), key=lambda s: s.name), made, strict=True):
        toml = tomllib.loads((folder / "site.toml").read_text())
        everyone = read_everyone(DataConfig.model_validate(toml["data"]), folder, schema, toml["site"]["slots"], token)
        truth, batch = to_batch(schema, population(spec.scaled(0.04), 7)), everyone.batch
        assert everyone.problems == ()
        assert batch.ids == truth.ids
        for i, (slot, instance) in enumerate(schema.instances()):
            if slot.name not in toml["site"]["slots"]:
                assert not bool(batch.present_BVI[:, :, i].any())
                continue
            assert torch.equal(batch.present_BVI[:, :, i], truth.present_BVI[:, :, i])
            assert torch.equal(batch.factor_BVIF[:, :, i], truth.factor_BVIF[:, :, i])
            assert torch.allclose(batch.gap_hours_BVI[:, :, i], truth.gap_hours_BVI[:, :, i], atol=1e-3)
            ours, wanted = batch.values[slot.key(instance)], truth.values[slot.key(instance)]
            assert torch.allclose(ours, wanted, atol=rounding[slot.name], equal_nan=True), slot.key(instance)


def test_two_hundred_patients_in_seconds(site: Any, schema: Any) -> None:
    """Six files a patient; the bar is ten seconds, an idle core takes under two."""
    site.participants(*map(str, range(200)))
    body = gzip.decompress(site.volume("0", "T1w").read_bytes())
    packed = gzip.compress(body, 1)
    for patient in range(200):
        for folder, name in (("anat", "T1w"), ("anat", "T2w"), ("pet", "trc-FDG_pet"), ("pet", "trc-AV45_pet")):
            path = site.data / f"sub-{patient}" / folder / f"sub-{patient}_{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(packed)
        site.png(str(patient), "current", np.arange(64, dtype=np.uint8).reshape(8, 8))
    (site.data / "pet.json").write_text('{"Units": "g/ml"}')
    counted: Counter[str] = Counter()
    start = time.perf_counter()
    records = site.load("mri", "pet", "cxr")
    assert time.perf_counter() - start < 10.0
    for key in ("mri.b", "pet.av45", "cxr.current"):
        counted[key] = int(records.members.present_BVI[:, 0, schema.keys().index(key)].sum())
    assert set(counted.values()) == {200}
