"""The verdict card: all findings of a rule as one line, its question in plain words, its worst finding quoted."""

from __future__ import annotations

from collections.abc import Sequence

from privacy.audit.gates import Rule, Status
from server.release.gate import Verdict
from server.release.measures import Frozen

GATES: dict[Rule, str] = {
    "G0 validity": "Can the audit be trusted?",
    "G1 budget": "Is the promise within the policy, and was it kept?",
    "G2 promise": "Does any attack contradict the promise?",
    "G3 membership": "Can anybody tell who took part?",
    "G4 three risks": "Can a person be singled out, linked, or guessed about?",
    "G5 copies": "Was anybody copied?",
    "G6 outliers": "Are unusual patients as safe as the others?",
    "G7 usefulness": "Is the cohort worth having?",
    "G8 integrity": "Are these the files that were checked?",
}


class Gate(Frozen):
    """All findings of one rule, as one line of the verdict card.

    Attributes:
        status: the worst; INFO does not clear, so it is PASS only if something passed and nothing holds or blocks.
        sentence: the worst finding.
        open: findings on HOLD or BLOCK.
        looked_at: findings in all.
    """

    rule: Rule
    question: str
    status: Status
    sentence: str
    open: int
    looked_at: int


def gates(verdict: Verdict) -> tuple[Gate, ...]:
    """One line per rule, in the order of the policy; a rule that nothing was found under is HOLD."""
    lines = []
    for rule, question in GATES.items():
        found = [finding for finding in verdict.findings if finding.rule == rule]
        if not found:
            lines.append(Gate(rule=rule, question=question, status="HOLD", sentence="Not judged.", open=1, looked_at=0))
            continue
        status = worst([finding.status for finding in found])
        shown = next(f for f in found if f.status == status)
        count = sum(f.status in ("HOLD", "BLOCK") for f in found)
        lines.append(
            Gate(rule=rule, question=question, status=status, sentence=shown.sentence, open=count, looked_at=len(found))
        )
    return tuple(lines)


def worst(statuses: Sequence[Status]) -> Status:
    """BLOCK before HOLD; PASS if anything passed beside results that only inform; HOLD of nothing.

    >>> worst([]), worst(["PASS", "INFO"]), worst(["PASS", "HOLD"])
    ('HOLD', 'PASS', 'HOLD')
    """
    order: tuple[Status, ...] = ("BLOCK", "HOLD", "PASS", "INFO")
    return next((status for status in order if status in statuses), "HOLD")
