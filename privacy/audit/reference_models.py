"""Attacks that compare a model with reference models: which of their training sets a patient was in is known.

A signal is one number per patient and model, higher = better fitted, on one scale for all models (minus the log loss at
fixed noises). K reference models (shadow models) were trained as the model under attack was, each on its own random part
of the attacker's patients. Scores are higher for members; what they prove is counted by :mod:`privacy.audit.bounds`.

Covered
    - LiRA, online and offline, with a variance per patient that is shrunk towards the common one, so that two to eight
      reference models are enough; the score of several signals is the sum over them.
    - RMIA, offline, against a public population; its score is a rank among public patients, so that a threshold of
      1 - r on it has a false-positive rate of about r before anybody looked at a patient.
    - A network that learns from reference models what membership looks like in a grid of losses.

Not covered
    - Who may train reference models: on private patients and without noise they are private themselves, and stay there.
    - Reference models trained in another way (fewer steps, another size), or too few: what is found stays true, and less is
      found. A better attacker may find more.

Shape legend: P patients, K reference models, Z public patients, J signals.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_LEAST_DEVIATION = 1e-6  # signals closer than this are one signal
_GRID = tuple(float(value) for value in np.linspace(0.0, 1.0, 11))


@dataclasses.dataclass(frozen=True)
class Reference:
    """What K reference models say of P patients, and whom each was trained on.

    Attributes:
        signal_PK: one signal per patient and model; a patient without data has NaN throughout.
        trained_PK: whether the patient was in the model's training set.
    """

    signal_PK: Floats
    trained_PK: Bools

    def __post_init__(self) -> None:
        shape = self.signal_PK.shape
        if self.signal_PK.ndim != 2 or shape[1] < 1 or self.trained_PK.shape != shape:
            raise ValueError(
                f"expected signals and coins of one shape (patients, models >= 1), got {shape} and {self.trained_PK.shape}"
            )

    @staticmethod
    def of(signal_PK: npt.ArrayLike, trained_PK: npt.ArrayLike | None = None) -> Reference:
        """From anything like arrays; without ``trained_PK`` no model saw any of these patients."""
        signal = np.asarray(signal_PK, np.float64)
        trained = np.zeros(signal.shape, bool) if trained_PK is None else np.asarray(trained_PK, bool)
        return Reference(signal, trained)


@dataclasses.dataclass(frozen=True)
class _Side:
    """Student-t predictive of the signal of one more model on one side, patient by patient."""

    count_P: Floats
    mean_P: Floats
    scale_P: Floats
    freedom_P: Floats


def lira_online(target_P: npt.ArrayLike, reference: Reference, prior: float = 4.0) -> Floats:
    """Log likelihood ratio "in against out" of the target's signal.

    Carlini et al. (2022), eq. 4, with the Student-t predictive of a normal sample under a conjugate prior on the variance, in
    the manner of Brännvall (2026): a patient's variance on a side with n models is

        v = (prior v0 + sum_k (s_k - mean)^2) / (prior + n - 1),

    v0 the common variance of that side (pooled over patients), and one more model's signal follows mean + sqrt(v (1 + 1/n)) t
    with prior + n - 1 degrees of freedom. With many models this is the plain likelihood ratio; with two it is nearly that of
    the common variance.

    Args:
        target_P: the attacked model's signals.
        reference: at least one model on each side of every patient.
        prior: number of observations that the common variance counts for, > 0.

    Returns:
        (P,) scores; minus infinity, never a hit, for a patient without data.

    Raises:
        ValueError: a patient whom no reference model, or every one, was trained on: there is nothing to compare.
    """
    target, reference = _checked(target_P, reference, prior)
    known = np.isfinite(target) & np.isfinite(reference.signal_PK).all(axis=1)
    sides = [_side(reference, side, known, prior) for side in (reference.trained_PK, ~reference.trained_PK)]
    if any(bool((side.count_P[known] < 1).any()) for side in sides):
        raise ValueError(
            "lira, online: some patient is on one side of all reference models; give each model a random half of them, or "
            "use the offline form"
        )
    ratio = _log_density(target, sides[0]) - _log_density(target, sides[1])
    return np.where(known, ratio, -np.inf)


def lira_offline(target_P: npt.ArrayLike, reference: Reference, prior: float = 4.0) -> Floats:
    """Minus the log p-value of the target's signal among models that were *not* trained on the patient.

    Carlini et al. (2022), sec. VI-A: P[signal of such a model < target], here under the predictive of :func:`lira_online`, on
    a logarithmic scale that does not end at 1. Needs one model without the patient, and no model with.

    Returns:
        (P,) scores >= 0; minus infinity for a patient without data.
    """
    target, reference = _checked(target_P, reference, prior)
    known = np.isfinite(target) & np.isfinite(reference.signal_PK).all(axis=1)
    out = _side(reference, ~reference.trained_PK, known, prior)
    if bool((out.count_P[known] < 1).any()):
        raise ValueError(
            "lira, offline: some patient is in every reference model's training set; leave some of them out"
        )
    standard = (target - out.mean_P) / out.scale_P
    score = -stats.t.logsf(np.where(known, standard, 0.0), out.freedom_P)
    return np.where(known, score, -np.inf)


def _checked(target_P: npt.ArrayLike, reference: Reference, prior: float) -> tuple[Floats, Reference]:
    target = np.asarray(target_P, np.float64)
    if target.shape != reference.signal_PK.shape[:1] or not prior > 0:
        raise ValueError(
            f"expected one target signal per patient and prior > 0, got shapes {target.shape}, "
            f"{reference.signal_PK.shape} and prior {prior}"
        )
    return target, reference


def _side(reference: Reference, side_PK: Bools, known_P: Bools, prior: float) -> _Side:
    """The predictive of one side; patients without data get that of nobody and are left out by the caller."""
    here = side_PK & known_P[:, None]
    signal = np.where(here, reference.signal_PK, 0.0)
    count = here.sum(axis=1).astype(np.float64)
    mean = signal.sum(axis=1) / np.maximum(count, 1.0)
    squares = (np.where(here, reference.signal_PK - mean[:, None], 0.0) ** 2).sum(axis=1)
    freedom = np.maximum(count - 1.0, 0.0)
    # with one model per patient nothing tells a common variance: the spread over patients stands in, which is too large
    spread = float(np.var(mean[count > 0])) if (count > 0).any() else 1.0
    common = float(squares.sum() / freedom.sum()) if freedom.sum() > 0 else spread
    variance = (prior * max(common, _LEAST_DEVIATION**2) + squares) / (prior + freedom)
    return _Side(count, mean, np.sqrt(variance * (1.0 + 1.0 / np.maximum(count, 1.0))), prior + freedom)


def _log_density(target: Floats, side: _Side) -> Floats:
    standard = np.where(np.isfinite(target), target - side.mean_P, 0.0) / side.scale_P
    return np.asarray(stats.t.logpdf(standard, side.freedom_P) - np.log(side.scale_P), np.float64)


# --- RMIA -------------------------------------------------------------------------------------------------------------


def rmia_offline(
    target_P: npt.ArrayLike,
    reference: Reference,
    target_Z: npt.ArrayLike,
    reference_ZK: npt.ArrayLike,
    offline_a: float,
    gamma: float = 1.0,
) -> Floats:
    """Share of public patients z that a patient x dominates: ratio_x >= gamma ratio_z.

    Zarifzadeh et al. (2024), eq. 2: ratio_x = P(x|model) / P(x) with P(x) = (P_in + P_out) / 2, where P_out is the mean over
    reference models without x and P_in, which an offline attacker lacks, is a guess. A signal is a log likelihood here, up to
    a constant that cancels in ratio_x / ratio_z. They guess P_in = a P_out + (1 - a), chances of a class, which end at 1; a
    likelihood has no such end, so the same is said of logarithms: log P_in = a log P_out + (1 - a) c with c the largest
    signal of a public patient under a reference model. With a = 1 nothing is gained by training on x.

    z is compared under the very reference models that were not trained on x. So where an x that nobody trained on is
    exchangeable with the public patients the score is uniform up to 1/Z, and a threshold of 1 - r lets a share r of them pass.

    Args:
        target_P: the attacked model's signals.
        reference: reference models' signals of the same patients; those of models that trained on x are not used.
        target_Z, reference_ZK: the same models' signals of public patients.
        offline_a: in [0, 1]; see :func:`fitted_offline_a`.
        gamma: > 0; above 1 asks for a margin.

    Returns:
        (P,) scores in [0, 1]; minus infinity for a patient without data.

    Raises:
        ValueError: no public patients, a patient whom every reference model trained on, or numbers out of range.
    """
    target, _ = _checked(target_P, reference, 1.0)
    public, public_K = np.asarray(target_Z, np.float64), np.asarray(reference_ZK, np.float64)
    if public.ndim != 1 or public_K.shape != (len(public), reference.signal_PK.shape[1]) or not len(public):
        raise ValueError(
            f"rmia: expected signals of public patients (Z >= 1) under {reference.signal_PK.shape[1]} reference models, got "
            f"{public.shape} and {public_K.shape}"
        )
    if not 0 <= offline_a <= 1 or not gamma > 0:
        raise ValueError(f"rmia: expected offline_a in [0, 1] and gamma > 0, got {offline_a} and {gamma}")
    there = np.isfinite(public) & np.isfinite(public_K).all(axis=1)
    if not there.any():
        raise ValueError("rmia: no public patient has signals that are finite; the population is empty")
    ceiling = float(public_K[there].max())
    known = np.isfinite(target) & np.isfinite(reference.signal_PK).all(axis=1)
    if bool(reference.trained_PK[known].all(axis=1).any()):
        raise ValueError("rmia: some patient is in every reference model's training set; leave some of them out")

    def log_ratio(own: Floats, others: Floats) -> Floats:
        log_out = special.logsumexp(others, axis=1) - math.log(others.shape[1])
        log_in = offline_a * log_out + (1 - offline_a) * ceiling
        return np.asarray(own - np.logaddexp(log_in, log_out) + math.log(2.0), np.float64)

    score = np.full(len(target), -np.inf)
    for used_K in np.unique(~reference.trained_PK[known], axis=0):
        rows = known & (~reference.trained_PK == used_K).all(axis=1)
        ratio_Z = np.sort(log_ratio(public[there], public_K[there][:, used_K]))
        ratio_P = log_ratio(target[rows], reference.signal_PK[rows][:, used_K])
        score[rows] = np.searchsorted(ratio_Z + math.log(gamma), ratio_P, side="right") / len(ratio_Z)
    return score


def fitted_offline_a(reference: Reference, reference_ZK: npt.ArrayLike) -> float:
    """The ``offline_a`` that works best against the reference models themselves: nothing is learnt about the target.

    Each model in turn plays the target; the others are its references (Zarifzadeh et al. (2024), app. B.2.2 fit it on one
    pair). The mean AUC over models decides, ties for the smallest.

    Raises:
        ValueError: no model can play the target: there are fewer than two, or their training sets do not differ.
    """
    public_K = np.asarray(reference_ZK, np.float64)
    models = reference.signal_PK.shape[1]
    quality = np.zeros(len(_GRID))
    played = 0
    for k in range(models if models > 1 else 0):
        others = [j for j in range(models) if j != k]
        usable = ~reference.trained_PK[:, others].all(axis=1) & np.isfinite(reference.signal_PK).all(axis=1)
        rest = Reference(reference.signal_PK[usable][:, others], reference.trained_PK[usable][:, others])
        member = reference.trained_PK[usable, k]
        if member.all() or not member.any():
            continue
        played += 1
        for place, a in enumerate(_GRID):
            score = rmia_offline(reference.signal_PK[usable, k], rest, public_K[:, k], public_K[:, others], a)
            quality[place] += _auc(score, member)
    if not played:
        raise ValueError(
            f"rmia: {models} reference models cannot stand in for the target, each with patients on both sides whom "
            "another one was not trained on; train four on random halves, or take offline_a = 1"
        )
    return _GRID[int(np.argmax(np.round(quality, 9)))]


def _auc(score: Floats, member: Bools) -> float:
    ranks = stats.rankdata(score)
    inside = int(member.sum())
    return float((ranks[member].sum() - inside * (inside + 1) / 2) / (inside * (len(score) - inside)))


# --- a network over the grid of losses --------------------------------------------------------------------------------


def learned_scores(
    target_PJ: npt.ArrayLike, reference_PKJ: npt.ArrayLike, trained_PK: npt.ArrayLike, seed: int, hidden: int = 100
) -> Floats:
    """Log odds of membership by a network that was trained on reference models' grids of signals, not averaged first.

    Wu et al. (2025), "Tartan-Federer" (winner of the MIDST challenge): losses at fixed times and noises, one hidden layer,
    labels from models whose training sets are known. Signals are standardised by the reference models' own.

    Args:
        target_PJ: the attacked model's J signals of each patient.
        reference_PKJ: the same of K reference models.
        trained_PK: whom each of them was trained on.
        seed: of the network's start.
        hidden: width.

    Returns:
        (P,) scores; minus infinity where a signal of the patient is not finite.

    Raises:
        ValueError: shapes that do not fit, or reference models that all have the same coin for everybody.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    target, known_PKJ = np.asarray(target_PJ, np.float64), np.asarray(reference_PKJ, np.float64)
    coins = np.asarray(trained_PK, bool)
    if target.ndim != 2 or known_PKJ.ndim != 3 or coins.shape != known_PKJ.shape[:2]:
        raise ValueError(f"learned attack: shapes {target.shape}, {known_PKJ.shape} and {coins.shape} do not fit")
    if target.shape != (len(known_PKJ), known_PKJ.shape[2]):
        raise ValueError(f"learned attack: expected the target's signals for the same patients, got {target.shape}")
    rows, labels = known_PKJ.reshape(-1, known_PKJ.shape[2]), coins.ravel()
    finite = np.isfinite(rows).all(axis=1)
    rows, labels = rows[finite], labels[finite]
    if not len(labels) or labels.all() or not labels.any():
        raise ValueError(
            "learned attack: needs patients on both sides of the reference models; give each a random half"
        )
    middle, size = rows.mean(axis=0), np.maximum(rows.std(axis=0), _LEAST_DEVIATION)
    network = MLPClassifier((hidden,), alpha=1.0, solver="lbfgs", max_iter=200, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is part of the method: it regularises
        network.fit((rows - middle) / size, labels)
    here = np.isfinite(target).all(axis=1)
    score = np.full(len(target), -np.inf)
    if here.any():
        chance = network.predict_proba((target[here] - middle) / size)[:, 1]
        score[here] = special.logit(np.clip(chance, 1e-12, 1 - 1e-12))
    return score
