"""Brains: anatomy as soft tissue fractions on a 32^3 grid of 6 mm, rendered as five MRI sequences and two PET tracers.

Axes run left to right, posterior to anterior, inferior to superior (RAS+); voxel centres lie at (i - 15.5) * 6 mm.
MRI and PET of a patient are painted from one set of fractions, so they agree in geometry by construction.

Shape legend: B patients, T tissues, X, Y, Z voxels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.phantom_population import Latents, Profile

F32 = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]
IntB = NDArray[np.int64]

VOXELS = 32
VOXEL_MM = 6.0
MRI_HIGH = 1000.0
SUV_HIGH = 4.0
MRI_BLUR = 0.45
PET_BLUR = 0.7

TISSUES: tuple[str, ...] = (
    "scalp",
    "skull",
    "muscle",
    "csf",
    "grey",
    "white",
    "deep",
    "cerebellum",
    "core",
    "rim",
    "oedema",
    "plaque",
)
# One row a sequence, one column a tissue, as a share of the intensity range; textbook weighting, drawn by eye.
CONTRAST: dict[str, tuple[float, ...]] = {
    #          scalp skull muscle csf  grey white deep  cereb core  rim  oedema plaque
    "T1w": (0.88, 0.06, 0.34, 0.10, 0.46, 0.74, 0.55, 0.54, 0.20, 0.42, 0.40, 0.46),
    "T1ce": (0.90, 0.07, 0.38, 0.11, 0.48, 0.75, 0.57, 0.56, 0.20, 0.98, 0.42, 0.62),
    "T2w": (0.55, 0.05, 0.24, 0.95, 0.56, 0.38, 0.45, 0.52, 0.90, 0.66, 0.76, 0.80),
    "FLAIR": (0.62, 0.05, 0.30, 0.07, 0.56, 0.42, 0.50, 0.52, 0.45, 0.84, 0.92, 0.94),
    "PD": (0.66, 0.08, 0.42, 0.94, 0.74, 0.56, 0.64, 0.70, 0.88, 0.80, 0.84, 0.84),
}
# Uptake in SUV (g/ml) at a cerebellar value that makes the pictures fill the public range.
FDG: tuple[float, ...] = (0.35, 0.15, 0.50, 0.15, 3.15, 1.15, 3.20, 2.15, 0.60, 3.90, 1.10, 1.20)
AV45: tuple[float, ...] = (0.45, 0.35, 0.50, 0.35, 1.00, 1.95, 1.35, 1.30, 0.80, 1.50, 1.30, 1.40)

LESION_SITES_MM: tuple[tuple[float, float, float], ...] = (
    (-32.0, 38.0, 24.0),
    (32.0, 38.0, 24.0),
    (-36.0, -30.0, 32.0),
    (36.0, -30.0, 32.0),
    (-42.0, 4.0, -16.0),
    (42.0, 4.0, -16.0),
)
PLAQUE_SITES_MM: tuple[tuple[float, float, float], ...] = (
    (-24.0, 26.0, 20.0),
    (24.0, 26.0, 20.0),
    (-27.0, -6.0, 28.0),
    (27.0, -6.0, 28.0),
    (-26.0, -38.0, 18.0),
    (26.0, -38.0, 18.0),
)


@dataclasses.dataclass(frozen=True)
class Lesions:
    """Where the focal lesions of B patients lie.

    Attributes:
        site: index of the tumour site, -1 without tumour.
        centre_B3, radius_mm: tumour position after jitter, and size.
        plaque_B6: which of the six plaque sites are affected.
        plaque_B63: plaque positions after jitter; plaque_mm_B6: their radii.
    """

    site: IntB
    centre_B3: F32
    radius_mm: F32
    plaque_B6: NDArray[np.bool_]
    plaque_B63: F32
    plaque_mm_B6: F32


def draw_lesions(latents: Latents, rng: np.random.Generator) -> Lesions:
    """Tumours at one of six sites, plaques at two to six of six sites, each with jitter."""
    n = len(latents)
    site = rng.integers(0, len(LESION_SITES_MM), n)
    centre = np.asarray(LESION_SITES_MM)[site] + 4.0 * rng.standard_normal((n, 3))
    radius = 13.0 + 7.0 * latents.severity + 1.5 * rng.standard_normal(n)
    count = 2 + np.floor(4.99 * np.clip(latents.severity + 0.1 * rng.standard_normal(n), 0.0, 0.999)).astype(np.int64)
    order_B6 = np.argsort(rng.random((n, 6)), axis=1).argsort(axis=1)
    plaque = (order_B6 < np.minimum(count, 6)[:, None]) & (latents.pathology == 2)[:, None]
    return Lesions(
        site=np.where(latents.pathology == 1, site, -1),
        centre_B3=centre.astype(np.float32),
        radius_mm=np.where(latents.pathology == 1, radius, 0.0).astype(np.float32),
        plaque_B6=plaque,
        plaque_B63=(np.asarray(PLAQUE_SITES_MM) + 3.0 * rng.standard_normal((n, 6, 3))).astype(np.float32),
        plaque_mm_B6=(7.0 + 1.0 * rng.standard_normal((n, 6))).astype(np.float32),
    )


def axis_mm() -> F32:
    """Voxel centres along one axis, millimetres."""
    return ((np.arange(VOXELS) - (VOXELS - 1) / 2.0) * VOXEL_MM).astype(np.float32)


def soft(depth_mm: Floats, width_mm: float = VOXEL_MM) -> F32:
    """Partial volume of a surface: 0 outside, 1 inside, linear over ``width_mm`` around it."""
    return np.asarray(np.clip(depth_mm / np.float32(width_mm) + np.float32(0.5), 0.0, 1.0), dtype=np.float32)


def ellipsoid(head: F32, centre: tuple[float, float, float], semi: tuple[float | F32, float | F32, float | F32]) -> F32:
    """Approximate depth below an ellipsoid's surface, millimetres (B, X, Y, Z).

    Args:
        head: linear head size of each patient (B,); centre and axes scale with it.
        centre: millimetres from the middle of the grid.
        semi: semi-axes in millimetres, one number or one per patient.
    """
    total: F32 = np.zeros((1, 1, 1, 1), np.float32)
    size = np.ones(len(head), np.float32)
    for axis, (middle, half) in enumerate(zip(centre, semi, strict=True)):
        half_B = (np.broadcast_to(np.asarray(half, np.float32), head.shape) * head)[:, None]
        term_BX = ((axis_mm()[None] - middle * head[:, None]) / half_B) ** 2
        shape = [len(head), 1, 1, 1]
        shape[axis + 1] = VOXELS
        total = total + term_BX.reshape(shape)
        size = size * half_B[:, 0]
    return (np.float32(1.0) - np.sqrt(total)) * np.cbrt(size)[:, None, None, None]


def both_sides(
    head: F32, centre: tuple[float, float, float], semi: tuple[float | F32, float | F32, float | F32]
) -> F32:
    """The ellipsoid and its mirror image in the midplane: depth below the nearer surface."""
    right = ellipsoid(head, centre, semi)
    return np.maximum(right, right[:, ::-1])


def folds(seed: int, wavelength_mm: float) -> F32:
    """A fixed smooth pattern in about [-1, 1], symmetric in the midplane: the gyri that all phantoms share."""
    rng = np.random.default_rng(seed)
    mm = axis_mm()
    x, y, z = np.abs(mm)[:, None, None], mm[None, :, None], mm[None, None, :]
    total = np.zeros((VOXELS,) * 3)
    for _ in range(6):
        direction = rng.standard_normal(3)
        k = 2 * np.pi / wavelength_mm * direction / np.linalg.norm(direction)
        total += np.sin(k[0] * x + k[1] * y + k[2] * z + rng.uniform(0, 2 * np.pi))
    return (total / 2.2).astype(np.float32)


def tissue_fractions(latents: Latents, lesions: Lesions, fold_B3: F32) -> F32:
    """Tissue fractions (B, T, X, Y, Z); they sum to at most 1, the rest is air.

    Args:
        latents: morphometry.
        lesions: focal lesions.
        fold_B3: how much each patient's folding departs from the shared pattern along three fixed patterns.
    """
    head = latents.head_scale.astype(np.float32)
    one = np.ones_like(head)
    atrophy = np.clip(latents.neurodegeneration, 0.0, 1.0).astype(np.float32)[:, None, None, None]
    own = np.stack([folds(20 + k, 31.0) for k in range(3)]).reshape(3, -1)
    fold = folds(11, 24.0)[None] + 0.25 * (fold_B3 @ own).reshape(-1, VOXELS, VOXELS, VOXELS)
    x = np.abs(axis_mm())[None, :, None, None]
    z = axis_mm()[None, None, None, :]

    cerebrum = np.minimum(ellipsoid(head, (0, 0, 12), (60, 76, 56)), soft(z + 30, 20.0) * 40)
    cerebrum = np.maximum(cerebrum, both_sides(head, (38, 6, -20), (23, 38, 20)))
    cerebellum = both_sides(head, (19, -46, -36), (29, 27, 20))
    stem = np.maximum(ellipsoid(head, (0, -18, -48), (11, 12, 46)), ellipsoid(head, (0, -12, -28), (16, 13, 14)))
    inside = np.maximum(np.maximum(cerebrum, cerebellum), stem) + 4.0
    skin = np.maximum(ellipsoid(head, (0, -1, 4), (74, 89, 78)), ellipsoid(head, (0, -14, -80), (50, 52, 62)))
    skin = np.maximum(skin, ellipsoid(head, (0, 48, -52), (46, 36, 44)))
    vault = ellipsoid(head, (0, -1, 6), (68.5, 83.5, 71))

    ribbon = np.float32(3.6) * latents.cortex_mm.astype(np.float32)[:, None, None, None]
    grey = np.float32(1.0) - soft(cerebrum - ribbon * (1.0 + 0.65 * fold), 6.0)
    sulcus = soft(5.0 * (fold - 0.75) + 5.5 * atrophy, 5.0) * soft(11.0 + 5.0 * atrophy - cerebrum, 8.0)
    fissure = soft(2.2 + 3.0 * atrophy - x) * soft(24.0 - cerebrum, 10.0) * soft(z - 4.0, 10.0)
    sylvian = soft(both_sides(head, (50, 8, -3), (16, 24, 3.5 * one + 5.0 * atrophy[:, 0, 0, 0])))
    sulcal = np.maximum(np.maximum(0.8 * sulcus, fissure), 0.85 * sylvian)

    size = np.sqrt(latents.ventricle_ml / 22.0).astype(np.float32)
    length = (latents.ventricle_ml / 22.0).astype(np.float32) ** 0.12
    ventricle = both_sides(head, (10.5, 2, 15), (5.4 * size, 28 * length, 6.4 * size))
    ventricle = np.maximum(ventricle, both_sides(head, (12, 24, 10), (5.0 * size, 11 * length, 7.0 * size)))
    ventricle = np.maximum(ventricle, both_sides(head, (21, -32, 8), (5.2 * size, 17 * length, 6.4 * size)))
    ventricle = np.maximum(ventricle, ellipsoid(head, (0, -4, 0), (2.6 * size, 12, 9)))
    ventricle = np.maximum(ventricle, ellipsoid(head, (0, -33, -34), (5 * length, 5, 7)))

    shrink = np.cbrt(latents.hippocampus_ml / 7.0).astype(np.float32)
    hippocampus = both_sides(head, (26, -12, -17), (8.5 * shrink, 18 * shrink, 7.5 * shrink))
    horn = both_sides(head, (26.5, -12, -16), (9.5, 19, 8.5))
    deep = np.maximum(both_sides(head, (12, -13, 2), (8, 13, 8)), both_sides(head, (25, 4, 2), (6, 15, 9)))
    deep = np.maximum(deep, both_sides(head, (15, 17, 8), (4.5, 10, 7)))
    foliage = np.float32(1.0) - soft(cerebellum - 9.0 - 5.0 * fold, 6.0)

    # Painted from the top: each layer takes its share of what the layers above left over.
    brain = soft(np.maximum(np.maximum(cerebrum, cerebellum), stem))
    left = np.ones_like(brain)
    out = np.zeros((len(head), len(TISSUES), VOXELS, VOXELS, VOXELS), np.float32)

    def paint(tissue: str, mask: F32) -> None:
        nonlocal left
        share = mask * left
        out[:, TISSUES.index(tissue)] += share
        left = left - share

    for tissue, mask in _lesion_layers(lesions, head, brain):
        paint(tissue, mask)
    paint("csf", soft(ventricle))
    paint("deep", soft(deep))
    paint("deep", soft(hippocampus))
    paint("csf", soft(horn) * soft(cerebrum))
    paint("white", soft(stem))
    paint("csf", sulcal * soft(cerebrum))
    paint("grey", soft(cerebrum) * grey)
    paint("white", soft(cerebrum))
    paint("cerebellum", soft(cerebellum) * foliage)
    paint("white", soft(cerebellum))
    paint("csf", soft(inside) * soft(vault))
    paint("skull", soft(vault + 1.5) * soft(z + 45.0))
    paint("muscle", soft(skin - 9.0) * (1.0 - soft(z + 30.0, 12.0)))
    paint("scalp", soft(skin))
    return out


def _lesion_layers(lesions: Lesions, head: F32, brain: F32) -> list[tuple[str, F32]]:
    """Masks of tumour core, enhancing rim, oedema and plaques, top layer first."""
    mm = axis_mm()
    layers: list[tuple[str, F32]] = []
    core, rim, oedema, plaque = (np.zeros_like(brain) for _ in range(4))

    def distance(rows: IntB, centre_R3: F32) -> F32:
        parts = [(mm[None] - centre_R3[:, axis, None] * head[rows, None]) ** 2 for axis in range(3)]
        square = parts[0][:, :, None, None] + parts[1][:, None, :, None] + parts[2][:, None, None, :]
        return np.asarray(np.sqrt(square), dtype=np.float32)

    rows = np.flatnonzero(lesions.site >= 0)
    if len(rows):
        away = distance(rows, lesions.centre_B3[rows])
        radius = lesions.radius_mm[rows, None, None, None]
        core[rows], rim[rows] = soft(0.55 * radius - away), soft(radius - away)
        oedema[rows] = 0.9 * soft(1.55 * radius - away, 9.0)
    for k in range(6):
        rows = np.flatnonzero(lesions.plaque_B6[:, k])
        if len(rows):
            away = distance(rows, lesions.plaque_B63[rows, k])
            plaque[rows] = np.maximum(plaque[rows], soft(lesions.plaque_mm_B6[rows, k, None, None, None] - away))
    for tissue, mask in (("core", core), ("rim", rim), ("oedema", oedema), ("plaque", plaque)):
        layers.append((tissue, mask * brain))
    return layers


def cortical_map(name: str) -> F32:
    """Fixed regional weight in [0, 1] (X, Y, Z): where a tracer changes with disease."""
    mm = axis_mm()
    x, y, z = np.abs(mm)[:, None, None], mm[None, :, None], mm[None, None, :]

    def blob(cx: float, cy: float, cz: float, width: float) -> NDArray[np.float64]:
        return np.asarray(np.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * width**2)))

    match name:
        case "temporoparietal":
            field = blob(44, -34, 26, 24) + 0.8 * blob(48, -8, -18, 20) + 0.8 * blob(4, -44, 34, 18)
        case "association":
            field = 1.6 * (
                blob(30, 40, 24, 32) + blob(44, -30, 26, 30) + 0.8 * blob(6, -40, 34, 24) + 0.6 * blob(46, 0, -14, 24)
            )
        case _:
            raise ValueError(f"unknown cortical map {name!r}; known maps are temporoparietal and association")
    return np.minimum(field, 1.0).astype(np.float32)


def render_mri(
    fractions_BTXYZ: F32, sequence_B: IntB, sequences: tuple[str, ...], profile: Profile, rng: np.random.Generator
) -> F32:
    """MRI in arbitrary units 0 to :data:`MRI_HIGH`: tissue contrast, site contrast, bias field, coil noise."""
    n = len(fractions_BTXYZ)
    contrast_ST = np.asarray([CONTRAST[s] for s in sequences], np.float32)
    weights_BT = contrast_ST[sequence_B] * (1.0 + 0.02 * rng.standard_normal((n, len(TISSUES)))).astype(np.float32)
    image = np.matmul(weights_BT[:, None], fractions_BTXYZ.reshape(n, len(TISSUES), -1)).reshape(n, *(VOXELS,) * 3)
    image = blur(image, MRI_BLUR)
    if profile.contrast != 1.0:
        image = np.power(np.maximum(image, 0.0), np.float32(profile.contrast))
    mm = axis_mm() / np.float32(93.0)
    tilt_B3 = (profile.bias_field + 0.02) * (np.asarray([0.5, 0.8, -0.4]) + 0.3 * rng.standard_normal((n, 3)))
    tilt_B3 = tilt_B3.astype(np.float32)
    field = np.float32(1.0) + tilt_B3[:, 0, None, None, None] * mm[:, None, None]
    field = field + tilt_B3[:, 1, None, None, None] * mm[:, None] + tilt_B3[:, 2, None, None, None] * mm
    gain = np.float32(profile.mri_gain) * (1.0 + 0.03 * rng.standard_normal((n, 1, 1, 1))).astype(np.float32)
    noise = np.float32(0.012 * profile.noise) * rng.standard_normal(image.shape, dtype=np.float32)
    shown = np.clip(np.abs(image * field * gain + noise), 0.0, 1.0) * np.float32(MRI_HIGH)
    return np.asarray(shown, dtype=np.float32)


def uptake(fractions_BTXYZ: F32, suvr_B: NDArray[np.float64], tracer: str) -> F32:
    """Noiseless activity in SUV (g/ml) for a cortical uptake ratio, after scanner blur.

    Disease lowers FDG in the temporoparietal cortex and raises AV45 in the association cortex; the rest stays.
    """
    grey = fractions_BTXYZ[:, TISSUES.index("grey")]
    match tracer:
        case "FDG":
            activity = np.tensordot(np.asarray(FDG, np.float32), fractions_BTXYZ, axes=(0, 1))
            change, field = 3.8 * (suvr_B - 1.25), cortical_map("temporoparietal")
        case "AV45":
            activity = np.tensordot(np.asarray(AV45, np.float32), fractions_BTXYZ, axes=(0, 1))
            change, field = 4.5 * (suvr_B - 0.95), cortical_map("association")
        case _:
            raise ValueError(f"unknown tracer {tracer!r}; known tracers are FDG and AV45")
    activity = activity + grey * field * change.astype(np.float32)[:, None, None, None]
    return blur(np.maximum(activity, 0.0), PET_BLUR)


def render_pet(fractions_BTXYZ: F32, latents: Latents, tracer: str, profile: Profile, rng: np.random.Generator) -> F32:
    """PET in SUV (g/ml): regional uptake on the same tissue fractions, then dose and activity noise."""
    n = len(fractions_BTXYZ)
    activity = uptake(fractions_BTXYZ, latents.fdg_suvr if tracer == "FDG" else latents.av45_suvr, tracer)
    dose = np.float32(profile.pet_gain) * (1.0 + 0.05 * rng.standard_normal((n, 1, 1, 1))).astype(np.float32)
    noise = rng.standard_normal(activity.shape, dtype=np.float32) * (0.02 + 0.03 * np.sqrt(activity))
    return np.asarray(np.clip(activity * dose + np.float32(profile.noise) * noise, 0.0, SUV_HIGH), dtype=np.float32)


def blur(image_BXYZ: F32, sigma_voxels: float) -> F32:
    """Separable Gaussian blur along the last three axes; the border repeats nothing, edges darken slightly."""
    index = np.arange(VOXELS)
    kernel = np.exp(-((index[:, None] - index[None]) ** 2) / (2.0 * sigma_voxels**2))
    kernel = (kernel / kernel.sum(axis=1).max()).astype(np.float32)
    out = image_BXYZ @ kernel
    out = kernel @ out
    flat = out.reshape(len(out), VOXELS, VOXELS * VOXELS)
    return np.asarray(np.matmul(kernel, flat).reshape(image_BXYZ.shape), dtype=np.float32)
