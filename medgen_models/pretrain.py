"""Public pre-training, and the public model that it leaves behind: codecs, core, and every public number planning needs.

Patients are encoded to tokens once; a step is one batched pass over a random batch with its drawn states, times and noise.
Shape legend as in :mod:`medgen_models.flow`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from medgen_models.adapters import Trained, add_lora, trainable
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import (
    FlowConfig,
    Shares,
    fixed_losses,
    make_unit_loss,
    make_units,
    objective_of,
    patient_losses,
)
from medgen_models.layout import Layout
from medgen_models.optimizer import PublicOptimizer
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema
from medgen_models.terms import Readout, fit_readout
from medgen_models.tokens import TokenBatch

WEIGHTS_FILE, CARD_FILE = "model.safetensors", "card.json"
Biomarkers = Mapping[str, Mapping[str, Tensor]]
"""Instance key -> name -> values of public patients at their first visit (B,), NaN where not measured."""
_GAP_QUANTILES = 33
_LOSS_DRAWS = 8
_READOUT = ("weight_RD", "offset_R", "explained_R")
_EXPLAINED = 0.5
"""Share of a biomarker's public variance that its read-out must explain to enter the objective."""
_FEWEST = 60
"""Public patients that a read-out is fitted on, at least."""
_MEASURED = 128
"""Public patients on whom gradient norms are measured."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Public pre-training.

    Attributes:
        steps, batch: training steps and patients in each.
        vae_steps: training steps of each ``vae`` codec before that.
        learning_rate, matrix_rate: peaks of the schedule (linear warm-up, cosine to 5 %) for AdamW and for the trunk's
            matrices; both updates are free of the gradient's scale, so no gradient is clipped.
        warmup: steps of the warm-up.
        average: decay of the running mean of the weights, which is what is kept.
        lora_rank: rank at which the adapters' gradient norm is measured.
        hinge: weight of the hinge here, in public training; private steps take ``flow.hinge``, whose second pass they may
            not want to pay.
        core, flow: model and objective.
    """

    steps: int = 1000
    batch: int = 32
    vae_steps: int = 300
    learning_rate: float = 3e-3
    matrix_rate: float = 2e-2
    warmup: int = 30
    average: float = 0.99
    weight_decay: float = 1e-2
    lora_rank: int = 4
    hinge: float = 0.3
    core: CoreConfig = dataclasses.field(default_factory=CoreConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)


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
        gap = torch.zeros(present_BVI.shape)
        for key, quantiles in self.gap_quantiles.items():
            i = self.layout.place(key)
            place = torch.rand(present_BVI.shape[:2], generator=generator) * (len(quantiles) - 1)
            table = torch.tensor(quantiles)
            low = place.long().clamp_max(len(quantiles) - 2)
            gap[:, :, i] = torch.lerp(table[low], table[low + 1], place - low)
        return gap * present_BVI

    def to_bytes(self) -> tuple[bytes, bytes]:
        """(weights, card): safetensors and canonical JSON; the card names the digest of the weights."""
        weights = {f"core/{name}": value.detach().contiguous() for name, value in self.core.named_parameters()}
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


def pretrain(
    schema: Schema,
    public: PatientBatch,
    config: PretrainConfig,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    weights: Mapping[str, Path] | None = None,
    biomarkers: Biomarkers | None = None,
) -> PublicModel:
    """Fit codecs and core on public patients.

    Args:
        schema: the study schema.
        public: public patients.
        config: sizes and schedule.
        seed: of everything random here.
        on_step: called after each step with its number (from 1) and loss.
        weights: folders with the weights of ``aekl`` codecs, by slot.
        biomarkers: what was measured in the public patients' images; those that tokens tell enter the objective.

    Raises:
        ValueError: no public patients, or a codec that cannot be fitted on them.
    """
    if len(public) == 0:
        raise ValueError("pre-training: there are no public patients; give a public population")
    bank = CodecBank.fit_public(schema, public, seed, config.vae_steps, weights)
    tokens = bank.encode(public)
    readouts = fit_readouts(bank.layout, tokens, biomarkers or {})
    core = train_core(bank.layout, tokens, config, seed, on_step, readouts=readouts)
    flow = config.flow
    quantiles = torch.quantile(fixed_losses(core, tokens, flow, _LOSS_DRAWS, seed), torch.linspace(0, 1, 33))
    image_slots = tuple(slot.name for slot in schema.slots if slot.kind in IMAGE_KINDS)
    vectors = bank.mean_vectors(tokens, image_slots) if image_slots else torch.zeros(1, 1)
    card = {
        "patients": len(public),
        "seed": seed,
        "pretrain": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("core", "flow")},
        "parameters": sum(p.numel() for p in core.parameters()),
        "tokens": bank.layout.tokens,
        "biomarkers": [
            {
                "instance": r.key,
                "of": f"{r.factor} {r.level}" if r.factor else "all",
                "explained": dict(zip(r.names, map(float, r.explained_R), strict=True)),
            }
            for r in readouts
        ],
    }
    return PublicModel(
        bank=bank,
        core=core,
        flow=flow,
        clip_norms=clip_norms(core, bank, public, tokens, config, seed, readouts),
        recentre_norm=float(vectors.norm(dim=1).median()),
        loss_quantiles=tuple(float(q) for q in quantiles),
        gap_quantiles=_gap_quantiles(bank.layout, tokens),
        card=card,
        readouts=readouts,
    )


def fit_readouts(layout: Layout, tokens: TokenBatch, biomarkers: Biomarkers) -> tuple[Readout, ...]:
    """Read-outs of the biomarkers that the tokens of an instance tell (see :data:`_EXPLAINED`).

    Where an instance's records differ in a factor that no column carries (a sequence), each level has its own read-out,
    given enough patients; a volume looks different in every contrast.

    Raises:
        ValueError: an instance that the study does not have, or too few patients with a biomarker.
    """
    out = []
    for key, values in biomarkers.items():
        i = layout.place(key)
        slot, instance = layout.pairs()[i]
        free = [f for f in slot.factors if not f.column and f.name not in instance.fixed]
        here_B = tokens.present_BVI[:, 0, i]
        levels_B = tokens.factor_BVIF[:, 0, i, layout.factors.index(free[0])] if free else torch.zeros(len(tokens))
        for level in range(1, len(free[0].levels) + 1) if free else (0,):
            own_B = here_B & (levels_B == level)
            if int(own_B.sum()) < _FEWEST:
                continue
            z_BD = tokens.z_BVNW[own_B, 0, layout.span(i), : layout.width_I[i]].flatten(1)
            found = fit_readout(key, tuple(values), z_BD, torch.stack([v[own_B] for v in values.values()], dim=1))
            keep = (found.explained_R >= _EXPLAINED).nonzero().flatten()
            if len(keep):
                out.append(
                    dataclasses.replace(
                        found,
                        names=tuple(found.names[int(r)] for r in keep),
                        weight_RD=found.weight_RD[keep],
                        offset_R=found.offset_R[keep],
                        explained_R=found.explained_R[keep],
                        factor=free[0].name if free else "",
                        level=level,
                    )
                )
    return tuple(out)


def train_core(
    layout: Layout,
    tokens: TokenBatch,
    config: PretrainConfig,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    start: TokenCore | None = None,
    readouts: tuple[Readout, ...] = (),
) -> TokenCore:
    """Train a core on encoded public patients and return the running mean of its weights, frozen.

    ``start`` is a core of ``config.core`` to go on from; it is left as it is. Without one the core starts at random.
    """
    generator = torch.Generator().manual_seed(seed)
    core = TokenCore(layout, config.core, generator)
    if start is not None:
        core.load_state_dict({name: value.detach() for name, value in start.named_parameters()})
    params = list(core.parameters())
    mean = [p.detach().clone() for p in params]
    optimizer = PublicOptimizer(core, config.matrix_rate, config.learning_rate, config.weight_decay)
    flow = dataclasses.replace(config.flow, hinge=config.hinge)
    objective = objective_of(layout, flow, readouts)
    for step in range(config.steps):
        rows = torch.randint(len(tokens), (config.batch,), generator=generator)
        units = make_units(tokens.select(rows), layout, flow, generator)
        loss = patient_losses(core, units, objective, together=True).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(_schedule(step, config))
        # The running mean forgets its start faster while it is young, so that short runs keep no initial weights.
        decay = min(config.average, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(mean, [p.detach() for p in params], 1.0 - decay)
        if on_step:
            on_step(step + 1, float(loss.detach()))
    with torch.no_grad():
        for parameter, value in zip(params, mean, strict=True):
            parameter.copy_(value)
    return core.requires_grad_(False)


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up times a cosine from 1 to .05."""
    share = 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * step / max(config.steps, 1)))
    return share * min(1.0, (step + 1) / max(config.warmup, 1))


def clip_norms(
    core: TokenCore,
    bank: CodecBank,
    public: PatientBatch,
    tokens: TokenBatch,
    config: PretrainConfig,
    seed: int,
    readouts: tuple[Readout, ...] = (),
) -> dict[str, float]:
    """Median per-patient gradient norm on public patients by trained group; patients without a target are left out."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.randperm(len(tokens), generator=generator)[:_MEASURED]
    units = make_units(tokens.select(rows), core.layout, config.flow, generator)
    adapted = add_lora(core, config.lora_rank, generator)
    norms: dict[str, float] = {}
    groups: tuple[tuple[Trained, TokenCore], ...] = (("all", core), ("attention", core), ("lora", adapted))
    for which, module in groups:
        norms[which] = _median_norm(make_unit_loss(module, config.flow, readouts), trainable(module, which), units)
    slots = bank.vae_slots()
    if slots:
        codec_units = bank.vae_units(public.select(rows[:32]), slots, generator)
        norms["codec"] = _median_norm(bank.make_vae_loss(slots), bank.vae_parameters(slots), codec_units)
    return norms


def _median_norm(
    loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor], params: dict[str, Tensor], units: dict[str, Tensor]
) -> float:
    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    squares = []
    count = len(next(iter(units.values())))
    for start in range(0, count, 16):
        part = {name: value[start : start + 16] for name, value in units.items()}
        squares.append(sum(g.flatten(1).square().sum(1) for g in gradient(params, part).values()))
    norm = torch.cat([torch.as_tensor(s) for s in squares]).sqrt()
    norm = norm[norm > 0]
    return float(norm.median()) if len(norm) else 1.0


def _gap_quantiles(layout: Layout, tokens: TokenBatch) -> dict[str, tuple[float, ...]]:
    """Quantiles of recorded gaps; a reference that no public patient has gets a day."""
    out = {}
    for i, target in enumerate(layout.references()):
        if target >= 0:
            gap = tokens.gap_BVI[:, :, i][tokens.present_BVI[:, :, i]]
            at = (
                torch.quantile(gap, torch.linspace(0, 1, _GAP_QUANTILES))
                if len(gap)
                else torch.full((_GAP_QUANTILES,), 24.0)
            )
            out[layout.keys[i]] = tuple(float(q) for q in at)
    return out


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
