"""Who the phantom patients are: the public profile of a population and the latent state of every patient in it.

The latent state is the known truth behind every modality. Age, sex and body size drive a severity, severity and
pathology drive a neurodegeneration and a cardiac load, and these drive images, table, vitals, note and outcome.

Shape legend: B patients.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

FloatB = NDArray[np.float64]
IntB = NDArray[np.int64]

SEQUENCES: tuple[str, ...] = ("T1w", "T1ce", "T2w", "FLAIR", "PD")
PATHOLOGIES: tuple[str, ...] = ("healthy", "glioma", "sclerosis", "dementia")
TRACERS: tuple[str, ...] = ("FDG", "AV45")
WINDOW_HOURS = 48.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """How one population differs from the public reference population, which is ``Profile()``.

    Attributes:
        age_years: mean age before clipping to 30-95.
        severity_shift: added to the logit of severity.
        pathology_mix: prior weights of healthy, glioma, sclerosis, dementia; age and severity act on top.
        male_share: expected share of male patients.
        contrast: exponent on MRI intensities relative to the range; 1 leaves them.
        mri_gain: factor on MRI intensities.
        bias_field: strength of a smooth multiplicative MRI field; .2 means about 20 % from one side to the other.
        pet_gain: factor on PET activity.
        cxr_contrast: exponent on X-ray densities; 1 leaves them.
        noise: factor on the noise of every image.
        mri_share, second_mri_share, fdg_share, av45_share, cxr_share, prior_share, vitals_share, note_share:
            expected share of patients who have the record (second MRI and prior film: of those with the first).
        sequence_mix: weights of T1w, T1ce, T2w, FLAIR, PD.
        withheld_cells: (pathology, sequence) pairs that never occur, for studies of unseen combinations.
    """

    age_years: float = 61.0
    severity_shift: float = 0.0
    pathology_mix: tuple[float, float, float, float] = (0.34, 0.22, 0.22, 0.22)
    male_share: float = 0.5
    contrast: float = 1.0
    mri_gain: float = 1.0
    bias_field: float = 0.0
    pet_gain: float = 1.0
    cxr_contrast: float = 1.0
    noise: float = 1.0
    mri_share: float = 0.95
    second_mri_share: float = 0.65
    fdg_share: float = 0.75
    av45_share: float = 0.6
    cxr_share: float = 0.95
    prior_share: float = 0.75
    vitals_share: float = 0.95
    note_share: float = 0.9
    sequence_mix: tuple[float, float, float, float, float] = (0.25, 0.18, 0.2, 0.22, 0.15)
    withheld_cells: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1] and mixes that cannot be drawn from."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_share") and not 0.0 <= value <= 1.0:
                raise ValueError(f"profile.{field.name}: expected a share in [0, 1], got {value}; give a fraction")
        for name, mix in (("pathology_mix", self.pathology_mix), ("sequence_mix", self.sequence_mix)):
            if min(mix) < 0 or sum(mix) <= 0:
                raise ValueError(f"profile.{name}: expected weights >= 0 with a positive sum, got {mix}")
        for pathology, sequence in self.withheld_cells:
            if pathology not in PATHOLOGIES or sequence not in SEQUENCES:
                raise ValueError(f"profile.withheld_cells: unknown cell ({pathology}, {sequence})")


@dataclasses.dataclass(frozen=True)
class Latents:
    """The truth behind B patients; every array has shape (B,).

    Attributes:
        age_years, male, height_cm, bmi: person.
        severity: overall burden in (0, 1).
        pathology: index into :data:`PATHOLOGIES`.
        neurodegeneration: 0 (none) to about 1.
        ventricle_ml, hippocampus_ml, cortex_mm: brain morphometry.
        head_scale: linear head size relative to the mean.
        apoe4: copies of the risk allele, 0-2.
        amyloid: whether the plaque tracer is positive; linked to neurodegeneration, not fixed by it.
        fdg_suvr, av45_suvr: cortex-to-cerebellum uptake ratios.
        cardiac: cardiac load in (0, 1).
        heart_ratio: cardiothoracic ratio of the heart without fluid overload.
        fluid_prior_l, fluid_current_l: fluid overload at the two films, litres.
        fluid_early_ml_h, fluid_late_ml_h: net balance before and after the prior film, ml per hour.
        gap_hours: time between the two films.
        pneumonia: whether there is a consolidation.
        smoker: 0 never, 1 former, 2 current.
        lives_alone: known from the note only; raises the risk of the outcome.
        outcome: death or readmission.
    """

    age_years: FloatB
    male: IntB
    height_cm: FloatB
    bmi: FloatB
    severity: FloatB
    pathology: IntB
    neurodegeneration: FloatB
    ventricle_ml: FloatB
    hippocampus_ml: FloatB
    cortex_mm: FloatB
    head_scale: FloatB
    apoe4: IntB
    amyloid: IntB
    fdg_suvr: FloatB
    av45_suvr: FloatB
    cardiac: FloatB
    heart_ratio: FloatB
    fluid_prior_l: FloatB
    fluid_current_l: FloatB
    fluid_early_ml_h: FloatB
    fluid_late_ml_h: FloatB
    gap_hours: FloatB
    pneumonia: IntB
    smoker: IntB
    lives_alone: IntB
    outcome: IntB

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.age_years)

    def select(self, rows: IntB) -> Latents:
        """The patients at ``rows``, in that order."""
        return Latents(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


def sigmoid(x: FloatB) -> FloatB:
    """Logistic function."""
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def draw_categories(weights_BK: FloatB, rng: np.random.Generator) -> IntB:
    """One category a patient, drawn by the weights in its row."""
    cumulative_BK = np.cumsum(weights_BK, axis=1)
    uniform_B1 = rng.random((len(weights_BK), 1)) * cumulative_BK[:, -1:]
    return np.asarray((uniform_B1 > cumulative_BK).sum(axis=1), dtype=np.int64)


def draw_latents(patients: int, profile: Profile, rng: np.random.Generator) -> Latents:
    """Draw the latent state of ``patients`` from ``profile``; the same generator state gives the same patients."""
    n, normal = patients, rng.standard_normal
    age = np.clip(profile.age_years + 13.0 * normal(n), 30.0, 95.0)
    male = (rng.random(n) < profile.male_share).astype(np.int64)
    height = 163.0 + 13.0 * male + 6.5 * normal(n)
    bmi = np.clip(26.0 * np.exp(0.15 * normal(n)), 17.0, 45.0)
    severity = sigmoid(profile.severity_shift - 0.2 + 0.025 * (age - 61.0) + 1.1 * normal(n))

    tilt_B4 = np.stack([-1.2 * severity, 0.3 * severity, -0.05 * (age - 61.0), 0.04 * (age - 61.0) + 0.8 * severity], 1)
    pathology = draw_categories(np.asarray(profile.pathology_mix) * np.exp(tilt_B4), rng)
    glioma, sclerosis, dementia = (pathology == k for k in (1, 2, 3))
    neuro = 0.06 + 0.20 * severity + 0.004 * (age - 61.0) + dementia * (0.22 + 0.32 * severity)
    neuro = np.clip(neuro + 0.07 * glioma * severity + 0.09 * sclerosis * severity + 0.05 * normal(n), 0.01, 1.0)
    ventricle = 14.0 + 78.0 * neuro + 3.0 * normal(n)
    hippocampus = np.clip(7.6 - 4.6 * neuro + 0.3 * normal(n), 2.2, 9.0)
    cortex = np.clip(3.0 - 0.9 * neuro + 0.08 * normal(n), 1.8, 3.3)
    head = 1.0 + 0.022 * (male - 0.5) + 0.0012 * (height - 163.0 - 13.0 * male) + 0.012 * normal(n)

    risk = sigmoid(-1.5 + 1.3 * dementia)
    apoe4 = (rng.random(n) < risk).astype(np.int64) + (rng.random(n) < 0.5 * risk)
    positive = sigmoid(-3.2 + 6.0 * neuro + 1.1 * apoe4 + 0.03 * (age - 61.0))
    amyloid = (rng.random(n) < positive).astype(np.int64)
    fdg = 1.25 - 0.36 * neuro + 0.145 * normal(n)
    av45 = np.where(amyloid == 1, 1.32 + 0.15 * neuro + 0.06 * normal(n), 0.95 + 0.05 * normal(n))

    cardiac = sigmoid(-1.1 + 2.2 * (severity - 0.45) + 0.03 * (age - 61.0) + 0.06 * (bmi - 26.0) + 0.9 * normal(n))
    heart = 0.42 + 0.17 * cardiac + 0.012 * normal(n)
    gap = np.round(rng.uniform(10.0, 40.0, n) * 4.0) / 4.0
    early = 10.0 + 28.0 * normal(n)
    late = np.clip(8.0 + 30.0 * (cardiac - 0.35) + 48.0 * normal(n), -130.0, 150.0)
    fluid_prior = np.clip(0.35 + 1.5 * cardiac + 0.35 * normal(n), 0.0, 4.0)
    fluid_current = np.clip(fluid_prior + late * gap / 1000.0, 0.0, 4.5)
    smoker = draw_categories(np.stack([0.5 + 0 * age, 0.2 + 0.004 * age, np.maximum(0.45 - 0.004 * age, 0.05)], 1), rng)
    pneumonia = (rng.random(n) < np.clip(0.08 + 0.22 * severity + 0.06 * (smoker == 2), 0.0, 1.0)).astype(np.int64)
    alone = (rng.random(n) < 0.35).astype(np.int64)
    logit = -4.0 + 2.4 * severity + 1.8 * cardiac + 0.45 * fluid_current + 1.1 * pneumonia + 0.9 * alone
    outcome = (rng.random(n) < sigmoid(logit + 0.8 * neuro)).astype(np.int64)
    return Latents(
        age_years=age,
        male=male,
        height_cm=height,
        bmi=bmi,
        severity=severity,
        pathology=pathology,
        neurodegeneration=neuro,
        ventricle_ml=np.maximum(ventricle, 8.0),
        hippocampus_ml=hippocampus,
        cortex_mm=cortex,
        head_scale=head,
        apoe4=apoe4,
        amyloid=amyloid,
        fdg_suvr=fdg,
        av45_suvr=av45,
        cardiac=cardiac,
        heart_ratio=heart,
        fluid_prior_l=fluid_prior,
        fluid_current_l=fluid_current,
        fluid_early_ml_h=early,
        fluid_late_ml_h=late,
        gap_hours=gap,
        pneumonia=pneumonia,
        smoker=smoker,
        lives_alone=alone,
        outcome=outcome,
    )
