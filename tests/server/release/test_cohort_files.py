"""What is written is what is read, within storage rounding, and every file says that it is synthetic."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from medgen_models.schema import PatientBatch, Schema
from server.release import marks
from server.release.cohort_files import storage_step, synthetic_ids, write_cohort
from server.release.cohort_read import read_cohort, read_schema


def assert_same(found: PatientBatch, wanted: PatientBatch, schema: Schema) -> None:
    assert found.ids == wanted.ids
    assert torch.equal(found.present_BVI, wanted.present_BVI)
    assert torch.equal(found.factor_BVIF, wanted.factor_BVIF)
    assert torch.equal(found.visit_BV, wanted.visit_BV)
    assert torch.allclose(found.gap_hours_BVI, wanted.gap_hours_BVI, atol=1 / 60)
    for slot, instance in schema.instances():
        if slot.kind == "text":
            continue
        a, b = found.values[slot.key(instance)], wanted.values[slot.key(instance)]
        assert torch.equal(torch.isnan(a), torch.isnan(b)), slot.name
        assert float((a - b).nan_to_num().abs().max()) <= storage_step(slot), slot.name


@pytest.fixture(scope="module")
def written(batch: PatientBatch, schema: Schema, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    write_cohort(batch, schema, folder)
    return folder


def test_round_trip(written: Path, batch: PatientBatch, schema: Schema) -> None:
    assert read_schema(written) == schema
    assert_same(read_cohort(written, schema), batch, schema)


def test_round_trip_with_visits(visits_batch: tuple[Schema, PatientBatch], tmp_path: Path) -> None:
    schema, batch = visits_batch
    write_cohort(batch, schema, tmp_path / "cohort")
    assert (tmp_path / "cohort" / "sub-SYN0001" / "ses-01").is_dir()
    assert_same(read_cohort(tmp_path / "cohort", schema), batch, schema)


def test_same_batch_gives_the_same_bytes(written: Path, batch: PatientBatch, schema: Schema, tmp_path: Path) -> None:
    write_cohort(batch, schema, tmp_path / "cohort")
    files = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "cohort") for p in (tmp_path / "cohort").rglob("*") if p.is_file())
    assert all((written / f).read_bytes() == (tmp_path / "cohort" / f).read_bytes() for f in files)


def test_every_file_is_marked(written: Path) -> None:
    files = [path for path in written.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".gz", ".png", ".csv", ".tsv", ".parquet", ".md"}
    assert all(marks.is_marked(path) for path in files if marks.needs_mark(path))


def test_volumes_are_plain_nifti_in_physical_units(written: Path, batch: PatientBatch, schema: Schema) -> None:
    slot = schema.slot("pet")
    row = int(torch.nonzero(batch.present_BVI[:, 0, schema.keys().index("pet.fdg")])[0, 0])
    path = written / batch.ids[row] / "pet" / f"{batch.ids[row]}_trc-FDG_pet.nii.gz"
    image = nib.load(path)  # type: ignore[attr-defined]
    assert image.header.get_zooms() == slot.voxel_mm
    wanted = (batch.values["pet.fdg"][row, 0].numpy() + 1) / 2 * slot.high
    assert np.abs(image.get_fdata() - wanted).max() < 1e-4
    assert np.allclose(image.affine @ [2.5, 2.5, 2.5, 1], [0, 0, 0, 1])  # the grid's centre is the origin
    assert image.header["descrip"].tobytes().startswith(b"synthetic")
    sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["Units"] == "g/ml"
    assert sidecar["TracerName"] == "FDG"
    assert sidecar["Modality"] == "PT"


def test_tables_hold_units_and_stay_inside_public_ranges(written: Path) -> None:
    text, binary = pd.read_csv(written / "ehr.csv"), pd.read_parquet(written / "ehr.parquet")
    assert list(text.columns) == ["participant_id", "age", "crp", "sex", "pathology", "died"]
    assert text["age"].dropna().between(18, 95).all()
    pd.testing.assert_series_equal(text["age"], binary["age"])
    assert set(text["sex"].dropna()) <= {"F", "M"}
    vitals = pd.read_csv(written / "vitals.csv")
    assert vitals["minute"].between(0, 48 * 60).all()
    assert set(vitals["channel"]) == {"heart_rate", "lactate"}


def test_two_instances_of_one_sequence_get_two_files(schema: Schema, tmp_path: Path) -> None:
    batch = PatientBatch.empty(schema, 1, synthetic_ids(1))
    for key in ("mri.a", "mri.b"):
        i = schema.keys().index(key)
        batch.values[key].copy_(torch.rand(batch.values[key].shape, generator=torch.Generator().manual_seed(i)))
        batch.present_BVI[0, 0, i] = True
        batch.factor_BVIF[0, 0, i, 0] = 1
    batch.visit_BV[0, 0] = True
    write_cohort(batch, schema, tmp_path / "cohort")
    names = sorted(p.name for p in (tmp_path / "cohort").rglob("*.nii.gz"))
    assert names == ["sub-SYN0001_acq-a_T1w.nii.gz", "sub-SYN0001_acq-b_T1w.nii.gz"]
    assert_same(read_cohort(tmp_path / "cohort", schema), batch, schema)


def test_only_synthetic_names_are_written(batch: PatientBatch, schema: Schema, tmp_path: Path) -> None:
    real = PatientBatch(**{**vars(batch), "ids": ("sub-0001", *batch.ids[1:])})
    with pytest.raises(ValueError, match="only synthetic"):
        write_cohort(real, schema, tmp_path / "cohort")
    assert list(tmp_path.iterdir()) == []


def test_a_cohort_is_written_once(batch: PatientBatch, schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "cohort").mkdir()
    with pytest.raises(FileExistsError):
        write_cohort(batch, schema, tmp_path / "cohort")


def test_values_beyond_the_range_are_clipped_into_it(batch: PatientBatch, schema: Schema, tmp_path: Path) -> None:
    values = {key: value.clone() for key, value in batch.values.items()}
    values["ehr"][:, :, 0] = 1.2
    values["mri.a"] *= 3
    write_cohort(PatientBatch(**{**vars(batch), "values": values}), schema, tmp_path / "cohort")
    assert (pd.read_csv(tmp_path / "cohort" / "ehr.csv")["age"] == 95).all()
    assert float(read_cohort(tmp_path / "cohort", schema).values["mri.a"].abs().max()) <= 1.0


@pytest.mark.parametrize(
    ("file", "message"),
    [("participants.tsv", "participants"), ("ehr.parquet", "ehr.parquet"), ("image", "cannot be read as an image")],
)
def test_a_torn_cohort_is_named(file: str, message: str, batch: PatientBatch, schema: Schema, tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    write_cohort(batch, schema, folder)
    path = next(iter(sorted(folder.rglob("*.nii.gz")))) if file == "image" else folder / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=message):
        read_cohort(folder, schema)
