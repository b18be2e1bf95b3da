"""What the evidence says, one plain sentence per question, each with a status and its place in ``report.json``.

The first page, the pyramid, the threat table and every template quote these facts, so that they cannot disagree. A fact
that a rule of the policy judges carries the worst status of that rule; one that nobody judges is INFO where it is known
and HOLD where it is not. Nothing that is missing is ever PASS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from privacy.audit.gates import Finding, GatePolicy, Rule, Status
from privacy.audit.training_gate import SUBJECT as TRAINING_AUDIT
from server.release.card import worst
from server.release.evidence import Evidence, Promise
from server.release.gate import Verdict
from server.release.measures import Frozen

FactName = Literal[
    "released",
    "use",
    "public",
    "promise",
    "unit",
    "relation",
    "parameters",
    "mechanism",
    "sampler",
    "divisor",
    "accounting",
    "tuning",
    "visits",
    "two sites",
    "not covered",
    "trust",
    "randomness",
    "budget left",
    "plan",
    "spent",
    "queries",
    "crossings",
    "audit valid",
    "attacks",
    "weights",
    "cohort",
    "transcript",
    "training audit",
    "refuted",
    "singling out",
    "linkability",
    "inference",
    "copies",
    "outliers",
    "usefulness",
    "integrity",
    "attempts",
    "deviations",
    "policy",
    "verdict",
]
Pointer = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_]+)+$", description="JSON Pointer (RFC 6901) into the report")]

_ORDER: tuple[Status, ...] = ("BLOCK", "HOLD", "INFO", "PASS")


class Fact(Frozen):
    """One answer.

    Attributes:
        name: what it is called in this version.
        question: what it answers.
        status: of the rule that judges it; else INFO where known and HOLD where not.
        sentence: the answer.
        sources: where in ``report.json`` its numbers stand.
    """

    name: FactName
    question: str
    status: Status
    sentence: str
    sources: tuple[Pointer, ...] = Field(min_length=1)


def facts(evidence: Evidence, verdict: Verdict, policy: GatePolicy) -> tuple[Fact, ...]:
    """Every fact once, in a fixed order; which facts there are does not depend on the evidence."""
    judged = _Judged(verdict)
    return (
        *_about_release(evidence),
        *_about_promise(evidence.promise, judged),
        *_about_sites(evidence, judged),
        *_about_attacks(evidence, judged),
        *_about_gate(evidence, verdict, policy, judged),
    )


class _Judged:
    """Findings of the verdict as facts."""

    def __init__(self, verdict: Verdict) -> None:
        self._findings = tuple(enumerate(verdict.findings))

    def fact(
        self,
        name: FactName,
        question: str,
        rules: Sequence[Rule],
        missing: str,
        pick: Callable[[Finding], bool] = lambda _: True,
        also: Sequence[str] = (),
    ) -> Fact:
        """The worst finding under ``rules`` that ``pick`` takes, how many there are, and where they stand."""
        found = [(place, f) for place, f in self._findings if f.rule in rules and pick(f)]
        if not found:
            return Fact(
                name=name, question=question, status="HOLD", sentence=missing, sources=also or ("/verdict/findings",)
            )
        status = worst([f.status for _, f in found])
        chosen = [f for _, f in found if f.status == status]
        sentence = chosen[0].sentence
        if len(found) > 1:
            sentence += f" ({_tally([f.status for _, f in found])}; the first {status} is quoted.)"
        sources = (*(f"/verdict/findings/{place}" for place, f in found if f.status == status), *also)
        return Fact(name=name, question=question, status=status, sentence=sentence, sources=sources[:6])


def _named(attacks: Collection[str]) -> Callable[[Finding], bool]:
    """Findings on these attacks, jointly or by slot."""
    return lambda finding: finding.subject.split(", ")[0] in attacks


def _about(risk: str) -> Callable[[Finding], bool]:
    return lambda finding: risk in finding.subject.lower() or finding.subject == "WP216"


def _tally(statuses: Sequence[Status]) -> str:
    return ", ".join(f"{statuses.count(status)} {status}" for status in _ORDER if status in statuses)


def _known(name: FactName, question: str, sentence: str, *sources: str) -> Fact:
    return Fact(name=name, question=question, status="INFO", sentence=sentence, sources=sources)


def _unknown(name: FactName, question: str, what: str, *sources: str) -> Fact:
    return Fact(name=name, question=question, status="HOLD", sentence=f"Not stated: {what}.", sources=sources)


def _about_release(evidence: Evidence) -> Iterator[Fact]:
    cohort, public = evidence.cohort, evidence.public
    asked = "What is released?"
    if cohort is None:
        yield _unknown("released", asked, "no cohort was described", "/evidence/cohort")
        yield _unknown("use", "For what may it be used?", "no cohort was described", "/evidence/cohort")
    else:
        sentence = f"{cohort.patients} synthetic patients with {', '.join(cohort.slots)}, in {cohort.files} files."
        yield _known("released", asked, sentence, "/evidence/cohort")
        words = f"{cohort.intended_use} Not for: {cohort.forbidden_use} Licence {cohort.licence}."
        yield _known("use", "For what may it be used?", words, "/evidence/cohort")
    asked = "Which public data went in, and do they overlap with the patients?"
    if public is None:
        yield _unknown("public", asked, "which public population trained the model first", "/evidence/public")
    else:
        overlap = {
            "generated": "made by a generator, so no person is in it",
            "checked": "checked against the sites' patients",
            "public by assertion": "not checked against the sites' patients: public by assertion",
        }[public.overlap]
        yield _known("public", asked, f"{public.name}: {overlap}.", "/evidence/public")


def _about_promise(promise: Promise | None, judged: _Judged) -> Iterator[Fact]:
    for name, question, answer, source in _PROMISE:
        if promise is None:
            yield _unknown(name, question, "no promise came with the evidence", "/evidence/promise")
        elif name == "promise":
            words = promise.sentence
            status = judged.fact(name, question, ("G1 budget",), "", lambda f: f.subject == "promise").status
            yield Fact(name=name, question=question, status=status, sentence=words, sources=("/evidence/promise",))
        elif not promise.private:
            words = "Nothing is promised, so this protects nobody."
            sources = (f"/evidence/promise/{source}",)
            yield Fact(name=name, question=question, status="HOLD", sentence=words, sources=sources)
        else:
            yield _known(name, question, answer(promise), f"/evidence/promise/{source}")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _parameters(p: Promise) -> str:
    delta = f"{p.delta:.0e}".replace("e-0", "e-")
    return f"Epsilon {p.epsilon:.2f} at delta {delta}; mu {_number(p.mu)}."


def _mechanism(p: Promise) -> str:
    kinds = []
    if training := [s for s in p.stages if s.kind == "training"]:
        names = ", ".join(f"{s.name} (clip {s.sensitivity:.3g}, noise {s.noise_multiplier:.3g})" for s in training)
        kinds.append(f"clipped, noised gradient steps: {names}")
    if queries := [s for s in p.stages if s.kind == "query"]:
        names = ", ".join(f"{s.name} (bound {s.sensitivity:.3g}, noise {s.noise_multiplier:.3g})" for s in queries)
        kinds.append(f"noised sums: {names}")
    return f"Gaussian noise on everything that is learned from patients: {'; '.join(kinds)}."


def _accounting(p: Promise) -> str:
    check = "" if p.epsilon_check is None else f" ({p.epsilon_check:.2f})"
    return f"{p.accountant[:1].upper()}{p.accountant[1:]}{check}; the cross-check {p.check_text}."


def _tuning(p: Promise) -> str:
    if p.trials > 1:
        return f"Every training step was run {p.trials} times and the best kept; all {p.trials} are charged."
    return (
        "This plan holds one run whose rounds and steps were fixed beforehand, so none was stopped early. Other studies on "
        "the same patients are known to the sites' ledgers, not to this report."
    )


_PROMISE: tuple[tuple[FactName, str, Callable[[Promise], str], str], ...] = (
    ("promise", "What was promised to a patient?", lambda p: p.sentence, "sentence"),
    ("unit", "Who is one unit?", lambda p: f"One {p.unit}, with everything one site holds about them.", "unit"),
    ("relation", "Which two data sets must look alike?", lambda p: p.relation_text, "relation_text"),
    ("parameters", "How strong is the promise?", _parameters, "epsilon"),
    ("mechanism", "What makes it private?", _mechanism, "stages"),
    ("sampler", "How were patients drawn?", lambda p: p.sampling_text, "sampling_text"),
    ("divisor", "What are sums divided by?", lambda p: p.divisor_text, "divisor_text"),
    ("accounting", "Who calculated it, and was it checked?", _accounting, "accountant"),
    ("tuning", "Were settings tried out on patients?", _tuning, "trials"),
    ("visits", "How much can one patient contribute?",
     lambda p: f"At most {p.max_visits} visit{'s' if p.max_visits > 1 else ''}; all of a patient's records share one clip.",
     "max_visits"),
    ("two sites", "What if a patient was at two sites?",
     lambda p: f"For a patient of two sites epsilon is {_number(p.epsilon_two_sites)}; where one patient is exchanged for "
     f"another, {_number(p.epsilon_replace_one)}. More than two sites are not stated.", "epsilon_two_sites"),
    ("not covered", "What does the promise not say?",
     lambda p: f"{len(p.not_covered)} limits are listed in section 4; the first: {p.not_covered[0]}."
     if p.not_covered else "No limit was listed.", "not_covered"),
)  # fmt: skip


def _about_sites(evidence: Evidence, judged: _Judged) -> Iterator[Fact]:
    groups = evidence.groups
    asked = "Who saw what on the way?"
    if not groups:
        yield _unknown("trust", asked, "how updates travelled", "/evidence/groups")
    else:
        count = {how: sum(group.status == how for group in groups) for how in ("masked", "local noise", "frozen")}
        words = (
            f"Of {len(groups)} groups of weights and statistics, {count['masked']} left the sites only as masked sums over "
            f"three sites or more, {count['local noise']} under each site's own noise alone, {count['frozen']} never left. "
            "Every site adds its full noise, so the promise does not rest on masking or on an honest coordinator."
        )
        yield _known("trust", asked, words, "/evidence/groups")
    asked = "Where does the randomness come from?"
    if evidence.promise is None:
        yield _unknown("randomness", asked, "no promise came with the evidence", "/evidence/promise")
    elif evidence.promise.deterministic:
        words = "From the test switch: it can be recomputed, so nothing here is private."
        yield Fact(name="randomness", question=asked, status="HOLD", sentence=words,
                   sources=("/evidence/promise/deterministic",))  # fmt: skip
    else:
        words = "From a cryptographic stream keyed by the operating system of each site; it cannot be replayed."
        yield _known("randomness", asked, words, "/evidence/promise/deterministic")
    words = (
        "Each site's ledger knows what is left under its lifetime ceiling and refuses what exceeds it; that number does "
        "not leave the site. Ask for: medgen site ledger show."
    )
    yield _known("budget left", "What else may still be released from these patients?", words, "/evidence/sites")
    if evidence.plan_sha256 is None:
        yield _unknown("plan", "Which plan was approved?", "the digest of the plan", "/evidence/plan_sha256")
    else:
        words = f"The plan with SHA-256 {evidence.plan_sha256}, approved by each site under this hash."
        yield _known("plan", "Which plan was approved?", words, "/evidence/plan_sha256")
    yield judged.fact("spent", "Was the promise kept?", ("G1 budget",), "Not measured: what each site spent.",
                      lambda f: f.subject == "spend", ("/evidence/sites",))  # fmt: skip
    yield judged.fact("queries", "What was asked of patients outside the promise?", ("G1 budget",),
                      "Not measured: queries outside the promise.", lambda f: f.subject == "not covered",
                      ("/evidence/uncovered",))  # fmt: skip
    asked = "What left the hospitals?"
    if not evidence.crossings:
        yield _unknown("crossings", asked, "what crossed the walls", "/evidence/crossings")
    else:
        by = {cover: sum(c.messages for c in evidence.crossings if c.cover == cover)
              for cover in ("DP", "public", "not covered")}  # fmt: skip
        mixed = [query.query for query in evidence.uncovered if query.asked] if not by["not covered"] else []
        outside = (
            f"among them answers to {', '.join(mixed)}, which are outside the promise"
            if mixed
            else f"{by['not covered']} outside the promise"
        )
        words = (
            f"{by['DP']} messages of noised sums, {outside}; {by['public']} without patient data. All are of fixed kinds: no "
            "record, no image, no text."
        )
        yield _known("crossings", asked, words, "/evidence/crossings")


def _about_attacks(evidence: Evidence, judged: _Judged) -> Iterator[Fact]:
    yield judged.fact("audit valid", "Can the audit be trusted?", ("G0 validity",), "Not measured.",
                      lambda f: f.subject != "attempts", ("/evidence/validity",))  # fmt: skip
    yield judged.fact("attacks", "Can anybody tell who took part?", ("G3 membership",), "No attack was run.",
                      also=("/derived/attacks",))  # fmt: skip
    held: tuple[tuple[FactName, str, str], ...] = (
        ("weights", "final weights", "with the final weights"),
        ("cohort", "cohort only", "with the released cohort alone"),
        ("transcript", "round transcript", "with everything that the coordinator received"),
    )
    for name, access, words in held:
        mine = {attack.name for attack in evidence.attacks if attack.access == access and attack.kind != "copies"}
        yield judged.fact(name, f"Can anybody tell who took part, {words}?", ("G3 membership",),
                          f"Not measured: no attack {words} was run.", _named(mine),
                          ("/derived/attacks",))  # fmt: skip
    yield judged.fact("training audit", "What did made-up patients show that went through training?", ("G2 promise",),
                      "Not measured: none went through training.", lambda f: f.subject == TRAINING_AUDIT,
                      ("/evidence/training_audit",))  # fmt: skip
    yield judged.fact("refuted", "Does any attack contradict the promise?", ("G2 promise",),
                      "Not measured: no attack was compared with the promise.", also=("/derived/attacks",))  # fmt: skip
    questions: tuple[tuple[FactName, str], ...] = (
        ("singling out", "Can one person's record be isolated?"),
        ("linkability", "Can two records be tied to one person?"),
        ("inference", "Can an attribute of a person be guessed better because they took part?"),
    )
    for name, question in questions:
        yield judged.fact(name, question, ("G4 three risks",), f"Not measured: {name}.",
                          _about(name),
                          ("/derived/risks",))  # fmt: skip
    yield judged.fact("copies", "Was anybody copied?", ("G5 copies",), "Not measured.", also=("/derived/copies",))
    yield judged.fact("outliers", "Are unusual patients as safe as the others?", ("G6 outliers",), "Not measured.",
                      also=("/derived/subgroups",))  # fmt: skip


def _about_gate(evidence: Evidence, verdict: Verdict, policy: GatePolicy, judged: _Judged) -> Iterator[Fact]:
    yield judged.fact("usefulness", "Is the cohort worth having?", ("G7 usefulness",), "Not measured.",
                      also=("/derived/utility",))  # fmt: skip
    yield judged.fact("integrity", "Are these the files that were checked?", ("G8 integrity",), "Not measured.",
                      also=("/evidence/cohort",))  # fmt: skip
    yield judged.fact("attempts", "How often was this tried?", ("G0 validity",), "Not stated.",
                      lambda f: f.subject == "attempts", ("/evidence/failed_attempts",))  # fmt: skip
    count = len(evidence.deviations)
    words = " ".join(evidence.deviations) if evidence.deviations else "No deviation from the plan was recorded."
    yield _known("deviations", "Did anything go otherwise than planned?",
                 words if len(words) < 400 else f"{count} deviations; the first: {evidence.deviations[0]}",
                 "/evidence/deviations")  # fmt: skip
    words = f"{policy.version}, SHA-256 {verdict.policy_sha256}; its limits are proposals, not regulatory limits."
    yield _known("policy", "By which rules was it judged?", words, "/policy", "/verdict/policy_sha256")
    status: dict[str, Any] = {"RELEASE": "PASS", "HOLD": "HOLD", "BLOCK": "BLOCK"}
    yield Fact(name="verdict", question="May it leave?", status=status[verdict.decision],
               sentence=f"{verdict.decision}. {verdict.sentence}", sources=("/verdict",))  # fmt: skip
