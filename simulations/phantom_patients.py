"""Draw a population: latent states, then every record of every patient in the units of its file.

Shape legend: B patients, X, Y, Z voxels or rows and columns of a film.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simulations import phantom_brain as brain
from simulations import phantom_chest as chest
from simulations import phantom_records as records
from simulations.phantom_population import (
    PATHOLOGIES,
    SEQUENCES,
    TRACERS,
    Latents,
    Profile,
    draw_categories,
    draw_latents,
)

CHUNK = 20


@dataclasses.dataclass(frozen=True)
class Phantoms:
    """B phantom patients in the units of their files.

    Attributes:
        ids: pseudonyms, unique within a population.
        latents: the truth behind the records.
        lesions: where tumours and plaques lie.
        sequence_B2: sequence of the first and second MRI as index into :data:`SEQUENCES`, ascending; -1 where absent.
        mri_B2XYZ: MRI in arbitrary units, zero where absent.
        pet_present_B2: whether FDG and AV45 exist.
        pet_B2XYZ: activity in SUV (g/ml), zero where absent.
        film_present_B2: whether the current and the prior film exist.
        film_B2YX: films, current first, in detector units.
        gap_hours_B: hours from the prior to the current film, 0 without a prior film.
        table: one row a patient; NaN or None where a value was not recorded.
        events: irregular vitals: patient (row), minute, channel, value.
        notes: one text a patient, empty where none was written.
    """

    ids: tuple[str, ...]
    latents: Latents
    lesions: brain.Lesions
    sequence_B2: NDArray[np.int64]
    mri_B2XYZ: NDArray[np.float32]
    pet_present_B2: NDArray[np.bool_]
    pet_B2XYZ: NDArray[np.float32]
    film_present_B2: NDArray[np.bool_]
    film_B2YX: NDArray[np.float32]
    gap_hours_B: NDArray[np.float64]
    table: pd.DataFrame
    events: pd.DataFrame
    notes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.ids)


def make_patients(
    patients: int, seed: int, profile: Profile | None = None, intervene: Callable[[Latents], Latents] | None = None
) -> Phantoms:
    """Draw ``patients`` from ``profile`` (the public population by default); a seed gives the same patients always.

    Patients have none, one or two MRI sequences, PET and films by the shares of the profile.

    Args:
        patients: how many.
        seed: of everything drawn.
        profile: of the population.
        intervene: changes the latent states before any record is made of them; with the same seed the records then
            differ by that change alone: who is recorded, positions and noise stay.
    """
    if patients < 0:
        raise ValueError(f"expected patients >= 0, got {patients}; give the size of the population")
    profile = profile or Profile()
    who, brains, films, rows, pick = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5))
    latents = draw_latents(patients, profile, who)
    if intervene is not None:
        latents = intervene(latents)
    lesions = brain.draw_lesions(latents, brains)
    sequence_B2 = _draw_sequences(latents, profile, pick)
    pet_B2 = pick.random((patients, 2)) < np.asarray([profile.fdg_share, profile.av45_share])
    film_B2 = pick.random((patients, 2)) < np.asarray([profile.cxr_share, profile.prior_share])
    film_B2[:, 1] &= film_B2[:, 0]
    mri, pet = _render_brains(latents, lesions, sequence_B2, pet_B2, profile, brains)
    side_B = films.integers(0, 2, patients)
    film = np.zeros((patients, 2, chest.PIXELS, chest.PIXELS), np.float32)
    for k, fluid_l in enumerate((latents.fluid_current_l, latents.fluid_prior_l)):
        film[:, k] = chest.render_film(latents, fluid_l, side_B, profile, films)
    film[~film_B2] = 0.0
    return Phantoms(
        ids=tuple(f"sub-{row + 1:04d}" for row in range(patients)),
        latents=latents,
        lesions=lesions,
        sequence_B2=sequence_B2,
        mri_B2XYZ=mri,
        pet_present_B2=pet_B2,
        pet_B2XYZ=pet,
        film_present_B2=film_B2,
        film_B2YX=film,
        gap_hours_B=np.where(film_B2[:, 1], latents.gap_hours, 0.0),
        table=records.make_table(latents, rows),
        events=records.make_vitals(latents, rows.random(patients) < profile.vitals_share, rows),
        notes=records.make_notes(latents, rows.random(patients) < profile.note_share, rows),
    )


def _draw_sequences(latents: Latents, profile: Profile, rng: np.random.Generator) -> NDArray[np.int64]:
    """First and second sequence of each patient, ascending, -1 where absent; withheld cells never occur."""
    weights_BS = np.tile(np.asarray(profile.sequence_mix, np.float64), (len(latents), 1))
    for pathology, sequence in profile.withheld_cells:
        weights_BS[latents.pathology == PATHOLOGIES.index(pathology), SEQUENCES.index(sequence)] = 0.0
    first = draw_categories(weights_BS, rng)
    weights_BS[np.arange(len(latents)), first] = 0.0
    possible = weights_BS.sum(axis=1) > 0
    second = draw_categories(np.where(possible[:, None], weights_BS, 1.0), rng)
    have, both = rng.random(len(latents)), rng.random(len(latents))
    pair_B2 = np.sort(np.stack([first, second], axis=1), axis=1)
    alone_B2 = np.stack([first, np.full_like(first, -1)], axis=1)
    out = np.where(((both < profile.second_mri_share) & possible)[:, None], pair_B2, alone_B2)
    return np.where((have < profile.mri_share)[:, None], out, -1)


def _render_brains(
    latents: Latents,
    lesions: brain.Lesions,
    sequence_B2: NDArray[np.int64],
    pet_B2: NDArray[np.bool_],
    profile: Profile,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """MRI and PET of all patients, a few patients at a time so that the tissue fractions stay in the cache."""
    n, cube = len(latents), (brain.VOXELS,) * 3
    mri, pet = np.zeros((n, 2, *cube), np.float32), np.zeros((n, 2, *cube), np.float32)
    fold_B3 = rng.standard_normal((n, 3)).astype(np.float32)
    imaged = np.flatnonzero((sequence_B2 >= 0).any(axis=1) | pet_B2.any(axis=1))
    for start in range(0, len(imaged), CHUNK):
        rows = imaged[start : start + CHUNK]
        part = latents.select(rows)
        spots = brain.Lesions(**{f.name: getattr(lesions, f.name)[rows] for f in dataclasses.fields(lesions)})
        fractions = brain.tissue_fractions(part, spots, fold_B3[rows])
        for k in range(2):
            here = np.flatnonzero(sequence_B2[rows, k] >= 0)
            mri[rows[here], k] = brain.render_mri(fractions[here], sequence_B2[rows[here], k], SEQUENCES, profile, rng)
            here = np.flatnonzero(pet_B2[rows, k])
            pet[rows[here], k] = brain.render_pet(fractions[here], part.select(here), TRACERS[k], profile, rng)
    return mri, pet
