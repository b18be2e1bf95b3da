"""Patients from a finished model, through medgen's command and through MONAI's own loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from medgen import app
from medgen_models.assembly import StudyModel
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.export import save_release_model
from medgen_models.flow import FlowConfig
from medgen_models.public_model import PublicModel
from medgen_models.schema import PatientBatch, Schema
from server.release import bundle
from server.release.cohort_read import read_cohort
from server.release.sampling import Request, announced, inference_config, load_generator, read_rows, sample_to


@pytest.fixture(scope="module")
def public_model(schema: Schema, batch: PatientBatch) -> PublicModel:
    bank = CodecBank.fit_public(schema, PatientBatch.concat([batch] * 6), seed=0)
    core = TokenCore(bank.layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(2)
    for parameter in core.parameters():  # a fresh core answers zero whatever it sees
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
    gaps = {"cxr.prior": tuple(float(h) for h in np.linspace(10, 40, 33))}
    return PublicModel(bank, core.requires_grad_(False), FlowConfig(), {}, 1.0, (0.0,) * 33, gaps, {"patients": 6})


@pytest.fixture(scope="module")
def released(public_model: PublicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "model"
    study = StudyModel(public_model, public_model.bank, public_model.core, "all")
    save_release_model(study, folder, "ab" * 32, False, inference=inference_config())
    return folder


def test_a_public_a_released_and_a_bundled_model_draw_the_same(
    public_model: PublicModel, released: Path, tmp_path: Path
) -> None:
    public_model.save(tmp_path / "public")
    request = Request(patients=3, steps=2, seed=5)
    cohorts = []
    for number, folder in enumerate((tmp_path / "public", released, released.parent)):
        cohorts.append(sample_to(load_generator(folder), request, tmp_path / f"out-{number}"))
    for other in cohorts[1:]:
        for key, value in cohorts[0].values.items():
            torch.testing.assert_close(other.values[key], value, equal_nan=True, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no model in"):
        load_generator(tmp_path)


def test_what_is_drawn_says_that_it_is_synthetic_and_is_read_back(
    public_model: PublicModel, schema: Schema, tmp_path: Path
) -> None:
    drawn = sample_to(public_model, Request(patients=3, steps=2), tmp_path / "out")
    assert bundle.unmarked_cohort(tmp_path / "out") == ()
    again = read_cohort(tmp_path / "out", schema)
    assert again.ids == ("sub-SYN0001", "sub-SYN0002", "sub-SYN0003")
    assert torch.equal(again.present_BVI, drawn.present_BVI)
    text = torch.tensor([slot.kind == "text" for slot, _ in schema.instances()])
    image = torch.tensor([slot.kind in ("volume", "image") for slot, _ in schema.instances()])
    assert bool(drawn.present_BVI[:, 0, image].all())
    assert not bool(drawn.present_BVI[..., text].any())
    with pytest.raises(FileExistsError, match="name a new folder"):
        sample_to(public_model, Request(patients=3, steps=2), tmp_path / "out")


def test_rows_of_a_file_are_kept(public_model: PublicModel, schema: Schema, tmp_path: Path) -> None:
    table = schema.table()
    assert table is not None
    cells = {
        c.name: [c.categories[1], ""] if c.kind == "categorical" else [str(0.5 * (c.low + c.high)), str(c.high)]
        for c in table.columns
    }
    pd.DataFrame(cells).to_csv(tmp_path / "rows.csv", index=False)
    rows = read_rows(schema, tmp_path / "rows.csv")
    drawn = sample_to(public_model, Request(task="row", steps=2), tmp_path / "out", rows)
    frame = pd.read_csv(tmp_path / "out" / f"{table.name}.csv")
    assert len(drawn) == len(frame) == 2
    for c in table.columns:
        if c.kind == "categorical":
            assert frame[c.name].astype(str)[0] == c.categories[1]
            assert pd.isna(frame[c.name][1])
        else:
            assert frame[c.name].tolist() == pytest.approx(
                [0.5 * (c.low + c.high), c.high], abs=1e-3 * (c.high - c.low)
            )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("planet\nx\n", "unknown columns"),
        ("{number}\n1e9\n", "outside"),
        ("{number}\nmany\n", "no number"),
        ("{label}\nnobody\n", "none of"),
        ("{number}\n", "0 rows"),
        ("", "no readable CSV"),
    ],
    ids=["column", "range", "number", "category", "empty", "nothing"],
)
def test_a_bad_row_file_names_line_and_rule(schema: Schema, tmp_path: Path, text: str, match: str) -> None:
    columns = schema.table_columns()
    number = next(c.name for c in columns if c.kind == "numeric")
    label = next(c.name for c in columns if c.kind == "categorical")
    (tmp_path / "rows.csv").write_text(text.format(number=number, label=label))
    with pytest.raises(ValueError, match=match):
        read_rows(schema, tmp_path / "rows.csv")


def test_conditional_draws_the_named_instances_in_the_named_levels(
    public_model: PublicModel, schema: Schema, tmp_path: Path
) -> None:
    i = next(i for i, (slot, _) in enumerate(schema.instances()) if slot.kind == "volume" and slot.factors)
    slot, instance = schema.instances()[i]
    factor = next(f for f in slot.factors if f.name not in instance.fixed)
    f = [one.name for one in schema.factors()].index(factor.name)
    request = Request("conditional", 3, (schema.keys()[i],), {factor.name: factor.levels[-1]}, steps=2)
    drawn = sample_to(public_model, request, tmp_path / "out")
    assert {place for _, _, place in drawn.present_BVI.nonzero().tolist()} == {i}
    assert drawn.factor_BVIF[:, 0, i, f].tolist() == [len(factor.levels)] * 3
    assert float(drawn.values[schema.keys()[i]][:, 0].flatten(1).std(dim=1).min()) > 0


def test_free_factors_do_not_repeat_within_a_slot(schema: Schema) -> None:
    out = announced(schema, Request(patients=20))
    for slot in schema.slots:
        for factor in slot.factors:
            free = [i for i in slot.instances if factor.name not in i.fixed]
            if factor.column or not 1 < len(free) <= len(factor.levels):
                continue
            f = schema.factors().index(factor)
            places = [schema.keys().index(slot.key(i)) for i in free]
            levels = out.factor_BVIF[:, 0, places, f]
            assert all(len(set(row)) == len(row) for row in levels.tolist())
            assert int(levels.min()) >= 1


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request(patients=0), "1 patient or more"),
        (Request("conditional", 2), "keys go with"),
        (Request("joint", 2, ("mri.a",)), "keys"),
        (Request("conditional", 2, ("moon",)), "unknown instances"),
        (Request("row", 2), "needs a file"),
        (Request("joint", 2, (), {"moon": "full"}), "unknown moon"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_met_is_refused(schema: Schema, request_: Request, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        announced(schema, request_)


def test_the_command_draws_and_refuses(released: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(released), "--rows", "2", "--out", str(tmp_path / "out"), "--steps", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "never existed" in result.output
    assert (tmp_path / "out" / "dataset_description.json").is_file()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "refused" in again.output
    assert CliRunner().invoke(app, [*arguments, "--factor", "nothing"]).exit_code == 2


_RUN = """
import sys
from pathlib import Path
from monai.bundle import load, run, verify_net_in_out
root, out = sys.argv[1], sys.argv[2]
configs = {"config_file": root + "/configs/inference.json", "meta_file": root + "/configs/metadata.json"}
run(bundle_root=root, output_dir=out, patients=2, steps=1, **configs)
verify_net_in_out(net_id="network", bundle_root=root, device="cpu", **configs)
network = load(Path(root).name, workflow_type="inference", bundle_dir=str(Path(root).parent), source="github", device="cpu")
print("loaded", type(network).__name__, float(network.core.trunk.register.detach().abs().sum()) > 0)
from monai.bundle import ConfigWorkflow
workflow = ConfigWorkflow(workflow_type="inference", bundle_root=root, **configs)
workflow.initialize()
print("missing", workflow.check_properties())
"""


def test_monai_runs_checks_and_loads_the_bundle_from_elsewhere(released: Path, schema: Schema, tmp_path: Path) -> None:
    """In a fresh process, in another folder, without a network: MONAI's parser is all that touches the model."""
    (tmp_path / "elsewhere").mkdir()
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", _RUN, str(released), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path / "elsewhere",
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loaded BundledNetwork True" in result.stdout
    assert "missing []" in result.stdout
    assert len(read_cohort(tmp_path / "out", schema)) == 2
    assert json.loads((tmp_path / "out" / "dataset_description.json").read_text())["Synthetic"] is True
