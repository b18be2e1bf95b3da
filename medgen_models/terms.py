"""The terms of the objective: what each number, category, withheld row, perturbed record and biomarker costs one patient.

Each function is one equation and returns one value per patient, visit and draw; none sees two patients. What a term needs
beside the tokens is public: positions of categories, linear read-outs of biomarkers that were fitted on public patients.

Shape legend: B patients, K noise draws, V visits, I instances, N tokens, W token width, R biomarkers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE
from medgen_models.layout import Categories, Layout

MARGIN = 0.2
"""By how much a squared error must grow when a patient's record is replaced by a perturbed one (Yao et al. (2024))."""
_LEAST_CHANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Readout:
    """Linear read-outs of biomarkers from an instance's clean tokens, fitted on public patients.

    Attributes:
        key: of the instance.
        names: of the biomarkers.
        weight_RD: on the instance's numbers, D = tokens times width; divided by the biomarker's public deviation.
        offset_R: value at zero tokens, in public deviations from the public mean.
        explained_R: share of the public variance that the read-out explains, on public patients left out of its fit.
        factor, level: records that it holds for, 1-based level of a factor (a sequence shows a volume in its own contrast);
            an empty factor stands for all.
    """

    key: str
    names: tuple[str, ...]
    weight_RD: Tensor
    offset_R: Tensor
    explained_R: Tensor
    factor: str = ""
    level: int = 0

    def applies(self, factor_BKVIF: Tensor, layout: Layout) -> Tensor:
        """1 where a record is one that this holds for (B, K, V)."""
        if not self.factor:
            return torch.ones(factor_BKVIF.shape[:-2])
        f = [factor.name for factor in layout.factors].index(self.factor)
        return (factor_BKVIF[..., layout.place(self.key), f] == self.level).float()


@dataclasses.dataclass(frozen=True)
class Objective:
    """Everything public that a loss reads.

    Attributes:
        layout: of the study.
        onehot_NI, categories: of the layout.
        cap: largest weight of the clean-token error.
        hinge, label, biomarker: weights of the terms; 0 leaves one out, and its cost.
        readouts: biomarkers.
    """

    layout: Layout
    onehot_NI: Tensor
    categories: Categories
    cap: float = 6.0
    hinge: float = 0.0
    label: float = 0.0
    biomarker: float = 0.0
    readouts: tuple[Readout, ...] = ()


def squared_error(clean: Tensor, z: Tensor, weight: Tensor, categories: Categories) -> Tensor:
    """Weighted squared error of the numbers of each token (..., N); categories are left to :func:`cross_entropy`."""
    return ((clean - z).square() * weight * (1.0 - categories.mask_NW)).sum(-1)


def cross_entropy(clean: Tensor, z: Tensor, categories: Categories) -> Tensor:
    """-log of the chance that the expected code gives to the true level (..., N), in nats; 0 where no level is coded."""
    share_N1, spread_N1 = 1.0 / categories.levels_N1, categories.spread_N1
    chance = clean * spread_N1 + share_N1
    truth = (z * spread_N1 + share_N1) * categories.mask_NW
    coded_N = categories.mask_NW.amax(-1)
    return -((chance * truth).sum(-1) + (1.0 - coded_N)).clamp(_LEAST_CHANCE, 1.0).log() * coded_N


def token_errors(clean: Tensor, z: Tensor, weight: Tensor, categories: Categories) -> Tensor:
    """What each token costs (..., N): squared error of its numbers, cross-entropy of its category where recorded."""
    recorded = (weight * categories.mask_NW).sum(-1)
    return squared_error(clean, z, weight, categories) + recorded * cross_entropy(clean, z, categories)


def label_loss(clean: Tensor, z: Tensor, weight: Tensor, state: Tensor, objective: Objective) -> Tensor:
    """Mean cross-entropy of the recorded categories of a row that the state withholds (B, K, V); 0 where none is.

    The auxiliary label head of Yao et al. (2024), with the row's categories as labels: what is seen of the patient must
    tell them.
    """
    categories, onehot_NI = objective.categories, objective.onehot_NI
    withheld_BKVN = (state == ABSENT).to(z.dtype) @ onehot_NI.mT
    recorded_BKVN = (weight * categories.mask_NW).sum(-1) * withheld_BKVN
    loss = (recorded_BKVN * cross_entropy(clean, z, categories)).sum(-1)
    return loss / recorded_BKVN.sum(-1).clamp_min(1e-6)


def biomarker_loss(
    clean: Tensor, z: Tensor, scale: Tensor, target: Tensor, factor: Tensor, objective: Objective
) -> Tensor:
    """Squared error of each biomarker read from predicted and from true tokens (B, K, V), in public deviations.

    A mean over the biomarkers of a read-out, weighted by its instance's time as the tokens are, and over the read-outs that
    the patient's own target instances have.
    """
    layout = objective.layout
    total, count = torch.zeros_like(scale[..., 0]), torch.zeros_like(scale[..., 0])
    for readout in objective.readouts:
        i = layout.place(readout.key)
        wrong = (clean - z)[..., layout.span(i), : layout.width_I[i]].flatten(-2)
        error = (wrong @ readout.weight_RD.mT).square().mean(-1)
        here = target[..., i] * readout.applies(factor, layout)
        total = total + error * scale[..., i] * here
        count = count + here
    return total / count.clamp_min(1.0)


def updated_targets(state: Tensor, layout: Layout) -> Tensor:
    """1 for each noised instance whose reference is given as such (..., I): what an update draws."""
    out = torch.zeros(state.shape, dtype=torch.float32, device=state.device)
    for reference, target in enumerate(layout.references()):
        if target >= 0:
            here = ((state[..., reference] == REFERENCE) & (state[..., target] == NOISED)).to(out.dtype)
            out = out + here[..., None] * torch.eye(layout.instances, device=state.device)[target]
    return out.clamp_max(1.0)


def perturbed(x: Tensor, noise: Tensor, state: Tensor, objective: Objective) -> Tensor:
    """``x`` with the given row, series and notes replaced by half themselves and half noise (Yao et al. (2024))."""
    record_I = torch.tensor(objective.layout.of_kind("table", "series", "text"), device=x.device)
    given_N1 = (((state == GIVEN) & record_I).to(x.dtype) @ objective.onehot_NI.mT)[..., None]
    return x + given_N1 * (0.5 * noise - 0.5 * x)


def hinge_loss(
    clean: Tensor, other: Tensor, z: Tensor, weight: Tensor, t: Tensor, state: Tensor, objective: Objective
) -> Tensor:
    """How far the error under the patient's own record is from being smaller than under a perturbed one (B, K, V).

    mean relu(d+ - d- + margin) over the numbers of updated instances, times t: where noise is high, the record matters
    (Yao et al. (2024), the hinge with the weight 1 - alpha-bar).

    Args:
        clean, other: predictions with the true and with the perturbed record.
        z, weight, t, state: tokens, weights of the numbers, times and states.
        objective: the public rest.
    """
    onehot_NI, layout = objective.onehot_NI, objective.layout
    target_I = updated_targets(state, layout)
    apart = torch.relu((clean - z).square() - (other - z).square() + MARGIN) * weight
    per_instance = (apart.sum(-1) @ onehot_NI) / (weight.sum(-1) @ onehot_NI).clamp_min(1e-6)
    return (per_instance * t * target_I).sum(-1) / target_I.sum(-1).clamp_min(1.0)


def fit_readout(key: str, names: tuple[str, ...], tokens_BD: Tensor, values_BR: Tensor, ridge: float = 10.0) -> Readout:
    """Ridge regression of public biomarkers (NaN where not measured) on an instance's tokens.

    ``explained_R`` is measured by fitting on every other patient and predicting the rest.

    Raises:
        ValueError: fewer than eight patients with a biomarker.
    """
    weights, offsets, explained = [], [], []
    for r, name in enumerate(names):
        known = torch.isfinite(values_BR[:, r])
        x, y = tokens_BD[known].double(), values_BR[known, r].double()
        if len(y) < 8:
            raise ValueError(f"biomarker {name}: expected 8 public patients or more, got {len(y)}; leave it out")
        spread = y.std().clamp_min(1e-9)
        y = (y - y.mean()) / spread
        half_w, half_b = _ridge(x[::2], y[::2], ridge)
        rest = y[1::2] - x[1::2] @ half_w - half_b
        explained.append(1.0 - float(rest.square().mean() / y[1::2].var().clamp_min(1e-9)))
        weight_D, offset = _ridge(x, y, ridge)
        weights.append(weight_D)
        offsets.append(offset)
    return Readout(key, names, torch.stack(weights).float(), torch.stack(offsets).float(), torch.tensor(explained))


def _ridge(x_BD: Tensor, y_B: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    mean_D = x_BD.mean(dim=0)
    centred = x_BD - mean_D
    gram = centred.mT @ centred + ridge * torch.eye(x_BD.shape[1], dtype=x_BD.dtype)
    weight_D = torch.linalg.solve(gram, centred.mT @ (y_B - y_B.mean()))
    return weight_D, y_B.mean() - mean_D @ weight_D
