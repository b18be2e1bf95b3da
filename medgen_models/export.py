"""The released model: weights as safetensors in the folder layout of a MONAI bundle, with a model card.

``models/model.safetensors`` holds core and codecs, ``configs/metadata.json`` the bundle's metadata with everything that
rebuilds the model, ``docs/README.md`` the card for readers. The folder follows MONAI's bundle layout so that hubs can show it;
it is loaded by :func:`load_release_model`, not by MONAI's config parser.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from medgen_models.adapters import merge_lora
from medgen_models.assembly import StudyModel
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, Shares
from medgen_models.schema import Schema

WEIGHTS, METADATA, CARD = "models/model.safetensors", "configs/metadata.json", "docs/README.md"
_PACKAGES = ("safetensors", "pydantic", "medgen")


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """A released model as it is loaded again.

    Attributes:
        bank: codecs with their final centres.
        core: the denoiser, adapters merged.
        flow: the objective that it was trained with.
        facts: study plan hash, whether it is private, digests, heads of the sites' ledgers.
    """

    bank: CodecBank
    core: TokenCore
    flow: FlowConfig
    facts: dict[str, Any]


def save_release_model(
    model: StudyModel, folder: Path, plan_hash: str, private: bool, ledger_heads: Mapping[str, str] | None = None
) -> None:
    """Write the model of a finished study; deterministic in its arguments and the installed versions.

    Args:
        model: the study model at its last round.
        folder: created where missing.
        plan_hash: of the plan under which it was trained; the plan states epsilon and delta.
        private: whether the plan makes a promise at all.
        ledger_heads: site -> head of its ledger in the last answer that is in the weights.
    """
    core = merge_lora(model.core) if model.core.config.lora_rank else model.core
    tensors = {f"core/{name}": value.detach().contiguous() for name, value in core.named_parameters()}
    body = bytes(save_tensors(tensors | {f"bank/{name}": value for name, value in model.bank.tensors().items()}))
    facts = {
        "format": 1,
        "plan_hash": plan_hash,
        "private": private,
        "ledger_heads": dict(ledger_heads or {}),
        "weights_sha256": hashlib.sha256(body).hexdigest(),
        "schema": model.schema.model_dump(mode="json"),
        "core": dataclasses.asdict(core.config),
        "flow": dataclasses.asdict(model.public.flow),
        "trained": model.which,
        "public": dict(model.public.card),
        "parameters": sum(p.numel() for p in core.parameters()),
    }
    files = {
        WEIGHTS: body,
        METADATA: json.dumps(_metadata(model, facts), indent=2, sort_keys=True).encode(),
        CARD: _card(model, facts).encode(),
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def load_release_model(folder: Path) -> ReleasedModel:
    """Read what :func:`save_release_model` wrote.

    Raises:
        ValueError: a missing or torn file, or weights that are not those the metadata names.
    """
    try:
        facts = json.loads((folder / METADATA).read_text(encoding="utf-8"))["medgen"]
        body = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(body).hexdigest() != facts["weights_sha256"]:
            raise ValueError("the weights do not match the digest in the metadata")
        tensors = load_tensors(body)
        schema = Schema.model_validate(facts["schema"])
        under = {
            part: {n.removeprefix(part): v for n, v in tensors.items() if n.startswith(part)}
            for part in ("core/", "bank/")
        }
        bank = CodecBank.from_tensors(schema, under["bank/"])
        core = TokenCore(bank.layout, CoreConfig(**facts["core"]), torch.Generator().manual_seed(0))
        core.load_state_dict(under["core/"])
        flow = FlowConfig(**(facts["flow"] | {"shares": Shares(**facts["flow"]["shares"])}))
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"no whole released model in {folder} ({error}); verify the bundle") from error
    kept = {name: facts[name] for name in ("plan_hash", "private", "ledger_heads", "weights_sha256", "trained")}
    return ReleasedModel(bank, core.requires_grad_(False), flow, kept)


def _metadata(model: StudyModel, facts: dict[str, Any]) -> dict[str, Any]:
    """Metadata in the shape of MONAI's bundle specification."""
    layout = model.layout
    tokens = {
        "type": "tuples",
        "format": "latent",
        "modality": "n/a",
        "num_channels": layout.width,
        "spatial_shape": [layout.tokens],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {},
    }
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_generator_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": "released"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in _PACKAGES},
        "name": f"medgen {model.schema.name}",
        "task": "Generation of synthetic multimodal patients",
        "description": "Token-set rectified flow over " + ", ".join(layout.slots),
        "authors": "the consortium of the study",
        "copyright": "as the consortium states",
        "network_data_format": {"inputs": {"tokens": tokens}, "outputs": {"tokens": tokens}},
        "medgen": facts,
    }


def _card(model: StudyModel, facts: dict[str, Any]) -> str:
    """The model card."""
    rows = "\n".join(
        f"| {slot.name} | {slot.kind} | {slot.codec} | {', '.join(i.name or slot.name for i in slot.instances)} |"
        for slot in model.schema.slots
    )
    promise = (
        "Trained under patient-level differential privacy. The plan named below states unit, relation, epsilon and delta; the "
        "report of the release states what each step cost."
        if facts["private"]
        else "**Not private.** The plan makes no differential-privacy promise; treat weights and samples like the patient data."
    )
    return f"""# Model card: {model.schema.name}

A generative model of synthetic patients, trained by several hospitals without pooling their data.

{promise}

- Plan: `{facts["plan_hash"]}`
- Weights: `{facts["weights_sha256"]}` ({facts["parameters"]} parameters in the core; trained group: {facts["trained"]})
- Started from a public model trained on {facts["public"].get("patients", "?")} public patients.

| slot | kind | codec | instances |
|---|---|---|---|
{rows}

## Use

Synthetic records for method development, teaching and software tests. Not for diagnosis, and not for estimates about the
hospitals' patients beyond what the report supports. A sample conditioned on a real patient is not covered by the promise and
must stay at that patient's site.
"""
