"""``report.json`` -> one self-contained HTML page: styles, figures and pictures inside, nothing fetched, no script.

The page is a pure function of the report and of the announced contact sheets: the same input gives the same bytes. A
second page shows the same report under the headings of a framework.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from server.release import figures
from server.release.attack_evidence import JOINT, AttackCounts
from server.release.document import Report
from server.release.frameworks import Framework
from server.release.statistics import AttackResult, Control

TEMPLATES = Path(__file__).parent / "templates"
ROC_FLOOR = 1e-3
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def render_html(report: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The report as HTML.

    Args:
        report: from :func:`server.release.report.build_report` (or parsed from ``report.json``).
        images: contact sheets by file name.

    Raises:
        ValueError: the report is of another version, or a contact sheet is missing.
    """
    known = Report.model_validate(report)
    evidence, derived = known.evidence, known.derived
    missing = [s.synthetic for s in evidence.sheets if s.synthetic not in images or s.public not in images]
    if missing:
        raise ValueError(f"{missing[0]}: announced in the report but not given")
    attacks = [attack for attack in evidence.attacks if attack.kind != "copies"]
    copies = [attack for attack in evidence.attacks if attack.kind == "copies"]
    findings = known.verdict.findings
    page: str = (
        _environment()
        .get_template("report.html.j2")
        .render(
            **_common(known),
            derived=derived,
            strongest=strongest(derived.attacks),
            open_findings=[finding for finding in findings if finding.status in ("HOLD", "BLOCK")],
            attacks=attacks,
            cards=cards(known),
            by_slot=by_slot(known),
            controls=controls(known),
            copies=list(zip(copies, derived.copies, strict=True)),
            risks=list(zip(evidence.risks, derived.risks, strict=True)),
            subgroups=list(zip(evidence.subgroups, derived.subgroups, strict=True)),
            figures=_figures(known),
            pictures={name: _uri(body, "image/png") for name, body in images.items()},
            tally={s: sum(f.status == s for f in findings) for s in ("PASS", "INFO", "HOLD", "BLOCK")},
        )
    )
    return page


def render_framework(report: Mapping[str, Any], framework: Framework) -> str:
    """The evidence of a report under the headings of a framework, as a page of its own.

    Raises:
        ValueError: the report is of another version, or of one without facts.
    """
    known = Report.model_validate(report)
    if not known.derived.facts:
        raise ValueError("this report was written by a version without facts, which the headings quote")
    canonical = (json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    page: str = (
        _environment()
        .get_template("framework.html.j2")
        .render(**_common(known), framework=framework, report_sha256=hashlib.sha256(canonical).hexdigest())
    )
    return page


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"eps": epsilon, "pct": percent, "num": number, "size": size, "day": day}
    return environment


def _common(known: Report) -> dict[str, Any]:
    return {
        "report": known,
        "evidence": known.evidence,
        "verdict": known.verdict,
        "facts": {fact.name: fact for fact in known.derived.facts},
    }


def strongest(attacks: Sequence[AttackResult]) -> AttackResult | None:
    """The valid attack that most surely beats guessing (highest lower end of its AUC); None if none has a result.

    Not the highest AUC: of many attacks on few patients that one is mostly luck.
    """
    return max((a for a in attacks if a.auc is not None), key=lambda a: a.auc.low if a.auc else 0.0, default=None)


def cards(known: Report) -> list[tuple[AttackCounts, AttackResult]]:
    """One attack of each name to show in full: the joint one, else the slot where it is strongest."""
    shown: dict[str, tuple[AttackCounts, AttackResult]] = {}
    for attack, result in _judged(known):
        before = shown.get(attack.name)
        if before is None or attack.scope == JOINT or (before[0].scope != JOINT and _low(result) > _low(before[1])):
            shown[attack.name] = (attack, result)
    return list(shown.values())


def by_slot(known: Report) -> tuple[list[str], dict[str, dict[str, AttackResult]]]:
    """Scopes in order of appearance, and each attack's results by scope; no scopes where everything is joint."""
    judged = _judged(known)
    scopes = list(dict.fromkeys(attack.scope for attack, _ in judged))
    if set(scopes) <= {JOINT}:
        return [], {}
    results: dict[str, dict[str, AttackResult]] = {}
    for attack, result in judged:
        results.setdefault(attack.name, {})[attack.scope] = result
    return scopes, results


def controls(known: Report) -> dict[str, tuple[Control | None, Control | None, list[Control]]]:
    """Per attack: its planted leak, its null control on everything, and its null controls by slot."""
    validity, derived = known.evidence.validity, known.derived
    rows: dict[str, tuple[Control | None, Control | None, list[Control]]] = {}
    for attack, control in zip(validity.planted, derived.planted, strict=True):
        if attack.scope == JOINT or attack.name not in rows:
            rows[attack.name] = (control, None, [])
    for attack, control in zip(validity.null, derived.null, strict=True):
        planted, joint, slots = rows.get(attack.name, (None, None, []))
        rows[attack.name] = (planted, control, slots) if attack.scope == JOINT else (planted, joint, [*slots, control])
    return rows


def _judged(known: Report) -> list[tuple[AttackCounts, AttackResult]]:
    attacks = [attack for attack in known.evidence.attacks if attack.kind != "copies"]
    return list(zip(attacks, known.derived.attacks, strict=True))


def _low(result: AttackResult) -> float:
    return result.auc.low if result.auc is not None else -1.0


def _figures(known: Report) -> dict[str, Any]:
    """All vector figures as data addresses."""
    evidence, derived, promise = known.evidence, known.derived, known.evidence.promise
    cap = [(point.fpr, point.tpr) for point in derived.caps.curve] if derived.caps else []
    promised = promise.epsilon if promise and promise.private else None
    drawn: dict[str, Any] = {"roc": {}, "bounds": {}, "forest": None, "exceed": {}}
    forest = []
    for attack, result in cards(known):
        if result.roc is None or result.auc is None:
            continue
        drawn["roc"][attack.label] = _svg(figures.roc(**result.roc.model_dump(), cap=cap, floor=_floor(attack)))
        bound = ("", result.epsilon_lower_bound or 0.0, result.power_ceiling or 0.0)
        drawn["bounds"][attack.label] = _svg(figures.bounds([bound], promised))
        area = result.auc
        forest.append((attack.label, area.low, area.estimate, area.high, attack.kind == "diagnostic"))
    for attack in evidence.attacks:
        if attack.kind == "copies" and attack.counts is not None and len(attack.thresholds) > 1:
            drawn["exceed"][attack.label] = _svg(_exceed(attack))
    if forest:
        drawn["forest"] = _svg(figures.forest(forest, derived.caps.auc if derived.caps else None))
    if evidence.training_audit is not None:
        rows = [(site.site, site.one_run, site.ceiling) for site in evidence.training_audit.sites]
        drawn["canaries"] = _svg(figures.bounds(rows, evidence.training_audit.promise))
    if evidence.sites:
        spent = [site.epsilon_spent for site in evidence.sites]
        total = promise.epsilon if promise else math.inf
        drawn["spend"] = _svg(figures.spend([site.site for site in evidence.sites], spent, total))
    drawn["marginals"] = [_svg(body) for body in figures.marginals(evidence.marginals)]
    drawn["traces"] = [_svg(body) for body in figures.traces(evidence.traces)]
    if evidence.correlations:
        drawn["correlations"] = _svg(figures.correlations(evidence.correlations))
    return drawn


def _exceed(attack: AttackCounts) -> bytes:
    member = [hits / attack.trials_member for hits in attack.hits_member]
    held_out = [hits / attack.trials_held_out for hits in attack.hits_held_out]
    return figures.exceed(attack.label, attack.thresholds, member, held_out)


def _floor(attack: AttackCounts) -> float:
    """The decade below one trial of the smaller group: nothing smaller can be seen."""
    smallest = 1 / max(2, min(attack.trials_member, attack.trials_held_out))
    return max(ROC_FLOOR, 10.0 ** math.floor(math.log10(smallest)))


def _uri(body: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(body).decode()}"


def _svg(body: bytes) -> str:
    return _uri(body, "image/svg+xml")


def epsilon(value: float | str | None) -> str:
    """A privacy number for people: two decimals, the sign of infinity, or a dash.

    >>> epsilon(7.996), epsilon("Infinity"), epsilon(None)
    ('8.00', '∞', '–')
    """
    if value is None:
        return "–"
    plain = float(value)
    return "∞" if math.isinf(plain) else f"{plain:.2f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A rate in percent.

    >>> percent(0.0123)
    '1.2%'
    """
    return "–" if value is None else f"{100 * float(value):.{digits}f}%"


def number(value: float | str | None, digits: int = 3) -> str:
    """A number with so many significant digits; whole numbers stay whole.

    >>> number(0.51234), number(12), number(None), number(1e-05)
    ('0.512', '12', '–', '1e-5')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    plain = float(value)
    if math.isinf(plain):
        return "∞"
    return f"{plain:.{digits}g}".replace("e-0", "e-").replace("e+0", "e+")


def day(moment: str) -> str:
    """A moment of the report, for people.

    >>> day("2026-11-04T10:05:00Z"), day("2026-11-04")
    ('4 November 2026, 10:05 UTC', '4 November 2026')
    """
    date, _, clock = moment.partition("T")
    year, month, number = date.split("-")
    words = f"{int(number)} {_MONTHS[int(month) - 1]} {year}"
    return f"{words}, {clock[:5]} UTC" if clock else words


def size(value: int) -> str:
    """Bytes for people, in powers of 1024.

    >>> size(900), size(3_500_000)
    ('900 B', '3.3 MiB')
    """
    amount = float(value)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
