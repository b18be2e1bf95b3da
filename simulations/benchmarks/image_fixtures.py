"""Adversarial images on which copy detectors go wrong, each with the verdict that is right.

Copies that a pixel comparison misses (dimmed, moved, mirrored, one slice, one image among many of a patient) and cohorts that
a nearest-neighbour distance takes for copies (a collapsed mean that is near everybody, one dark frame around all). No tool
that installs audits images per patient, so medgen stands alone here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from rich.console import Console
from scipy import ndimage

from privacy.audit.gates import Decision
from privacy.audit.image_audit import ImageAudit, ImageSet, ImageSets, audit_images
from privacy.audit.table_gates import TablePolicy
from simulations.benchmarks.runner import Row

Pixels = npt.NDArray[np.float32]

SIZE = 200
_FILM = (32, 32)
_VOLUME = (16, 16, 12)
_EACH = 6  # images of a patient, where the fixture is about several

LEAKS: frozenset[Decision] = frozenset({"BLOCK"})
DOUBT: frozenset[Decision] = frozenset({"HOLD"})
NOT_GREEN: frozenset[Decision] = frozenset({"HOLD", "BLOCK"})
NOT_RED: frozenset[Decision] = frozenset({"RELEASE", "HOLD"})


@dataclasses.dataclass(frozen=True)
class ImageFixture:
    """Released images with what is right to say of them.

    Attributes:
        name: what they are.
        sets: members, held-out patients and the cohort.
        right: decisions that are right.
    """

    name: str
    sets: ImageSets
    right: frozenset[Decision]


def scans(rng: np.random.Generator, people: int, shape: tuple[int, ...] = _FILM, each: int = 1) -> Pixels:
    """Made-up scans, ``each`` of every person one after another: one anatomy, own detail, and what changes every day."""

    def field(source: np.random.Generator, count: int) -> Pixels:
        parts = []
        for width in (1.2, 4.0):
            part = ndimage.gaussian_filter(source.normal(size=(count, *shape)), (0.0, *(width,) * len(shape)))
            parts.append(part / part.std())
        return np.asarray(sum(parts), np.float32)

    anatomy = field(np.random.default_rng(20_210), 1)
    own = np.repeat(field(rng, people), each, axis=0)
    return np.asarray(40 + 3 * anatomy + own + 0.4 * field(rng, len(own)), np.float32)


def named(images: Pixels, prefix: str, each: int = 1) -> ImageSet:
    """Images with made-up patients."""
    return ImageSet(images, tuple(f"{prefix}{i // each}" for i in range(len(images))))


def image_fixtures(size: int = SIZE) -> tuple[ImageFixture, ...]:
    """All of them, the same on every call; ``size`` members, as many held-out patients and as many synthetic images."""
    rng = np.random.default_rng(7)
    member, held_out, fresh = (scans(rng, size) for _ in range(3))
    tenth = size // 10

    def made(
        name: str,
        synthetic: Pixels,
        right: frozenset[Decision],
        sides: tuple[Pixels, Pixels] = (member, held_out),
        each: int = 1,
    ) -> ImageFixture:
        sets = ImageSets(named(sides[0], "m", each), named(sides[1], "h", each), named(synthetic, "s"))
        return ImageFixture(name, sets, right)

    def mixed(copies: Pixels, cohort: Pixels = fresh) -> Pixels:
        return np.concatenate([copies, cohort[len(copies) :]])[rng.permutation(len(cohort))]

    def framed(images: Pixels) -> Pixels:
        distance = np.hypot(*np.meshgrid(*(np.linspace(-1, 1, side) for side in _FILM)))
        return np.where(distance < 0.8, images, 0).astype(np.float32)

    copied = member[:tenth]
    mean = np.repeat(member.mean(axis=0)[None], size, axis=0)
    volumes, new = (scans(rng, size, _VOLUME), scans(rng, size, _VOLUME)), scans(rng, size, _VOLUME)
    sliced = new.copy()
    sliced[: size // 5, :, :, 5] = volumes[0][: size // 5, :, :, 5]
    many = scans(rng, size, each=_EACH), scans(rng, size, each=_EACH)
    hidden = many[0][3 :: 10 * _EACH]
    return (
        made("one film in ten copied, darker and flatter", mixed(np.float32(0.6) * copied - 5), LEAKS),
        made("one film in ten copied, moved by two pixels", mixed(np.roll(copied, (2, -2), axis=(1, 2))), LEAKS),
        made("one film in ten copied, mirrored", mixed(copied[:, :, ::-1]), LEAKS),
        made("one film in ten copied, under noise", mixed(_noisy(rng, copied, 0.7)), LEAKS),
        made(
            "one film in ten copied by a generator that blurs every image",
            ndimage.gaussian_filter(mixed(copied), (0, 0.7, 0.7)),
            LEAKS,
        ),
        made("one slice copied in one volume of five", sliced, LEAKS, volumes),
        made("six films a patient, one of one patient in ten copied", mixed(hidden), LEAKS, many, _EACH),
        made("one member's film over and over", np.repeat(member[[4]], size, axis=0), NOT_GREEN),
        made(
            "members from a brighter scanner, three in ten copied",
            mixed(member[: 3 * tenth] + 9),
            DOUBT,
            (member + 9, held_out),
        ),
        made("collapse to the members' mean image, near everybody", _noisy(rng, mean, 0.02), NOT_RED),
        made("pure noise", _noisy(rng, 0 * fresh, 1.0), NOT_RED),
        made("private generator", fresh, NOT_RED),
        made(
            "private generator, one dark frame around every film",
            framed(fresh),
            NOT_RED,
            (framed(member), framed(held_out)),
        ),
        made("private generator of volumes", new, NOT_RED, volumes),
    )


def _noisy(rng: np.random.Generator, images: Pixels, spread: float) -> Pixels:
    return np.asarray(images + spread * rng.normal(size=images.shape), np.float32)


def audited(fixture: ImageFixture) -> ImageAudit:
    """Medgen's audit with the default policy."""
    return audit_images(fixture.sets, TablePolicy(), seed=0)


def rows(found: tuple[ImageFixture, ...], judge: Callable[[ImageFixture], ImageAudit] = audited) -> list[Row]:
    """One row per fixture, and how many verdicts are right."""
    out, right = [], 0
    console = Console(stderr=True)
    for fixture in found:
        with console.status(fixture.name):
            decision = judge(fixture).decision
        right += decision in fixture.right
        words = f"images, {fixture.name}: medgen says {decision}, right is {' or '.join(sorted(fixture.right))}"
        out.append(Row.at_least(words, float(decision in fixture.right), 1.0))
    out.append(Row.at_least("image fixtures on which medgen's verdict is right", float(right), float(len(found))))
    return out
