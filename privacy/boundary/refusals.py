"""Refusal codes: the only words with which a site says no.

A code describes configuration (a plan, a key, a ceiling, a message) and is the same whatever the records hold. All that
depends on data or on the machine leaves as ``SITE_UNAVAILABLE``, which is also what a cut link looks like.

Covered: no path, name, count or exception text can ride in a refusal, because a code comes from a closed list.
Not covered: *when* a refusal arrives, and that a site which refuses is alive.
"""

from __future__ import annotations

from typing import Literal, get_args

RefusalCode = Literal[
    "ATTEMPT_CONFLICT",
    "BAD_MESSAGE",
    "BAD_PLAN",
    "BAD_SIGNATURE",
    "BUDGET_CONFLICT",
    "CANARIES",
    "CAPACITY",
    "COHORT_TOO_SMALL",
    "COORDINATOR_UNKNOWN",
    "DELTA",
    "DETERMINISTIC_NOISE",
    "LEDGER_UNUSABLE",
    "MIN_CONTRIBUTORS",
    "NOT_A_SURVIVOR",
    "NOT_APPROVED",
    "NOT_CALIBRATED",
    "NOT_INVITED",
    "NOT_IN_ROSTER",
    "OVER_LIFETIME_CEILING",
    "OVER_PLAN_CEILING",
    "PARTS_MISSING",
    "PLAN_REJECTED",
    "QUIET_HOURS",
    "ROSTER_KEYS",
    "ROUND_NOT_IN_PLAN",
    "SITE_STOPPED",
    "SITE_UNAVAILABLE",
    "SLOTS",
    "SPARES_EXHAUSTED",
    "SURVIVORS_CONFLICT",
    "UNCOVERED_CAP",
    "UNKNOWN_TASK",
]

REFUSAL_CODES: frozenset[str] = frozenset(get_args(RefusalCode))

LedgerFault = Literal["locked", "torn", "tampered", "rolled back", "foreign", "storage"]

_MEANING: dict[RefusalCode, str] = {
    "ATTEMPT_CONFLICT": "this attempt was already started with other content",
    "BAD_MESSAGE": "the message is not one that the boundary knows",
    "BAD_PLAN": "the plan does not parse, or contradicts itself",
    "BAD_SIGNATURE": "the signature does not fit the content and the expected key",
    "BUDGET_CONFLICT": "this plan was reserved before with other contents",
    "CANARIES": "the plan puts more canaries into training than this site allows, or has none to show",
    "CAPACITY": "the roster's capacity or held-out size is not the declared one",
    "COHORT_TOO_SMALL": "fewer sites than the smallest cohort allowed",
    "COORDINATOR_UNKNOWN": "the coordinator's key is not the pinned one",
    "DELTA": "the plan's delta is above the ceiling or above min(1e-5, 1/(10 capacity))",
    "DETERMINISTIC_NOISE": "the plan switches to deterministic noise, which this site does not admit",
    "LEDGER_UNUSABLE": "the spend file cannot be used; the site's officer must look at it",
    "MIN_CONTRIBUTORS": "the roster's smallest cohort is not this site's",
    "NOT_A_SURVIVOR": "the site is not in the survivor set",
    "NOT_APPROVED": "the plan was not approved here",
    "NOT_CALIBRATED": "the plan's noise was not calibrated",
    "NOT_INVITED": "the site is not in the invited set",
    "NOT_IN_ROSTER": "the site is not in the plan's roster",
    "OVER_LIFETIME_CEILING": "with this plan the site's lifetime ceiling would be passed",
    "OVER_PLAN_CEILING": "the plan's epsilon is above the site's ceiling for one plan",
    "PARTS_MISSING": "content-addressed parts that the task names are not here",
    "PLAN_REJECTED": "the plan was rejected here",
    "QUIET_HOURS": "no round begins here at this time of day",
    "ROSTER_KEYS": "the roster's keys or self-signature for a site do not fit",
    "ROUND_NOT_IN_PLAN": "the plan holds no such stage or round",
    "SITE_STOPPED": "a person stopped this site; it answers nothing until a person lets it",
    "SITE_UNAVAILABLE": "the site cannot answer",
    "SLOTS": "the roster asks for slots that this site does not offer",
    "SPARES_EXHAUSTED": "no spare round of this stage is left",
    "SURVIVORS_CONFLICT": "another survivor set was answered for this attempt",
    "UNCOVERED_CAP": "more queries outside the guarantee than the site allows",
    "UNKNOWN_TASK": "this site never answered that task",
}


class Refused(ValueError):
    """A site says no. ``code`` may leave the site; ``str(error)`` (meaning, detail, remedy) is for its own operator.

    >>> Refused("NOT_APPROVED").code
    'NOT_APPROVED'
    """

    def __init__(self, code: RefusalCode, detail: str = "", remedy: str = "") -> None:
        self.code: RefusalCode = code
        self.detail = detail
        self.remedy = remedy
        parts = [f"{code}: {_MEANING[code]}", detail, f"Remedy: {remedy}" if remedy else ""]
        super().__init__(". ".join(part.rstrip(".") for part in parts if part))


class LedgerError(Refused):
    """The spend file cannot be trusted or written. ``fault`` says how and stays on site; the wire sees one code.

    Attributes:
        fault: what was found: another process holds it, it is torn, tampered with, older than its mirrored head,
            another site's, or its disk failed.
    """

    def __init__(self, fault: LedgerFault, detail: str, remedy: str) -> None:
        self.fault: LedgerFault = fault
        super().__init__("LEDGER_UNUSABLE", f"{fault}: {detail}", remedy)
