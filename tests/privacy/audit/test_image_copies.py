"""Copies in images: found when moved, dimmed, cropped or hidden in one slice; strangers, backgrounds and means are none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from privacy.audit.image_copies import (
    Pictures,
    copies,
    copy_thresholds,
    recognition,
    resemblance,
    usual,
)
from privacy.audit.likeness import Likeness

SIDE = 32
MASK = np.hypot(*np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]) < 0.8


def field(rng: np.random.Generator, count: int, *shape: int) -> np.ndarray:
    """Smooth noise of unit spread, coarse and fine."""
    blur = [0.0] + [1.0] * len(shape)
    parts = [ndimage.gaussian_filter(rng.normal(size=(count, *shape)), np.multiply(blur, s)) for s in (1.2, 4.0)]
    return np.asarray(sum(part / part.std() for part in parts))


def films(seed: int, people: int, each: int = 1) -> np.ndarray:
    """Made-up films, ``each`` of every person one after another: one anatomy for all, masked, with own detail."""
    anatomy = 2 * field(np.random.default_rng(99), 1, SIDE, SIDE)
    rng = np.random.default_rng(seed)
    own = np.repeat(field(rng, people, SIDE, SIDE), each, axis=0)
    return np.asarray(np.where(MASK, 5 + anatomy + own + 0.4 * field(rng, len(own), SIDE, SIDE), 0.0))


def volumes(seed: int, people: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    anatomy = 4 * field(np.random.default_rng(98), 1, 16, 16, 12)
    return np.asarray(anatomy + field(rng, people, 16, 16, 12))


def found(
    member: np.ndarray, held_out: np.ndarray, synthetic: np.ndarray, part: str = "whole"
) -> tuple[int, int, float]:
    """Members and held-out patients above every stranger, and the p-value."""
    likeness = Likeness.of(np.concatenate([member, held_out]))
    sides = [Pictures.of(likeness, images) for images in (member, held_out, synthetic)]
    strangers = usual(likeness, sides[0].joined(sides[1]), len(synthetic), np.random.default_rng(0))
    seen = [resemblance(likeness, side, sides[2]) for side in sides[:2]]
    pick = {"whole": lambda r: r.whole_P, "slice": lambda r: r.slice_P}[part]
    out = copies(part, pick(seen[0]), pick(seen[1]), copy_thresholds(pick(strangers)))
    return out.counts.hits_member[-1], out.counts.hits_held_out[-1], out.p_value


def moved(images: np.ndarray, *by: int) -> np.ndarray:
    return np.asarray(ndimage.shift(images, (0, *by), order=0, mode="nearest"))


CHANGES = {
    "verbatim": lambda x: x,
    "noise half as large as own detail": lambda x: x + 0.7 * np.random.default_rng(1).normal(size=x.shape),
    "brightness and contrast": lambda x: 1.7 * x - 30,
    "shifted by two pixels": lambda x: moved(x, 2, -1),
    "mirrored": lambda x: x[:, :, ::-1],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_is_found(name: str) -> None:
    member, held_out, fresh = films(1, 80), films(2, 80), films(3, 60)
    hits, misses, p_value = found(member, held_out, np.concatenate([fresh, CHANGES[name](member[:20])]))
    assert hits >= 18, name
    assert misses <= 1
    assert p_value < 1e-3


def test_a_cropped_copy_is_found_as_far_as_its_detail_survives() -> None:
    member, held_out, fresh = films(1, 80), films(2, 80), films(3, 60)
    cropped = ndimage.zoom(member[:40, 1:-1, 1:-1], (1, 32 / 30, 32 / 30), order=1)
    hits, misses, p_value = found(member, held_out, np.concatenate([fresh, cropped]))
    assert hits >= 12
    assert misses <= 1
    assert p_value < 1e-3


def test_a_generator_that_blurs_every_image_hides_no_copy() -> None:
    member, held_out, fresh = films(1, 80), films(2, 80), films(3, 60)
    blurred = ndimage.gaussian_filter(np.concatenate([fresh, member[:20]]), (0, 0.7, 0.7))
    hits, misses, p_value = found(member, held_out, blurred)
    assert (hits >= 18, misses <= 1, p_value < 1e-3) == (True, True, True)


def test_a_cohort_that_is_one_patient_over_and_over_is_a_copy() -> None:
    member, held_out = films(1, 80), films(2, 80)
    hits, misses, _ = found(member, held_out, np.repeat(member[[4]], 60, axis=0))
    assert hits >= 1 > misses


def test_strangers_are_no_copies_more_often_than_the_level_says() -> None:
    values, faint = [], []
    for i in range(40):
        member, held_out, cohort = (films(3 * i + part, 40) for part in range(3))
        likeness = Likeness.of(np.concatenate([member, held_out]))
        sides = [Pictures.of(likeness, images) for images in (member, held_out, cohort)]
        strangers = usual(likeness, sides[0].joined(sides[1]), 40, np.random.default_rng(i)).whole_P
        scores = [resemblance(likeness, side, sides[2]).whole_P for side in sides[:2]]
        values.append(copies("whole image", *scores, copy_thresholds(strangers)).p_value)
        # so many pass the median that the exact test nearly reaches its level
        faint.append(copies("whole image", *scores, (float(np.median(strangers)),)).p_value)
    assert sum(value <= 0.05 for value in values) <= 6  # 99.7 % of fair audits
    assert sum(value <= 0.2 for value in faint) <= 16  # 99.7 % of them, too
    assert sum(value <= 0.5 for value in faint) >= 5  # and not a test that never alarms


def test_a_background_of_zeros_makes_nobody_alike() -> None:
    likeness = Likeness.of(films(1, 60))
    people = Pictures.of(likeness, films(2, 60))
    plain = np.corrcoef(films(2, 2).reshape(2, -1))[0, 1]
    alike = usual(likeness, people, 60, np.random.default_rng(0))
    assert plain > 0.9
    assert np.nanmedian(alike.whole_P) < 0.6


def test_the_mean_image_and_noise_and_blank_images_copy_nobody() -> None:
    member, held_out = films(1, 60), films(2, 60)
    rng = np.random.default_rng(0)
    mean = np.repeat(member.mean(axis=0)[None], 60, axis=0)
    for synthetic in (mean, mean + 0.01 * rng.normal(size=mean.shape), rng.normal(size=mean.shape), 0 * mean):
        hits, misses, p_value = found(member, held_out, synthetic)
        assert abs(hits - misses) <= 2
        assert p_value > 0.05


def test_one_slice_of_a_volume_is_found_where_the_whole_is_not() -> None:
    member, held_out, synthetic = volumes(1, 60), volumes(2, 60), volumes(3, 60)
    synthetic[:20, :, :, 5] = member[:20, :, :, 5]
    hits, misses, p_value = found(member, held_out, synthetic, "slice")
    assert hits >= 18
    assert misses <= 5
    assert p_value < 1e-3
    assert found(member, held_out, synthetic, "whole")[2] > 0.01
    assert found(member, held_out, moved(member, 1, -1, 0))[0] >= 55


def test_one_image_among_many_flags_its_patient_and_only_that_one() -> None:
    images, owner = films(1, 60, each=6), np.repeat(np.arange(60), 6)
    likeness = Likeness.of(images)
    people = Pictures.of(likeness, images, owner, patients=61)
    cohort = Pictures.of(likeness, np.concatenate([films(2, 30), images[[44]]]))
    seen = resemblance(likeness, people, cohort)
    strangers = usual(likeness, people, 31, np.random.default_rng(0))
    assert seen.whole_P[7] >= copy_thresholds(strangers.whole_P)[-1]
    assert np.flatnonzero(seen.whole_P > 0.9).tolist() == [7]
    assert (seen.nearest_N[44], seen.likeness_N[44] > 0.99) == (30, True)
    assert np.isnan(seen.whole_P[60])  # a patient without an image is never a hit
    assert np.isnan(strangers.person_P[60])


def test_another_image_of_the_same_person_is_recognised() -> None:
    images, owner = films(1, 40, each=2), np.repeat(np.arange(40), 2)
    likeness = Likeness.of(images)
    known = recognition(likeness, Pictures.of(likeness, images, owner))
    assert known is not None
    assert known > 0.95
    assert recognition(likeness, Pictures.of(likeness, images)) is None
    strangers = Pictures.of(likeness, images, np.random.default_rng(0).permutation(owner))
    wrong = recognition(likeness, strangers)
    assert wrong is not None
    assert 0.3 < wrong < 0.7


def test_thresholds_rise_and_the_last_is_above_every_stranger() -> None:
    scores = np.append(np.linspace(0, 0.5, 200), np.nan)
    low, high = copy_thresholds(scores)
    assert (scores >= low).sum() == 2  # one per cent of two hundred
    assert not (scores >= high).any()
    assert len(copy_thresholds(np.array([0.3]))) == 2
    with pytest.raises(ValueError, match="no patient has an image"):
        copy_thresholds(np.array([np.nan]))


def test_bad_images_are_refused_by_name() -> None:
    images = films(1, 10)
    likeness = Likeness.of(images)
    for make, message in (
        (lambda: Likeness.of(images[0]), "2-D or 3-D images of 8 pixels"),
        (lambda: Likeness.of(images[:1]), "two reference images or more, got 1"),
        (lambda: Likeness.of(0 * images), "the same everywhere"),
        (lambda: likeness.view(images[:, :-1]), r"expected images of shape \(32, 32\), got \(31, 32\)"),
        (lambda: likeness.view(images * np.nan), "not finite"),
        (lambda: Pictures.of(likeness, images, np.arange(9)), "a patient in"),
        (lambda: resemblance(likeness, Pictures.of(likeness, images), Pictures.of(likeness, images[:0])), "got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
