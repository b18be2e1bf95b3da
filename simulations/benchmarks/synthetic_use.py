"""What synthetic patients are used for beside training: to test on, and to choose among candidate predictors.

The task is the outcome from table and series. Real patients are held-out ones of the hospitals, dealt anew into thirds
for every split: to train on, to choose with, and to count. Training sets are of equal size. Scores are areas under the
curve; what is reported is the mean over splits. Candidates and their settings were fixed beforehand.

Shape legend: B patients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from medgen_models.heads import Family, Head, fit_outcome
from medgen_models.metrics.utility import Selection, Transfer, selection, transfer
from medgen_models.schema import PatientBatch, Schema
from simulations.benchmarks.task_figures import Figure

TARGET = "outcome"
SPLITS = 5


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to foretell the outcome.

    Attributes:
        name: in words.
        family: of the model.
        parts: features that it reads, None for all.
        patients: how many of the training patients it takes, None for all.
    """

    name: str
    family: Family
    parts: tuple[str, ...] | None = None
    patients: int | None = None

    def fit(self, schema: Schema, batch: PatientBatch, seed: int) -> Head:
        """The fitted predictor; the first patients of the batch are taken."""
        taken = batch if self.patients is None else batch.select(list(range(min(self.patients, len(batch)))))
        return fit_outcome(schema, taken, TARGET, seed, self.family, self.parts)


CANDIDATES: tuple[Candidate, ...] = (
    Candidate("linear, all", "linear"),
    Candidate("boosting, all", "boosting"),
    Candidate("linear, table", "linear", ("ehr",)),
    Candidate("boosting, table", "boosting", ("ehr",)),
    Candidate("linear, series", "linear", ("vitals",)),
    Candidate("boosting, series", "boosting", ("vitals",)),
    Candidate("linear, age and sex", "linear", ("age_years", "sex")),
    Candidate("linear, all, of 30 patients", "linear", None, 30),
)
MAIN = CANDIDATES[0]


def use_figures(
    schema: Schema, real: PatientBatch, synthetic: PatientBatch, public: PatientBatch, seed: int
) -> list[Figure]:
    """Training and testing on either side, and choosing a predictor with synthetic patients.

    Args:
        schema: of the study.
        real: held-out patients of the hospitals.
        synthetic: the cohort.
        public: public patients: what there was before any hospital was asked.
        seed: of splits and models.
    """
    transfers: list[Transfer] = []
    from_public: list[float] = []
    real_trained: dict[str, list[Selection]] = {"synthetic": [], "real": [], "public": []}
    synthetic_trained: list[Selection] = []
    halves = [synthetic.select([int(i) for i in part]) for part in np.array_split(np.arange(len(synthetic)), 2)]
    for split in range(SPLITS):
        train, choose, count = thirds(real, seed * SPLITS + split)
        size = min(len(train), len(halves[0]), len(public))
        sides = [_first(part, size) for part in (train, halves[0], public)]
        transfers.append(
            transfer(
                lambda part: MAIN.fit(schema, part, seed),
                lambda head, part: head.auc(schema, part),
                (sides[0], count),
                (sides[1], halves[1]),
            )
        )
        from_public.append(MAIN.fit(schema, sides[2], seed).auc(schema, count))
        heads = [candidate.fit(schema, sides[0], seed) for candidate in CANDIDATES]
        truth = _scores(schema, heads, count)
        for name, part in (("synthetic", synthetic), ("real", choose), ("public", public)):
            real_trained[name].append(_selected(_scores(schema, heads, part), truth))
        own = [candidate.fit(schema, sides[1], seed) for candidate in CANDIDATES]
        synthetic_trained.append(_selected(_scores(schema, own, halves[1]), _scores(schema, own, count)))
    scores = {
        name: _mean([getattr(each, name) for each in transfers])
        for name in ("real_to_real", "synthetic_to_real", "real_to_synthetic", "synthetic_to_synthetic")
    }
    trtr = {"train on real, test on real": scores["real_to_real"]}
    out = [
        Figure(
            "AUC of the outcome, train on synthetic, test on real",
            scores["synthetic_to_real"],
            peers={**trtr, "train on public, test on real": _mean(from_public)},
        ),
        Figure(
            "AUC of the outcome, train on real, test on synthetic",
            scores["real_to_synthetic"],
            peers={**trtr, "train on synthetic, test on synthetic": scores["synthetic_to_synthetic"]},
        ),
    ]
    chosen = real_trained["synthetic"]
    others = {f"chosen with {name} patients": found for name, found in real_trained.items() if name != "synthetic"}
    what = f"{len(CANDIDATES)} outcome predictors"
    out += [
        Figure(
            f"rank correlation of the scores of {what} trained on real patients, on synthetic against real patients",
            _mean([each.rank_correlation for each in chosen]),
            peers={name: _mean([each.rank_correlation for each in found]) for name, found in others.items()},
        ),
        Figure(
            f"AUC lost by choosing among {what} trained on real patients with synthetic ones",
            _mean([each.regret for each in chosen]),
            peers={
                **{name: _mean([each.regret for each in found]) for name, found in others.items()},
                "chosen at random": _mean([each.at_random for each in chosen]),
            },
        ),
        Figure(
            f"rank correlation of the scores of {what} trained on synthetic patients, on others of them against real patients",
            _mean([each.rank_correlation for each in synthetic_trained]),
        ),
        Figure(
            f"AUC lost by choosing among {what} trained on synthetic patients with others of them",
            _mean([each.regret for each in synthetic_trained]),
            peers={"chosen at random": _mean([each.at_random for each in synthetic_trained])},
        ),
    ]
    return out


def thirds(patients: PatientBatch, seed: int) -> tuple[PatientBatch, PatientBatch, PatientBatch]:
    """The patients dealt into three parts at random."""
    order = np.random.default_rng(seed).permutation(len(patients))
    first, second, third = (patients.select([int(i) for i in part]) for part in np.array_split(order, 3))
    return first, second, third


def _scores(schema: Schema, heads: Sequence[Head], patients: PatientBatch) -> list[float]:
    return [head.auc(schema, patients) for head in heads]


def _selected(scores: Sequence[float], real: Sequence[float]) -> Selection:
    """The selection, or one that says nothing where fewer than two candidates have a score on both sides."""
    if np.isfinite(np.asarray(scores) + np.asarray(real)).sum() < 2:
        return Selection(float("nan"), float("nan"), float("nan"), -1, -1)
    return selection(scores, real)


def _first(patients: PatientBatch, count: int) -> PatientBatch:
    return patients.select(list(range(count)))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
