from __future__ import annotations

from typing import get_args

from privacy.boundary import refusals
from privacy.boundary.refusals import REFUSAL_CODES, LedgerError, RefusalCode, Refused

# What a site may say about itself. A new code must describe configuration, never a record.
CODES = """
ATTEMPT_CONFLICT BAD_MESSAGE BAD_PLAN BAD_SIGNATURE BUDGET_CONFLICT CANARIES CAPACITY COHORT_TOO_SMALL
COORDINATOR_UNKNOWN DELTA
DETERMINISTIC_NOISE LEDGER_UNUSABLE MIN_CONTRIBUTORS NOT_APPROVED NOT_A_SURVIVOR NOT_CALIBRATED NOT_INVITED
NOT_IN_ROSTER OVER_LIFETIME_CEILING OVER_PLAN_CEILING PARTS_MISSING PLAN_REJECTED QUIET_HOURS ROSTER_KEYS
ROUND_NOT_IN_PLAN SITE_STOPPED SITE_UNAVAILABLE SLOTS SPARES_EXHAUSTED SURVIVORS_CONFLICT UNCOVERED_CAP UNKNOWN_TASK
""".split()


def test_the_list_of_codes_is_closed() -> None:
    assert sorted(get_args(RefusalCode)) == sorted(CODES) == sorted(REFUSAL_CODES)


def test_every_code_has_a_meaning_for_the_operator() -> None:
    for code in get_args(RefusalCode):
        error = Refused(code, "a detail", "a remedy")
        assert error.code == code
        assert refusals._MEANING[code] in str(error)
        assert "a detail" in str(error)
        assert "Remedy: a remedy" in str(error)


def test_a_ledger_fault_is_one_code_outside_and_a_sentence_inside() -> None:
    error = LedgerError("rolled back", "row 3 of 5", "restore it")
    assert isinstance(error, Refused)
    assert (error.code, error.fault) == ("LEDGER_UNUSABLE", "rolled back")
    assert "row 3 of 5" in str(error)
