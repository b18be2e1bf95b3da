"""Patients from a finished model: what ``medgen sample`` and a bundle under MONAI's loader both do.

A public model, a released one and a bundle are read alike. What is drawn is written as a cohort (see
:mod:`server.release.cohort_files`): every file says that its patient never existed. No real patient conditions anything
here; tasks that need a patient's own images (impute, update) belong to that patient's site.

Shape legend: B patients · V visits · I instances · F factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from medgen_models.bundle_network import BundledNetwork
from medgen_models.export import METADATA, load_release_model
from medgen_models.public_model import CARD_FILE, PublicModel
from medgen_models.schema import Column, PatientBatch, Schema, scale
from server.release.cohort import Generator, SampleTask, sample_cohort
from server.release.cohort_files import write_cohort

MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        task: ``joint`` draws rows and images, ``row`` images and series given rows, ``conditional`` the instances ``keys``
            from factors alone.
        patients: how many, where no rows are given.
        keys: instances, for ``conditional``; what else is there in other tasks is everything that can be generated.
        factors: factor -> level, for all patients; factors that are neither given, fixed nor in the table are drawn evenly.
        steps, guidance, seed: of the sampler.
    """

    task: SampleTask = "joint"
    patients: int = 4
    keys: tuple[str, ...] = ()
    factors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    steps: int = 20
    guidance: float = 2.0
    seed: int = 0


def load_generator(folder: Path) -> Generator:
    """A public model's folder, a released model's, or a bundle's.

    Raises:
        ValueError: none of these, or one that is not whole.
    """
    if (folder / METADATA).is_file():
        return load_release_model(folder)
    if (folder / MODEL / METADATA).is_file():
        return load_release_model(folder / MODEL)
    if (folder / CARD_FILE).is_file():
        return PublicModel.load(folder)
    raise ValueError(f"no model in {folder}: expected {CARD_FILE}, {METADATA} or a bundle; name the folder of one")


def read_rows(schema: Schema, file: Path) -> PatientBatch:
    """Rows of a CSV file with the table's columns, as patients who have nothing but their row.

    Numbers are in the columns' own units, categories by name; an empty cell and a column that is not there are missing.

    Raises:
        ValueError: no table in the schema, no rows, an unknown column or category, or a number outside its public range.
    """
    table = schema.table()
    if table is None:
        raise ValueError("rows: this model has no table; give a number of patients")
    try:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"rows: {file} is no readable CSV ({error}); mend it") from error
    known = {column.name: column for column in table.columns}
    unknown = [name for name in frame.columns if name not in known and name != "participant_id"]
    if unknown or not len(frame):
        raise ValueError(
            f"rows: {file.name} has {len(frame)} rows and unknown columns {unknown}; the table has {', '.join(known)}"
        )
    batch = PatientBatch.empty(schema, len(frame))
    key = table.key(table.instances[0])
    for c, column in enumerate(table.columns):
        if column.name in frame.columns:
            cells = [_cell(column, text, number) for number, text in enumerate(frame[column.name], start=2)]
            batch.values[key][:, 0, c] = torch.tensor(cells)
    batch.present_BVI[:, 0, schema.keys().index(key)] = True
    batch.visit_BV[:, 0] = True
    return batch


def _cell(column: Column, text: str, line: int) -> float:
    """One cell in the scale of a batch."""
    text = column.aliases.get(text.strip(), text.strip())
    if not text:
        return float("nan")
    if column.kind == "categorical":
        if text not in column.categories:
            raise ValueError(f"rows: line {line}: {column.name}: {text!r} is none of {', '.join(column.categories)}")
        return float(column.categories.index(text))
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"rows: line {line}: {column.name}: {text!r} is no number; write one, or nothing") from None
    if not column.low <= number <= column.high:
        raise ValueError(
            f"rows: line {line}: {column.name}: {text} is outside {column.low} to {column.high} {column.unit}".rstrip()
        )
    return float(scale(number, column.low, column.high))


def announced(schema: Schema, request: Request, rows: PatientBatch | None = None) -> PatientBatch:
    """Patients as the sampler takes them: what they shall have, in which factor levels, and their row if they have one.

    Raises:
        ValueError: an unknown instance, factor or level, a count below 1, or a task that does not fit the rows.
    """
    keys = schema.keys()
    if unknown := [key for key in request.keys if key not in keys]:
        raise ValueError(f"keys: unknown instances {unknown}; this model has {', '.join(keys)}")
    if (request.task == "conditional") != bool(request.keys):
        raise ValueError(
            f"keys: task {request.task!r} got {list(request.keys)}; keys go with 'conditional', and only there"
        )
    if (request.task == "row") != (rows is not None):
        raise ValueError(f"rows: task {request.task!r} {'needs a file' if rows is None else 'reads none'}; change one")
    if rows is None and request.patients < 1:
        raise ValueError(f"rows: expected 1 patient or more, got {request.patients}; ask for one")
    out = rows if rows is not None else PatientBatch.empty(schema, request.patients)
    present, visit = out.present_BVI.clone(), out.visit_BV.clone()
    for i, (slot, _) in enumerate(schema.instances()):
        if slot.kind != "table" and (keys[i] in request.keys if request.keys else slot.kind != "text"):
            present[:, 0, i] = True
        if slot.kind == "table" and request.task == "joint":
            present[:, 0, i] = True
    visit[:, 0] = True
    factors = _factors(schema, request, out)
    return dataclasses.replace(out, present_BVI=present, visit_BV=visit, factor_BVIF=factors * present[..., None])


def _factors(schema: Schema, request: Request, rows: PatientBatch) -> Tensor:
    """Levels (B, V, I, F): fixed ones, those asked for, those of the row, and the rest drawn without repeats in a slot."""
    known = {factor.name: factor for factor in schema.factors()}
    if unknown := [name for name in request.factors if name not in known]:
        raise ValueError(f"factor: unknown {', '.join(unknown)}; this model has {', '.join(known) or 'none'}")
    chosen = {name: known[name].index(level) for name, level in request.factors.items()}
    rng = np.random.default_rng(request.seed)
    out, table = rows.factor_BVIF.clone(), schema.table()
    for f, factor in enumerate(schema.factors()):
        for slot in schema.slots:
            if factor not in slot.factors:
                continue
            places = [schema.keys().index(slot.key(i)) for i in slot.instances]
            order = np.stack([rng.permutation(len(factor.levels)) for _ in range(len(rows))])
            for k, (i, instance) in enumerate(zip(places, slot.instances, strict=True)):
                if factor.name in instance.fixed:
                    out[:, 0, i, f] = factor.index(instance.fixed[factor.name])
                elif factor.name in chosen:
                    out[:, 0, i, f] = chosen[factor.name]
                elif factor.column and table is not None:
                    out[:, 0, i, f] = _of_row(rows, table.key(table.instances[0]), schema, factor.column, factor.levels)
                else:
                    out[:, 0, i, f] = torch.from_numpy(order[:, k % len(factor.levels)] + 1)
    return out


def _of_row(rows: PatientBatch, key: str, schema: Schema, column: str, levels: Sequence[str]) -> Tensor:
    """Levels (B,) that the table says, 0 where it says nothing."""
    names = [c.name for c in schema.table_columns()]
    categories = schema.table_columns()[names.index(column)].categories
    codes = rows.values[key][:, 0, names.index(column)]
    lookup = torch.tensor([levels.index(c) + 1 if c in levels else 0 for c in categories] + [0])
    return lookup[torch.where(torch.isfinite(codes), codes, torch.tensor(float(len(categories)))).long()]


def sample_to(model: Generator, request: Request, folder: Path, rows: PatientBatch | None = None) -> PatientBatch:
    """Draw patients and write them as a cohort in ``folder``, which must not exist yet.

    Raises:
        ValueError: see :func:`announced`.
        FileExistsError: the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder")
    drawn = sample_cohort(
        model,
        announced(model.schema, request, rows),
        task=request.task,
        keys=request.keys,
        steps=request.steps,
        guidance=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
    ).batch
    write_cohort(drawn, model.schema, folder, version("medgen"), f"{model.schema.name} synthetic patients")
    return drawn


class BundleRun:
    """What MONAI's parser instantiates from ``configs/inference.json`` as the evaluator, and runs.

    Args:
        network: filled.
        inferer: what to draw.
        dataset: one entry per patient.
        output_dir: of the cohort; must not exist yet.
    """

    def __init__(self, network: BundledNetwork, inferer: Request, dataset: Sequence[Any], output_dir: str) -> None:
        self._network, self._request, self._folder = network, inferer, Path(output_dir)
        self._patients = len(dataset)

    def run(self) -> None:
        """Draw and write."""
        request = dataclasses.replace(self._request, patients=self._patients)
        sample_to(self._network, request, self._folder)


def inference_config() -> dict[str, Any]:
    """The entries of ``configs/inference.json`` beyond the network: MONAI's names for what this module does."""
    return {
        "dataset_dir": "",
        "output_dir": "$@bundle_root + '/synthetic'",
        "patients": 4,
        "seed": 0,
        "steps": 20,
        "dataset": {"_target_": "monai.data.Dataset", "data": "$list(range(@patients))"},
        "inferer": {"_target_": "server.release.sampling.Request", "task": "joint", "steps": "@steps", "seed": "@seed"},
        "evaluator": {
            "_target_": "server.release.sampling.BundleRun",
            "network": "@network",
            "inferer": "@inferer",
            "dataset": "@dataset",
            "output_dir": "@output_dir",
        },
        "run": ["$@evaluator.run()"],
    }
