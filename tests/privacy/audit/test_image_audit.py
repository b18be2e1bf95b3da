"""The audit of images: copies block, private images do not, and an audit that may not be believed never decides anything."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import ndimage

from privacy.audit import image_gates
from privacy.audit.bounds import Interval
from privacy.audit.gates import Finding
from privacy.audit.image_audit import ImageAudit, ImageSet, ImageSets, audit_images
from privacy.audit.image_copies import ImageCopies, copies
from privacy.audit.image_links import leads
from privacy.audit.mixed import Columns
from privacy.audit.standalone import Tables
from privacy.audit.table_gates import TablePolicy

SIDE = 16
QUICK = TablePolicy(fewest_patients=60, predicates=100, draws=999)
PEOPLE = 90


def films(seed: int, people: int, each: int = 1) -> np.ndarray:
    """Small made-up films, ``each`` of every person one after another."""

    def field(rng: np.random.Generator, count: int) -> np.ndarray:
        made = ndimage.gaussian_filter(rng.normal(size=(count, SIDE, SIDE)), (0, 1, 1))
        return np.asarray(made / made.std())

    rng = np.random.default_rng(seed)
    own = np.repeat(field(rng, people), each, axis=0)
    return np.asarray(50 + 2 * field(np.random.default_rng(99), 1) + own + 0.4 * field(rng, len(own)))


def named(images: np.ndarray, prefix: str, each: int = 1) -> ImageSet:
    return ImageSet(images, tuple(f"{prefix}{i // each}" for i in range(len(images))))


def private(each: int = 1) -> ImageSets:
    return ImageSets(
        named(films(1, PEOPLE, each), "m", each), named(films(2, PEOPLE, each), "h", each), named(films(3, PEOPLE), "s")
    )


def leaking(sets: ImageSets, share: float) -> ImageSets:
    """With one image each of a share of the members in the cohort, dimmed."""
    images, owners = sets.member.pixels_N, np.asarray(sets.member.owners)
    first = np.unique(owners, return_index=True)[1][: round(share * len(sets.member.patients))]
    synthetic = sets.synthetic.pixels_N.copy()
    synthetic[: len(first)] = 0.7 * images[first]
    return dataclasses.replace(sets, synthetic=dataclasses.replace(sets.synthetic, pixels_N=synthetic))


def status(found: ImageAudit, subject: str) -> str:
    return next(finding.status for finding in found.findings if finding.subject == subject)


@pytest.fixture(scope="module")
def leaky() -> ImageAudit:
    return audit_images(leaking(private(3), 0.3), QUICK, 0)


def test_copies_of_one_image_among_several_block(leaky: ImageAudit) -> None:
    assert (leaky.decision, leaky.valid) == ("BLOCK", True)
    assert status(leaky, "copies, whole image") == "BLOCK"
    assert status(leaky, "registered-image") in ("HOLD", "BLOCK")  # ninety patients are few for one per cent
    assert status(leaky, "planted leak") == "PASS"
    assert leaky.copies[0].counts.hits_member[-1] >= 25
    assert leaky.recognition is not None
    assert leaky.recognition > 0.9


def test_the_result_is_json_with_power_beside_every_bound_and_no_patient(leaky: ImageAudit) -> None:
    text = json.dumps(leaky.to_json(), allow_nan=False)
    content = json.loads(text)
    assert content["schema_version"] == "medgen.image-audit/1"
    assert content["patients"] == {"members": 90, "held_out": 90, "synthetic": 90, "reference": 0}
    assert content["images"] == {"members": 270, "held_out": 270, "synthetic": 90, "reference": 0}
    assert content["copies"][0]["adjusted_p_value"] < 0.01
    for attack in content["attacks"]:
        assert 0 <= attack["epsilon_lower"] <= attack["epsilon_lower_ceiling"]
        assert "synthetic images" in attack["access"]
    assert "m17" not in text


def test_private_images_are_not_blocked_and_the_same_seed_gives_the_same_result() -> None:
    steps: list[str] = []
    first, second = audit_images(private(), QUICK, 5, steps.append), audit_images(private(), QUICK, 5)
    assert first.decision in ("RELEASE", "HOLD")
    assert first.valid
    assert first.to_json() == second.to_json()
    assert {"likeness of strangers", "attack domias", "copies"} <= set(steps)
    assert status(first, "null control") == "PASS"
    assert status(first, "re-identification") == "INFO"  # nobody has two images, so silence says little


def test_a_reference_takes_the_place_of_half_of_the_held_out_patients() -> None:
    sets = dataclasses.replace(private(), reference=named(films(4, 60), "r"))
    found = audit_images(leaking(sets, 0.3), QUICK, 0)
    assert (found.decision, found.patients[3], found.images[3]) == ("BLOCK", 60, 60)


def test_a_single_plain_copy_is_for_somebody_to_look_at() -> None:
    found = audit_images(leaking(private(), 0.011), QUICK, 0)
    assert found.decision == "HOLD"
    assert found.copies[0].verbatim_member == 1
    assert status(found, "copies, whole image") == "HOLD"


# --- validity ---------------------------------------------------------------------------------------------------------


def test_people_or_images_on_both_sides_hold_and_nothing_is_attacked() -> None:
    sets = private()
    by_name = dataclasses.replace(sets, held_out=named(films(2, PEOPLE), "m"))
    shared = sets.held_out.pixels_N.copy()
    shared[:3] = 2 * sets.member.pixels_N[:3] + 5  # the same films, saved again brighter
    by_image = dataclasses.replace(sets, held_out=ImageSet(shared, sets.held_out.owners))
    for own in (by_name, by_image):
        found = audit_images(leaking(own, 0.5), QUICK, 0)
        assert (found.decision, found.valid, found.attacks, found.copies) == ("HOLD", False, (), ())
        assert status(found, "split") == "HOLD"
    assert found.overlap.equal_records == 3


def test_one_image_under_two_names_holds() -> None:
    sets = private()
    twice = sets.member.pixels_N.copy()
    twice[1] = twice[0]
    found = audit_images(dataclasses.replace(sets, member=ImageSet(twice, sets.member.owners)), QUICK, 0)
    assert (found.decision, found.valid, found.overlap.repeated) == ("HOLD", False, 2)


def test_ten_patients_are_no_audit_however_many_images_they_have() -> None:
    sets = dataclasses.replace(private(), member=named(films(1, 10, 9), "m", 9))
    found = audit_images(sets, QUICK, 0)
    assert (found.decision, found.valid) == ("HOLD", False)
    assert "10 members" in next(f.sentence for f in found.findings if f.subject == "size")


@pytest.mark.parametrize("difference", ["brightness", "contents", "number"])
def test_groups_that_differ_by_themselves_hold_even_if_members_were_copied(difference: str) -> None:
    sets = leaking(private(), 0.5)
    match difference:
        case "brightness":
            other = named(sets.held_out.pixels_N + 4, "h")
        case "contents":
            other = named(ndimage.gaussian_filter(sets.held_out.pixels_N, (0, 1, 1)), "h")
        case _:
            other = named(films(2, PEOPLE, 4), "h", 4)
    found = audit_images(dataclasses.replace(sets, held_out=other), QUICK, 0)
    assert (found.decision, found.valid) == ("HOLD", False)
    assert status(found, "blind baseline") == "HOLD"


def test_bad_sets_are_refused_by_name() -> None:
    sets = private()
    with pytest.raises(ValueError, match="a patient for each of 90 images, got 89"):
        ImageSet(sets.member.pixels_N, sets.member.owners[1:])
    with pytest.raises(ValueError, match=r"synthetic: images have shape \(16, 15\), the members' \(16, 16\)"):
        dataclasses.replace(sets, synthetic=named(films(3, 9)[:, :, 1:], "s"))
    with pytest.raises(ValueError, match="the same everywhere"):
        audit_images(ImageSets(*(named(np.ones((80, SIDE, SIDE)), p) for p in "mhs")), QUICK, 0)


# --- image and table --------------------------------------------------------------------------------------------------


def test_the_row_of_the_nearest_image_is_among_the_nearest_or_not() -> None:
    rows = np.array([[0.0], [0.1], [0.5]], np.float32)
    records = np.array([[0.02], [0.11], [0.5], [0.5]], np.float32)
    hits = leads(records, rows, np.array([0, 0, 2, -1]), [1, 2])
    assert hits.tolist() == [[True, True], [False, True], [True, True], [False, False]]
    tied = leads(np.array([[0.05]], np.float32), rows, np.array([1]), [1])
    assert tied.tolist() == [[True]]  # as near as the nearest counts


def test_an_image_that_leads_to_its_row_blocks_and_one_that_does_not_leaves_the_tables_verdict() -> None:
    columns = Columns(tuple("abcd"), ("numeric",) * 4)
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(PEOPLE, 4)) for _ in range(3)]
    sets = private()
    ids = [tuple(f"{prefix}{i}" for i in range(PEOPLE)) for prefix in "mhs"]
    both = dataclasses.replace(sets, tables=Tables(columns, *tables, None, ids[0], ids[1]), synthetic_ids=ids[2])
    found = audit_images(both, QUICK, 0)
    assert found.table is not None
    assert found.decision != "BLOCK"
    assert status(found, "linkability of image and table") != "BLOCK"
    assert found.table.policy.level_block == QUICK.level_block / 2
    copied = tables[2].copy()
    copied[:45] = tables[0][np.argsort(ids[0])[:45]]  # the members whose images leak, in the order of their names
    leaky = dataclasses.replace(
        leaking(both, 0.5), tables=Tables(columns, tables[0], tables[1], copied, None, ids[0], ids[1])
    )
    found = audit_images(leaky, QUICK, 0)
    assert found.decision == "BLOCK"
    assert status(found, "linkability of image and table") == "BLOCK"
    assert found.risks[0].hits_member >= 40
    assert found.to_json()["table"]["decision"] == "BLOCK"
    shuffled = dataclasses.replace(leaky, synthetic_ids=tuple(reversed(ids[2])))
    assert audit_images(shuffled, QUICK, 0).risks[0].hits_member <= 5  # images and rows of different patients


# --- rules ------------------------------------------------------------------------------------------------------------


def test_where_groups_may_differ_only_copies_beyond_every_two_strangers_block() -> None:
    blind = Interval(0.52, 0.58, 0.9)
    held = np.zeros(100)

    def of(scores: np.ndarray) -> tuple[ImageCopies, Finding]:
        found = copies("whole image", scores, held, (0.5, 0.6))
        return found, image_gates.copies(found, found.p_value, QUICK)

    faint, plain = (of(np.where(np.arange(100) < 20, value, 0.0)) for value in (0.55, 0.7))
    assert (faint[1].status, plain[1].status) == ("BLOCK", "BLOCK")
    assert image_gates.doubtful([faint[1]], [], [faint[0]], blind, QUICK)[0].status == "HOLD"
    assert image_gates.doubtful([plain[1]], [], [plain[0]], blind, QUICK)[0].status == "BLOCK"


def test_copies_are_judged_after_holm_and_one_plain_copy_is_looked_at() -> None:
    one = copies("whole image", np.append(np.zeros(99), 0.99), np.zeros(100), (0.5, 0.6))
    none = copies("whole image", np.zeros(100), np.zeros(100), (0.5, 0.6))
    both = copies("whole image", np.append(np.zeros(99), 0.99), np.append(np.zeros(99), 0.99), (0.5, 0.6))
    for found, p_value, expected in (
        (one, 0.001, "BLOCK"),
        (one, 0.03, "HOLD"),
        (one, 1.0, "HOLD"),
        (both, 1.0, "PASS"),
        (none, 1.0, "PASS"),
    ):
        assert image_gates.copies(found, p_value, QUICK).status == expected
    assert one.p_value == 1.0  # a half for one patient, twice for two thresholds
    assert one.rate_member.low > 0
