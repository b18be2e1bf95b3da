"""The standalone audit: leaks block, private tables do not, and an audit that may not be believed never decides anything."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from privacy.audit import table_attacks, table_gates
from privacy.audit.bounds import Interval, ThresholdCounts, auc, best_epsilon_lower_bound
from privacy.audit.copies import Repeats
from privacy.audit.mixed import Columns
from privacy.audit.risks import judge
from privacy.audit.standalone import TableAudit, Tables, audit
from privacy.audit.table_gates import Copies, TablePolicy

NAN = float("nan")
COLUMNS = Columns(("a", "b", "c", "d", "e"), ("numeric", "numeric", "numeric", "numeric", "categorical"))
QUICK = TablePolicy(predicates=200, draws=2999)
SIZE = 240


def people(seed: int, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(size, 5))
    table[:, 1] += table[:, 0]
    table[:, 4] = np.digitize(table[:, 4] + table[:, 2], [-1.0, 1.0])
    table[rng.random(size) < 0.1, 3] = NAN
    return table


def private() -> Tables:
    return Tables(COLUMNS, people(1), people(2), people(3))


@pytest.fixture(scope="module")
def leaky() -> TableAudit:
    tables = private()
    return audit(_with(tables, tables.member_PC[::-1]), QUICK, 0)


def _with(tables: Tables, synthetic: np.ndarray) -> Tables:
    return dataclasses.replace(tables, synthetic_SC=synthetic)


def status(found: TableAudit, subject: str) -> str:
    return next(finding.status for finding in found.findings if finding.subject == subject)


def test_a_copy_blocks_and_every_kind_of_evidence_says_so(leaky: TableAudit) -> None:
    assert leaky.decision == "BLOCK"
    assert leaky.valid
    for subject in ("nearest-neighbour", "nearest-ratio", "linkability", "inference", "near copies", "frequencies"):
        assert status(leaky, subject) == "BLOCK", subject
    assert status(leaky, "planted leak") == "PASS"


def test_the_result_is_json_with_power_beside_every_bound_and_no_patient(leaky: TableAudit) -> None:
    text = json.dumps(leaky.to_json(), allow_nan=False)
    content = json.loads(text)
    assert content["schema_version"] == "medgen.table-audit/1"
    assert content["policy_digest"] == QUICK.digest
    for attack in content["attacks"]:
        assert 0 <= attack["epsilon_lower"] <= attack["epsilon_lower_ceiling"]
        assert attack["epsilon_credible"] <= attack["epsilon_credible_ceiling"] + 1e-6
        assert "synthetic table" in attack["access"]
    assert str(float(private().member_PC[0, 0])) not in text


def test_a_private_table_is_not_blocked_and_the_same_seed_gives_the_same_result() -> None:
    steps: list[str] = []
    first, second = audit(private(), QUICK, 5, steps.append), audit(private(), QUICK, 5)
    assert first.decision in ("RELEASE", "HOLD")
    assert first.valid
    assert first.to_json() == second.to_json()
    assert {"validity", "linkability", "copies"} <= set(steps)


# --- validity ---------------------------------------------------------------------------------------------------------


def test_too_few_patients_hold_and_nothing_is_attacked() -> None:
    found = audit(Tables(COLUMNS, people(1, 10), people(2, 10), people(1, 10)), QUICK, 0)
    assert (found.decision, found.valid, found.attacks) == ("HOLD", False, ())
    assert "10 members" in next(f.sentence for f in found.findings if f.subject == "size")


def test_overlap_by_identifier_or_by_content_holds() -> None:
    names = tuple(f"p{i}" for i in range(SIZE))
    by_name = audit(dataclasses.replace(private(), member_ids=names, held_out_ids=names), QUICK, 0)
    tables = private()
    shared = tables.held_out_PC.copy()
    shared[:3] = tables.member_PC[:3]
    by_content = audit(dataclasses.replace(tables, held_out_PC=shared), QUICK, 0)
    for found in (by_name, by_content):
        assert (found.decision, found.valid) == ("HOLD", False)
        assert status(found, "split") == "HOLD"
    assert by_content.overlap.equal_records == 3


def test_groups_that_differ_by_themselves_hold_even_if_members_were_copied() -> None:
    tables = private()
    shifted = dataclasses.replace(tables, held_out_PC=tables.held_out_PC + np.array([1.5, 0, 0, 0, 0]))
    found = audit(_with(shifted, tables.member_PC), QUICK, 0)
    assert (found.decision, found.valid) == ("HOLD", False)
    assert found.blind is not None
    assert found.blind.low > 0.55


def test_a_difference_in_spread_alone_is_seen() -> None:
    tables = private()
    found = audit(dataclasses.replace(tables, held_out_PC=tables.held_out_PC * np.array([4.0, 4, 4, 1, 1])), QUICK, 0)
    assert not found.valid


def test_people_who_are_alike_in_a_coarse_table_are_no_overlap() -> None:
    rng = np.random.default_rng(0)
    columns = Columns(("x", "y"), ("categorical", "categorical"))
    sides = [(rng.random((SIZE, 2)) < 0.5).astype(float) for _ in range(3)]
    found = audit(Tables(columns, *sides), QUICK, 0)
    assert status(found, "split") == "PASS"
    assert found.decision == "HOLD"  # nobody could be found in such a table, so silence clears nothing
    assert status(found, "planted leak") == "HOLD"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member_ids": ("p",) * SIZE}, "one row per patient"),
        ({"member_ids": ("p",)}, "expected 240 identifiers"),
        (
            {"held_out_PC": np.where([True, False, False, False, False], NAN, people(2))},
            "'a' holds no value for held-out",
        ),
        ({"synthetic_SC": np.zeros((5, 3))}, "expected 5 columns"),
    ],
)
def test_bad_tables_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(private(), **change)  # type: ignore[arg-type]


def test_a_constant_column_and_an_unknown_secret_are_refused() -> None:
    flat = [table.copy() for table in (people(1), people(2), people(3))]
    for table in flat:
        table[:, 2] = 7.0
    with pytest.raises(ValueError, match="'c' is constant"):
        Tables(COLUMNS, *flat)
    with pytest.raises(ValueError, match="secret 'z' is no column"):
        audit(private(), TablePolicy(secrets=("z",)), 0)


# --- attacks and their controls ---------------------------------------------------------------------------------------


def test_thresholds_blind_to_labels_keep_the_level_of_bounds() -> None:
    """1,000 audits of random scores at thresholds that are quantiles of the pool."""
    rng = np.random.default_rng(0)
    alarms, high = 0, 0
    for _ in range(1000):
        member, held_out = rng.normal(size=150), rng.normal(size=150)
        counts = table_attacks.count(member, held_out, table_attacks.blind_thresholds(member, held_out)[::4])
        alarms += best_epsilon_lower_bound(counts, 1e-5) > 0
        high += auc(counts).low > 0.5
    assert alarms <= 50
    assert high <= 25 + 3 * np.sqrt(25)


def test_without_a_reference_no_patient_is_compared_with_themselves() -> None:
    held_out = people(2)
    split = table_attacks.folds(SIZE, held_out, None, np.random.default_rng(0))
    assert sorted(np.concatenate([fold.member for fold in split])) == list(range(SIZE))
    assert sorted(np.concatenate([fold.held_out for fold in split])) == list(range(SIZE))
    for fold in split:
        own = {row.tobytes() for row in held_out[fold.held_out]}
        assert not own & {row.tobytes() for row in fold.reference_RC}
        assert len(fold.reference_RC) == SIZE // 2


# --- rules ------------------------------------------------------------------------------------------------------------


def counts(member: int, held_out: int, trials: int = 1000) -> ThresholdCounts:
    return ThresholdCounts((0.0,), (member,), (held_out,), trials, trials)


def attacked(
    main: ThresholdCounts, planted: ThresholdCounts, worst: ThresholdCounts | None = None
) -> table_attacks.Attacked:
    return table_attacks.Attacked("domias", "", False, main, planted, worst, 0.02)


def test_an_attack_that_missed_the_planted_leak_clears_nothing_and_still_accuses() -> None:
    fine = ThresholdCounts((0.0, 1.0), (500, 10), (500, 10), 1000, 1000)
    blunt, sharp = counts(20, 20, 100), counts(100, 0, 100)
    assert table_gates.membership(attacked(fine, blunt), 1, QUICK).status == "INFO"
    assert table_gates.membership(attacked(counts(900, 100), blunt), 1, QUICK).status == "BLOCK"
    assert table_gates.membership(attacked(counts(60, 10), sharp), 1, QUICK).status == "HOLD"  # a bound above zero
    assert table_gates.planted([attacked(fine, blunt)], QUICK).status == "HOLD"
    assert table_gates.planted([attacked(fine, sharp)], QUICK).status == "PASS"
    assert table_gates.planted([], QUICK).status == "HOLD"


def test_null_alarms_beyond_the_level_hold() -> None:
    fine = attacked(counts(10, 10), counts(10, 0, 10))
    assert table_gates.null([fine]).status == "PASS"
    assert table_gates.null([dataclasses.replace(fine, null_alarms=0.3)]).status == "HOLD"


def test_outliers_block_hold_and_pass() -> None:
    def finding(hit: int, miss: int, trials: int) -> str:
        worst = ThresholdCounts((0.0, 1.0), (trials // 2, hit), (trials // 2, miss), trials, trials)
        return table_gates.outliers([attacked(counts(1, 1), counts(1, 1), worst)], QUICK).status

    assert finding(240, 5, 500) == "BLOCK"
    assert finding(8, 1, 30) == "HOLD"
    assert finding(10, 10, 500) == "PASS"
    assert table_gates.outliers([attacked(counts(1, 1), counts(1, 1))], QUICK).status == "HOLD"


def test_risks_block_on_evidence_hold_for_want_of_it_and_say_invalid() -> None:
    def finding(member: int, held_out: int, baseline: int, p: float, trials: int = 1000) -> table_gates.Finding:
        risk = judge("linkability", "1 nearest", (member, trials), (held_out, trials), (baseline, trials))
        return table_gates.risk("linkability", [risk], [p], "1 nearest", QUICK)

    assert finding(500, 100, 10, 1e-9).status == "BLOCK"
    assert finding(120, 100, 10, 0.03).status == "HOLD"
    assert finding(100, 100, 10, 1.0).status == "PASS"
    assert finding(5, 5, 1, 1.0, trials=20).status == "HOLD"  # too few to exclude a risk
    invalid = finding(10, 10, 10, 1.0)
    assert invalid.status == "HOLD"
    assert "INVALID" in invalid.sentence
    assert table_gates.risk("linkability", [], [], "1 nearest", QUICK).status == "HOLD"


def test_copies_block_by_test_and_hold_where_no_held_out_patient_has_one() -> None:
    def near(member: int, held_out: int, p: float) -> str:
        found = Copies(ThresholdCounts((-0.01,), (member,), (held_out,), 1000, 1000), 0, p, Repeats(0.9, 0.9, 1.0, 3))
        return table_gates.copies(found, p, 1.0, QUICK)[0].status

    assert near(30, 0, 1e-8) == "BLOCK"
    assert near(30, 15, 0.02) == "HOLD"
    assert near(1, 0, 0.5) == "HOLD"  # one copied patient is one too many to call chance unseen
    assert near(4, 3, 0.5) == "PASS"
    assert near(0, 0, 1.0) == "PASS"


def test_where_groups_may_differ_only_what_exceeds_the_difference_blocks() -> None:
    near = ThresholdCounts((-0.01,), (30,), (0,), 1000, 1000)
    findings = [
        table_gates.Finding("G5 copies", "near copies", "BLOCK", 30, ""),
        table_gates.Finding("G5 copies", "x", "BLOCK", 1, ""),
    ]
    weak = [attacked(counts(510, 500), counts(1, 1))]
    blind = Interval(0.51, 0.54, 0.58)

    def statuses(attacks: list[table_attacks.Attacked], twins: int) -> list[str]:
        found = Copies(near, twins, 1e-9, Repeats(0.9, 1.0, 1.0, 30))
        return [f.status for f in table_gates.doubtful(findings, attacks, found, blind, QUICK)]

    assert statuses(weak, 0) == ["BLOCK", "HOLD"]  # members do not come so close to each other
    assert statuses(weak, 40) == ["HOLD", "HOLD"]
    assert statuses([attacked(counts(900, 100), counts(1, 1))], 40) == ["BLOCK", "BLOCK"]


def test_a_policy_with_an_unknown_field_is_refused_and_its_digest_follows_its_content() -> None:
    with pytest.raises(ValueError, match="extra"):
        TablePolicy(copy_tolerence=0.1)  # type: ignore[call-arg]
    assert TablePolicy().digest == TablePolicy().digest != QUICK.digest
