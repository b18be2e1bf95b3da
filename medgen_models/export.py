"""The released model: weights as safetensors in a MONAI bundle, with a model card.

    models/model.safetensors   every array of core and codecs; the file that is meant to be read
    models/model.pt            the same arrays as a state dictionary: MONAI's loader looks for this name and reads nothing else
    configs/metadata.json      MONAI's metadata, and under ``medgen``, as JSON in a text, all that rebuilds the model
    configs/inference.json     what MONAI's parser instantiates and runs: network, sampler, writer of the cohort
    docs/README.md             the card for readers

:func:`load_release_model` reads the safetensors and runs no code that lies in the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from medgen_models.adapters import merge_lora
from medgen_models.assembly import StudyModel
from medgen_models.bundle_network import WEIGHTS, BundledNetwork
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import TokenCore
from medgen_models.flow import FlowConfig, Shares
from medgen_models.layout import Layout
from medgen_models.schema import Schema

STATE, METADATA, INFERENCE, CARD = (
    "models/model.pt",
    "configs/metadata.json",
    "configs/inference.json",
    "docs/README.md",
)
_PACKAGES = ("safetensors", "pydantic", "medgen")


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """A released model as it is loaded again.

    Attributes:
        bank: codecs with their final centres.
        core: the denoiser, adapters merged.
        flow: the objective that it was trained with.
        facts: study plan hash, whether it is private, digests, heads of the sites' ledgers.
        network: codecs and core as MONAI loads them; here the source of time gaps.
    """

    bank: CodecBank
    core: TokenCore
    flow: FlowConfig
    facts: dict[str, Any]
    network: BundledNetwork

    @property
    def schema(self) -> Schema:
        """The study schema."""
        return self.bank.schema

    @property
    def layout(self) -> Layout:
        """Where every token lies."""
        return self.bank.layout

    def draw_gaps(self, present_BVI: Tensor, generator: torch.Generator) -> Tensor:
        """Time gaps (B, V, I) in hours for synthetic references, from public quantiles."""
        return self.network.draw_gaps(present_BVI, generator)


def save_release_model(
    model: StudyModel,
    folder: Path,
    plan_hash: str,
    private: bool,
    ledger_heads: Mapping[str, str] | None = None,
    *,
    inference: Mapping[str, Any],
    statement: Mapping[str, Any] | None = None,
) -> None:
    """Write the model of a finished study; deterministic in its arguments and the installed versions.

    Args:
        model: the study model at its last round.
        folder: created where missing.
        plan_hash: of the plan under which it was trained; the plan states epsilon and delta.
        private: whether the plan makes a promise at all.
        ledger_heads: site -> head of its ledger in the last answer that is in the weights.
        inference: further entries of ``inference.json``: what draws patients from ``@network`` and writes them. They name
            code of the room that releases, so that room gives them.
        statement: the promise in numbers and sentences, which goes into the metadata with its digest.
    """
    core = merge_lora(model.core) if model.core.config.lora_rank else model.core
    tensors = {f"core/{name}": value.detach().contiguous() for name, value in core.state_dict().items()}
    tensors |= {f"bank/{name}": value for name, value in model.bank.tensors().items()}
    body = bytes(save_tensors(tensors))
    promise = dict(statement) if statement is not None else None
    facts = {
        "format": 2,
        "plan_hash": plan_hash,
        "private": private,
        "statement": promise,
        "statement_sha256": hashlib.sha256(canonical(promise)).hexdigest() if promise is not None else "",
        "ledger_heads": dict(ledger_heads or {}),
        "weights_sha256": hashlib.sha256(body).hexdigest(),
        "schema": model.schema.model_dump(mode="json"),
        "schema_digest": model.schema.digest(),
        "core": dataclasses.asdict(core.config),
        "flow": dataclasses.asdict(model.public.flow),
        "gap_quantiles": {key: list(value) for key, value in model.public.gap_quantiles.items()},
        "arrays": {
            name.removeprefix("bank/"): [list(value.shape), str(value.dtype).removeprefix("torch.")]
            for name, value in tensors.items()
            if name.startswith("bank/")
        },
        "trained": model.which,
        "public": dict(model.public.card),
        "parameters": sum(p.numel() for p in core.parameters()),
    }
    text, state = inert(facts), io.BytesIO()
    torch.save(BundledNetwork(text).fill(tensors).state_dict(), state)
    files = {
        WEIGHTS: body,
        STATE: state.getvalue(),
        METADATA: json.dumps(_metadata(model, text), indent=2, sort_keys=True).encode(),
        INFERENCE: json.dumps(_inference(inference), indent=2).encode(),
        CARD: _card(model, facts).encode(),
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def canonical(content: Any) -> bytes:
    """Canonical JSON, of which digests are taken."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def inert(content: Any) -> str:
    """Canonical JSON as one text in which MONAI's parser finds nothing to run, follow or open.

    It runs a text that begins with ``$``, follows ``@``, opens ``%`` and rewrites ``##``, at any depth; a unit of ``%`` is
    enough to break it. In JSON these characters stand within strings only, and may be written by their numbers.
    """
    text = canonical(content).decode()
    for character in "$@%#":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def load_release_model(folder: Path) -> ReleasedModel:
    """Read what :func:`save_release_model` wrote.

    Raises:
        ValueError: a missing or torn file, or weights that are not those the metadata names.
    """
    try:
        text = json.loads((folder / METADATA).read_text(encoding="utf-8"))["medgen"]
        facts = json.loads(text)
        body = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(body).hexdigest() != facts["weights_sha256"]:
            raise ValueError("the weights do not match the digest in the metadata")
        network = BundledNetwork(text).fill(load_tensors(body))
        flow = FlowConfig(**(facts["flow"] | {"shares": Shares(**facts["flow"]["shares"])}))
        names = ("plan_hash", "private", "ledger_heads", "weights_sha256", "statement_sha256", "trained")
        kept = {name: facts[name] for name in names}
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"no whole released model in {folder} ({error}); verify the bundle") from error
    return ReleasedModel(network.bank, network.core, flow, kept, network)


def _inference(further: Mapping[str, Any]) -> dict[str, Any]:
    """``inference.json``: the network is built from the metadata and filled from the safetensors beside it."""
    return {
        "bundle_root": ".",
        "device": "cpu",
        "network_def": {"_target_": "medgen_models.bundle_network.BundledNetwork", "text": "@_meta_#medgen"},
        "network": "$@network_def.read(@bundle_root).to(@device)",
        **further,
    }


def _metadata(model: StudyModel, facts: str) -> dict[str, Any]:
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
        "channel_def": {str(w): f"number {w} of each token" for w in range(layout.width)},
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
        "intended_use": "Synthetic records for method development, teaching and software tests; not for diagnosis",
        "data_source": "records of the hospitals in the plan, which never left them; public patients as the card says",
        "network_data_format": {"inputs": {"image": tokens}, "outputs": {"pred": tokens}},
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
    public = facts["public"]
    source = (
        f"source: {public['source']}, licence: {public['licence']}" if "source" in public else "a generated population"
    )
    statement = (
        f"- Privacy statement: `{facts['statement_sha256']}` (in `configs/metadata.json`)\n"
        if facts["statement"]
        else ""
    )
    sites = "".join(f"- `{site}`, ledger head `{head}`\n" for site, head in sorted(facts["ledger_heads"].items()))
    return f"""# Model card: {model.schema.name}

A generative model of synthetic patients, trained by several hospitals without pooling their data.

{promise}

- Plan: `{facts["plan_hash"]}`
{statement}- Weights: `{facts["weights_sha256"]}` ({facts["parameters"]} parameters in the core; trained group: {facts["trained"]})

| slot | kind | codec | instances |
|---|---|---|---|
{rows}

## What it was trained on

Public pre-training on {public.get("patients", "?")} patients ({source}), seed {public.get("seed", "?")}; then private steps at
these sites:

{sites or "- none: these are public weights"}

## Use

    medgen sample FOLDER --rows 20 --out synthetic

or, where MONAI and medgen are installed, from this folder:

    python -c "from monai.bundle import run; run(config_file='configs/inference.json', output_dir='synthetic')"

(`python -m monai.bundle run` does the same where the package `fire` is installed.) MONAI's parser runs whatever a
configuration names; check the bundle's signature first with `medgen release verify`.

Synthetic records for method development, teaching and software tests. Not for diagnosis, and not for estimates about the
hospitals' patients beyond what the report supports. A sample conditioned on a real patient is not covered by the promise and
must stay at that patient's site.

## Limits

- It knows the slots above, on their public grids and within their public ranges, and populations like those it was trained on.
- Rare findings are rare in its samples too, and under privacy rarer or missing; it is no estimate of how often they occur.
- Images are restored by a codec of few numbers: detail that the codec does not keep is not there.
- Notes are read, never written.
"""
