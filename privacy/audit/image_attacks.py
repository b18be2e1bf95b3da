"""Membership attacks on released images: scores per patient, with a planted leak, dealt labels and worst cases beside.

An attack scores images; a patient's score is the largest of their images' for attacks that look for a match, and the mean
for those that look for density. Controls and counts are those of tables (:mod:`privacy.audit.table_attacks`).

Shape legend: N images · P patients · D components

Covered
    - Match: likeness with the nearest image, plain, registered, and over likeness with the nearest image of the population.
    - Density and classifier on the whitened leading components of coarse features. Each is compared with a reference where
      there is one, else with the held-out patients of the other half.
    - A planted leak: one image each of a tenth of the members joins the cohort, under faint noise.

Not covered
    - Attackers with shadow models, or with weights learned on such images: likeness here is arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from privacy.audit.bounds import auc
from privacy.audit.density import domias_score
from privacy.audit.discriminator import classifier_score
from privacy.audit.image_copies import Pictures, Resemblance, resemblance
from privacy.audit.likeness import Floats, Likeness, Pixels
from privacy.audit.mixed import Columns
from privacy.audit.table_attacks import NULL_DRAWS, PLANTED_SHARE, Attacked, blind_thresholds, count
from privacy.audit.validity import null_control

ImageAttack = Literal["nearest-image", "registered-image", "nearest-ratio", "domias", "classifier"]
IMAGE_ATTACKS: tuple[ImageAttack, ...] = get_args(ImageAttack)
COMPONENTS = 16
_FEWEST_WORST = 11
_FAINT = 0.05  # noise on planted copies, in spreads of the image: no generator copies bit for bit
_COHORT = "the synthetic images and an image of the patient"
_REFERENCE = f"{_COHORT}, and images of the population"


@dataclasses.dataclass(frozen=True)
class Half:
    """Patients who are compared with one reference.

    Attributes:
        member, held_out: their numbers in the pool.
        reference: images of the population, of neither.
    """

    member: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    reference: Pictures


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything that attacks look at.

    Attributes:
        likeness: fitted to the pool.
        pool: members, then held-out patients; every one has an image. Both are scored in one call, so that nothing falls
            differently for them.
        members: number of members.
        cohort: the released images.
        halves: from :func:`halves`.
        seen: the pool's resemblance to the cohort.
        easy: which patients of the pool are easiest to recognise.
    """

    likeness: Likeness
    pool: Pictures
    members: int
    cohort: Pictures
    halves: tuple[Half, ...]
    seen: Resemblance
    easy: npt.NDArray[np.bool_]

    def split(self, score_P: Floats) -> tuple[Floats, Floats]:
        """Members' and held-out patients' part."""
        return score_P[: self.members], score_P[self.members :]


def halves(
    pool: Pictures, members: int, reference: Pictures | None, generator: np.random.Generator
) -> tuple[Half, ...]:
    """One group with the reference; without one, two that take it from each other's held-out patients."""
    held_out = pool.patients - members
    if reference is not None:
        return (Half(np.arange(members), members + np.arange(held_out), reference),)
    side = np.concatenate([generator.permutation(np.arange(size) % 2) for size in (members, held_out)])
    inside = np.arange(pool.patients) < members
    return tuple(
        Half(
            np.flatnonzero(inside & (side == half)),
            np.flatnonzero(~inside & (side == half)),
            pool.taken(np.flatnonzero((~inside & (side != half))[pool.owner_N])),
        )
        for half in (0, 1)
    )


def run(
    scene: Scene, generator: np.random.Generator, progress: Callable[[str], None] = lambda step: None
) -> list[Attacked]:
    """All attacks with their controls.

    Args:
        scene: the images.
        generator: planted copies, fits, dealt labels.
        progress: told each attack's name before it starts.
    """
    progress("planted leak")
    chosen, images = _plant(scene, generator)
    planted = resemblance(scene.likeness, scene.pool, images)
    first = scene.halves[0]
    out = []
    for name in IMAGE_ATTACKS:
        progress(f"attack {name}")
        score, leaky = np.empty(scene.pool.patients), np.empty(0)
        for half in scene.halves:
            rows = np.concatenate([half.member, half.held_out])
            score[rows] = _score(name, scene, half, scene.seen, scene.cohort, generator)[rows]
        if name == "domias" or name == "classifier":
            leaky = _score(name, scene, first, planted, scene.cohort.joined(images), generator)
        else:  # the rest of the cohort is as before, so the larger of both is the score with the leaky cohort
            leaky = np.maximum(score, _score(name, scene, first, planted, images, generator))
        sides = scene.split(score)
        thresholds = blind_thresholds(*sides)
        worst_m, worst_h = (own[easy] for own, easy in zip(sides, np.split(scene.easy, [scene.members]), strict=True))
        worst = None
        if min(len(worst_m), len(worst_h)) >= _FEWEST_WORST:
            worst = count(worst_m, worst_h, blind_thresholds(worst_m, worst_h))
        alarms = sum(auc(null_control(*sides, thresholds, generator)).low > 0.5 for _ in range(NULL_DRAWS))
        access = _COHORT if name in ("nearest-image", "registered-image") else _REFERENCE
        control = count(leaky[chosen], leaky[first.held_out], thresholds)
        diagnostic = name == "nearest-image"
        out.append(Attacked(name, access, diagnostic, count(*sides, thresholds), control, worst, alarms / NULL_DRAWS))
    return out


def _plant(scene: Scene, generator: np.random.Generator) -> tuple[npt.NDArray[np.int64], Pictures]:
    """Members of the first half, and an image of each for the cohort."""
    able = scene.halves[0].member
    chosen = np.sort(generator.choice(able, max(1, round(PLANTED_SHARE * len(able))), replace=False))
    first = np.unique(scene.pool.owner_N, return_index=True)[1]
    views = scene.pool.view_N[first[chosen]]
    faint = generator.normal(0.0, _FAINT, views.shape).astype(np.float32)
    return chosen, Pictures(views + faint, np.arange(len(views)), len(views))


def _score(
    name: ImageAttack, scene: Scene, half: Half, seen: Resemblance, cohort: Pictures, generator: np.random.Generator
) -> Floats:
    """(P,) scores of the whole pool."""
    match name:
        case "nearest-image":
            return seen.person_P
        case "registered-image":
            return seen.whole_P
        case "nearest-ratio":
            return seen.person_P - _nearest(scene.likeness, scene.pool, half.reference)
        case "domias" | "classifier":
            return _by_components(name, scene.likeness, scene.pool, cohort, half.reference, generator)


def _nearest(likeness: Likeness, people: Pictures, reference: Pictures) -> Floats:
    """Coarse likeness of each patient with the nearest image of the population."""
    own, others = likeness.features(people.view_N), likeness.features(reference.view_N)
    best = np.concatenate([(own[start : start + 512] @ others.T).max(axis=1) for start in range(0, len(own), 512)])
    return people.per_patient(best.astype(np.float64))


def _by_components(
    name: Literal["domias", "classifier"],
    likeness: Likeness,
    people: Pictures,
    cohort: Pictures,
    reference: Pictures,
    generator: np.random.Generator,
) -> Floats:
    """An attack on tables, asked about the components of every image; the mean of a patient's images."""
    known = likeness.features(reference.view_N)
    turn = directions(known, COMPONENTS)
    asked, released, population = (
        np.asarray(features @ turn, np.float64)
        for features in (likeness.features(people.view_N), likeness.features(cohort.view_N), known)
    )
    columns = Columns(tuple(f"component {d}" for d in range(turn.shape[1])), ("numeric",) * turn.shape[1])
    if name == "domias":
        score = domias_score(columns, asked, released, population)
    else:
        score = classifier_score(columns, asked, released, population, generator)
    total, images = (np.bincount(people.owner_N, weight, people.patients) for weight in (score, None))
    return np.where(images > 0, total / np.maximum(images, 1), np.nan)


def directions(features_NF: Pixels, components: int) -> Pixels:
    """(F, D) leading directions of features, at most ``components``: their variances fall."""
    centred = features_NF - features_NF.mean(axis=0)
    if len(centred) < centred.shape[1]:
        values, left = np.linalg.eigh(centred @ centred.T)
        values, vectors = values[::-1], centred.T @ left[:, ::-1]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)
    else:
        values, vectors = np.linalg.eigh(centred.T @ centred)
        values, vectors = values[::-1], vectors[:, ::-1]
    kept: Sequence[int] = np.flatnonzero(values[:components] > 1e-6 * max(float(values[0]), 1e-12)).tolist()
    if not kept:
        raise ValueError("reference images do not differ; there is no density to compare")
    return np.asarray(vectors[:, kept], np.float32)
