"""Chest films: a frontal X-ray of 64 x 64 pixels of 6 mm, painted from the heart, the fluid and the lungs of a patient.

Rows run from top to bottom, columns from the patient's right to the patient's left, as a film is read. Bright is dense
(MONOCHROME2). The prior and the current film share the patient's anatomy; what differs is the fluid between them.

Shape legend: B patients, Y rows, X columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulations.phantom_population import FloatB, Latents, Profile

F32 = NDArray[np.float32]

PIXELS = 64
PIXEL_MM = 6.0
CXR_HIGH = 4095.0
MIDLINE = 31.5
THORAX_PIXELS = 46.0


def edge(depth: NDArray[np.floating], width: float = 1.6) -> F32:
    """Soft edge: 0 outside, 1 inside, linear over ``width`` pixels."""
    return np.asarray(np.clip(depth / width + 0.5, 0.0, 1.0), dtype=np.float32)


def column(values: FloatB) -> F32:
    """A value per patient, shaped to multiply films (B, 1, 1)."""
    return values.astype(np.float32)[:, None, None]


def effusion_height(fluid_l: FloatB) -> FloatB:
    """Height of the pleural fluid above the costophrenic angle, pixels; none below 0.7 litres of overload."""
    return np.asarray(5.0 * np.maximum(fluid_l - 0.7, 0.0) ** 0.85)


def render_film(
    latents: Latents, fluid_l: FloatB, side_B: NDArray[np.int64], profile: Profile, rng: np.random.Generator
) -> F32:
    """Films (B, Y, X) in 0 to :data:`CXR_HIGH`.

    Args:
        latents: heart, body size, pneumonia.
        fluid_l: fluid overload at the time of this film.
        side_B: side of the consolidation, 0 right or 1 left; the same for both films of a patient.
        profile: contrast and noise of the site.
        rng: breath, exposure and noise of this film.
    """
    n = len(latents)
    y = np.arange(PIXELS, dtype=np.float32)[None, :, None]
    x = np.arange(PIXELS, dtype=np.float32)[None, None, :]
    dx = x - MIDLINE
    breath = column(0.7 * rng.standard_normal(n))
    girth = column(1.0 + 0.006 * (latents.bmi - 26.0))
    size = column(1.0 + 0.0015 * (latents.height_cm - 170.0))

    # Body: torso that widens into shoulders; neck above.
    half = np.where(y < 15, 13.0 + 17.0 * np.sqrt(np.clip((y - 2.0) / 13.0, 0.0, 1.0)), 30.0 - 0.05 * (y - 15.0))
    torso = edge(half * girth - np.abs(dx), 2.5)
    neck = edge(8.5 - np.abs(dx), 2.0)
    density = 0.62 * np.maximum(torso, neck) * (0.86 + 0.14 * np.clip(np.abs(dx) / 30.0, 0, 1)) + 0.02

    # Lungs: two fields, wide below, that end on the diaphragm; the right dome stands higher.
    lungs = np.zeros((n, PIXELS, PIXELS), np.float32)
    space, base = np.zeros_like(lungs), np.zeros_like(lungs)
    for side, dome in ((-1.0, 47.0), (1.0, 49.0)):
        middle = side * 12.4 * size
        across = (dx - middle) / (10.6 * size)
        floor = (dome + breath) + 3.8 * (across - 0.1 * side) ** 2 + 2.5 * np.maximum(across * side, 0.0) ** 3
        taper = 1.0 - 0.55 * np.clip((26.0 - y) / 22.0, 0.0, 1.0) ** 1.8
        inward = (taper - np.abs(across + 0.18 * side * (1 - taper))) * 10.6
        lungs = np.maximum(lungs, edge(inward, 1.8) * edge(y - 5.5, 2.0) * edge(floor - y, 1.6))
        space = np.maximum(space, edge(inward + 1.6, 1.8))
        base = np.where(side * dx > 0, floor, base)
    density = density * (1.0 - lungs) + lungs * 0.20

    # Vessels fan out from the hila; they thicken with congestion.
    wet = column(np.clip(fluid_l, 0.0, 4.0))
    hilum = np.abs(np.abs(dx) - 8.0) ** 2 + (y - 28.0) ** 2
    angle = np.arctan2(y - 28.0, np.abs(dx) - 5.0)
    branches = np.clip(np.cos(9.0 * angle + 0.35 * np.sqrt(hilum)), 0.0, 1.0) ** 2
    density = density + lungs * (0.10 + 0.03 * wet) * branches * np.exp(-hilum / 160.0)
    density = density + lungs * (0.05 + 0.055 * wet) * np.exp(-hilum / 90.0)

    # Consolidation in one upper field, clear of heart, hilum and fluid.
    patch = (dx - np.where(side_B == 0, -16.0, 16.0)[:, None, None]) ** 2 / 22.0 + (y - 19.0) ** 2 / 26.0
    density = density + lungs * 0.30 * column(latents.pneumonia.astype(np.float64)) * np.exp(-patch)

    # Effusion: fills the base, highest at the chest wall, with a meniscus.
    height = column(effusion_height(fluid_l))
    lateral = np.clip((np.abs(dx) - 6.0) / 17.0, 0.0, 1.0) ** 1.5
    level = base + 3.0 - height * (0.55 + 0.75 * lateral)
    fluid = edge(y - level, 2.5) * edge(height - 0.4, 1.5) * space * edge(base + 2.0 - y, 1.6)
    density = density * (1.0 - fluid) + fluid * 0.63

    # Mediastinum, heart and great vessels in front of the spine.
    width = column(latents.heart_ratio + 0.006 * np.clip(fluid_l, 0, 4)) * THORAX_PIXELS * size
    tall, lean = 0.38 * width + 1.0, 0.42  # the apex points down and to the patient's left
    reach = np.sqrt(np.maximum(0.25 * width**2 - (lean * tall) ** 2, 9.0))
    down = y - 40.5 - breath
    bulk = np.sqrt(((dx - 0.17 * width - lean * down) / reach) ** 2 + (down / tall) ** 2)
    heart = edge((1.0 - bulk) * 10.0, 2.0) * edge(base + 4.0 - y, 4.0)
    stalk = edge(4.2 + 1.2 * edge(y - 22.0, 8.0) - np.abs(dx - 0.4), 1.8) * edge(y - 4.0, 3.0)
    knob = edge(4.0 - np.sqrt((dx - 2.8) ** 2 + (0.85 * (y - 19.0)) ** 2), 1.8)
    trunk = edge(4.2 - np.sqrt((dx - 3.6) ** 2 + (0.8 * (y - 27.5)) ** 2), 1.8)
    middle_mask = np.maximum(np.maximum(heart, stalk), np.maximum(knob, trunk)) * torso
    density = density * (1.0 - middle_mask) + middle_mask * 0.70
    spine = edge(2.6 - np.abs(dx), 1.5)
    density = density + spine * (0.07 + 0.025 * np.cos(2 * np.pi * y / 4.2)) * torso
    airway = edge(1.3 - np.abs(dx + 0.6), 1.4) * edge(22.0 - y, 2.0)
    density = density - 0.20 * airway

    # Bones: posterior ribs slope down and outwards, anterior ribs the other way, clavicles on top.
    ribs = np.zeros_like(density)
    reach_out = np.abs(dx)
    cage = edge(24.5 * size - reach_out, 2.0) * edge(reach_out - 3.0, 1.5)
    for k in range(9):
        back = 7.5 + 4.9 * k - 0.020 * (reach_out - 12.0) ** 2 + 0.10 * reach_out
        ribs = ribs + np.exp(-((y - back) ** 2) / 1.1) * 0.095
        if 2 <= k <= 6:
            front = 9.0 + 5.4 * k + 0.45 * (14.0 - reach_out)
            ribs = ribs + np.exp(-((y - front) ** 2) / 1.6) * 0.045 * edge(reach_out - 9.0, 5.0)
    density = density + ribs * cage * edge(54.0 - y, 4.0)
    collar = 9.5 - 0.20 * (reach_out - 3.0)
    density = density + np.exp(-((y - collar) ** 2) / 1.3) * 0.13 * edge(reach_out - 3.5, 2.0) * edge(24.0 - reach_out)
    arms = edge(reach_out - 26.5, 2.0) * edge(y - 8.0, 3.0) * edge(20.0 - y, 6.0)
    density = density + 0.10 * arms * torso
    bubble = ((dx - 11.0) / 4.0) ** 2 + ((y - 55.0) / 2.6) ** 2
    density = density - 0.16 * np.exp(-bubble)

    exposure = column(1.0 + 0.03 * rng.standard_normal(n))
    density = np.clip(density * exposure, 0.0, 1.0)
    if profile.cxr_contrast != 1.0:
        density = np.power(density, np.float32(profile.cxr_contrast))
    noise = np.float32(0.012 * profile.noise) * rng.standard_normal(density.shape, dtype=np.float32)
    return np.asarray(np.clip(density + noise, 0.0, 1.0) * np.float32(CXR_HIGH), dtype=np.float32)
