"""The adversarial images: medgen is right on small forms of those that fool a pixel comparison or a nearest neighbour."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from privacy.audit.image_audit import audit_images
from privacy.audit.table_gates import TablePolicy
from simulations.benchmarks.image_fixtures import image_fixtures, rows

SMALL = {fixture.name: fixture for fixture in image_fixtures(120)}


def test_there_are_leaks_and_cohorts_that_only_look_like_it_the_same_on_every_call() -> None:
    assert sum("RELEASE" not in fixture.right for fixture in SMALL.values()) >= 8
    assert sum("BLOCK" not in fixture.right for fixture in SMALL.values()) >= 5
    for fixture in image_fixtures(120):
        np.testing.assert_array_equal(fixture.sets.synthetic.pixels_N, SMALL[fixture.name].sets.synthetic.pixels_N)


@pytest.mark.parametrize(
    "name",
    [
        "one film in ten copied, darker and flatter",
        "one film in ten copied, moved by two pixels",
        "one slice copied in one volume of five",
        "six films a patient, one of one patient in ten copied",
        "members from a brighter scanner, three in ten copied",
        "collapse to the members' mean image, near everybody",
        "pure noise",
        "private generator, one dark frame around every film",
    ],
)
def test_medgen_is_right_on_a_small_form(name: str) -> None:
    fixture = SMALL[name]
    assert audit_images(fixture.sets, TablePolicy(), seed=0).decision in fixture.right


def test_a_wrong_verdict_misses_its_bar() -> None:
    leak, private = SMALL["one film in ten copied, mirrored"], SMALL["private generator"]
    wrong = audit_images(private.sets, TablePolicy(), 0)
    found = rows((leak, private), lambda _: wrong)
    assert [row.holds for row in found] == [False, True, False]
    assert found[-1].value == 1.0
    assert dataclasses.replace(wrong, decision="BLOCK").sentence == "This cohort gives members away."
