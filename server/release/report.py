"""The report: evidence and verdict as one JSON file, the source of truth, and the figures and numbers derived from it.

``report.json`` holds the evidence as it was given, the verdict with every rule, and what follows from both: statistics,
facts, scope, pyramid and threats. :mod:`server.release.render` turns that file, and nothing else, into HTML and PDF; the
same evidence gives the same bytes. :mod:`server.release.schema` publishes its JSON Schema.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from privacy.audit.gates import GatePolicy
from server.release import card, facts, guarantee, statistics
from server.release.attack_evidence import JOINT, AttackCounts
from server.release.document import Derived, Report
from server.release.evidence import Evidence
from server.release.gate import Verdict, decide
from server.release.render import render_html


def build_report(evidence: Evidence, policy: GatePolicy) -> dict[str, Any]:
    """Everything that the report says, as JSON values; infinite numbers are the word ``Infinity``."""
    verdict = decide(evidence, policy)
    report = Report(verdict=verdict, policy=policy, evidence=evidence, derived=_derived(evidence, verdict, policy))
    plain: dict[str, Any] = _plain(json.loads(report.model_dump_json()))
    return plain


def _derived(evidence: Evidence, verdict: Verdict, policy: GatePolicy) -> Derived:
    promise = evidence.promise
    judged = [attack for attack in evidence.attacks if attack.kind != "copies"]
    joint = {attack.name for attack in judged if attack.scope == JOINT}
    known = facts.facts(evidence, verdict, policy)
    return Derived(
        attacks=tuple(
            statistics.attack_result(attack, promise, len(judged), policy, _drawn(attack, joint)) for attack in judged
        ),
        subgroups=tuple(
            statistics.subgroup_result(group, promise, len(judged), policy) for group in evidence.subgroups
        ),
        risks=tuple(statistics.risk_result(risk, policy) for risk in evidence.risks),
        copies=tuple(statistics.copy_result(attack, policy) for attack in evidence.attacks if attack.kind == "copies"),
        caps=statistics.caps(promise),
        blind=statistics.blind(evidence),
        planted=tuple(statistics.control(row, policy.planted_fpr, policy) for row in evidence.validity.planted),
        null=tuple(statistics.control(row, policy.planted_fpr, policy) for row in evidence.validity.null),
        coherence=evidence.coherence,
        utility=tuple(statistics.utility_result(row) for row in evidence.utility),
        gates=card.gates(verdict),
        facts=known,
        scope=guarantee.scope(evidence),
        pyramid=guarantee.pyramid(known),
        threats=guarantee.threats(evidence, known),
    )


def _drawn(attack: AttackCounts, joint: Collection[str]) -> bool:
    """Whether a report needs its curve: slots of an attack that ran jointly are shown as numbers."""
    return attack.scope == JOINT or attack.name not in joint


def report_bytes(report: Mapping[str, Any]) -> bytes:
    """Canonical bytes of a report."""
    return (json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def write_report(evidence: Evidence, policy: GatePolicy, images: Mapping[str, bytes], folder: Path) -> Verdict:
    """Write ``report.json``, ``report.html`` and ``figures/``; the files appear whole.

    Args:
        evidence: what is known.
        policy: the gate policy.
        images: contact sheets by the file names of ``evidence.sheets``.
        folder: the bundle folder; made if missing.

    Raises:
        ValueError: a contact sheet is missing, was not announced, or has another digest.
    """
    check_images(evidence, images)
    report = build_report(evidence, policy)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, body in sorted(images.items()):
        _write(folder / name, body)
    _write(folder / "report.json", report_bytes(report))
    _write(folder / "report.html", render_html(report, images).encode())
    return decide(evidence, policy)


def check_images(evidence: Evidence, images: Mapping[str, bytes]) -> None:
    """Only announced figures enter a report, byte for byte.

    Raises:
        ValueError: naming the figure.
    """
    announced = {sheet.synthetic: sheet.synthetic_sha256 for sheet in evidence.sheets}
    announced |= {sheet.public: sheet.public_sha256 for sheet in evidence.sheets}
    if unknown := sorted(set(images) - set(announced)):
        raise ValueError(f"{unknown[0]}: not announced in the evidence; no other picture may enter a report")
    for name, digest in announced.items():
        if name not in images:
            raise ValueError(f"{name}: announced in the evidence but not given; draw it again")
        if hashlib.sha256(images[name]).hexdigest() != digest:
            raise ValueError(f"{name}: not the picture that the evidence announces; draw it again")


def _plain(value: Any) -> Any:
    """JSON values with at most nine significant digits, and words for numbers that JSON does not have."""
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            if math.isnan(value):
                return "NaN"
            if math.isinf(value):
                return "Infinity" if value > 0 else "-Infinity"
            return float(f"{value:.9g}")
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case _:
            return [_plain(item) for item in value]


def _write(path: Path, body: bytes) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(body)
    os.replace(partial, path)
