"""What the weights of a flow say about whether a patient trained it: one number per patient and slot, higher = member.

Everything here asks the core for the clean tokens of a point x_t = (1 - t) x + t e on the straight line from a patient's
record x to some noise e, and looks at how far its answer c(x_t, t) lies from x. Noise and velocity of the line are the same
answer in other units: with the predicted velocity v(x_t, t) = (x_t - c) / t and the predicted noise
n(x_t, t) = c + v = (x_t - (1 - t) c) / t,

    v - (e - x) = (x - c) / t        n - e = (1 - t) (x - c) / t                                      (1)

so attacks written for noise prediction carry over by choosing e and the norm:

====== ============================================ =================================================================
form   e                                            what is measured
====== ============================================ =================================================================
loss   fixed noises, the same for everybody         squared velocity error, for every time and noise
SimA   0                                            size of the predicted noise where there is none
PIA    the core's own answer near t = 0             how consistently it predicts that noise again later
SecMI  where the core's own flow leads              how much the velocity changes over one more step
====== ============================================ =================================================================

All of them ask as a draw of the whole patient is asked ("joint": everything is noised, nothing given, factors that a column
carries dropped), at times fixed in advance and the same for all patients and models. A slot that a patient lacks is NaN. A
patient's records of a slot are averaged before the logarithm is taken, so no patient counts twice; scores are minus logarithms
of errors, so that a difference between two models (a shadow model, the public start) is a ratio of errors.

Shape legend: B patients, V visits, I instances, N tokens, W token width, S slots, T times, K noises, D numbers of a record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.codecs.base import bounded
from medgen_models.codecs.vae import VaeCodec
from medgen_models.core import NOISED, TokenCore
from medgen_models.layout import Layout
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Slot
from medgen_models.tasks import states_for
from medgen_models.terms import token_errors
from medgen_models.tokens import TokenBatch

_LEAST = 1e-12


@dataclasses.dataclass(frozen=True)
class Queries:
    """Where the core is asked; public, fixed before looking, the same for every patient and model.

    Attributes:
        times, noises, seed: of the loss grid: T times in (0, 1), K noises drawn once from ``seed``.
        start: time in (0, 1) that stands for "hardly any noise" in PIA and SecMI.
        at: time of the SimA query and of the second PIA query.
        step, steps: SecMI inverts ``steps`` Euler steps of ``step`` from ``start``, then looks one step further.
        power: of the norm in SimA and PIA.
    """

    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    noises: int = 2
    seed: int = 20210
    start: float = 0.05
    at: float = 0.3
    step: float = 0.1
    steps: int = 2
    power: float = 4.0

    def __post_init__(self) -> None:
        """Refuse times outside (0, 1) and empty grids."""
        asked = (*self.times, self.start, self.at, self.start + self.step * (self.steps + 1))
        if not self.times or self.noises < 1 or self.steps < 1 or not all(0 < t < 1 for t in asked):
            raise ValueError(
                f"membership queries: expected noises and steps >= 1 and all times in (0, 1), got {self}; change them"
            )

    @property
    def passes(self) -> int:
        """Core passes per patient of :func:`signals`."""
        return len(self.times) * self.noises + self.steps + 4


@dataclasses.dataclass(frozen=True)
class Signals:
    """Scores of B patients, higher = more like a member; NaN where the patient has no record in the slot.

    Attributes:
        loss_BSTK: minus log loss at every time and noise, not averaged.
        sima_BS, pia_BS, secmi_BS: see :func:`signals`.
    """

    loss_BSTK: Tensor
    sima_BS: Tensor
    pia_BS: Tensor
    secmi_BS: Tensor

    @property
    def loss_BS(self) -> Tensor:
        """The grid's summary: the mean over times and noises of minus the log loss."""
        return self.loss_BSTK.mean(dim=(2, 3))

    def by_name(self) -> dict[str, Tensor]:
        """(B, S) by the name of the attack."""
        return {"loss-grid": self.loss_BS, "sima": self.sima_BS, "pia": self.pia_BS, "secmi": self.secmi_BS}

    def grid(self) -> Tensor:
        """(B, T K): minus log losses of the whole patient, the mean over the slots that they have; a null patient is NaN."""
        return self.loss_BSTK.nanmean(dim=1).flatten(1)


def per_patient(score_BS: Tensor) -> Tensor:
    """One score per patient (B,): the mean over the slots that they have, NaN for a null patient.

    A mean, not a sum: a sum of errors would grow with the number of slots whether or not anybody trained on them.
    """
    return score_BS.nanmean(dim=1)


def signals(core: TokenCore, tokens: TokenBatch, queries: Queries, cap: float = 6.0, chunk: int = 64) -> Signals:
    """All forms at once; ``queries.passes`` core passes per patient.

    *Loss* (Yeom et al. (2018); fixed noises reused for everybody as in Wu et al. (2025), "Tartan-Federer"): the training
    loss of each instance, min(1/t^2, cap) |c - x|^2 (by (1) the squared velocity error, capped), cross-entropy for
    categories.

    *SimA* (arXiv 2509.25003) scores -|n(x, t)|: a noise predictor that has learnt the training set answers with the offset
    from x to a mean of the training points near x, which is 0 at a training point of its own. On the straight line the
    points without noise are (1 - t) x, not x, so that is where the core is asked, and by (1) with e = 0
    n = (1 - t) (x - c) / t: one query.

    *PIA* (Kong et al. (2024), eq. 9) takes e from the core: e0 = n at ``start`` where there is no noise, then scores
    -|e0 - n(x_t, at)| on x_t = (1 - t) x + t e0. By (1) this is (1 - t) |x - c| / t. Two queries, one of them shared with
    SecMI. Their second form, which brings e0 to the size of normal noise first, is left out: a memorised patient's e0 is
    next to nothing, and blown up it is mostly the core's error, so that form ranks members *last* here.

    *SecMI* (Duan et al. (2023), eq. 9) inverts deterministically, x <- x + h v(x, t), from ``start`` to t_s, then goes one
    step forth and back, x' = x + h v(x, t_s), x'' = x' - h v(x', t_s + h), and scores -|x'' - x|^2. Here
    (x'' - x) / h = v(x, t_s) - v(x', t_s + h): how much the flow bends. A memorised patient's flow is the straight line to
    it and does not bend at all.

    Args:
        core: the denoiser.
        tokens: patients in the codec that belongs to this core.
        queries: where to ask.
        cap: of :class:`medgen_models.flow.FlowConfig`.
        chunk: patients per pass; memory only.
    """
    parts = [_signals(core, part, queries, cap) for part in _chunks(tokens, chunk)]
    if not parts:
        slots = len(core.layout.slots)
        none = torch.zeros(0, slots)
        return Signals(torch.zeros(0, slots, len(queries.times), queries.noises), none, none, none)
    names = [field.name for field in dataclasses.fields(Signals)]
    return Signals(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _chunks(tokens: TokenBatch, size: int) -> Iterator[TokenBatch]:
    for start in range(0, len(tokens), size):
        yield tokens.select(list(range(start, min(start + size, len(tokens)))))


@torch.no_grad()
def _signals(core: TokenCore, tokens: TokenBatch, queries: Queries, cap: float) -> Signals:
    asked = _Asked.of(core, tokens)
    z, layout = tokens.z_BVNW, core.layout
    generator = torch.Generator().manual_seed(queries.seed)
    noises = torch.randn(queries.noises, *z.shape[1:], generator=generator)
    categories = layout.categories()
    losses = []
    for t in queries.times:
        scale = min(1.0 / t**2, cap)
        errors = [token_errors(asked.clean((1 - t) * z + t * e, t), z, tokens.weight_BVNW, categories) for e in noises]
        losses.append(torch.stack([asked.by_slot(scale * error) for error in errors], dim=-1))
    loss_BSTK = -torch.stack(losses, dim=2).clamp_min(_LEAST).log()

    def noise_at(t: float) -> Tensor:
        """What the core takes for noise at the points without any."""
        return (1 - t) * (z - asked.clean((1 - t) * z, t)) / t * asked.number_BVNW

    t = queries.at
    sima_BS = asked.score(noise_at(t), queries.power)
    first = noise_at(queries.start)
    again = (1 - t) * (z - asked.clean((1 - t) * z + t * first, t)) / t * asked.number_BVNW
    pia_BS = asked.score(again, queries.power)

    t = queries.start
    x = (1 - t) * z
    v = first - (x - t * first) / (1 - t) * asked.number_BVNW  # n = c + v, with c from n: nothing is asked twice
    for _ in range(queries.steps):
        x, t = x + queries.step * v, t + queries.step
        v = asked.velocity(x, t)
    bend = v - asked.velocity(x + queries.step * v, t + queries.step)
    return Signals(loss_BSTK, sima_BS, pia_BS, asked.score(bend, 2.0))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A batch of patients ready to be asked about as a whole: everything recorded is noised."""

    core: TokenCore
    state_BVI: Tensor
    factor_BVIF: Tensor
    gap_BVI: Tensor
    onehot_NI: Tensor
    number_BVNW: Tensor  # 1 on every recorded number
    weight_BVI: Tensor  # of an instance in the loss
    count_BVI: Tensor  # recorded numbers of an instance

    @staticmethod
    def of(core: TokenCore, tokens: TokenBatch) -> _Asked:
        layout = core.layout
        onehot_NI = layout.onehot_NI()
        state = states_for("joint", layout, tokens.present_BVI)
        noised_BVN1 = ((state == NOISED).float() @ onehot_NI.mT)[..., None]
        number = (tokens.weight_BVNW > 0).float() * noised_BVN1
        of_row = torch.tensor(layout.row_factors(), dtype=torch.bool)
        weight = (tokens.weight_BVNW.sum(-1) @ onehot_NI) * (state == NOISED)
        factor, count = tokens.factor_BVIF * ~of_row, number.sum(-1) @ onehot_NI
        return _Asked(core, state, factor, tokens.gap_BVI, onehot_NI, number, weight, count)

    def clean(self, x_BVNW: Tensor, t: float) -> Tensor:
        """The core's clean tokens of points at time ``t``."""
        state = self.state_BVI.flatten(0, 1)
        out: Tensor = self.core(
            x_BVNW.flatten(0, 1),
            state,
            (state == NOISED).float() * t,
            self.factor_BVIF.flatten(0, 1),
            self.gap_BVI.flatten(0, 1),
        )
        return out.reshape(x_BVNW.shape)

    def velocity(self, x_BVNW: Tensor, t: float) -> Tensor:
        return (x_BVNW - self.clean(x_BVNW, t)) / t * self.number_BVNW

    def score(self, value_BVNW: Tensor, power: float) -> Tensor:
        """Minus the log of the power mean of a slot's recorded numbers (B, S)."""
        total_BVI = value_BVNW.abs().pow(power).sum(-1) @ self.onehot_NI
        mean_BS = _slot_mean(total_BVI / self.count_BVI.clamp_min(1.0), self.count_BVI > 0, self.core.layout)
        return -mean_BS.clamp_min(_LEAST).log() / power

    def by_slot(self, error_BVN: Tensor) -> Tensor:
        """Weighted mean of a slot's token errors (B, S)."""
        error_BVI = (error_BVN @ self.onehot_NI) / self.weight_BVI.clamp_min(1e-6)
        return _slot_mean(error_BVI, self.weight_BVI > 0, self.core.layout)


def _slot_mean(value_BVI: Tensor, here_BVI: Tensor, layout: Layout) -> Tensor:
    """Mean over a patient's records of each slot (B, S); NaN where there is none."""
    of_slot_IS = torch.zeros(layout.instances, len(layout.slots))
    of_slot_IS[torch.arange(layout.instances), torch.tensor(layout.slot_of_I)] = 1.0
    here = here_BVI.to(value_BVI.dtype)
    total, count = ((v.sum(dim=1) @ of_slot_IS) for v in (torch.where(here_BVI, value_BVI, 0.0), here))
    return torch.where(count > 0, total / count.clamp_min(1.0), torch.nan)


# --- codecs -----------------------------------------------------------------------------------------------------------


def reconstruction(bank: CodecBank, batch: PatientBatch) -> Tensor:
    """Minus the log of a codec's mean squared reconstruction error (B, S), in the codec's own units.

    An autoencoder restores the patients best who trained it (Hilprecht et al. (2019), sec. 4.2). Images and autoencoders
    only: codes of tables, series and notes restore everybody's values and say nothing, so those slots are NaN. A codec that
    was fitted on public patients alone cannot know a member either; its error is what the trained one's is compared with.
    """

    def error(slot: Slot, x: Tensor) -> Tensor | None:
        codec = bank.codecs[slot.name]
        if isinstance(codec, VaeCodec):
            known, weight = codec.features(x)
            weight = weight.expand_as(known)
            wrong = (codec.net.reconstruct(codec.net.posterior(known)[0]) - known).square() * weight
            return wrong.sum(dim=1) / weight.sum(dim=1).clamp_min(1e-6)
        if slot.kind in (*IMAGE_KINDS, "signal"):
            return (codec.decode(codec.encode(x)) - bounded(x)).square().flatten(1).mean(dim=1)
        return None

    return _of_records(bank, batch, error)


def evidence_bound(bank: CodecBank, batch: PatientBatch, draws: int, seed: int) -> Tensor:
    """Minus the log of the negative evidence bound of a slot's autoencoder (B, S), over ``draws`` fixed latent noises.

    The bound is the loss that training lowers (:meth:`medgen_models.codecs.vae.SlotVae.bound`); the noises are the same for
    all patients. NaN for slots without an autoencoder.

    Raises:
        ValueError: fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"evidence bound: expected draws >= 1, got {draws}; 4 are usual")

    def bound(slot: Slot, x: Tensor) -> Tensor | None:
        codec = bank.codecs[slot.name]
        if not isinstance(codec, VaeCodec):
            return None
        generator = torch.Generator().manual_seed(seed)
        known, weight = codec.features(x)
        total = torch.zeros(len(x))
        for noise_R in torch.randn(draws, codec.net.latent, generator=generator):
            total = total + codec.net(known, weight, noise_R.expand(len(x), -1))
        return total / draws

    return _of_records(bank, batch, bound)


@torch.no_grad()
def _of_records(bank: CodecBank, batch: PatientBatch, error: Callable[[Slot, Tensor], Tensor | None]) -> Tensor:
    """Minus the log of a patient's mean ``error`` in each slot (B, S); NaN where absent or not defined."""
    layout = bank.layout
    here_BVI = batch.present_BVI & batch.visit_BV[..., None]
    values_BVI = torch.zeros(here_BVI.shape)
    defined = torch.zeros(layout.instances, dtype=torch.bool)
    for i, (slot, _) in enumerate(layout.pairs()):
        found = error(slot, batch.values[layout.keys[i]].flatten(0, 1))
        if found is not None:
            values_BVI[:, :, i], defined[i] = found.reshape(here_BVI.shape[:2]), True
    return -_slot_mean(values_BVI, here_BVI & defined, layout).clamp_min(_LEAST).log()
