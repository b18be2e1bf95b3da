"""The types of ``report.json``: evidence, policy and verdict as they were given, and what follows from them."""

from __future__ import annotations

from typing import Literal

from privacy.audit.bounds import Interval
from privacy.audit.gates import GatePolicy
from server.release.card import Gate
from server.release.evidence import Evidence
from server.release.facts import Fact
from server.release.gate import Verdict
from server.release.guarantee import Block, ScopeStep, Threat
from server.release.measures import Frozen
from server.release.statistics import (
    AttackResult,
    Caps,
    Control,
    CopyResult,
    RiskResult,
    SubgroupResult,
    UtilityResult,
)


class Derived(Frozen):
    """What follows from evidence, policy and verdict, written down so that a reader need not calculate.

    Attributes:
        attacks: every judged attack, jointly and per slot.
        subgroups: the same on some patients by themselves.
        risks: the three risks.
        copies: repeated patients.
        planted, null: controls per attack.
        gates: the verdict card, one line per rule.
        facts: what the evidence says, one sentence per question.
    """

    attacks: tuple[AttackResult, ...] = ()
    subgroups: tuple[SubgroupResult, ...] = ()
    risks: tuple[RiskResult, ...] = ()
    copies: tuple[CopyResult, ...] = ()
    caps: Caps | None = None
    blind: Interval | None = None
    planted: tuple[Control, ...] = ()
    null: tuple[Control, ...] = ()
    coherence: float | None = None
    utility: tuple[UtilityResult, ...] = ()
    gates: tuple[Gate, ...] = ()
    facts: tuple[Fact, ...] = ()
    scope: tuple[ScopeStep, ...] = ()
    pyramid: tuple[Block, ...] = ()
    threats: tuple[Threat, ...] = ()


class Report(Frozen):
    """``report.json``."""

    schema_version: Literal["medgen.report/1"] = "medgen.report/1"
    verdict: Verdict
    policy: GatePolicy
    evidence: Evidence
    derived: Derived
