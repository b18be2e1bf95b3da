"""What missing instances are imputed with where there is no generative model: mean, nearest patient, ridge with a Gaussian.

All are fitted on the public patients that the model learned from, in token space, one fit per mask; a sequence label that
the model is told, they are told. Shape legend: B test patients, P public patients, F inputs, W token width, D numbers of a
target's tokens, K draws.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold

from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch

F64 = NDArray[np.float64]
_PENALTIES = np.logspace(0.0, 4.5, 13)
_FOLDS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Imputed:
    """A target as each baseline sees it for every test patient.

    Attributes:
        mean_BD: public mean among records of the same label.
        nearest_BD: the target of the nearest public patient with that label.
        ridge_BD: ridge regression on the given tokens; the mean where none are given.
        covariance_DD: of the ridge's errors on public patients left out of its fit.
        expected_gain_db: ridge over mean on those: how much the mask tells. Known before any test patient is looked at.
    """

    mean_BD: F64
    nearest_BD: F64
    ridge_BD: F64
    covariance_DD: F64
    expected_gain_db: float

    def gaussian_draws(self, draws: int, rng: np.random.Generator) -> F64:
        """Draws (K, B, D) around the ridge with its errors' covariance."""
        noise = rng.multivariate_normal(
            np.zeros(len(self.covariance_DD)), self.covariance_DD, (draws, len(self.ridge_BD)), method="eigh"
        )
        return np.asarray(self.ridge_BD + noise)


def impute(layout: Layout, public: TokenBatch, test: TokenBatch, given: tuple[str, ...], target: str) -> Imputed:
    """All baselines of one mask.

    Args:
        layout: of the study.
        public: public patients; those who lack the target, or something given, are left out of what needs it.
        test: patients who have the target and everything given.
        given: instance keys whose tokens may be read.
        target: the instance to impute.

    Raises:
        ValueError: fewer than ten public patients to learn from.
    """
    own, whole = having(layout, public, (target,)), having(layout, public, (*given, target))
    if len(whole) < 2 * _FOLDS:
        raise ValueError(f"impute {target}: {len(whole)} public patients have it and {given}; ten are the least")
    mean_BD = _label_means(label(layout, own, target), flat(layout, own, target), label(layout, test, target))
    y_PD = flat(layout, whole, target)
    x_PF, x_BF = (inputs(layout, patients, given, target) for patients in (whole, test))
    if not given:
        public_mean_PD = _label_means(
            label(layout, own, target), flat(layout, own, target), label(layout, whole, target)
        )
        return Imputed(mean_BD, mean_BD, mean_BD, np.cov((y_PD - public_mean_PD).T), 0.0)
    ridge_BD, left_PD = ridge(x_PF, y_PD, x_BF), left_out(x_PF, y_PD)
    apart_BP = _squared_distances(
        np.concatenate([flat(layout, test, key) for key in given], axis=1),
        np.concatenate([flat(layout, whole, key) for key in given], axis=1),
    )
    other_BP = label(layout, test, target)[:, None] != label(layout, whole, target)[None]
    nearest_BD = y_PD[np.where(other_BP, apart_BP + apart_BP.max() + 1.0, apart_BP).argmin(axis=1)]
    around_PD = y_PD - _label_means(label(layout, own, target), flat(layout, own, target), label(layout, whole, target))
    error_PD = y_PD - left_PD
    return Imputed(mean_BD, nearest_BD, ridge_BD, np.cov(error_PD.T), gain_db(error_PD, around_PD))


def gain_db(error_BD: F64, reference_BD: F64) -> float:
    """How far the mean square of ``error`` lies under that of ``reference``, in dB; positive is better.

    >>> round(gain_db(np.ones((2, 3)), 2 * np.ones((2, 3))), 2)
    6.02
    """
    return float(10.0 * np.log10(np.square(reference_BD).mean() / np.square(error_BD).mean()))


def having(layout: Layout, tokens: TokenBatch, keys: tuple[str, ...]) -> TokenBatch:
    """The patients who have all of ``keys`` at their first visit."""
    return tokens.select(tokens.present_BVI[:, 0, [layout.place(key) for key in keys]].all(1).nonzero().flatten())


def flat(layout: Layout, tokens: TokenBatch, key: str) -> F64:
    """All numbers (B, D) of one instance's tokens at the first visit."""
    return of_instance(layout, tokens.z_BVNW[:, 0].double().numpy(), key)


def of_instance(layout: Layout, z_BNW: F64, key: str) -> F64:
    """The same numbers of any array whose last axes are tokens and width: (..., D)."""
    i = layout.place(key)
    part = z_BNW[..., layout.span(i), : layout.width_I[i]]
    return part.reshape(*part.shape[:-2], -1)


def label(layout: Layout, tokens: TokenBatch, key: str) -> NDArray[np.int64]:
    """The free factors (those that no table column carries) of an instance as one number a patient (B,)."""
    i, out = layout.place(key), np.zeros(len(tokens), np.int64)
    for f, factor in enumerate(layout.factors):
        if not factor.column:
            out = out * (len(factor.levels) + 1) + tokens.factor_BVIF[:, 0, i, f].numpy()
    return out


def inputs(layout: Layout, tokens: TokenBatch, given: tuple[str, ...], target: str) -> F64:
    """What ridge reads (B, F): tokens of the given instances, and labels of these and of the target, one-hot.

    Labels are public levels, so test patients get the same columns as public ones.
    """
    parts = [flat(layout, tokens, key) for key in given]
    for key in (*given, target):
        i = layout.place(key)
        for f, factor in enumerate(layout.factors):
            if not factor.column and factor in layout.pairs()[i][0].factors:
                parts.append(np.eye(len(factor.levels) + 1)[tokens.factor_BVIF[:, 0, i, f].numpy()])
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(tokens), 0))


def ridge(x_PF: F64, y_PD: F64, x_BF: F64) -> F64:
    """Ridge regression on standardised inputs, its penalty per number of the target by generalised cross-validation."""
    centre_F, spread_F = x_PF.mean(axis=0), np.maximum(x_PF.std(axis=0), 1e-6)
    fitted = RidgeCV(_PENALTIES, alpha_per_target=True).fit((x_PF - centre_F) / spread_F, y_PD)
    return np.asarray(fitted.predict((x_BF - centre_F) / spread_F)).reshape(len(x_BF), -1)


def left_out(x_PF: F64, y_PD: F64) -> F64:
    """Predictions of each public patient by ridges that were fitted without him (five folds)."""
    out = np.zeros_like(y_PD)
    for fit, rest in KFold(_FOLDS, shuffle=True, random_state=0).split(x_PF):
        out[rest] = ridge(x_PF[fit], y_PD[fit], x_PF[rest])
    return out


def _label_means(own_P: NDArray[np.int64], y_PD: F64, wanted_B: NDArray[np.int64]) -> F64:
    """Mean over public patients with the same label, over all of them for a label that none has."""
    known = {int(k): y_PD[own_P == k].mean(axis=0) for k in np.unique(own_P)}
    return np.stack([known.get(int(k), y_PD.mean(axis=0)) for k in wanted_B]) if len(wanted_B) else y_PD[:0]


def _squared_distances(a_BF: F64, b_PF: F64) -> F64:
    return np.asarray((a_BF**2).sum(1)[:, None] - 2.0 * a_BF @ b_PF.T + (b_PF**2).sum(1)[None])
