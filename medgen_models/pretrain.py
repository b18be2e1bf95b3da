"""Public pre-training: codecs and core fitted on public patients.

Patients are encoded to tokens once; a step is one batched pass over a random batch with its drawn states, times and noise.
Shape legend as in :mod:`medgen_models.flow`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.devices import placed
from medgen_models.flow import FlowConfig, fixed_losses, make_units, objective_of, patient_losses
from medgen_models.gaussian_prior import GaussianPrior, fit_gaussian_prior
from medgen_models.layout import Layout
from medgen_models.optimizer import PublicOptimizer
from medgen_models.public_model import PublicModel
from medgen_models.public_numbers import Biomarkers, clip_norms, fit_readouts, gap_quantiles
from medgen_models.public_terms import PublicTerms, contrastive_loss, refined_bank
from medgen_models.scanners import through_other_scanners
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema
from medgen_models.terms import Readout
from medgen_models.tokens import TokenBatch

OnStep = Callable[[int, float], None]
_LOSS_DRAWS = 8


@dataclasses.dataclass(frozen=True)
class Keep:
    """Where the state of a training is kept, so that an interrupted one goes on.

    Attributes:
        file: safetensors; appears whole or not at all.
        recipe: digest of everything that training depends on; a state of another recipe is refused.
        every: steps between two states.
    """

    file: Path
    recipe: str
    every: int = 50

    def read(self) -> dict[str, Tensor] | None:
        """The kept tensors, or None where there are none yet.

        Raises:
            ValueError: the file is torn, or of another recipe.
        """
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as body:
                recipe = (body.metadata() or {}).get("recipe")
                tensors = {name: body.get_tensor(name) for name in body.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.file.name}: the kept training state is torn ({error}); remove it") from error
        if recipe != self.recipe:
            raise ValueError(
                f"{self.file.name}: the kept training state is of other data, settings or versions; "
                "give those again, or remove it to start afresh"
            )
        return tensors

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` in place of what was kept before."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f"{self.file.name}.part")
        part.write_bytes(save_tensors(dict(tensors), metadata={"recipe": self.recipe}))
        part.replace(self.file)


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
        scanners: spread of the density curves that the core sees public films through (see :mod:`medgen_models.scanners`);
            0 shows them as they are.
        prior_rank: loadings of the Gaussian over all tokens that is fitted first and that the core adds to.
        hinge: weight of the hinge here, in public training; private steps take ``flow.hinge``, whose second pass they may
            not want to pay.
        core, flow: model and objective.
        terms: what public training alone may use; off unless asked for.
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
    scanners: float = 0.06
    prior_rank: int = 80
    core: CoreConfig = dataclasses.field(default_factory=CoreConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    terms: PublicTerms = dataclasses.field(default_factory=PublicTerms)


def pretrain(
    schema: Schema,
    public: PatientBatch,
    config: PretrainConfig,
    seed: int,
    on_step: OnStep | None = None,
    weights: Mapping[str, Path] | None = None,
    biomarkers: Biomarkers | None = None,
    device: torch.device | None = None,
    keep: Keep | None = None,
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
        device: where the core computes.
        keep: where the core's training is kept and gone on from; codecs are fitted again, to the same values.

    Raises:
        ValueError: no public patients, a codec that cannot be fitted on them, or a kept state of another training.
    """
    if len(public) == 0:
        raise ValueError("pre-training: there are no public patients; give a public population")
    bank = CodecBank.fit_public(schema, public, seed, config.vae_steps, weights)
    if config.terms.adversarial or config.terms.perceptual:
        bank = refined_bank(bank, public, config.terms, seed)
    public = through_other_scanners(schema, public, config.scanners, seed)
    tokens = bank.encode(public)
    if not bool((tokens.weight_BVNW > 0).any()):
        raise ValueError(
            f"pre-training: none of {len(public)} public patients has a record that can be generated; give a public "
            "population with images, a table or series"
        )
    readouts = fit_readouts(bank.layout, tokens, biomarkers or {})
    config = dataclasses.replace(config, core=dataclasses.replace(config.core, prior_rank=config.prior_rank))
    prior = fit_gaussian_prior(bank.layout, tokens, config.prior_rank)
    trainer = CoreTrainer(bank.layout, tokens, config, seed, readouts=readouts, device=device, prior=prior)
    core = trainer.run(on_step, keep)
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
        "losses": _thinned(trainer.losses),
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
        clip_norms=clip_norms(core, bank, public, tokens, flow, config.lora_rank, seed, readouts),
        recentre_norm=float(vectors.norm(dim=1).median()),
        loss_quantiles=tuple(float(q) for q in quantiles),
        gap_quantiles=gap_quantiles(bank.layout, tokens),
        card=card,
        readouts=readouts,
    )


class CoreTrainer:
    """Training of a core on encoded public patients, step by step; its state can be kept and gone on with.

    Args:
        layout, tokens: the study's layout and the encoded patients.
        config: sizes and schedule.
        seed: of initial weights, batches and noise.
        start: core of ``config.core`` to go on from, left as it is; without one the core starts at random.
        readouts: biomarkers of the objective.
        prior: of ``config.core``'s rank; without one it is that of ``start``, or fresh.
        device: where the core computes; on a GPU in bfloat16.

    Attributes:
        done: steps taken.
        losses: of each step.
    """

    def __init__(
        self,
        layout: Layout,
        tokens: TokenBatch,
        config: PretrainConfig,
        seed: int,
        start: TokenCore | None = None,
        readouts: tuple[Readout, ...] = (),
        device: torch.device | None = None,
        prior: GaussianPrior | None = None,
    ) -> None:
        self._tokens, self._config = tokens, config
        self._generator = torch.Generator().manual_seed(seed)
        self._core = TokenCore(layout, config.core, self._generator)
        if start is not None:
            self._core.load_state_dict(start.state_dict())
        if prior is not None:
            self._core.prior.load_state_dict(prior.state_dict())
        where = device or torch.device("cpu")
        self._core.to(where)
        self._call = self._core if where.type == "cpu" else placed(self._core, bf16=True)
        self._params = list(self._core.parameters())
        self._mean = [p.detach().clone() for p in self._params]
        self._optimizer = PublicOptimizer(self._core, config.matrix_rate, config.learning_rate, config.weight_decay)
        self._flow = dataclasses.replace(config.flow, hinge=config.hinge)
        self._objective = objective_of(layout, self._flow, readouts)
        self.done = 0
        self.losses: list[float] = []

    def run(self, on_step: OnStep | None = None, keep: Keep | None = None) -> TokenCore:
        """Take all steps that are left, from the state that ``keep`` has, and return :meth:`result`."""
        if keep is not None and (known := keep.read()) is not None:
            self.restore(known)
        while self.done < self._config.steps:
            loss = self.advance()
            if keep is not None and (self.done % keep.every == 0 or self.done == self._config.steps):
                keep.write(self.tensors())
            if on_step:
                on_step(self.done, loss)
        return self.result()

    def advance(self) -> float:
        """Take one step and return its loss."""
        config, step = self._config, self.done
        rows = torch.randint(len(self._tokens), (config.batch,), generator=self._generator)
        batch = self._tokens.select(rows)
        units = make_units(batch, self._core.layout, self._flow, self._generator)
        loss = patient_losses(self._call, units, self._objective, together=True).mean()
        if config.terms.contrastive:
            loss = loss + config.terms.contrastive * contrastive_loss(self._core, batch)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step(_schedule(step, config))
        # The running mean forgets its start faster while it is young, so that short runs keep no initial weights.
        decay = min(config.average, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(self._mean, [p.detach() for p in self._params], 1.0 - decay)
        self.done += 1
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def result(self) -> TokenCore:
        """A frozen core with the running mean of the weights, on the CPU."""
        core = TokenCore(self._core.layout, self._config.core, torch.Generator().manual_seed(0))
        core.prior.load_state_dict(self._core.prior.state_dict())
        with torch.no_grad():
            for parameter, value in zip(core.parameters(), self._mean, strict=True):
                parameter.copy_(value)
        return core.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """All that later steps depend on, by name."""
        names = [name for name, _ in self._core.named_parameters()]
        out = {f"core.{name}": p.detach() for name, p in zip(names, self._params, strict=True)}
        out |= {f"mean.{name}": value for name, value in zip(names, self._mean, strict=True)}
        out |= {f"optimizer.{name}": value for name, value in self._optimizer.tensors().items()}
        out |= {"generator": self._generator.get_state(), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        return {name: value.cpu().contiguous() for name, value in out.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors` of a trainer with the same arguments: what follows is as if it had never stopped.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        try:
            with torch.no_grad():
                for (name, p), mean in zip(self._core.named_parameters(), self._mean, strict=True):
                    p.copy_(tensors[f"core.{name}"])
                    mean.copy_(tensors[f"mean.{name}"])
            prefix = "optimizer."
            self._optimizer.restore({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
            self._generator.set_state(tensors["generator"])
            self.losses = tensors["losses"].tolist()
            self.done = len(self.losses)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the kept training state is of another model ({error}); start afresh") from error


def train_core(
    layout: Layout,
    tokens: TokenBatch,
    config: PretrainConfig,
    seed: int,
    on_step: OnStep | None = None,
    start: TokenCore | None = None,
    readouts: tuple[Readout, ...] = (),
    device: torch.device | None = None,
    prior: GaussianPrior | None = None,
) -> TokenCore:
    """Train a core on encoded public patients and return the running mean of its weights, frozen.

    Arguments are those of :class:`CoreTrainer`.
    """
    return CoreTrainer(layout, tokens, config, seed, start, readouts, device, prior).run(on_step)


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up times a cosine from 1 to .05."""
    share = 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * step / max(config.steps, 1)))
    return share * min(1.0, (step + 1) / max(config.warmup, 1))


def _thinned(losses: list[float]) -> list[float]:
    """Mean loss over twenty equal stretches of the training, in order."""
    edges = [round(k * len(losses) / 20) for k in range(21)]
    return [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]
