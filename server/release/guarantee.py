"""The promise taken apart for a reader: what every step did to patients, what it stands on, and against whom it holds.

Three tables, each a pure function of evidence and facts: the scope step by step, the pyramid of NIST SP 800-226 (a
guarantee is as good as the block below it), and the five attackers that the release is meant for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from privacy.audit.gates import Status
from server.release.card import worst
from server.release.evidence import Evidence
from server.release.facts import Fact, FactName
from server.release.measures import Frozen

Cover = Literal["DP", "public", "not covered"]


class ScopeStep(Frozen):
    """One step that touched data, or that a reader would suspect of it.

    Attributes:
        cover: ``DP`` under the promise, ``public`` without patients, ``not covered`` outside the promise.
        epsilon: cost of the step alone; None where it has none.
    """

    step: str
    reads: str
    cover: Cover
    epsilon: float | None = None
    note: str


class Block(Frozen):
    """One block of the pyramid: what it asks, and the facts that answer."""

    level: Literal["top", "middle", "base"]
    name: str
    status: Status
    facts: tuple[FactName, ...] = ()
    note: str = ""


class Threat(Frozen):
    """One attacker: what they hold, what limits them, and which fact says what such attacks found."""

    code: Literal["T1", "T2", "T3", "T4", "T5"]
    attacker: str
    holds: str
    limited_by: str
    status: Status
    fact: FactName | None = None
    note: str = ""


def scope(evidence: Evidence) -> tuple[ScopeStep, ...]:
    """Every step of a study in the order in which it ran."""
    steps = [
        ScopeStep(step="study schema", reads="nothing", cover="public",
                  note="Ranges, categories and vocabularies are typed in before anybody looks."),
        ScopeStep(step="first training", reads=evidence.public.name if evidence.public else "public data", cover="public",
                  note="Codecs and core start from public data; section 12 says whether those were checked for overlap."),
    ]  # fmt: skip
    if evidence.promise is not None:
        for stage in evidence.promise.stages:
            kind = "noised sums" if stage.kind == "query" else "clipped, noised training steps"
            spare = f", {stage.spare_rounds} spare charged" if stage.spare_rounds else ""
            steps.append(
                ScopeStep(step=stage.name, reads="members", cover="DP" if evidence.promise.private else "not covered",
                          epsilon=stage.epsilon, note=f"{stage.rounds} round{'s' if stage.rounds > 1 else ''} of {kind}{spare}.")
            )  # fmt: skip
        trials = evidence.promise.trials
        note = f"{trials} runs of each training step, all charged." if trials > 1 else "None in this plan."
        steps.append(ScopeStep(step="hyper-parameter runs", reads="members" if trials > 1 else "nothing",
                               cover="DP" if trials > 1 and evidence.promise.private else "public", note=note))  # fmt: skip
    steps += [
        ScopeStep(step="early stopping", reads="nothing", cover="public", note="The number of rounds is in the plan."),
        ScopeStep(step="drawing the cohort", reads="the noised weights", cover="DP" if _private(evidence) else "not covered",
                  note="Follows from what is already protected, and costs nothing more."),
    ]  # fmt: skip
    for query in evidence.uncovered:
        steps.append(
            ScopeStep(step=query.query, reads="members and held-out", cover="not covered",
                      note=f"Asked {query.asked} of at most {query.cap} times; exact counts, in every site's ledger.")
        )  # fmt: skip
    steps.append(
        ScopeStep(step="the gate", reads="the counts above", cover="not covered",
                  note="Choosing on counts of real patients is itself a query; attempts are counted and capped. The "
                  "promise covers the cohort before any gate chose it.")
    )  # fmt: skip
    return tuple(steps)


def _private(evidence: Evidence) -> bool:
    return evidence.promise is not None and evidence.promise.private


_BLOCKS: tuple[tuple[Literal["top", "middle", "base"], str, tuple[FactName, ...], str], ...] = (
    ("top", "Epsilon and delta", ("parameters",), ""),
    ("top", "Unit of privacy", ("unit", "visits", "two sites"), ""),
    ("middle", "Algorithm and correctness", ("mechanism", "sampler", "divisor", "accounting", "refuted"), ""),
    ("middle", "Composition and tuning", ("tuning", "spent", "queries"), ""),
    ("middle", "Trust model", ("trust", "crossings"), ""),
    ("middle", "Randomness and side channels", ("randomness",),
     "When answers leave is not covered: timing is not hidden."),
    ("middle", "Security and access control", (),
     "Not measured here. At each site: medgen site doctor. A person answers for it."),
    ("base", "Data collection", ("public",), "How the patients' data were collected is for each hospital to say."),
)  # fmt: skip


def pyramid(facts: Sequence[Fact]) -> tuple[Block, ...]:
    """The blocks from the top down; one without facts is INFO, because a person answers for it."""
    known = {fact.name: fact for fact in facts}
    return tuple(
        Block(
            level=level,
            name=name,
            status=worst([known[fact].status for fact in names]) if names else "INFO",
            facts=names,
            note=note,
        )
        for level, name, names, note in _BLOCKS
    )


def threats(evidence: Evidence, facts: Sequence[Fact]) -> tuple[Threat, ...]:
    """T1 to T5. Where no attack of a kind ran, the row says what stands in for it."""
    known: Mapping[str, Fact] = {fact.name: fact for fact in facts}
    private = _private(evidence)
    promise = "The promise, whatever they know or try." if private else "Nothing: the study is not private."

    def row(code: Literal["T1", "T2", "T3", "T4"], attacker: str, holds: str, limited: str, fact: FactName) -> Threat:
        return Threat(
            code=code, attacker=attacker, holds=holds, limited_by=limited, status=known[fact].status, fact=fact
        )

    return (
        row("T1", "A recipient of the cohort", "the released files", promise, "cohort"),
        row("T2", "Somebody who may ask the model for patients", "as many synthetic patients as they like",
            f"{promise} Whoever holds the weights can ask as often: T3 is the harder test.", "weights"),
        row("T3", "A recipient of the weights", "the final model", promise, "weights"),
        row("T4", "A curious coordinator", "masked answers, sums over three sites or more, timing",
            "Masking hides single sites; every site's own noise holds even if masking fails." if private
            else "Masking hides single sites; no noise protects their sum.", "transcript"),
        Threat(code="T5", attacker="Another hospital of the study", holds="the weights of every round, its own patients",
               limited_by="As T4. In a group of three, a hospital can subtract its own part from the sum and see the noised "
               "sum of two others.", status="INFO" if private else "HOLD",
               note="No attack of its own was run: it rests on the promise." if private else "Nothing is promised."),
    )  # fmt: skip
