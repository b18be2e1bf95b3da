"""Patients with two chest films and the record in between, what a model makes of the later film, and plain rivals of it.

The outcome is known only after the later film, so it is withheld from whatever predicts that film. A *twin* is the same
patient with one thing changed in the latent state: every record of the twin, its films among them, differs by that change
alone, noise included, so what a change does to the film is known exactly.

Shape legend: B patients, V visits, I instances, N tokens, T tokens of one film, W token width, Y, X pixels, D inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import TokenCore
from medgen_models.layout import Layout
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch, Schema
from medgen_models.tasks import states_for
from simulations import phantoms
from simulations.benchmarks.tasks_world import HOSPITALS, Place
from simulations.phantom_population import Latents, Profile

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]
CURRENT, PRIOR = "cxr.current", "cxr.prior"
AFTERWARDS: tuple[str, ...] = ("outcome",)
"""Columns that nobody knows when the later film is due."""
STALENESS: tuple[tuple[str, float, float], ...] = (
    ("under 12 h", 0.0, 12.0),
    ("12 to 24 h", 12.0, 24.0),
    ("24 to 36 h", 24.0, 36.0),
    ("36 h or more", 36.0, math.inf),
)
"""(words, from, below): hours between the films, in the classes of Yao et al. (2024)."""
_SERIAL, _CHUNK = 5_000_000, 64


class Model(Protocol):
    """What draws films: a study's model or a public one."""

    @property
    def bank(self) -> CodecBank:
        """Codecs."""
        ...

    @property
    def core(self) -> TokenCore:
        """Denoiser."""
        ...

    @property
    def layout(self) -> Layout:
        """Token layout."""
        ...


def serial_patients(
    place: Place, intervene: Callable[[Latents], Latents] | None = None
) -> tuple[PatientBatch, Latents]:
    """Patients with both films and vitals, nobody's training data, and what lies behind them; brains were not imaged.

    From the population of the public model, or from the hospitals in equal parts. Three times as many as there are test
    patients, because few films are taken within twelve hours. With ``intervene`` they are the twins, in the same order.
    """
    profiles = (Profile(),) if place.privacy == "public" else HOSPITALS
    schema, batches, latents = phantoms.demo_schema(), [], []
    for k, profile in enumerate(profiles):
        chest = dataclasses.replace(
            profile, mri_share=0.0, fdg_share=0.0, av45_share=0.0, cxr_share=1.0, prior_share=1.0, vitals_share=1.0
        )
        drawn = phantoms.make_patients(
            3 * place.sizes.test // len(profiles), _SERIAL + 10 * place.seed + k, chest, intervene
        )
        batches.append(phantoms.to_batch(schema, drawn))
        latents.append(drawn.latents)
    names = [field.name for field in dataclasses.fields(Latents)]
    return PatientBatch.concat(batches), Latents(
        **{name: np.concatenate([getattr(part, name) for part in latents]) for name in names}
    )


def exchanged_balance(latents: Latents) -> Latents:
    """Everybody with the next patient's fluid balance since the prior film; the overload at the later film follows."""
    late = np.roll(latents.fluid_late_ml_h, 1)
    current = np.clip(latents.fluid_prior_l + late * latents.gap_hours / 1000.0, 0.0, 4.5)
    return dataclasses.replace(latents, fluid_late_ml_h=late, fluid_current_l=current)


def other_household(latents: Latents) -> Latents:
    """Who lives alone lives with family and the other way round; the outcome stays what it was."""
    return dataclasses.replace(latents, lives_alone=1 - latents.lives_alone)


def withheld(
    schema: Schema, batch: PatientBatch, columns: Collection[str], slots: Collection[str] = ()
) -> PatientBatch:
    """``batch`` with table columns missing, and with everything of ``slots`` absent.

    Raises:
        ValueError: a column or slot that the study does not have.
    """
    names = [column.name for column in schema.table_columns()]
    unknown = (set(columns) - set(names)) | (set(slots) - {slot.name for slot in schema.slots})
    table = schema.table()
    if unknown or table is None:
        raise ValueError(f"withhold: this study has no {sorted(unknown) or 'table'}; name its columns and slots")
    key = table.key(table.instances[0])
    gone_C = torch.tensor([name in columns for name in names])
    values = dict(batch.values) | {key: torch.where(gone_C, torch.nan, batch.values[key])}
    gone_I = torch.tensor([slot.name in slots for slot, _ in schema.instances()])
    gone_F = torch.tensor([factor.column in columns for factor in schema.factors()])
    return dataclasses.replace(
        batch, values=values, present_BVI=batch.present_BVI & ~gone_I, factor_BVIF=batch.factor_BVIF * ~gone_F
    )


def with_both(schema: Schema, batch: PatientBatch) -> PatientBatch:
    """The patients of ``batch`` who have both films."""
    at = [schema.keys().index(key) for key in (CURRENT, PRIOR)]
    return batch.select(batch.present_BVI[:, 0, at].all(dim=1).nonzero().flatten())


def true_films(batch: PatientBatch, key: str = CURRENT) -> F64:
    """Recorded films (B, Y, X) in [-1, 1]."""
    return batch.values[key][:, 0].double().numpy()


def draw_tokens(model: Model, batch: PatientBatch, states_BVI: Tensor, steps: int, seed: int) -> Tensor:
    """Tokens (B, V, N, W) with what ``states_BVI`` calls noised drawn; one step gives its expectation.

    The same seed gives every patient the same noise, whatever the records say.
    """
    given = model.bank.encode(batch)
    noise = torch.randn(given.z_BVNW.shape, generator=torch.Generator().manual_seed(seed))
    drawn = []
    for start in range(0, len(batch), _CHUNK):
        rows = list(range(start, min(start + _CHUNK, len(batch))))
        drawn.append(
            sample(
                model.core,
                model.layout,
                given.select(rows),
                states_BVI[rows],
                generator=torch.Generator().manual_seed(seed),
                steps=steps,
                noise_BVNW=noise[rows],
            )
        )
    return torch.cat(drawn)


def film_tokens(model: Model, batch: PatientBatch, steps: int, seed: int) -> Tensor:
    """The later film of every patient, drawn from whatever else is present (B, T, W); see :func:`draw_tokens`."""
    layout = model.layout
    states_BVI = states_for("update", layout, batch.present_BVI, keys=(CURRENT,))
    i = layout.place(CURRENT)
    return draw_tokens(model, batch, states_BVI, steps, seed)[:, 0, layout.span(i), : layout.width_I[i]]


def decoded(bank: CodecBank, z_BTW: Tensor) -> F64:
    """Tokens of later films as films (B, Y, X)."""
    return bank.codecs["cxr"].decode(z_BTW + bank.centres[CURRENT]).clamp(-1.0, 1.0).double().numpy()


def encoded(bank: CodecBank, batch: PatientBatch, key: str = CURRENT) -> Tensor:
    """Recorded films as tokens (B, T, W)."""
    i = bank.layout.place(key)
    return bank.encode(batch).z_BVNW[:, 0, bank.layout.span(i), : bank.layout.width_I[i]]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRidge:
    """Ridge regression of the later film's tokens on those of the earlier film and of the record, and on the gap."""

    bank: CodecBank
    fitted: RidgeCV

    @staticmethod
    def fit(bank: CodecBank, batch: PatientBatch) -> TokenRidge:
        """Fit on patients with both films; the penalty is chosen by leaving each of them out."""
        with threadpool_limits(1):
            fitted = RidgeCV(np.logspace(-1, 5, 13)).fit(
                _inputs(bank, batch), encoded(bank, batch).flatten(1).double().numpy()
            )
        return TokenRidge(bank, fitted)

    def films(self, batch: PatientBatch) -> F64:
        """Expected later films (B, Y, X)."""
        i = self.bank.layout.place(CURRENT)
        shape = (len(batch), self.bank.layout.tokens_I[i], self.bank.layout.width_I[i])
        found = torch.from_numpy(self.fitted.predict(_inputs(self.bank, batch))).float()
        return decoded(self.bank, found.reshape(shape))


def _inputs(bank: CodecBank, batch: PatientBatch) -> F64:
    """(B, D): tokens of the earlier film, row, vitals and note, which of them there are, the gap and its logarithm."""
    layout, tokens = bank.layout, bank.encode(batch)
    chosen = [layout.place(PRIOR), *(i for i, there in enumerate(layout.of_kind("table", "series", "text")) if there)]
    parts = [tokens.z_BVNW[:, 0, layout.span(i), : layout.width_I[i]].flatten(1) for i in chosen]
    gap_B1 = tokens.gap_BVI[:, 0, [layout.place(PRIOR)]]
    parts += [tokens.present_BVI[:, 0, chosen].float(), gap_B1 / 24.0, torch.log1p(gap_B1)]
    return torch.cat(parts, dim=1).double().numpy()


def slope(change_B: F64, moved_B: F64) -> float:
    """Least-squares slope of ``moved`` on ``change`` through the origin; NaN where nothing changed.

    Through the origin, because a twin without a change is the same patient.

    >>> slope(np.array([1.0, -1.0, 2.0]), np.array([0.5, -0.5, 1.0]))
    0.5
    """
    size = float(change_B @ change_B)
    return float(change_B @ moved_B) / size if size > 0 else float("nan")
