"""The same evidence under five sets of headings: every number has its place, every gap is left to a person."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from privacy.audit.gates import GatePolicy
from server.release.evidence import Evidence
from server.release.facts import FactName
from server.release.frameworks import FRAMEWORKS, Asked, Framework, FrameworkName, framework
from server.release.render import render_framework
from server.release.report import build_report

POLICY = GatePolicy()
each = pytest.mark.parametrize("frame", FRAMEWORKS, ids=lambda frame: frame.name)


@pytest.fixture(scope="module")
def report(audited_with_images: tuple[Evidence, dict[str, bytes]]) -> dict[str, Any]:
    return build_report(audited_with_images[0], POLICY)


def test_every_framework_has_its_page() -> None:
    assert {frame.name for frame in FRAMEWORKS} == set(get_args(FrameworkName))
    assert all(framework(name).name == name for name in get_args(FrameworkName))


@each
def test_headings_quote_known_facts_and_end_with_a_person(frame: Framework) -> None:
    entries = [entry for heading in frame.headings for entry in heading.entries]
    assert {entry for entry in entries if isinstance(entry, str)} <= set(get_args(FactName))
    assert isinstance(frame.headings[-1].entries[-1], Asked)  # a name, a date, a signature
    assert all(heading.entries for heading in frame.headings)


@each
def test_every_answer_says_where_it_stands(frame: Framework, report: dict[str, Any]) -> None:
    html = render_framework(report, frame)
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", html, flags=re.S)
    quoted = [entry for heading in frame.headings for entry in heading.entries if isinstance(entry, str)]
    assert len(rows) == len(quoted)
    assert all(re.search(r'<span class="hash">/[a-z]', row) for row in rows)
    assert html.count('class="ask"') == sum(
        isinstance(entry, Asked) for heading in frame.headings for entry in heading.entries
    )


@each
def test_no_page_claims_compliance(frame: Framework, report: dict[str, Any]) -> None:
    text = re.sub(r"<[^>]+>", " ", render_framework(report, frame))
    assert "claims no compliance" in text
    assert not re.search(r"\b(is|are|fully) (compliant|anonymous|de-identified)\b", text)
    assert not re.search(r"\bcompl(ies|iant) with\b", text)


@each
def test_same_report_same_bytes_nothing_fetched(frame: Framework, report: dict[str, Any]) -> None:
    html = render_framework(report, frame)
    assert html == render_framework(report, frame)
    assert "http" not in html
    assert "<script" not in html


def test_missing_evidence_stays_missing_under_every_heading() -> None:
    report = build_report(Evidence(study="empty", created="2026-11-21"), POLICY)
    for frame in FRAMEWORKS:
        html = render_framework(report, frame)
        statuses = set(re.findall(r'<span class="badge ([a-z]+)">', html))
        assert "hold" in statuses
        assert "RELEASE" not in html


def test_a_report_without_facts_is_refused(report: dict[str, Any]) -> None:
    bare = {**report, "derived": {**report["derived"], "facts": []}}
    with pytest.raises(ValueError, match="without facts"):
        render_framework(bare, FRAMEWORKS[0])
