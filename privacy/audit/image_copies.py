"""Copies and re-identification in released images: is a patient's image in the cohort more than a stranger's would be?

Likeness alone proves nothing: strangers look alike, more so among many. So every score is held against two controls: how
alike patients of the same hospitals are to each other (that sets the threshold), and how often patients who never trained
pass it (that is the baseline that members must exceed).

Shape legend: N images asked about · G images of the cohort · P patients · K candidates

Covered
    - Per patient: any image that passes makes the patient pass. Patients without an image of this slot never pass.
    - Whole images, registered over shifts, mirrored and zoomed; single slices of volumes; the same person in other images.
    - Thresholds that do not know who is a member, from as many strangers' images as the cohort has: a nearest neighbour is
      nearer in a larger crowd.

Not covered
    - A patient whose likeness was learned and whose image was not copied, beyond what the coarse features recognise:
      :func:`recognition` says how well they do that on real images. See :mod:`privacy.audit.likeness` for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from privacy.audit.attacks import counts_at
from privacy.audit.bounds import Interval, ThresholdCounts, clopper_pearson
from privacy.audit.likeness import Floats, Likeness, Pixels, neighbouring
from privacy.audit.mixed import row_blocks
from privacy.audit.multiplicity import excess_p_value

Ints = npt.NDArray[np.int64]

CANDIDATES = 6
"""Images of the cohort, in any form, that are registered with each image asked about."""
QUANTILE = 0.99
"""Of strangers' likeness, above which an image counts as too alike. Source: Dar et al. (2025), who take 0.95."""
VERBATIM = 0.95
"""Likeness from which somebody must look at the two images, however few they are."""
_NONE = -2.0  # below every likeness
_GALLERY_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images of patients, ready to be compared.

    Attributes:
        view_N: on the working grid of a :class:`Likeness`.
        owner_N: number of each image's patient, in [0, patients).
        patients: number of patients, those without an image included.
    """

    view_N: Pixels
    owner_N: Ints
    patients: int

    @classmethod
    def of(
        cls, likeness: Likeness, images_N: npt.ArrayLike, owner_N: npt.ArrayLike | None = None, patients: int = 0
    ) -> Pictures:
        """Prepare images.

        Args:
            likeness: what they are compared by.
            images_N: (N, D, ...) images of the reference's shape.
            owner_N: number of each image's patient; by default every image is a patient.
            patients: number of patients; by default as many as ``owner_N`` names.

        Raises:
            ValueError: another shape, a number that is not finite, or a patient out of range.
        """
        view = likeness.view(images_N)
        owner = np.arange(len(view)) if owner_N is None else np.asarray(owner_N, np.int64)
        named = int(owner.max()) + 1 if owner.size else 0
        patients = patients or named
        if owner.shape != (len(view),) or named > patients or (owner.size and owner.min() < 0):
            raise ValueError(f"expected a patient in [0, {patients}) for each of {len(view)} images")
        return cls(view, owner, patients)

    def joined(self, other: Pictures) -> Pictures:
        """Both, the patients of the second numbered after those of the first."""
        owner = np.concatenate([self.owner_N, other.owner_N + self.patients])
        return Pictures(np.concatenate([self.view_N, other.view_N]), owner, self.patients + other.patients)

    def taken(self, rows: Ints) -> Pictures:
        """Some of the images, with their patients' numbers."""
        return Pictures(self.view_N[rows], self.owner_N[rows], self.patients)

    def per_patient(self, score_N: Floats) -> Floats:
        """(P,) the largest score of each patient's images; NaN without an image."""
        out = np.full(self.patients, -np.inf)
        np.maximum.at(out, self.owner_N, score_N)
        return np.where(np.isneginf(out), np.nan, out)


@dataclasses.dataclass(frozen=True)
class Resemblance:
    """How alike each patient's images are to a cohort's: at most about one, NaN for a patient without an image.

    Attributes:
        whole_P: registered correlation with the most alike image, in any form.
        slice_P: the most alike slice at nearly the same place; None for films.
        person_P: coarse likeness with the most alike image: the score of re-identification.
        nearest_N, likeness_N: for each image, which image of the cohort is most alike, and how much.
    """

    whole_P: Floats
    slice_P: Floats | None
    person_P: Floats
    nearest_N: Ints
    likeness_N: Floats


def resemblance(likeness: Likeness, asked: Pictures, cohort: Pictures, strangers: bool = False) -> Resemblance:
    """Compare patients with a cohort.

    Threat model: the attacker holds the cohort and an image of the patient.

    Args:
        likeness: what images are compared by.
        asked: the patients.
        cohort: the released images.
        strangers: both number the same patients, and nobody is compared with their own images.

    Raises:
        ValueError: the cohort has no image.
    """
    if not len(cohort.view_N):
        raise ValueError("expected at least one image in the cohort, got 0")
    common = cohort.view_N.mean(axis=0, dtype=np.float64).astype(np.float32)
    place, form, known, person = _candidates(likeness, asked, cohort, strangers, common)
    whole = np.full(known.shape, _NONE)
    queries, ranks = np.nonzero(known)
    for number in likeness.variants():
        own = np.flatnonzero(form[queries, ranks] == number)
        for rows in row_blocks(len(own), 8 * likeness.mean.size):
            q, r = queries[own[rows]], ranks[own[rows]]
            shown = likeness.variant(cohort.view_N[place[q, r]], number, common)
            whole[q, r] = likeness.registered(asked.view_N[q], shown)
    best = whole.argmax(axis=1)
    every = np.arange(len(whole))
    slices = None
    if likeness.mean.ndim == 3:
        slices = asked.per_patient(_slices(likeness, asked, cohort, strangers))
    near = np.where(known.any(axis=1), place[every, best], -1)
    score = whole[every, best]
    return Resemblance(asked.per_patient(score), slices, asked.per_patient(person), near, score)


def usual(likeness: Likeness, pool: Pictures, size: int, generator: np.random.Generator) -> Resemblance:
    """How alike patients are to strangers: everybody against at most ``size`` images of others.

    Args:
        likeness: what images are compared by.
        pool: members and held-out patients together (or public patients): thresholds then know no labels.
        size: images of the cohort.
        generator: which images stand for the cohort.
    """
    if pool.patients < 2:
        raise ValueError(f"expected two patients or more, got {pool.patients}; strangers need somebody else")
    rows = np.sort(generator.permutation(len(pool.view_N))[:size])
    return resemblance(likeness, pool, pool.taken(rows), strangers=True)


def copy_thresholds(usual_P: Floats) -> tuple[float, ...]:
    """The 99 % quantile of strangers' likeness, and the largest: no two strangers are more alike than that.

    The first finds many faint copies, the second a few plain ones.
    """
    known = usual_P[np.isfinite(usual_P)]
    if not known.size:
        raise ValueError("no patient has an image; there is no threshold")
    largest = np.nextafter(known.max(), np.inf)
    return tuple(float(value) for value in np.unique([np.quantile(known, QUANTILE, method="higher"), largest]))


@dataclasses.dataclass(frozen=True)
class ImageCopies:
    """Patients with an image in the cohort that is too alike.

    Attributes:
        what: "whole image" or "single slice".
        counts: members and held-out patients at both thresholds.
        verbatim_member, verbatim_held_out: patients above :data:`VERBATIM` and above every two strangers.
        rate_member, rate_held_out: Clopper-Pearson intervals at the first threshold.
        p_value: of "members have no more of them", exact, corrected for the two thresholds.
    """

    what: str
    counts: ThresholdCounts
    verbatim_member: int
    verbatim_held_out: int
    rate_member: Interval
    rate_held_out: Interval
    p_value: float


def copies(
    what: str, member_P: Floats, held_out_P: Floats, thresholds: Sequence[float], confidence: float = 0.95
) -> ImageCopies:
    """Members against held-out patients at thresholds that know no labels.

    Args:
        what: which likeness.
        member_P, held_out_P: its scores against the same cohort.
        thresholds: from :func:`copy_thresholds`.
        confidence: of the intervals.
    """
    counts = ThresholdCounts(
        tuple(thresholds),
        counts_at(member_P, thresholds),
        counts_at(held_out_P, thresholds),
        len(member_P),
        len(held_out_P),
    )
    sizes = counts.trials_member, counts.trials_held_out
    pairs = list(zip(counts.hits_member, counts.hits_held_out, strict=True))
    smallest = min(excess_p_value(hits, sizes[0], misses, sizes[1]) for hits, misses in pairs)
    rates = [clopper_pearson(hits, size, confidence) for hits, size in zip(pairs[0], sizes, strict=True)]
    plain = [int((side >= max(VERBATIM, thresholds[-1])).sum()) for side in (member_P, held_out_P)]
    return ImageCopies(what, counts, plain[0], plain[1], rates[0], rates[1], min(1.0, len(pairs) * smallest))


def recognition(likeness: Likeness, pool: Pictures) -> float | None:
    """How well coarse likeness tells another image of the same patient from a stranger's: AUC, None without such pairs.

    The power of re-identification on these images: at one half, its silence says nothing.
    """
    first, second = [], []
    for patient in np.flatnonzero(np.bincount(pool.owner_N, minlength=pool.patients) > 1):
        own = np.flatnonzero(pool.owner_N == patient)
        first.append(own[0])
        second.append(own[-1])
    if len(first) < 2:
        return None
    likely = likeness.features(pool.view_N[first]) @ likeness.features(pool.view_N[second]).T
    same = np.diag(likely)
    others = likely[~np.eye(len(likely), dtype=bool)]
    ranks = stats.rankdata(np.concatenate([same, others]))[: len(same)].sum()
    return float((ranks - len(same) * (len(same) + 1) / 2) / (len(same) * len(others)))


def _candidates(
    likeness: Likeness, asked: Pictures, cohort: Pictures, strangers: bool, common: Pixels
) -> tuple[Ints, Ints, npt.NDArray[np.bool_], Floats]:
    """Places and forms of the most alike images by coarse features, (N, K), which are there, and the best plain one."""
    features = likeness.features(asked.view_N) if len(asked.view_N) else np.empty((0, 1), np.float32)
    count = len(features)
    score = np.full((count, CANDIDATES), _NONE, np.float32)
    place, form = np.zeros(score.shape, np.int64), np.zeros(score.shape, np.int64)
    person = np.full(count, _NONE)
    for number in likeness.variants():
        for start in range(0, len(cohort.view_N), _GALLERY_BLOCK):
            columns = slice(start, start + _GALLERY_BLOCK)
            shown = likeness.features(likeness.variant(cohort.view_N[columns], number, common))
            for rows in row_blocks(count, len(shown)):
                alike = features[rows] @ shown.T
                if strangers:
                    alike[asked.owner_N[rows, None] == cohort.owner_N[None, columns]] = _NONE
                if number == 0:
                    person[rows] = np.maximum(person[rows], alike.max(axis=1))
                keep = min(CANDIDATES, alike.shape[1])
                near = np.argpartition(-alike, keep - 1, axis=1)[:, :keep]
                both = np.concatenate([score[rows], np.take_along_axis(alike, near, axis=1)], axis=1)
                order = np.argsort(-both, axis=1, kind="stable")[:, :CANDIDATES]
                score[rows] = np.take_along_axis(both, order, axis=1)
                for kept, new in ((place, near + start), (form, np.full(near.shape, number))):
                    kept[rows] = np.take_along_axis(np.concatenate([kept[rows], new], axis=1), order, axis=1)
    return place, form, score > _NONE, person


def _slices(likeness: Likeness, asked: Pictures, cohort: Pictures, strangers: bool) -> Floats:
    """(N,) likeness of the most alike slice at the same place or one beside it."""
    best = np.full(len(asked.view_N), _NONE)
    if not best.size:
        return best
    own = likeness.slices(asked.view_N)
    for start in range(0, len(cohort.view_N), _GALLERY_BLOCK):
        columns = slice(start, start + _GALLERY_BLOCK)
        shown = likeness.slices(cohort.view_N[columns])
        for first, second in neighbouring(len(own)):
            for rows in row_blocks(len(best), shown.shape[1]):
                alike = own[first, rows] @ shown[second].T
                if strangers:
                    alike[asked.owner_N[rows, None] == cohort.owner_N[None, columns]] = _NONE
                best[rows] = np.maximum(best[rows], alike.max(axis=1))
    return best
