"""DP-SGD for one site and one round: the only function that touches raw per-patient gradients.

Stage: ``prepare`` (units of the drawn patients) -> gradients -> clip, sum, noise, divide -> AdamW -> weights that may leave.

One step (Abadi et al. (2016), Algorithm 1, with a public divisor):
    1. every patient is drawn with probability q, by fresh coins from the noise source;
    2. g_i, the gradient of patient i's own loss, is scaled by C / max(C, |g_i|);
    3. the clipped gradients are summed, N(0, (sigma C)²) is added to every coordinate of the sum;
    4. the result is divided by q * N_decl and handed to AdamW.

Covered
    * Opacus's ``DPOptimizer`` carries the step; what it does unsafely is replaced: noise from the cryptographic stream
      instead of torch's global generator, a divisor that does not depend on the number of patients, norms that are upper
      bounds and sums whose rounding is inside the clip (so zeroing a patient moves the computed sum by at most C, not by C
      and a bit: :func:`clip_factors`), no queue of skipped steps, and no gradient left behind when a step is interrupted.
    * A patient whose loss or gradient is not finite contributes zero. An empty draw is stepped, noised and charged.
    * A stage without noise (not private) runs the same path with sigma 0, clipping included.
    * What comes out depends on patients only through noised sums: weights, and the optimizer's moments of them.
    * Canaries (:mod:`privacy.spare`) pass the same sampler, clip, noise and divisor in coordinates of their own; weights are
      the same with and without them, and an auditor gets the noised sums of those coordinates and nothing else.

Not covered
    * Rounding when a patient is *removed* instead of emptied: later patients then move to other chunks, which changes
      float32 sums by about 1e-7 of the batch. The promise is about emptying; rows and chunks stay.
    * What ``prepare`` and ``unit_loss`` do beside returning their result: no metric, buffer or log of theirs may leave.
    * Run time: it grows with the number of patients drawn.
    * A stage that somebody marked calibrated by hand; stages come from a calibrated plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from privacy.engines import as_stored, flat_rows, norm_bounds
from privacy.gradients import ProvedHooks, Speed, UnitLoss, batch_size, raw_gradients
from privacy.noise import BLOCK_VALUES, NoiseSource, to_grid
from privacy.spare import SpareCanaries
from privacy.stages import TrainingStage

Prepare = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class RoundOutcome:
    """What one private round made; all of it is post-processing of noised sums.

    Attributes:
        params: the trained parameters, float32 copies.
        optimizer_state: ``"<moment>:<parameter>"`` -> tensor, flat, to be saved and handed to the next round.
        steps: steps taken in this round: the plan's number, always.
        deterministic: the noise can be repeated, so nothing here is private.
        spare_TD: noised sums of the spare coordinates at every step, in units of the clip; None without canaries. They are
            a function of coins and noise, and for the auditor alone.
    """

    params: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    steps: int
    deterministic: bool
    spare_TD: NDArray[np.float64] | None = None


class StreamDPOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus ships no types
    """Opacus's DPOptimizer with sound noise, divisor and state (see the module's first lines).

    One logical batch is any number of :meth:`accumulate` calls, none for an empty one, and then :meth:`step`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float,
        clip: float,
        divisor: float,
        noise: NoiseSource,
        chunk: int = 16,
        canaries: SpareCanaries | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=sigma,
            max_grad_norm=clip,
            expected_batch_size=divisor,
            loss_reduction="mean",
        )
        self._noise = noise
        self._chunk = chunk
        self._canaries = canaries
        self._losses: Tensor | None = None
        self._total: Tensor | None = None
        self.spare_grad: Tensor | None = None
        """What the spare coordinates' ``grad`` would be: noised and divided, float64; for the auditor."""

    def accumulate(
        self, gradients: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], losses: Tensor | None = None
    ) -> None:
        """Clip these patients' gradients (B, *shape) and add them to the sums.

        A patient whose gradient, or whose entry of ``losses`` (B,), is not finite adds exactly zero.
        """
        for name, parameter in named.items():
            parameter.grad_sample = gradients[name]  # type: ignore[attr-defined]  # Opacus's protocol
        self._losses = losses
        try:
            self.clip_and_accumulate()
        finally:
            self._losses = None
            for parameter in named.values():
                parameter.grad_sample = None  # type: ignore[attr-defined]

    def accumulate_canaries(self, coordinates: Tensor) -> None:
        """Clip the canaries of these spare coordinates and add them to the sums, by the code that does it to patients."""
        assert self._canaries is not None
        for part in torch.split(coordinates, self._chunk):
            if len(part):
                total = self._spare_sum()
                self._clip_into([self._canaries.gradients(part, self.max_grad_norm).to(total.device)], [total])

    def clip_and_accumulate(self) -> None:
        """Add each patient's gradient, scaled to at most C, to the float64 sums."""
        self._clip_into(self.grad_samples, self._sums())

    def _clip_into(self, gradients: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Scale each row's whole gradient to at most C and add it up; :func:`clip_factors` has the argument."""
        bounds = norm_bounds(gradients)
        if len(bounds) > self._chunk:
            raise ValueError(
                f"Expected at most {self._chunk} patients at once, got {len(bounds)}; hand them over in chunks"
            )
        finite = torch.isfinite(bounds)
        if self._losses is not None:
            finite &= torch.isfinite(self._losses)
        factors = torch.where(finite, clip_factors(bounds, self.max_grad_norm, self._chunk), 0.0)
        silent = (~finite).nonzero()[:, 0]
        for gradient, total in zip(gradients, sums, strict=True):
            stored, order = as_stored(gradient)
            flat = flat_rows(stored)
            if len(silent):
                flat = flat.index_fill(0, silent, 0.0)  # zero times infinity is not a number
            total.permute(order).add_((factors.to(flat.dtype) @ flat).view(stored.shape[1:]))

    def _sums(self) -> list[Tensor]:
        """The float64 sum of every parameter: views of one vector, so that noise is drawn and rounded in one go.

        The spare coordinates are that vector's end.
        """
        if self._total is None:
            device = self.params[0].device
            sizes = [p.numel() for p in self.params]
            self._total = torch.zeros(sum(sizes) + self._spare_size, dtype=torch.float64, device=device)
            pieces = torch.split(self._total, [*sizes, self._spare_size])
            for parameter, piece in zip(self.params, pieces[:-1], strict=True):
                parameter.summed_grad = piece.view(parameter.shape)
        return [parameter.summed_grad for parameter in self.params]

    @property
    def _spare_size(self) -> int:
        return 0 if self._canaries is None else self._canaries.enrolled_D.size

    def _spare_sum(self) -> Tensor:
        self._sums()
        assert self._total is not None  # just made
        return self._total[len(self._total) - self._spare_size :]

    def add_noise(self) -> None:
        """Noise every sum, an empty one too, and put it on the public grid; from here on it may be seen."""
        self._sums()
        assert self._total is not None  # just made
        std = self.noise_multiplier * self.max_grad_norm
        network, spare = torch.split(self._total, [len(self._total) - self._spare_size, self._spare_size])
        sources = [(network, self._noise)] + ([(spare, self._canaries.noise)] if self._canaries is not None else [])
        for sums, source in sources:
            for part in torch.split(sums, BLOCK_VALUES):
                part.add_(source.gaussian(part.shape, std, dtype=torch.float64).to(part.device))
                part.copy_(to_grid(part, std))

    def scale_grad(self) -> None:
        """Divide by the public constant q * N_decl and round to the parameter's type."""
        for parameter, total in zip(self.params, self._sums(), strict=True):
            parameter.grad = (total / self.expected_batch_size).to(parameter.dtype)
            parameter.summed_grad = None
        if self._canaries is not None:
            self.spare_grad = self._spare_sum() / self.expected_batch_size
        self._total = None

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noise and scale what was accumulated; there is no skipping and no closure."""
        self.add_noise()
        self.scale_grad()
        return True

    def clear(self) -> None:
        """Forget every gradient and sum, whatever was interrupted."""
        for parameter in self.params:
            parameter.grad_sample, parameter.summed_grad, parameter.grad = None, None, None
        self._total, self.spare_grad = None, None
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False


def clip_factors(bounds_B: Tensor, clip: float, chunk: int) -> Tensor:
    """Factors (B,) that bring every patient to at most C, rounding of a chunk's float32 sum included.

    With gradients g_i and factors f_i, the float32 sum of n terms in any order is off by at most gamma_n sum |f_i g_i| in every
    coordinate, gamma_n = n u / (1 - n u), u = 2^-24 (Higham (2002), eq. 3.5). Replacing one patient by an empty record keeps
    rows and chunks, so the computed sum moves by at most max |f_i g_i| (1 + 2 n gamma_n) in L2: scaling to
    C / (1 + 2 n gamma_n) keeps it within C. n is the public size of a chunk, full or not, so that no patient's factor depends on
    how many others are there. For 16 patients that costs 3e-5 of the clip. Chunk sums are added up in float64.
    """
    gamma = chunk * 2.0**-24 / (1.0 - chunk * 2.0**-24)
    aimed = clip / ((1.0 + 2.0 * chunk * gamma) * (1.0 + 2.0**-20))  # the last for rounding factors to float32
    return aimed / torch.clamp(bounds_B, min=aimed)


def draw_patients(noise: NoiseSource, patients: int, sampling_rate: float) -> Tensor:
    """Poisson sample: the rows (int64) of the patients drawn, each independently with the public probability."""
    return torch.from_numpy((noise.uniform(patients) < sampling_rate).nonzero()[0])


def train_round(
    *,
    params: Mapping[str, Tensor],
    unit_loss: UnitLoss,
    patients: int,
    prepare: Prepare,
    stage: TrainingStage,
    n_decl: int,
    learning_rate: float,
    speed: Speed,
    noise: NoiseSource,
    optimizer_state: Mapping[str, Tensor] | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    on_step: Callable[[int, int], None] | None = None,
    hooks: ProvedHooks | None = None,
    canaries: SpareCanaries | None = None,
) -> RoundOutcome:
    """One round of ``stage.steps`` DP steps at one site.

    The sensitivity of every step's sum to zeroing one patient is at most ``stage.clip`` whatever that patient's values,
    ``unit_loss`` or the engine's chunks are, provided that ``unit_loss`` reads nothing but its unit (probe it).

    Args:
        params: the trainable parameters; copied, so an interrupted round changes nothing.
        unit_loss: scalar loss of one patient given parameters and unit.
        patients: number of real patients at this site, null ones included; private, used for sampling alone.
        prepare: ``prepare(rows, generator)`` gives the units of these patients (B-leading, in this order), with
            everything random already drawn; it is called per chunk and never for an empty batch.
        stage: a training stage of a calibrated plan.
        n_decl: declared capacity of the site; with the sampling rate it makes the divisor.
        learning_rate: of AdamW, constant in the round, public; likewise ``weight_decay`` and ``betas``.
        speed: engine and chunk; no influence on the guarantee.
        noise: source of noise, sampling coins and of the generator's seed.
        optimizer_state: what an earlier round returned, or None to start afresh.
        on_step: called with (steps done, steps) after each step; it learns nothing about patients.
        hooks: proof for engine ``hooks``.
        canaries: made-up patients in spare coordinates, or None; parameters and state are the same either way.

    Returns:
        New parameters and optimizer state, and what the auditor sees of the canaries.

    Raises:
        ValueError: the stage is not calibrated, or an argument breaks a rule stated above.
    """
    if not stage.calibrated:
        raise ValueError(f"stage {stage.name!r} is not calibrated; take it from DPPlan.calibrate(...)")
    if patients < 0 or not learning_rate > 0:
        raise ValueError(f"Expected patients={patients} >= 0 and learning_rate={learning_rate} > 0")
    if not params or any(not value.is_floating_point() for value in params.values()):
        raise ValueError("Expected at least one floating-point parameter to train; name the trained group")
    named = {name: nn.Parameter(value.detach().clone().to(torch.float32)) for name, value in params.items()}
    adam = torch.optim.AdamW(list(named.values()), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    _load_state(adam, named, optimizer_state)
    optimizer = StreamDPOptimizer(
        adam,
        sigma=stage.sigma,
        clip=stage.clip,
        divisor=stage.divisor(n_decl),
        noise=noise,
        chunk=speed.chunk,
        canaries=canaries,
    )
    generator = noise.torch_generator()
    spare = torch.zeros(0, dtype=torch.int64) if canaries is None else canaries.coordinates
    seen: list[NDArray[np.float64]] = []
    try:
        for step in range(stage.steps):
            drawn = draw_patients(noise, patients + len(spare), stage.sampling_rate)
            rows, others = drawn[drawn < patients], drawn[drawn >= patients] - patients
            for part in torch.split(rows, speed.chunk):
                if len(part):
                    units = prepare(part, generator)
                    if batch_size(units) != len(part):
                        raise ValueError(f"prepare() gave {batch_size(units)} units for a chunk of another size")
                    current = {name: parameter.detach() for name, parameter in named.items()}
                    gradients, losses = raw_gradients(unit_loss, current, units, speed.engine, hooks)
                    optimizer.accumulate(gradients, named, losses)
            if canaries is not None:
                optimizer.accumulate_canaries(spare[others])
            optimizer.step()
            if optimizer.spare_grad is not None:
                seen.append(optimizer.spare_grad.cpu().numpy() * (stage.divisor(n_decl) / stage.clip))
            optimizer.clear()
            if on_step is not None:
                on_step(step + 1, stage.steps)
    finally:
        optimizer.clear()
    return RoundOutcome(
        params={name: parameter.detach().clone() for name, parameter in named.items()},
        optimizer_state=_save_state(adam, named),
        steps=stage.steps,
        deterministic=noise.deterministic,
        spare_TD=np.stack(seen) if seen else None,
    )


def _save_state(adam: torch.optim.AdamW, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{moment}:{name}": adam.state[parameter][moment].detach().clone()
        for name, parameter in named.items()
        for moment in MOMENTS
    }


def _load_state(adam: torch.optim.AdamW, named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor] | None) -> None:
    if not state:
        return
    wanted = {f"{moment}:{name}" for name in named for moment in MOMENTS}
    if set(state) != wanted:
        odd = sorted(wanted ^ set(state))
        raise ValueError(
            f"optimizer state does not fit the trained parameters; first odd entry {odd[0]!r}; start afresh"
        )
    for name, parameter in named.items():
        moments = {moment: state[f"{moment}:{name}"].detach().clone() for moment in MOMENTS}
        if any(moments[moment].shape != parameter.shape for moment in MOMENTS[1:]):
            raise ValueError(f"optimizer state of {name!r} has another shape than the parameter; start afresh")
        adam.state[parameter] = moments
