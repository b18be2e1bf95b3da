"""Scores of members and held-out patients under every attack that a plan can name; higher means more like a member.

Both sides are scored in one batch by code that is not told who is who. Scores stay on site: only counts at the plan's
thresholds leave (:mod:`client.evidence`).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from numpy.typing import NDArray

from client.pictures import Alike, alike
from medgen_models.assembly import StudyModel
from medgen_models.flow import fixed_losses
from medgen_models.membership import Queries, per_patient, reconstruction, signals
from medgen_models.patient_features import features_of
from medgen_models.schema import PatientBatch
from medgen_models.tokens import TokenBatch
from privacy.audit.attacks import copied, nearest_neighbour_score, token_distance
from privacy.audit.cohort_attacks import cohort_score, recognisable
from privacy.audit.population import Features, Lens
from privacy.audit.validity import blind_scores
from privacy.boundary.audit import JOINT, Attack
from privacy.boundary.refusals import Refused

Floats = NDArray[np.float64]
COPY_TOLERANCE = 1e-3  # root mean square of token differences, in units of their public spread
FEWEST_BLIND = 4
SEED = 20210  # of the fixed noise: public, the same for every patient and site


@dataclasses.dataclass(frozen=True)
class Sides:
    """Scores of the sampled members and of the held-out patients under one attack."""

    member: Floats
    held_out: Floats


@dataclasses.dataclass(frozen=True, eq=False)
class Attacked:
    """The patients and what an attacker may hold.

    Attributes:
        model: final weights, and the public ones.
        lens: public patients, and how patients are looked at; None where the plan has none.
        member, held_out: the sampled patients.
        cohort: the candidate, from its files.
        draws: fixed (time, noise) draws of the loss attacks.
    """

    model: StudyModel
    lens: Lens | None
    member: PatientBatch
    held_out: PatientBatch
    cohort: PatientBatch
    draws: int

    def sides(self, attack: Attack) -> Sides:
        """Scores under one attack; NaN, never a hit, where a patient has nothing that it looks at.

        Raises:
            Refused: ``BAD_PLAN`` for an attack that this version does not know, or one that needs public patients.
        """
        scores = self._scores(attack.name, attack.scope)
        size = len(self.member)
        return Sides(scores[:size], scores[size:])

    def recognisable(self) -> Sides:
        """How easy each patient is to recognise; 0 for all without public patients."""
        if self.lens is None:
            return Sides(np.zeros(len(self.member)), np.zeros(len(self.held_out)))
        found = recognisable(self.lens, self.features)
        return Sides(found[: len(self.member)], found[len(self.member) :])

    def nearest(self, scope: str) -> tuple[NDArray[np.int64], Floats]:
        """The nearest synthetic patient of everybody, members first, and how far it lies (infinite without a record)."""
        distance = self._distance(scope)
        return distance.argmin(axis=1), distance.min(axis=1)

    @functools.cached_property
    def both(self) -> PatientBatch:
        """Members, then held-out patients."""
        return PatientBatch.concat([self.member, self.held_out])

    @functools.cached_property
    def features(self) -> Features:
        """Of both, by the public codecs."""
        return features_of(self.model.public.bank, self.both)

    @functools.cached_property
    def cohort_features(self) -> Features:
        """Of the candidate, by the public codecs."""
        return features_of(self.model.public.bank, self.cohort)

    def _scores(self, name: str, scope: str) -> Floats:
        match name:
            case "loss":
                return -self._final_loss
            case "loss-ratio":
                return np.asarray(self._public_loss - self._final_loss, np.float64)
            case "loss-grid" | "sima" | "pia" | "secmi":
                gain = self._signals[name]
                return _double(per_patient(gain) if scope == JOINT else gain[:, self._slot(scope)])
            case "reconstruction":
                return self._reconstruction[:, self._slot(scope)]
            case "nearest-neighbour":
                with np.errstate(divide="ignore"):
                    return np.asarray(-np.log(-nearest_neighbour_score(self._distance(scope))), np.float64)
            case "copies":
                return copied(self._distance(scope), COPY_TOLERANCE).astype(np.float64)
            case "image-copies":
                return self._alike(scope).copy_P
            case "recognition":
                return self._alike(scope).person_P
            case "blind":
                return self._blind()
            case "domias" | "gen-lra" | "classifier" | "nearest-ratio":
                if self.lens is None:
                    raise Refused("BAD_PLAN", f"attack {name} needs public patients, and the plan has none")
                return cohort_score(name, scope, self.lens, self.features, self.cohort_features)
            case _:
                raise Refused("BAD_PLAN", f"unknown attack {name}", "run the medgen version that the plan names")

    @functools.cached_property
    def _tokens(self) -> TokenBatch:
        return self.model.bank.encode(self.both)

    @functools.cached_property
    def _public_tokens(self) -> TokenBatch:
        return self.model.public.bank.encode(self.both)

    @functools.cached_property
    def _synthetic(self) -> TokenBatch:
        return self.model.bank.encode(self.cohort)

    @functools.cached_property
    def _final_loss(self) -> Floats:
        tokens, flow = self._tokens, self.model.public.flow
        return _log_loss(fixed_losses(self.model.core, tokens, flow, self.draws, SEED), tokens)

    @functools.cached_property
    def _public_loss(self) -> Floats:
        tokens, public = self._public_tokens, self.model.public
        return _log_loss(fixed_losses(public.core, tokens, public.flow, self.draws, SEED), tokens)

    @functools.cached_property
    def _signals(self) -> dict[str, torch.Tensor]:
        """How much more the final core gives away than the public one, (B, S) by attack: patients' own difficulty cancels."""
        queries, cap = Queries(noises=1, seed=SEED), self.model.public.flow.cap
        final = signals(self.model.core, self._tokens, queries, cap).by_name()
        public = signals(self.model.public.core, self._public_tokens, queries, cap).by_name()
        return {name: value - public[name] for name, value in final.items()}

    @functools.cached_property
    def _reconstruction(self) -> Floats:
        return _double(reconstruction(self.model.bank, self.both) - reconstruction(self.model.public.bank, self.both))

    def _alike(self, scope: str) -> Alike:
        if scope not in self._pictures:
            schema = self.model.schema
            self._pictures[scope] = alike(schema.slot(scope), schema.keys(), self.both, self.cohort)
        return self._pictures[scope]

    @functools.cached_property
    def _pictures(self) -> dict[str, Alike]:
        return {}

    def _slot(self, scope: str) -> int:
        return self.model.layout.slots.index(scope)

    def _distance(self, scope: str) -> Floats:
        """Token distances (P, S) over a slot or over everything; infinite where two patients share nothing."""
        layout = self.model.layout
        spans = [layout.span(i) for i in (layout.members(scope) if scope != JOINT else range(layout.instances))]
        sides = []
        for tokens in (self._tokens, self._synthetic):
            for values in (tokens.z_BVNW, (tokens.weight_BVNW > 0).float()):
                sides.append(_double(torch.cat([values[:, :, span] for span in spans], dim=2).flatten(1)))
        return token_distance(sides[0], sides[2], sides[1], sides[3])

    def _blind(self) -> Floats:
        """Scores of a classifier that never saw the model; where a side is too small to fit one, nobody is a hit."""
        flat = _double(self._tokens.z_BVNW.flatten(1))
        size = len(self.member)
        if min(size, len(flat) - size) < FEWEST_BLIND:
            return np.full(len(flat), np.nan)
        return np.concatenate(blind_scores(flat[:size], flat[size:], np.random.default_rng(SEED)))


def _double(values: torch.Tensor) -> Floats:
    return np.asarray(values.double().numpy())


def _log_loss(losses: torch.Tensor, tokens: TokenBatch) -> Floats:
    """Log loss per patient; NaN for a null patient, who is never a hit."""
    values = losses.double().numpy()
    there = tokens.visit_BV.any(dim=1).numpy() & (values > 0)
    out = np.full(values.shape, np.nan)
    out[there] = np.log(values[there])
    return out
