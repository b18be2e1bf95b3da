"""Measure images again: what a reader would take from a scan, from intensities in known anatomical regions only.

Nothing here sees the truth behind a phantom. A region is where two public prototypes differ (large against small
ventricles, say); the measure is linear in the image after a robust normalisation of that image, so mild blur and noise
cancel. It works on recorded and on synthetic images in [-1, 1] alike, because both lie in the registered phantom space.

Shape legend: B patients, V visits, X, Y, Z voxels.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.schema import PatientBatch, Schema
from simulations import phantom_brain as brain
from simulations.phantom_population import SEQUENCES, Latents

F64 = NDArray[np.float64]

ATTRIBUTES: tuple[str, ...] = (
    "ventricle_ml",
    "hippocampus_ml",
    "lesion_load",
    "fdg_suvr",
    "av45_suvr",
    "heart_ratio",
    "effusion",
    "congestion",
    "consolidation",
    "prior_heart_ratio",
    "prior_effusion",
    "prior_congestion",
    "prior_consolidation",
    "effusion_change",
)
SMALL_ML, LARGE_ML = (15.0, 3.0), (80.0, 7.5)
SUVR_MARKS = (0.9, 1.4)


@dataclasses.dataclass(frozen=True)
class Regions:
    """Public weight maps (X, Y, Z) on the brain grid; each sums to 1.

    Attributes:
        ventricle, hippocampus: where prototypes with large and small structures differ.
        white: white matter in every prototype; deep: grey nuclei in every prototype.
        temporoparietal, association, cerebellum: cortical targets and the reference of the uptake ratios.
    """

    ventricle: F64
    hippocampus: F64
    white: F64
    deep: F64
    temporoparietal: F64
    association: F64
    cerebellum: F64


def _prototype(ventricle_ml: float, hippocampus_ml: float) -> F64:
    """Tissue fractions (T, X, Y, Z) of an average head without lesions."""
    zero, one = np.zeros(1), np.zeros(1, np.int64)
    values: dict[str, NDArray[np.float64] | NDArray[np.int64]] = {
        field.name: (one if "Int" in str(field.type) else zero) for field in dataclasses.fields(Latents)
    }
    values |= {
        "ventricle_ml": np.asarray([ventricle_ml]),
        "hippocampus_ml": np.asarray([hippocampus_ml]),
        "cortex_mm": np.asarray([2.8]),
        "head_scale": np.ones(1),
        "neurodegeneration": np.asarray([0.3]),
    }
    none = brain.Lesions(
        site=np.full(1, -1),
        centre_B3=np.zeros((1, 3), np.float32),
        radius_mm=np.zeros(1, np.float32),
        plaque_B6=np.zeros((1, 6), bool),
        plaque_B63=np.zeros((1, 6, 3), np.float32),
        plaque_mm_B6=np.zeros((1, 6), np.float32),
    )
    latents = Latents(**values)  # type: ignore[arg-type]
    fractions = brain.tissue_fractions(latents, none, np.zeros((1, 3), np.float32))
    return np.asarray(fractions[0], dtype=np.float64)


@lru_cache(maxsize=1)
def regions() -> Regions:
    """The public regions, derived once from two prototypes."""
    small, large = _prototype(SMALL_ML[0], SMALL_ML[1]), _prototype(LARGE_ML[0], LARGE_ML[1])
    at = {name: k for k, name in enumerate(brain.TISSUES)}
    both = np.minimum(small, large)

    def unit(weight: F64) -> F64:
        return np.asarray(weight / weight.sum())

    opened = np.clip(large[at["csf"]] - small[at["csf"]], 0, 1) * (small[at["white"]] > 0.5)
    filled = np.clip(large[at["deep"]] - small[at["deep"]], 0, 1) * (small[at["csf"]] > 0.3)
    return Regions(
        ventricle=unit(opened),
        hippocampus=unit(filled),
        white=unit((both[at["white"]] > 0.97).astype(np.float64)),
        deep=unit((both[at["deep"]] > 0.9).astype(np.float64)),
        temporoparietal=unit(both[at["grey"]] * brain.cortical_map("temporoparietal") ** 2),
        association=unit(both[at["grey"]] * brain.cortical_map("association") ** 2),
        cerebellum=unit(np.where(both[at["cerebellum"]] > 0.5, 1.0, 0.0)),
    )


def _share(image_BXYZ: F64, weight_XYZ: F64) -> F64:
    """Weighted mean of each image over a region (B,)."""
    return np.asarray(image_BXYZ.reshape(len(image_BXYZ), -1) @ weight_XYZ.ravel())


def _openness(image_BXYZ: F64) -> tuple[F64, F64, F64]:
    """Mean level in the ventricle and the hippocampus region, and lesion load, relative to own air and white matter."""
    area = regions()
    flat = image_BXYZ.reshape(len(image_BXYZ), -1)
    here = np.flatnonzero(area.white.ravel())
    air = np.percentile(flat[:, ::7], 10, axis=1)
    own = np.median(flat[:, here], axis=1) - air
    own = np.where(np.abs(own) < 1e-3, np.nan, own)
    away = np.abs((flat[:, here] - air[:, None]) / own[:, None] - 1.0)
    opened, filled = ((_share(image_BXYZ, w) - air) / own for w in (area.ventricle, area.hippocampus))
    return opened, filled, np.asarray(np.maximum(away - 0.2, 0.0).mean(axis=1))


@lru_cache(maxsize=1)
def _scale_marks() -> tuple[F64, F64]:
    """What :func:`_openness` reads off the two noiseless prototypes in each sequence: (2, S) ventricle, hippocampus."""
    level = np.asarray([brain.CONTRAST[s] for s in SEQUENCES])
    reads = []
    for fractions in (_prototype(*SMALL_ML), _prototype(*LARGE_ML)):
        reads.append(
            _openness(
                brain.blur(np.tensordot(level, fractions, axes=(1, 0)).astype(np.float32), brain.MRI_BLUR).astype(
                    np.float64
                )
            )[:2]
        )
    return np.stack([r[0] for r in reads]), np.stack([r[1] for r in reads])


def measure_mri(image_BXYZ: F64, sequence_B: NDArray[np.int64]) -> dict[str, F64]:
    """Ventricle and hippocampus volume (ml, approximate) and lesion load of MRI in [-1, 1].

    Intensities are taken relative to the image's own air and deep white matter, then placed between what the two
    prototypes show in the same sequence. Rows of unknown sequence (-1) are NaN.
    """
    opened, filled, load = _openness((np.asarray(image_BXYZ, np.float64) + 1.0) / 2.0)
    marks_opened, marks_filled = (m[:, sequence_B] for m in _scale_marks())

    def between(value: F64, marks: F64, low: float, high: float) -> F64:
        return np.asarray(low + (high - low) * (value - marks[0]) / (marks[1] - marks[0]))

    out = {
        "ventricle_ml": between(opened, marks_opened, SMALL_ML[0], LARGE_ML[0]),
        "hippocampus_ml": between(filled, marks_filled, SMALL_ML[1], LARGE_ML[1]),
        "lesion_load": load,
    }
    return {name: np.where(sequence_B >= 0, value, np.nan) for name, value in out.items()}


def _uptake_ratio(image_BXYZ: F64, tracer: str) -> F64:
    """Mean uptake in the tracer's cortical target relative to the cerebellum, partial volume included."""
    area = regions()
    target = area.temporoparietal if tracer == "FDG" else area.association
    return np.asarray(_share(image_BXYZ, target) / np.maximum(_share(image_BXYZ, area.cerebellum), 1e-3))


@lru_cache(maxsize=2)
def _uptake_marks(tracer: str) -> tuple[float, float]:
    """The raw ratio that noiseless prototypes show at the two marks of :data:`SUVR_MARKS`."""
    fractions = _prototype(40.0, 6.0)[None].astype(np.float32)
    low, high = (brain.uptake(fractions, np.asarray([suvr]), tracer) for suvr in SUVR_MARKS)
    return float(_uptake_ratio(low.astype(np.float64), tracer)[0]), float(
        _uptake_ratio(high.astype(np.float64), tracer)[0]
    )


def measure_pet(image_BXYZ: F64, tracer: str) -> F64:
    """Cortex-to-cerebellum uptake ratio of PET in [-1, 1], corrected for partial volume with the prototypes."""
    raw = _uptake_ratio((np.asarray(image_BXYZ, np.float64) + 1.0) / 2.0, tracer)
    low, high = _uptake_marks(tracer)
    return np.asarray(SUVR_MARKS[0] + (SUVR_MARKS[1] - SUVR_MARKS[0]) * (raw - low) / (high - low))


def measure_film(image_BYX: F64) -> dict[str, F64]:
    """Cardiothoracic ratio, effusion and congestion of films in [-1, 1].

    Brightness is taken relative to the film's own lung apex (0) and upper abdomen (1).
    """
    image = (np.asarray(image_BYX, np.float64) + 1.0) / 2.0
    lung = np.percentile(image[:, 14:36, 8:56].reshape(len(image), -1), 8, axis=1)[:, None, None]
    dense = np.median(image[:, 56:63, 18:38].reshape(len(image), -1), axis=1)[:, None, None]
    level = (image - lung) / np.where(np.abs(dense - lung) < 1e-3, np.nan, dense - lung)
    band = np.clip(level[:, 34:41, 9:55].mean(axis=1), 0.0, 1.0)
    width = np.clip((band - 0.35) / 0.4, 0.0, 1.0)
    corner = np.concatenate([level[:, 40:51, 10:15], level[:, 42:52, 49:54]], axis=1)
    right, left = level[:, 15:24, 11:20], level[:, 15:24, 44:53]
    hilum = np.concatenate([level[:, 22:34, 18:26], level[:, 22:34, 38:46]], axis=1)
    return {
        "heart_ratio": width.sum(axis=1) / 46.0,
        "effusion": corner.mean(axis=(1, 2)),
        "consolidation": np.abs(right.mean(axis=(1, 2)) - left.mean(axis=(1, 2))),
        "congestion": hilum.mean(axis=(1, 2)),
    }


def biomarkers(schema: Schema, batch: PatientBatch) -> dict[str, dict[str, Tensor]]:
    """What an objective may keep of the images: instance key -> attribute -> (B,) as :func:`attributes` measures it."""
    measured = {name: torch.from_numpy(value).float() for name, value in attributes(schema, batch).items()}
    out: dict[str, dict[str, Tensor]] = {}
    for slot, instance in schema.instances():
        match slot.name:
            case "mri":
                names = {name: name for name in ("ventricle_ml", "hippocampus_ml", "lesion_load")}
            case "pet":
                names = {"suvr": f"{instance.fixed['tracer'].lower()}_suvr"}
            case "cxr":
                prefix = "prior_" if instance.role == "reference" else ""
                names = {name: prefix + name for name in ("heart_ratio", "effusion", "congestion", "consolidation")}
            case _:
                continue
        out[slot.key(instance)] = {name: measured[source] for name, source in names.items()}
    return out


def attributes(schema: Schema, batch: PatientBatch) -> dict[str, F64]:
    """Image-derived attributes of each patient's first visit, (B,) each, NaN where the image is absent.

    Keys are :data:`ATTRIBUTES`; those of slots that the schema lacks are NaN throughout. Two MRI of a patient are
    averaged. Only images, presence and the sequence label enter: no column, no latent.
    """
    out = {name: np.full(len(batch), np.nan) for name in ATTRIBUTES}
    names = [factor.name for factor in schema.factors()]
    mri: dict[str, list[F64]] = {name: [] for name in ("ventricle_ml", "hippocampus_ml", "lesion_load")}
    for place, (slot, instance) in enumerate(schema.instances()):
        if slot.name not in ("mri", "pet", "cxr"):
            continue
        rows = np.flatnonzero(batch.present_BVI[:, 0, place].numpy())
        if len(rows) == 0:  # percentiles of no image are not defined
            continue
        image = batch.values[slot.key(instance)][rows, 0].double().numpy()
        match slot.name:
            case "mri":
                sequence = batch.factor_BVIF[rows, 0, place, names.index("sequence")].numpy() - 1
                for name, value in measure_mri(image, sequence).items():
                    full = np.full(len(batch), np.nan)
                    full[rows] = value
                    mri[name].append(full)
            case "pet":
                tracer = instance.fixed["tracer"]
                out[f"{tracer.lower()}_suvr"][rows] = measure_pet(image, tracer)
            case "cxr":
                prefix = "prior_" if instance.role == "reference" else ""
                for name, value in measure_film(image).items():
                    out[prefix + name][rows] = value
    for name, parts in mri.items():
        if parts:
            stack = np.stack(parts)
            count = np.isfinite(stack).sum(axis=0)
            out[name] = np.where(count > 0, np.nansum(stack, axis=0) / np.maximum(count, 1), np.nan)
    out["effusion_change"] = out["effusion"] - out["prior_effusion"]
    return out
