"""The white-box canary audit: does a private round protect one patient as well as its plan says?

Stage: beside training, with the whole of :func:`privacy.training.train_round` in the middle and nothing of it replaced.

A *canary* is a made-up patient whose gradient is a multiple of one coordinate of an extra parameter that the network does
not use. Fair secret coins decide which canaries are enrolled; the auditor sees the noised gradient of every step and
guesses the coins. Each coordinate holds N(0, sigma²) or, where its canary was drawn, N(1, sigma²), in units of the clip:
the worst pair that the plan is accounted for, so the guesses can come close to the promise and may never pass it.

Covered
    * Sampler, clip, noise and divisor, as they run: canaries pass through the same calls as patients. Their raw gradient is
      larger than the clip, so that a clip that does not clip shows.
    * Canaries and patients do not touch: a canary's gradient is zero in every coordinate of the network, a patient's is
      zero in every canary coordinate. The result depends on coins and noise alone and may be published as it is;
      canaries are in no declared capacity, and :func:`dropped` takes their parameter out before an update leaves.
    * The guesses are the most powerful ones (Neyman and Pearson (1933)): likelihood ratios over all steps. Thresholds are
      fixed by the plan, before looking, and the bounds are corrected for their number.

Not covered
    * Whether a patient's gradient is that patient's alone: :mod:`privacy.probe` tries that.
    * Noise that is right in the canaries' parameter and wrong in another one; the tests of training look at each.
    * What leaves a site after the round. An audit refutes a promise or fails to; it proves none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy import accounting
from privacy.audit.attacks import counts_at
from privacy.audit.bounds import GaussianBound, ThresholdCounts, best_epsilon_lower_bound, best_gaussian_lower_bound
from privacy.engines import UnitLoss
from privacy.gradients import Speed
from privacy.noise import NoiseSource
from privacy.spare import STRENGTH
from privacy.stages import TrainingStage
from privacy.training import Prepare, train_round

Floats = NDArray[np.float64]

CANARY = "canary"  # the extra parameter, and the field of a unit that says which coordinate is this canary's
AUDIT_DELTA = 1e-2  # where tens of thousands of trials can show most of a promise
GAUSSIAN_DELTA = 1e-5
CONFIDENCE = 0.999
PER_ARM = 50_000
PER_RUN = 1024
CHUNK = 64  # small: the clip leaves room for rounding that grows with the square of a chunk
SHARES = (-1.0, -0.5, 0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of epsilon: thresholds of the log-likelihood ratio


@dataclasses.dataclass(frozen=True)
class Enrolled:
    """The private arguments of ``train_round`` with the canaries that the coins chose put in beside the patients.

    Attributes:
        params: trained parameters and the canaries' own.
        unit_loss: loss of a patient or of a canary.
        patients: real patients and enrolled canaries.
        prepare: units of both; canaries stand behind the patients.
    """

    params: dict[str, Tensor]
    unit_loss: UnitLoss
    patients: int
    prepare: Prepare


def enrol(
    enrolled_D: NDArray[np.bool_],
    clip: float,
    *,
    params: Mapping[str, Tensor] | None = None,
    unit_loss: UnitLoss | None = None,
    patients: int = 0,
    prepare: Prepare | None = None,
    blank: Mapping[str, Tensor] | None = None,
    strength: float = STRENGTH,
) -> Enrolled:
    """Put canaries into the arguments of a round; without a network, the round consists of canaries alone.

    Args:
        enrolled_D: which of the D canaries are there; canary j owns coordinate j.
        clip: the stage's clip, in whose units gradients are made.
        params, unit_loss, patients, prepare: of the study, as ``train_round`` takes them; all or none.
        blank: one public unit (without batch axis) with the fields of ``prepare``'s; canaries carry it as their record.
        strength: raw gradient of a canary over the clip; at least 1.

    Raises:
        ValueError: no canary, a strength below 1, or a network of which a part is missing.
    """
    if enrolled_D.ndim != 1 or not enrolled_D.size or not strength >= 1:
        raise ValueError(f"Expected at least one canary and strength={strength} >= 1, got {enrolled_D.shape} canaries")
    given = (params is not None, unit_loss is not None, prepare is not None, blank is not None)
    if any(given) and not all(given):
        raise ValueError("Expected params, unit_loss, prepare and blank together; leave all out for canaries alone")
    if params is not None and CANARY in params:
        raise ValueError(f"a parameter is called {CANARY!r} already; rename it")
    coordinates = torch.from_numpy(np.flatnonzero(enrolled_D))
    fields = {name: value for name, value in (blank or {}).items()}

    def with_canaries(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        real, own = rows[rows < patients], rows[rows >= patients]
        vectors = torch.zeros(len(rows), enrolled_D.size)
        vectors[torch.arange(len(real), len(rows)), coordinates[own - patients]] = strength * clip
        units = prepare(real, generator) if prepare is not None and len(real) else {}
        order = torch.argsort(torch.cat([torch.nonzero(rows < patients), torch.nonzero(rows >= patients)]).flatten())
        out = {CANARY: vectors[order]}
        for name, value in fields.items():
            records = value.expand(len(own), *value.shape)
            out[name] = (torch.cat([units[name], records]) if len(real) else records)[order]
        return out

    def loss(weights: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        own = (weights[CANARY] * unit[CANARY]).sum()
        if unit_loss is None:
            return own
        rest = unit_loss(dropped(weights), dropped(unit))
        return torch.where(unit[CANARY].any(), torch.zeros_like(rest), rest) + own

    return Enrolled(
        params={**(params or {}), CANARY: torch.zeros(enrolled_D.size)},
        unit_loss=loss,
        patients=patients + len(coordinates),
        prepare=with_canaries,
    )


def dropped(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything but the canaries: what may leave, and what the network is called with."""
    return {name: value for name, value in values.items() if name != CANARY}


def coins(canaries: int, noise: NoiseSource) -> NDArray[np.bool_]:
    """A fair secret coin for each canary, from the stream that noise and sampling come from."""
    return noise.uniform(canaries) < 0.5


def noised_steps(
    arguments: Enrolled, stage: TrainingStage, n_decl: int, noise: NoiseSource, chunk: int = CHUNK
) -> Floats:
    """What a white-box attacker sees of the canaries: the noised sum of every step over the clip, (steps, D).

    The stage runs as rounds of one step that hand weights and optimizer state on, which is the same mechanism; each
    step's gradient is read back from AdamW's first moment (Kingma and Ba (2015), algorithm 1).
    """
    beta, one = 0.9, stage.model_copy(update={"steps": 1})
    params, state = arguments.params, None
    moment = np.zeros(arguments.params[CANARY].shape)
    seen = []
    for _ in range(stage.steps):
        outcome = train_round(
            params=params,
            unit_loss=arguments.unit_loss,
            patients=arguments.patients,
            prepare=arguments.prepare,
            stage=one,
            n_decl=n_decl,
            learning_rate=1e-3,
            speed=Speed("vmap", chunk),
            noise=noise,
            optimizer_state=state,
            betas=(beta, 0.98),
        )
        params, state = outcome.params, outcome.optimizer_state
        before, moment = moment, state[f"exp_avg:{CANARY}"].double().numpy()
        seen.append((moment - beta * before) / (1 - beta) * stage.divisor(n_decl) / stage.clip)
    return np.stack(seen)


def log_likelihood_ratio(seen_TD: Floats, sigma: float, sampling_rate: float) -> Floats:
    """Sum over steps of log((1 - q) + q exp((x - 1/2) / sigma²)), (D,): enrolled against absent, per coordinate.

    The density ratio of (1 - q) N(0, sigma²) + q N(1, sigma²) to N(0, sigma²), so no score has more power.

    >>> log_likelihood_ratio(np.array([[0.5, 1.5]]), 1.0, 1.0)
    array([0., 1.])
    """
    if not sigma > 0:
        raise ValueError(f"Expected sigma={sigma} > 0; a stage without noise promises nothing that could be audited")
    exponent = (np.asarray(seen_TD, np.float64) - 0.5) / sigma**2
    if sampling_rate == 1:
        return np.asarray(exponent.sum(axis=0))
    return np.asarray(np.logaddexp(np.log1p(-sampling_rate), np.log(sampling_rate) + exponent).sum(axis=0))


@dataclasses.dataclass(frozen=True)
class CanaryResult:
    """What an audit found beside what was promised.

    Attributes:
        counts: guesses at the thresholds that the plan fixed.
        epsilon_lower: Clopper-Pearson bound at ``delta``; any mechanism that keeps the promise stays below it.
        gaussian: bound on mu and its epsilon at 1e-5; carries the label that it holds for Gaussian-like mechanisms only.
        epsilon, epsilon_gaussian: promised at ``delta`` and at 1e-5 for these steps, by PLD.
        delta, confidence: of the Clopper-Pearson bound.
        deterministic: the noise can be repeated; the audit of a private run says False.
    """

    counts: ThresholdCounts
    epsilon_lower: float
    gaussian: GaussianBound
    epsilon: float
    epsilon_gaussian: float
    delta: float
    confidence: float
    deterministic: bool

    @property
    def refuted(self) -> bool:
        """Whether the counts refute the promise at this confidence. The Gaussian bound cannot: it is an estimate."""
        return self.epsilon_lower > self.epsilon


def thresholds(stage: TrainingStage, delta: float = AUDIT_DELTA) -> tuple[float, ...]:
    """Thresholds of the log-likelihood ratio: public shares of epsilon(delta), fixed before anything is looked at.

    The set where the ratio passes e^epsilon is the one at which (epsilon, delta) is tight; a little below it there are
    more hits to count.
    """
    promised = accounting.epsilon(stage.event(), delta)
    if not 0 < promised < np.inf:
        raise ValueError(f"stage {stage.name!r}: Expected a finite epsilon({delta:g}) > 0 to audit, got {promised}")
    return tuple(share * promised for share in SHARES)


def judge(
    scores: Floats,
    enrolled: NDArray[np.bool_],
    stage: TrainingStage,
    *,
    deterministic: bool,
    at: tuple[float, ...] | None = None,
    confidence: float = CONFIDENCE,
) -> CanaryResult:
    """Bounds from one score per trial and the coins, beside the promise of one round of the stage.

    Args:
        scores: higher means enrolled; likelihood ratios, or whatever a crafted attack computes.
        enrolled: the coins.
        stage: whose event is the promise: ``stage.steps`` steps.
        deterministic: of the noise source that was used.
        at: thresholds fixed before looking; None takes :func:`thresholds`.
        confidence: of each bound, after the correction for the number of thresholds.
    """
    fixed = thresholds(stage) if at is None else at
    inside, outside = scores[enrolled], scores[~enrolled]
    counts = ThresholdCounts(fixed, counts_at(inside, fixed), counts_at(outside, fixed), inside.size, outside.size)
    return CanaryResult(
        counts=counts,
        epsilon_lower=best_epsilon_lower_bound(counts, AUDIT_DELTA, confidence),
        gaussian=best_gaussian_lower_bound(counts, GAUSSIAN_DELTA, confidence),
        epsilon=accounting.epsilon(stage.event(), AUDIT_DELTA),
        epsilon_gaussian=accounting.epsilon(stage.event(), GAUSSIAN_DELTA),
        delta=AUDIT_DELTA,
        confidence=confidence,
        deterministic=deterministic,
    )


def audit(
    stage: TrainingStage, noise: NoiseSource, *, n_decl: int = 1000, per_arm: int = PER_ARM, per_run: int = PER_RUN
) -> CanaryResult:
    """Audit one round of a calibrated stage with ``per_arm`` canaries or a few more on either side of the coin.

    Canaries are asked for until both sides have enough, a decision that rests on coins alone. Memory: one chunk of
    ``per_run`` numbers per canary.
    """
    scores: list[Floats] = []
    present: list[NDArray[np.bool_]] = []
    inside = outside = 0
    while min(inside, outside) < per_arm:
        enrolled = coins(per_run, noise)
        seen = noised_steps(enrol(enrolled, stage.clip), stage, n_decl, noise)
        scores.append(log_likelihood_ratio(seen, stage.sigma, stage.sampling_rate))
        present.append(enrolled)
        inside, outside = inside + int(enrolled.sum()), outside + int((~enrolled).sum())
    return judge(np.concatenate(scores), np.concatenate(present), stage, deterministic=noise.deterministic)
