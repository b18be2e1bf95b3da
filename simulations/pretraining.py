"""``medgen pretrain``: a public model from phantoms or from a folder of public records, with a card that says what it saw.

A folder is laid out as a hospital lays out its own (see :mod:`client.records.config`) and read by the same readers. That its
records are public is the user's word, and the card calls it that, unless the report of an overlap check is given.
Everything lies in one output folder; an interrupted training goes on from the state that it keeps there, and ends in the
same bytes as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from client.records.config import DataConfig
from client.records.load import read_everyone
from client.records.problems import RecordsError
from medgen_models.batches import batch_to_bytes
from medgen_models.devices import best_device
from medgen_models.presets import Preset, core_preset, schema_preset
from medgen_models.pretrain import Keep, PretrainConfig, pretrain
from medgen_models.public_model import CARD_FILE, PublicModel
from medgen_models.public_numbers import Biomarkers
from medgen_models.public_terms import PublicTerms
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema
from privacy.ledger import Ledger
from server.checkpoints import write_atomically
from server.preparation import PUBLIC_FILE, REFERENCE_FILE
from simulations import phantoms, public_populations, real_schemas

PHANTOMS = "phantoms"
STATE, README = "state", "README.md"
MIN_PATIENTS = 8
_VERSIONS = ("medgen", "torch", "monai", "numpy", "safetensors")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        data: ``phantoms``, or a folder of public records.
        schema: name of a schema that comes with medgen, or a JSON file.
        preset: sizes of core and images; None keeps the schema's grids and takes the core from ``dial``.
        dial: size of the core where it shall not be the preset's.
        out: of the model; created.
        source, licence: the user's words on where the records come from and under which terms.
        overlap: report of a check that no patient of the study is among them; empty: public by assertion.
        patients: phantoms to generate.
        reference: public patients that are set aside, never trained on; with them a study can be planned on the model.
        weights: slot -> folder with the weights of an ``aekl`` codec.
    """

    data: str
    schema: str
    preset: Preset | None
    dial: float | None
    out: Path
    source: str = ""
    licence: str = ""
    overlap: Path | None = None
    patients: int = 600
    reference: int = 0
    steps: int = 1000
    batch: int = 32
    codec_steps: int = 300
    seed: int = 0
    resume: bool = False
    weights: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    terms: PublicTerms = dataclasses.field(default_factory=PublicTerms)


@dataclasses.dataclass(frozen=True)
class Public:
    """Public records as they were found.

    Attributes:
        batch: patients with at least one record, who are trained on. reference: those set aside, if any were asked for.
        biomarkers: what was measured in their images.
        facts: what the card says of them.
    """

    batch: PatientBatch
    biomarkers: Biomarkers | None
    facts: dict[str, Any]
    reference: PatientBatch | None = None


def run_pretraining(request: Request) -> int:
    """Read, train, save; returns the exit code and prints what a person needs to know."""
    console = Console(soft_wrap=True)
    try:
        schema = schema_of(request)
        _claim(request)
        with console.status(f"reading {request.data}"):
            public = read_public(request, schema)
        console.print(f"{len(public.batch)} public patients ({public.facts['standing']}), schema {schema.name}")
        with _progress(console) as progress:
            task = progress.add_task("codecs", total=request.steps, loss="")
            model = train(
                request,
                schema,
                public,
                lambda step, loss: progress.update(task, completed=step, description="core", loss=f"loss {loss:.3f}"),
            )
    except KeyboardInterrupt:
        console.print("interrupted; nothing is lost. Go on with the same command and --resume")
        return 130
    except (ValueError, OSError, RecordsError) as error:
        console.print(f"[bold red]refused[/] {error}")
        return 1
    console.print(
        f"model  {request.out}  digest {model.digest()[:12]}, {model.card['parameters']} parameters in the core"
    )
    console.print(f"card   {request.out / README}")
    return 0


def train(request: Request, schema: Schema, public: Public, on_step: Any = None) -> PublicModel:
    """Train, save model and card under ``request.out``, and remove the kept state.

    Raises:
        ValueError: see :func:`medgen_models.pretrain.pretrain`.
    """
    config = PretrainConfig(
        steps=request.steps,
        batch=request.batch,
        vae_steps=request.codec_steps,
        core=core_preset(request.dial if request.dial is not None else request.preset or "smoke"),
        terms=request.terms,
    )
    device = best_device()
    versions = {name: version(name) for name in _VERSIONS}
    recipe = [schema.digest(), public.facts["digest"], repr(config), request.seed, versions, device.type]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    keep = Keep(request.out / STATE / "training.safetensors", digest)
    model = pretrain(
        schema,
        public.batch,
        config,
        request.seed,
        on_step,
        request.weights,
        public.biomarkers,
        device=device,
        keep=keep,
    )
    facts = {**public.facts, "preset": request.preset or "", "device": device.type, "versions": versions}
    model = dataclasses.replace(model, card={**model.card, **facts})
    if public.reference is not None:
        write_atomically(request.out / PUBLIC_FILE, batch_to_bytes(public.batch, schema))
        write_atomically(request.out / REFERENCE_FILE, batch_to_bytes(public.reference, schema))
    model.save(request.out)
    (request.out / README).write_text(card_text(model), encoding="utf-8")
    shutil.rmtree(request.out / STATE, ignore_errors=True)
    return model


def schema_of(request: Request) -> Schema:
    """The schema by name or file, on the preset's grids.

    Raises:
        ValueError: no such schema, or a file that is none.
    """
    schema = _named(request.schema)
    if schema is None:
        try:
            schema = Schema.model_validate_json(Path(request.schema).read_bytes())
        except OSError as error:
            raise ValueError(
                f"schema {request.schema!r}: known are demo, autoencoders, petmr and icu, or name a JSON file ({error})"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"schema {request.schema}: {where}: {first['msg']}; correct it") from error
    return schema_preset(schema, request.preset) if request.preset is not None else schema


def _named(name: str) -> Schema | None:
    match name:
        case "demo":
            return phantoms.demo_schema()
        case "autoencoders":
            return phantoms.autoencoder_schema()
        case "petmr":
            return real_schemas.petmr_schema()
        case "icu":
            return real_schemas.icu_schema()
        case _:
            return None


def _claim(request: Request) -> None:
    """Refuse to write over another model, and to start afresh where a training can go on."""
    if (request.out / CARD_FILE).exists():
        raise ValueError(f"{request.out} holds a model already; name another folder")
    if (request.out / STATE).exists() and not request.resume:
        raise ValueError(f"{request.out} holds an unfinished training; add --resume, or name another folder")
    request.out.mkdir(parents=True, exist_ok=True)


def read_public(request: Request, schema: Schema) -> Public:
    """Generate or read the public patients of ``schema``.

    Raises:
        ValueError: no records, or phantoms for a schema that they do not fill.
        RecordsError: a folder that cannot be read.
    """
    if request.data == PHANTOMS:
        batch, biomarkers = _generated(request, schema)
        skipped: dict[str, int] = {}
        standing = "generated"
        source, licence = request.source or f"generated by medgen {version('medgen')}", request.licence or "not needed"
    else:
        batch, skipped = _from_folder(Path(request.data), schema)
        biomarkers, standing = None, "public by assertion"
        if not request.source or not request.licence:
            raise ValueError("data: say where the records come from and under which terms, with --source and --licence")
        source, licence = request.source, request.licence
    batch, reference, biomarkers = _set_aside(request, batch, biomarkers)
    check = hashlib.sha256(request.overlap.read_bytes()).hexdigest() if request.overlap is not None else ""
    present = batch.present_BVI.any(dim=1).sum(dim=0).tolist()
    facts = {
        "source": source,
        "licence": licence,
        "standing": "checked" if check else standing,
        "overlap_check_sha256": check,
        "digest": hashlib.sha256(batch_to_bytes(batch, schema)).hexdigest(),
        "instances": dict(zip(schema.keys(), present, strict=True)),
        "not_used": skipped,
    }
    return Public(batch, biomarkers, facts, reference)


def _set_aside(
    request: Request, batch: PatientBatch, biomarkers: Biomarkers | None
) -> tuple[PatientBatch, PatientBatch | None, Biomarkers | None]:
    """Who is trained on, who is set aside (drawn by the seed), and the biomarkers of the former."""
    if request.reference == 0:
        return batch, None, biomarkers
    left = len(batch) - request.reference
    if left < MIN_PATIENTS:
        raise ValueError(
            f"reference = {request.reference}: of {len(batch)} public patients at least {MIN_PATIENTS} must remain to train "
            "on; set fewer aside"
        )
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(request.seed))
    kept, aside = order[:left].sort().values, order[left:].sort().values
    measured = {
        key: {name: values[kept] for name, values in found.items()} for key, found in (biomarkers or {}).items()
    }
    return batch.select(kept.tolist()), batch.select(aside.tolist()), measured if biomarkers is not None else None


def _generated(request: Request, schema: Schema) -> tuple[PatientBatch, Biomarkers | None]:
    """A generated population; images are made on the generator's own grid and interpolated to the schema's."""
    native = _named(request.schema)
    if native is None:
        raise ValueError(f"data: phantoms do not fill schema {schema.name!r}; name a folder of public records")
    biomarkers: Biomarkers | None = None
    match request.schema:
        case "icu":
            batch = public_populations.icu_population(native, request.patients, request.seed)
        case "petmr":
            batch = public_populations.limb_population(native, request.patients, request.seed)
        case _:
            batch = phantoms.to_batch(native, phantoms.make_patients(request.patients, request.seed))
            biomarkers = phantoms.biomarkers(native, batch)
    return on_grid(batch, schema), biomarkers


def on_grid(batch: PatientBatch, schema: Schema) -> PatientBatch:
    """Images linearly interpolated to the grids of ``schema``, over the same field of view; the rest as it is."""
    values = dict(batch.values)
    for slot, instance in schema.instances():
        key = slot.key(instance)
        if slot.kind in IMAGE_KINDS and tuple(values[key].shape[2:]) != slot.shape:
            values[key] = _interpolated(values[key], slot.shape)
    return dataclasses.replace(batch, values=values)


def _interpolated(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    b, v = image.shape[:2]
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    out = torch.nn.functional.interpolate(image.flatten(0, 1)[:, None], shape, mode=mode, align_corners=False)
    return out[:, 0].reshape(b, v, *shape)


def _from_folder(folder: Path, schema: Schema) -> tuple[PatientBatch, dict[str, int]]:
    """Patients of a folder with at least one record, and how many records were left out, by reason."""
    config, slots = _data_config(folder, schema)
    # The readers open records for a ledger's token only. These records are public, so the ledger is made for the purpose
    # and thrown away: there is nothing to account for.
    with tempfile.TemporaryDirectory() as place, Ledger.open(Path(place) / "ledger.sqlite", "public") as ledger:
        everyone = read_everyone(config, folder, schema, slots, ledger.local("public pre-training"))
    rows = everyone.batch.visit_BV.any(dim=1).nonzero().flatten()
    skipped = {"patients without a usable record": len(everyone.batch) - len(rows), **everyone.counts}
    return everyone.batch.select(rows), {reason: count for reason, count in skipped.items() if count}


def _data_config(folder: Path, schema: Schema) -> tuple[DataConfig, tuple[str, ...]]:
    """How to read a folder: its ``site.toml`` (``[data]``, and ``slots`` of ``[site]`` where given), or the default layout.

    Raises:
        ValueError: no such folder, or a file that does not fit.
    """
    slots = tuple(slot.name for slot in schema.slots)
    file = folder / "site.toml"
    if file.is_file():
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
            config = DataConfig.model_validate(tables.get("data", {}))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise ValueError(f"{file}: {error}; correct it") from error
        return config, tuple(tables.get("site", {}).get("slots", slots))
    for root in (".", "data"):
        if (folder / root / "participants.tsv").is_file():
            return DataConfig(root=root), slots
    raise ValueError(f"data: {folder} has no site.toml and no participants.tsv; lay it out as a hospital's folder")


def card_text(model: PublicModel) -> str:
    """The model card of a public model."""
    card, schema = model.card, model.schema
    rows = "\n".join(f"| {key} | {count} |" for key, count in card["instances"].items())
    slots = "\n".join(
        f"| {s.name} | {s.kind} | {s.codec} | {'x'.join(map(str, s.shape)) or '-'} |" for s in schema.slots
    )
    terms = {name: value for name, value in card["pretrain"]["terms"].items() if name != "refine_steps" and value}
    standing = {
        "generated": "Generated: nobody's records.",
        "checked": f"An overlap check was given (SHA-256 `{card['overlap_check_sha256']}`).",
        "public by assertion": "Public by assertion: nobody checked that no patient of a study is among them.",
    }[card["standing"]]
    losses = card["losses"]
    return f"""# Public model: {schema.name}

Codecs and a core, fitted on public patients only; what a study starts from. Nothing here is private, and nothing here is
protected by differential privacy.

## What it saw

- Source: {card["source"]}
- Licence: {card["licence"]}
- {standing}
- {card["patients"]} patients, SHA-256 of the records as read `{card["digest"]}`
- Not used: {", ".join(f"{count} {reason}" for reason, count in card["not_used"].items()) or "nothing was left out"}

| instance | patients who have it |
|---|---|
{rows}

| slot | kind | codec | grid |
|---|---|---|---|
{slots}

## How it was trained

- {card["pretrain"]["steps"]} steps of {card["pretrain"]["batch"]} patients, seed {card["seed"]}, on {card["device"]}
- {card["parameters"]} parameters in the core, {card["tokens"]} tokens a patient's visit
- Loss {losses[0]:.4f} over the first twentieth of the steps, {losses[-1]:.4f} over the last
- Public-only terms: {", ".join(f"{name} {value}" for name, value in terms.items()) or "none"}
- Schema `{schema.digest()}`
- {", ".join(f"{name} {number}" for name, number in card["versions"].items())}

## Limits

- It knows populations like the one above; hospitals differ, which is what private training is for.
- Images come back through codecs of few numbers: detail that a codec does not keep is not there.
- Samples are synthetic and for method development, teaching and tests; not for diagnosis.
"""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<7}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
    )
