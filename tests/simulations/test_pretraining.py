"""`medgen pretrain`: a public model and a card from phantoms or a folder, and the same model after an interruption."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from medgen import app
from medgen_models.batches import batch_from_bytes
from medgen_models.public_model import CARD_FILE, PublicModel
from medgen_models.schema import PatientBatch, Schema
from server.preparation import PUBLIC_FILE, REFERENCE_FILE
from server.release.cohort_files import synthetic_ids, write_cohort
from simulations import phantoms
from simulations.pretraining import README, STATE, Request, on_grid, read_public, run_pretraining, schema_of, train

TINY = Request("phantoms", "demo", None, 0.0, Path(), patients=24, steps=3, batch=4, codec_steps=2)


@pytest.fixture(scope="module")
def tables_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A schema of table and series alone, whose pre-training takes a second."""
    demo = phantoms.demo_schema()
    small = demo.model_copy(
        update={"slots": tuple(s for s in demo.slots if s.kind in ("table", "series")), "name": "rows"}
    )
    file = tmp_path_factory.mktemp("schema") / "rows.json"
    file.write_text(small.model_dump_json())
    return file


@pytest.fixture(scope="module")
def folder(tables_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty patients in the layout of a hospital, one of whom has no record."""
    schema = Schema.model_validate_json(tables_only.read_bytes())
    batch = phantoms.to_batch(schema, phantoms.make_patients(20, 3))
    batch = dataclasses.replace(batch, ids=synthetic_ids(20))
    batch.present_BVI[0] = False
    place = tmp_path_factory.mktemp("public") / "records"
    write_cohort(batch, schema, place)
    return place


def asked(tables_only: Path, folder: Path, out: Path, **changes: object) -> Request:
    base = dataclasses.replace(TINY, data=str(folder), schema=str(tables_only), out=out, source="a test", licence="CC0")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_a_folder_of_records_is_read_and_the_card_says_what_was_seen(
    tables_only: Path, folder: Path, tmp_path: Path
) -> None:
    request = asked(tables_only, folder, tmp_path / "model")
    assert run_pretraining(request) == 0
    model = PublicModel.load(tmp_path / "model")
    card = model.card
    assert card["patients"] == 19
    assert card["source"] == "a test"
    assert card["licence"] == "CC0"
    assert card["standing"] == "public by assertion"
    assert card["not_used"]["patients without a usable record"] == 1
    assert card["instances"]["ehr"] <= 19
    assert len(card["digest"]) == 64
    assert len(card["losses"]) == 3
    assert set(card["versions"]) >= {"medgen", "torch"}
    text = (tmp_path / "model" / README).read_text()
    for words in ("a test", "CC0", "nobody checked", card["digest"], "19 patients", "Public-only terms: none"):
        assert words in text
    assert not (tmp_path / "model" / STATE).exists()
    assert run_pretraining(request) == 1  # a model is never written over


def test_patients_set_aside_are_never_trained_on_and_lie_beside_the_model(
    tables_only: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_pretraining(asked(tables_only, folder, tmp_path / "model", reference=8)) == 0
    schema = Schema.model_validate_json(tables_only.read_bytes())
    trained, aside = (
        batch_from_bytes((tmp_path / "model" / name).read_bytes(), schema) for name in (PUBLIC_FILE, REFERENCE_FILE)
    )
    assert (len(trained), len(aside)) == (11, 8)
    assert set(trained.ids).isdisjoint(aside.ids)
    assert PublicModel.load(tmp_path / "model").card["patients"] == 11
    assert run_pretraining(asked(tables_only, folder, tmp_path / "other", reference=12)) == 1
    assert "at least 8 must remain" in capsys.readouterr().out.replace("\n", " ")


def test_an_overlap_check_changes_what_the_card_calls_it(tables_only: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "check.txt").write_text("0 of 19 patients are in the study")
    request = asked(tables_only, folder, tmp_path / "model", overlap=tmp_path / "check.txt")
    facts = read_public(request, schema_of(request)).facts
    assert facts["standing"] == "checked"
    assert len(facts["overlap_check_sha256"]) == 64


class Interrupted(Exception):
    pass


def test_an_interrupted_command_that_goes_on_ends_in_the_same_bytes(
    tables_only: Path, folder: Path, tmp_path: Path
) -> None:
    whole = asked(tables_only, folder, tmp_path / "whole", steps=60)
    schema = schema_of(whole)
    public = read_public(whole, schema)
    digest = train(whole, schema, public).digest()
    broken = dataclasses.replace(whole, out=tmp_path / "broken")

    def stop(step: int, _loss: float) -> None:
        if step == 55:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(broken, schema, public, stop)
    assert (broken.out / STATE).is_dir()
    assert not (broken.out / CARD_FILE).exists()
    assert run_pretraining(broken) == 1  # neither silently afresh
    assert run_pretraining(dataclasses.replace(broken, resume=True, seed=1)) == 1  # nor with other settings
    later: list[int] = []
    again = train(broken, schema, public, lambda step, _loss: later.append(step))
    assert later == list(range(51, 61))
    assert again.digest() == digest


def test_images_are_interpolated_over_the_same_field_of_view() -> None:
    """A constant stays one, a linear ramp stays a ramp at the new voxels' centres."""
    native, wanted = phantoms.demo_schema(), schema_of(dataclasses.replace(TINY, preset="small"))
    batch = PatientBatch.empty(native, 1)
    ramp = (torch.arange(32) + 0.5) / 32 * 2 - 1
    batch.values["mri.a"][0, 0] = ramp[:, None, None]
    batch.values["cxr.current"][0, 0] = 0.25
    moved = on_grid(batch, wanted)
    assert moved.values["mri.a"].shape == (1, 1, 64, 64, 64)
    expected = (torch.arange(64) + 0.5) / 64 * 2 - 1
    torch.testing.assert_close(moved.values["mri.a"][0, 0, 1:-1, 5, 7], expected[1:-1])
    assert bool((moved.values["cxr.current"] == 0.25).all())
    assert moved.values["cxr.current"].shape[2:] == (128, 128)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema": "moon"}, "known are demo"),
        ({"data": "/nowhere"}, "no site.toml"),
        ({"source": ""}, "--source"),
        ({"data": "phantoms"}, "do not fill"),
        ({"dial": 3.0}, "dial"),
    ],
    ids=["schema", "folder", "source", "phantoms", "dial"],
)
def test_what_cannot_be_trained_on_is_refused_by_name(
    tables_only: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    match: str,
) -> None:
    assert run_pretraining(asked(tables_only, folder, tmp_path / "model", **changes)) == 1
    printed = capsys.readouterr().out
    assert "refused" in printed
    assert match in printed


def test_a_site_file_says_where_the_records_lie(tables_only: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "place" / "elsewhere")
    (tmp_path / "place" / "site.toml").write_text('[site]\nslots = ["ehr"]\n[data]\nroot = "elsewhere"\n')
    request = asked(tables_only, tmp_path / "place", tmp_path / "model")
    facts = read_public(request, schema_of(request)).facts
    assert facts["instances"]["ehr"] > 0
    assert facts["instances"]["vitals"] == 0
    (tmp_path / "place" / "site.toml").write_text('[data]\nrout = "elsewhere"\n')
    with pytest.raises(ValueError, match="rout"):
        read_public(request, schema_of(request))


def test_pretrain_then_sample_by_command_alone(tmp_path: Path) -> None:
    """Phantoms to a model, the model to files: what a newcomer types first."""
    arguments = ["--patients", "24", "--steps", "2", "--batch", "4", "--out", str(tmp_path / "model")]
    made = CliRunner().invoke(app, ["pretrain", *arguments])
    assert made.exit_code == 0, made.output
    card = json.loads((tmp_path / "model" / CARD_FILE).read_text())["card"]
    assert card["standing"] == "generated"
    assert card["biomarkers"] == []  # 24 phantoms are too few for a read-out
    drawn = CliRunner().invoke(
        app,
        ["sample", str(tmp_path / "model"), "--rows", "2", "--steps", "1", "--out", str(tmp_path / "cohort")],
    )
    assert drawn.exit_code == 0, drawn.output
    assert len(list((tmp_path / "cohort").glob("sub-SYN*/anat/*.nii.gz"))) == 4
