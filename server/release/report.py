"""The report: evidence and verdict as one JSON file, the source of truth, and the figures and numbers derived from it.

``report.json`` holds the evidence as it was given, the verdict with every rule, and the statistics of every attack.
:mod:`server.release.render` turns that file, and nothing else, into HTML; the same evidence gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from privacy.audit.bounds import (
    Interval,
    ThresholdCounts,
    auc,
    best_epsilon_lower_bound,
    best_gaussian_lower_bound,
    power_ceiling,
    roc_band,
    tpr_at_fpr,
    wilson,
)
from privacy.audit.gates import GatePolicy, joint_confidence
from privacy.audit.tradeoff import auc_cap_of_profile, tpr_cap_of_profile
from privacy.audit.validity import blind_auc
from server.release.attack_evidence import AttackCounts
from server.release.evidence import SCHEMA_VERSION, Evidence, Promise
from server.release.gate import Verdict, decide
from server.release.render import render_html

FPR_POINTS = (0.01, 0.05, 0.10)
CURVE_POINTS = (0.0, *(round(10 ** (power / 12), 9) for power in range(-48, 1)))
AUDIT_DELTA = 1e-5  # at which bounds are stated where nothing was promised


def build_report(evidence: Evidence, policy: GatePolicy) -> dict[str, Any]:
    """Everything that the report says, as JSON values; infinite numbers are the word ``Infinity``."""
    verdict = decide(evidence, policy)
    judged = [attack for attack in evidence.attacks if attack.kind != "copies"]
    attacks = [_attack(attack, evidence.promise, len(judged), policy) for attack in judged]
    report: dict[str, Any] = _plain(
        {
            "schema_version": SCHEMA_VERSION,
            "verdict": dataclasses.asdict(verdict),
            "policy": policy.model_dump(mode="json"),
            "evidence": json.loads(evidence.model_dump_json()),
            "derived": {
                "attacks": attacks,
                "caps": _caps(evidence.promise),
                "blind": _interval(_blind(evidence)),
                "planted": _planted(evidence, policy),
                "coherence": evidence.coherence,
                "utility": [
                    {**json.loads(row.model_dump_json()), "auc": _interval(wilson(row.concordant, row.pairs))}
                    for row in evidence.utility
                ],
            },
        }
    )
    return report


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


def _attack(attack: AttackCounts, promise: Promise | None, judged: int, policy: GatePolicy) -> dict[str, Any]:
    """Statistics of one of ``judged`` attacks; ``valid`` is False, without numbers, where its counts are no result."""
    counts = attack.counts
    if counts is None:
        return {"name": attack.label, "valid": False}
    delta = promise.delta if promise else AUDIT_DELTA
    confidence = joint_confidence(policy, judged)
    gaussian = best_gaussian_lower_bound(counts, delta, confidence)
    ceiling = power_ceiling(counts.trials_member, counts.trials_held_out, delta, confidence, len(counts.thresholds))
    return {
        "name": attack.label,
        "valid": True,
        "auc": _interval(auc(counts, policy.confidence)),
        "tpr": [{"fpr": fpr, **(_interval(tpr_at_fpr(counts, fpr, policy.confidence)) or {})} for fpr in FPR_POINTS],
        "epsilon_lower_bound": best_epsilon_lower_bound(counts, delta, confidence),
        "power_ceiling": ceiling,
        "gaussian": dataclasses.asdict(gaussian),
        "roc": _roc(counts, policy),
    }


def _roc(counts: ThresholdCounts, policy: GatePolicy) -> dict[str, list[float]]:
    names = ("fpr", "tpr", "low", "high")
    return {
        name: values.round(6).tolist() for name, values in zip(names, roc_band(counts, policy.confidence), strict=True)
    }


def _caps(promise: Promise | None) -> dict[str, Any] | None:
    """The most that any attack can reach if the promise holds: from the whole profile, else from one (epsilon, delta).

    None where nothing is promised. ``curve`` are the points of the plotted trade-off curve.
    """
    if promise is None or not promise.private:
        return None
    epsilons, deltas = zip(*(promise.profile or ((promise.epsilon, promise.delta),)), strict=True)

    def points(rates: Sequence[float]) -> list[dict[str, float]]:
        caps = tpr_cap_of_profile(rates, epsilons, deltas).tolist()
        return [{"fpr": rate, "tpr": cap} for rate, cap in zip(rates, caps, strict=True)]

    return {
        "tpr": points(FPR_POINTS),
        "curve": points(CURVE_POINTS),
        "auc": auc_cap_of_profile(epsilons, deltas) if promise.profile else None,
    }


def _blind(evidence: Evidence) -> Interval | None:
    counts = evidence.validity.blind.counts if evidence.validity.blind else None
    return blind_auc(counts) if counts else None


def _planted(evidence: Evidence, policy: GatePolicy) -> list[dict[str, Any]]:
    """Per attack, how much of what was planted for it was found."""
    rows = []
    for attack in evidence.validity.planted:
        if (counts := attack.counts) is not None:
            found = _interval(tpr_at_fpr(counts, policy.planted_fpr, policy.confidence)) or {}
            rows.append({"name": attack.label, "fpr": policy.planted_fpr, "copies": counts.trials_member, **found})
    return rows


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else dataclasses.asdict(interval)


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
