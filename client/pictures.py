"""A site's images beside a cohort's: copies and re-identification per imaging slot, by labels that nobody is told.

The likeness is fitted to, and its thresholds are taken from, the sampled members and held-out patients together: how alike
they are to *each other* says what is too alike, and it is the same for both sides.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from medgen_models.schema import PatientBatch, Slot
from privacy.audit.cohort_attacks import in_spreads
from privacy.audit.image_copies import Pictures, copy_thresholds, resemblance, usual
from privacy.audit.likeness import Likeness

Floats = NDArray[np.float64]
FEWEST = 8  # images, of the patients and of the cohort, below which nobody is compared
MOST_PER_PATIENT = 1
"""Images of a patient and slot that are compared: time grows with their number, and copies of all images together are
counted by codec tokens anyway."""
SEED = 20214


@dataclasses.dataclass(frozen=True)
class Alike:
    """Scores by patient, NaN where there is no image of the slot.

    Attributes:
        copy_P: 0, 1 or 2: how many of the two thresholds of strangers' likeness the patient's whole images pass.
        person_P: coarse likeness with the most alike image, in spreads of strangers'.
    """

    copy_P: Floats
    person_P: Floats

    @staticmethod
    def nobody(patients: int) -> Alike:
        """No image, no score."""
        return Alike(np.full(patients, np.nan), np.full(patients, np.nan))


def alike(slot: Slot, keys: tuple[str, ...], patients: PatientBatch, cohort: PatientBatch) -> Alike:
    """Compare patients' images of a slot with the cohort's.

    Args:
        slot: an imaging slot.
        keys: of all instances of the schema, in order.
        patients: members and held-out patients together.
        cohort: the candidate.
    """
    asked, owner = images_of(slot, keys, patients, MOST_PER_PATIENT)
    shown, _ = images_of(slot, keys, cohort)
    if min(len(asked), len(shown)) < FEWEST or len(set(owner.tolist())) < 2:
        return Alike.nobody(len(patients))
    try:
        likeness = Likeness.of(asked)
    except ValueError:  # too small a grid, or blank images everywhere
        return Alike.nobody(len(patients))
    own = Pictures.of(likeness, asked, owner, len(patients))
    found = resemblance(likeness, own, Pictures.of(likeness, shown))
    strangers = usual(likeness, own, len(shown), np.random.default_rng(SEED))
    try:
        limits = copy_thresholds(strangers.whole_P)
    except ValueError:
        return Alike.nobody(len(patients))
    there = np.isfinite(found.whole_P)
    passed = sum(np.asarray(found.whole_P >= limit, np.float64) for limit in limits)
    known = strangers.person_P[np.isfinite(strangers.person_P)]
    return Alike(np.where(there, passed, np.nan), in_spreads(found.person_P, known))


def images_of(
    slot: Slot, keys: tuple[str, ...], batch: PatientBatch, most: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (N, *shape) of a slot and the number of each one's patient; the first ``most`` of a patient."""
    images, owners = [], []
    here_BVI = (batch.present_BVI & batch.visit_BV[..., None]).numpy()
    for patient in range(len(batch)):
        places = [
            (v, key)
            for v in range(here_BVI.shape[1])
            for key in (slot.key(instance) for instance in slot.instances)
            if here_BVI[patient, v, keys.index(key)]
        ]
        for v, key in places[:most]:
            images.append(batch.values[key][patient, v].numpy())
            owners.append(patient)
    shape = (0, *slot.raw_shape())
    return np.stack(images) if images else np.zeros(shape, np.float32), np.asarray(owners, np.int64)
