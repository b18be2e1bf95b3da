"""The public model: codecs, core and every public number that planning needs, as one value and as two files.

Holds public information only. Shape legend as in :mod:`medgen_models.flow`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, Shares
from medgen_models.layout import Layout
from medgen_models.public_numbers import draw_gaps
from medgen_models.schema import Schema
from medgen_models.terms import Readout

WEIGHTS_FILE, CARD_FILE = "model.safetensors", "card.json"
_READOUT = ("weight_RD", "offset_R", "explained_R")


@dataclasses.dataclass(frozen=True)
class PublicModel:
    """Everything a study starts from; holds public information only.

    Attributes:
        bank: codecs.
        core: running mean of the trained weights.
        flow: the objective that it was trained with.
        clip_norms: median per-patient gradient norm on public patients by trained group (``all``, ``attention``, ``lora`` at
            ``lora_rank``, ``codec`` for all autoencoders together where there are any).
        recentre_norm: median norm of a public patient's recentring vector over all image slots.
        loss_quantiles: 33 even quantiles of the public patients' fixed-draw losses.
        gap_quantiles: instance key -> 33 even quantiles of the public time gaps in hours, for references.
        card: what was trained, on what, how.
        readouts: biomarkers of the objective.
    """

    bank: CodecBank
    core: TokenCore
    flow: FlowConfig
    clip_norms: Mapping[str, float]
    recentre_norm: float
    loss_quantiles: tuple[float, ...]
    gap_quantiles: Mapping[str, tuple[float, ...]]
    card: Mapping[str, Any]
    readouts: tuple[Readout, ...] = ()

    @property
    def schema(self) -> Schema:
        """The study schema."""
        return self.bank.schema

    @property
    def layout(self) -> Layout:
        """The token layout."""
        return self.bank.layout

    @property
    def core_config(self) -> CoreConfig:
        """Size of the core."""
        return self.core.config

    def draw_gaps(self, present_BVI: Tensor, generator: torch.Generator) -> Tensor:
        """Time gaps (B, V, I) in hours for synthetic references, from the public quantiles; 0 elsewhere."""
        return draw_gaps(self.layout, self.gap_quantiles, present_BVI, generator)

    def to_bytes(self) -> tuple[bytes, bytes]:
        """(weights, card): safetensors and canonical JSON; the card names the digest of the weights."""
        weights = {f"core/{name}": value.detach().contiguous() for name, value in self.core.state_dict().items()}
        weights |= {f"bank/{name}": value for name, value in self.bank.tensors().items()}
        for number, readout in enumerate(self.readouts):
            for name in _READOUT:
                weights[f"readout/{number}/{name}"] = getattr(readout, name).contiguous()
        body = bytes(save_tensors(weights))
        card = {
            "format": 1,
            "schema_digest": self.schema.digest(),
            "schema": self.schema.model_dump(mode="json"),
            "core": dataclasses.asdict(self.core.config),
            "flow": dataclasses.asdict(self.flow),
            "clip_norms": dict(self.clip_norms),
            "recentre_norm": self.recentre_norm,
            "loss_quantiles": list(self.loss_quantiles),
            "gap_quantiles": {key: list(value) for key, value in self.gap_quantiles.items()},
            "weights_sha256": hashlib.sha256(body).hexdigest(),
            "readouts": [
                {"key": r.key, "names": list(r.names), "factor": r.factor, "level": r.level} for r in self.readouts
            ],
            "card": dict(self.card),
        }
        return body, json.dumps(card, sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(weights: bytes, card: bytes, schema: Schema | None = None) -> PublicModel:
        """Inverse of :meth:`to_bytes`.

        Args:
            weights: safetensors.
            card: JSON.
            schema: the study's schema, if the caller has one: a model of another schema is refused.

        Raises:
            ValueError: torn files, another digest, or a model of another schema.
        """
        try:
            facts = json.loads(card)
            own = Schema.model_validate(facts["schema"])
            digest = facts["weights_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the model card is torn or of another format ({error}); pre-train again") from error
        if hashlib.sha256(weights).hexdigest() != digest:
            raise ValueError("the model weights do not match the digest on their card; fetch or train them again")
        if schema is not None and schema.digest() != own.digest():
            raise ValueError(
                f"the model was trained for schema {own.name!r} ({own.digest()[:12]}), this study is {schema.name!r} "
                f"({schema.digest()[:12]}); pre-train for this schema"
            )
        try:
            tensors = load_tensors(weights)
            bank = CodecBank.from_tensors(own, _under(tensors, "bank/"))
            core = TokenCore(bank.layout, CoreConfig(**facts["core"]), torch.Generator().manual_seed(0))
            core.load_state_dict(_under(tensors, "core/"))
            flow = FlowConfig(**(facts["flow"] | {"shares": Shares(**facts["flow"]["shares"])}))
            readouts = tuple(
                Readout(
                    key=known["key"],
                    names=tuple(known["names"]),
                    factor=known["factor"],
                    level=known["level"],
                    **{name: tensors[f"readout/{number}/{name}"] for name in _READOUT},
                )
                for number, known in enumerate(facts["readouts"])
            )
        except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"the model files do not fit each other ({error}); fetch or train them again") from error
        return PublicModel(
            bank=bank,
            core=core.requires_grad_(False),
            flow=flow,
            clip_norms=facts["clip_norms"],
            recentre_norm=facts["recentre_norm"],
            loss_quantiles=tuple(facts["loss_quantiles"]),
            gap_quantiles={key: tuple(value) for key, value in facts["gap_quantiles"].items()},
            card=facts["card"],
            readouts=readouts,
        )

    def digest(self) -> str:
        """SHA-256 over card and weights: two models with one digest are the same model."""
        return hashlib.sha256(self.to_bytes()[1]).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``card.json``; the card last, so a torn save is never read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, body in zip((WEIGHTS_FILE, CARD_FILE), self.to_bytes(), strict=True):
            part = folder / f"{name}.part"
            part.write_bytes(body)
            part.replace(folder / name)

    @staticmethod
    def load(folder: Path, schema: Schema | None = None) -> PublicModel:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: a missing or torn file, or a model of another schema.
        """
        try:
            weights, card = (folder / WEIGHTS_FILE).read_bytes(), (folder / CARD_FILE).read_bytes()
        except OSError as error:
            raise ValueError(f"no public model in {folder} ({error}); run pre-training first") from error
        return PublicModel.from_bytes(weights, card, schema)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
