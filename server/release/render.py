"""``report.json`` -> one self-contained HTML page: styles, figures and pictures inside, nothing fetched, no script.

The page is a pure function of the report and of the announced contact sheets: the same input gives the same bytes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from server.release import figures
from server.release.attack_evidence import AttackCounts
from server.release.evidence import Evidence

TEMPLATE = "report.html.j2"
ROC_FLOOR = 1e-3


def render_html(report: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The report as HTML.

    Args:
        report: from :func:`server.release.report.build_report` (or parsed from ``report.json``).
        images: contact sheets by file name.

    Raises:
        ValueError: the report is of another version, or a contact sheet is missing.
    """
    evidence = Evidence.model_validate(report["evidence"])
    missing = [s.synthetic for s in evidence.sheets if s.synthetic not in images or s.public not in images]
    if missing:
        raise ValueError(f"{missing[0]}: announced in the report but not given")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"eps": epsilon, "pct": percent, "num": number, "size": size, "share": _share_range}
    attacks = {row["name"]: row for row in report["derived"]["attacks"]}
    return environment.get_template(TEMPLATE).render(
        report=report,
        evidence=evidence,
        verdict=report["verdict"],
        derived=report["derived"],
        strongest=strongest(attacks),
        open_findings=[f for f in report["verdict"]["findings"] if f["status"] in ("HOLD", "BLOCK")],
        attacks=[(attack, attacks[attack.label]) for attack in evidence.attacks if attack.kind != "copies"],
        copies=[attack for attack in evidence.attacks if attack.kind == "copies"],
        figures=_figures(evidence, attacks, report["derived"]["caps"]),
        pictures={name: _uri(body, "image/png") for name, body in images.items()},
        tally={
            status: sum(f["status"] == status for f in report["verdict"]["findings"])
            for status in ("PASS", "INFO", "HOLD", "BLOCK")
        },
        infinite=math.inf,
    )


def strongest(attacks: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The valid attack with the largest AUC; None if no attack has a result."""
    valid = [attack for attack in attacks.values() if attack["valid"]]
    return max(valid, key=lambda attack: float(attack["auc"]["estimate"]), default=None)


def _figures(
    evidence: Evidence, attacks: Mapping[str, Mapping[str, Any]], caps: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All vector figures as data addresses."""
    cap = [(point["fpr"], point["tpr"]) for point in caps["curve"]] if caps else []
    promise = evidence.promise
    drawn: dict[str, Any] = {"roc": {}}
    for attack in evidence.attacks:
        row = attacks.get(attack.label)
        if row is None or not row["valid"]:
            continue
        drawn["roc"][attack.label] = _svg(
            figures.roc(
                **row["roc"],
                cap=cap,
                floor=_floor(attack),
            )
        )
    if evidence.sites:
        spent = [site.epsilon_spent for site in evidence.sites]
        promised = promise.epsilon if promise else math.inf
        drawn["spend"] = _svg(figures.spend([site.site for site in evidence.sites], spent, promised))
    drawn["marginals"] = [_svg(body) for body in figures.marginals(evidence.marginals)]
    drawn["traces"] = [_svg(body) for body in figures.traces(evidence.traces)]
    if evidence.correlations:
        drawn["correlations"] = _svg(figures.correlations(evidence.correlations))
    return drawn


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


def _share_range(interval: Mapping[str, Any] | None) -> str:
    """``1.2% (0.0% to 4.5%)``."""
    if interval is None:
        return "–"
    return f"{percent(interval['estimate'])} ({percent(interval['low'])} to {percent(interval['high'])})"
