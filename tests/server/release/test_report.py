"""One evidence, one report: deterministic, self-contained, and complete on its first page."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from privacy.audit.gates import GatePolicy
from privacy.audit.tradeoff import tpr_cap, tpr_cap_gdp
from privacy.plan import DPPlan, TrainingStage
from privacy.trials import repeated
from server.release.attack_evidence import AttackCounts
from server.release.card import GATES
from server.release.document import Report
from server.release.evidence import Evidence, Promise
from server.release.figures import contact_sheet
from server.release.render import by_slot, cards, render_html, strongest
from server.release.report import build_report, report_bytes, write_report

Case = tuple[Evidence, dict[str, bytes]]
Make = Callable[..., Evidence]
POLICY = GatePolicy()


class Page(HTMLParser):
    """What the tests look at in a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "col"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def html(evidence_with_images: Case) -> str:
    evidence, images = evidence_with_images
    return render_html(build_report(evidence, POLICY), images)


def test_same_evidence_same_bytes(evidence_with_images: Case, tmp_path: Path) -> None:
    evidence, images = evidence_with_images
    for name in ("a", "b"):
        write_report(evidence, POLICY, images, tmp_path / name)
    for file in ("report.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"report.json", "report.html", "figures"}


def test_html_follows_from_the_json_file_alone(evidence_with_images: Case, html: str) -> None:
    evidence, images = evidence_with_images
    parsed = json.loads(report_bytes(build_report(evidence, POLICY)))
    assert render_html(parsed, images) == html


def test_another_process_on_another_day_writes_the_same_bytes(audited_with_images: Case, tmp_path: Path) -> None:
    evidence = audited_with_images[0].model_copy(update={"sheets": ()})
    (tmp_path / "evidence.json").write_text(evidence.model_dump_json(), encoding="utf-8")
    script = """
import sys
from pathlib import Path
from privacy.audit.gates import GatePolicy
from server.release.evidence import Evidence
from server.release.report import write_report
here = Path(sys.argv[1])
write_report(Evidence.model_validate_json((here / "evidence.json").read_bytes()), GatePolicy(), {}, here / "other")
"""
    surroundings = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Pacific/Kiritimati", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=surroundings, timeout=120)
    write_report(evidence, POLICY, {}, tmp_path / "here")
    for file in ("report.json", "report.html"):
        assert (tmp_path / "other" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


def test_nothing_is_fetched_and_nothing_runs(html: str) -> None:
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), value
    outside = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert "http" not in outside
    assert "url(" not in outside
    assert "@import" not in outside


def test_vector_figures_reach_for_nothing(evidence_with_images: Case, html: str) -> None:
    import base64

    for body in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html):
        svg = base64.b64decode(body).decode()
        for link in re.findall(r'(?:href|src)="([^"]*)"', svg):
            assert link.startswith("#"), link


def test_the_first_page_answers_the_four_questions(html: str) -> None:
    front = html[: html.index('<section id="released">')]
    for question in ("What was promised?", "What was spent?", "What did attacks find?", "May it leave?"):
        assert question in front
    assert "HOLD" in front
    assert "ε 7.98 at δ 1e-5" in front
    assert "ε 7.28 of 7.98" in front
    assert "Not yet" in front


def test_sections_stand_in_the_order_that_officers_ask_in(html: str) -> None:
    order = ("verdict", "open", "released", "flow", "promise", "attacks", "risks", "copies", "subgroups", "validity")
    order += ("usefulness", "deviations", "method")
    places = [html.index(f'<section id="{name}"') for name in order]
    assert places == sorted(places)
    numbers = re.findall(r'<h2><span class="no">(\d+)</span>', html)
    assert numbers == [str(n) for n in range(1, 13)]
    linked = set(re.findall(r'<li><a href="#([a-z]+)">', html))
    assert linked == set(order) - {"verdict", "open"}


def test_the_first_page_has_every_rule_and_room_for_two_signatures(html: str) -> None:
    front = html[: html.index('<section id="open"')]
    for question in GATES.values():
        assert front.count(question) == 1
    assert "Data lead" in front
    assert "Privacy officer" in front
    assert ".front{break-after:page}" in html


def test_everything_that_an_audit_measures_is_shown(audited_with_images: Case) -> None:
    evidence, images = audited_with_images
    report = build_report(evidence, POLICY)
    html = render_html(report, images)
    assert Page(html).open == []
    text = re.sub(r"\s+", " ", Page(html).text)
    for attack in evidence.attacks:
        assert attack.label in text
    for risk in evidence.risks:
        assert f"{risk.hits_member} of {risk.trials_member}" in text
        assert risk.knows in text
    for site in evidence.training_audit.sites if evidence.training_audit else ():
        assert site.commitment[:12] in text
    assert "invalid: guessing without the cohort does as well" in text
    assert "nobody knows what attacks do to them: pathology=sclerosis" in text
    assert "G5 copies, cxr; G3 membership, flow loss" in text
    assert "Planted leak: found, at least 50%" in text
    assert "membership dealt at random" in text
    for threat in ("T1", "T2", "T3", "T4", "T5"):
        assert threat in text
    for words in ("PRV", "Poisson", "declared capacity", "cryptographic stream", "NOT COVERED"):
        assert words in text


def test_an_attack_is_shown_in_full_once_and_by_slot_in_a_table(audited_with_images: Case) -> None:
    written = build_report(audited_with_images[0], POLICY)
    known = Report.model_validate(written)
    assert [attack.label for attack, _ in cards(known)] == [
        "flow loss", "density ratio", "sum of canaries", "nearest neighbour",
    ]  # fmt: skip
    scopes, rows = by_slot(known)
    assert scopes == ["joint", "mri", "ehr"]
    assert set(rows["density ratio"]) == {"joint", "mri", "ehr"}
    assert set(rows["flow loss"]) == {"joint"}
    drawn = {row["name"] for row in written["derived"]["attacks"] if row["roc"] is not None}
    assert drawn == {attack.label for attack, _ in cards(known)}


def test_an_attack_that_ran_on_slots_alone_is_shown_where_it_is_strongest(
    evidence_factory: Make, attack_factory: Callable[..., AttackCounts]
) -> None:
    slots = tuple(
        attack_factory("codec", mu, 400, 200, 3, access="final weights", scope=scope)
        for scope, mu in (("mri", 0.1), ("cxr", 2.0), ("pet", 0.0))
    )
    known = Report.model_validate(build_report(evidence_factory(attacks=slots), POLICY))
    assert [attack.scope for attack, _ in cards(known)] == ["cxr"]
    assert "codec, cxr" in Page(render_html(build_report(evidence_factory(attacks=slots), POLICY), {})).text


def test_the_clearest_attack_is_not_the_luckiest(
    evidence_factory: Make, attack_factory: Callable[..., AttackCounts]
) -> None:
    lucky = attack_factory("lucky", 1.2, 6, 6, 5, access="cohort only")
    clear = attack_factory("clear", 0.8, 400, 200, 6, access="cohort only")
    results = Report.model_validate(build_report(evidence_factory(attacks=(lucky, clear)), POLICY)).derived.attacks
    area = {result.name: result.auc.estimate for result in results if result.auc is not None}
    assert area["lucky"] > area["clear"]
    found = strongest(results)
    assert found is not None
    assert found.name == "clear"


def test_what_was_not_measured_is_on_hold_in_every_section() -> None:
    html = render_html(build_report(Evidence(study="empty", created="2026-11-21"), POLICY), {})
    for section in ("released", "flow", "promise", "attacks", "risks", "copies", "subgroups", "validity", "usefulness"):
        body = html[html.index(f'<section id="{section}"') :].split("</section>")[0]
        assert '<span class="badge hold">' in body, section
        assert '<span class="badge pass">' not in body, section


def test_hostile_words_stay_words(evidence_factory: Make) -> None:
    """The types refuse most; what a label may hold is escaped."""
    bad = "x\"'&<script>alert(1)</script>"
    marginal = evidence_factory().marginals[0].model_copy(update={"labels": (bad, *("b",) * 4), "unit": "<b>"})
    html = render_html(build_report(evidence_factory(marginals=(marginal,)), POLICY), {})
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert Page(html).open == []


def test_a_reader_who_hears_the_page_finds_the_way(html: str) -> None:
    page = Page(html)
    names = [tag for tag, _ in page.tags]
    assert (names.count("main"), names.count("header"), names.count("footer"), names.count("h1")) == (1, 1, 1, 1)
    assert '<html lang="en">' in html
    assert html.index('class="skip"') < html.index("<header")
    assert names.count("table") == names.count("caption")
    for tag, attributes in page.tags:
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
        if tag in ("nav", "ol") and attributes.get("class") in ("toc", "flow"):
            assert attributes.get("aria-label")
    assert html.count('<svg class="icon"') == html.count('aria-hidden="true"')


def test_contrast_is_at_least_that_of_wcag_aa(html: str) -> None:
    colours = dict(re.findall(r"--([a-z]+):(#[0-9a-f]{6})", html))
    for name in ("ink", "soft", "accent", "pass", "hold", "block", "info"):
        for ground in ("#ffffff", colours["pale"]):
            assert _contrast(colours[name], ground) >= 4.5, (name, ground)


def _contrast(one: str, other: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_pictures_have_words(html: str) -> None:
    images = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    assert len(images) > 15
    assert all(attributes.get("alt") for attributes in images)


def test_headings_do_not_skip(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(html).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_status_is_a_word_and_a_shape_not_a_colour(html: str) -> None:
    badges = re.findall(r'<span class="badge [a-z]+">(.*?)</span>', html, flags=re.S)
    assert badges
    assert all("<svg" in badge and re.search(r"PASS|INFO|HOLD|BLOCK", badge) for badge in badges)


def test_report_holds_the_intervals_and_the_ceiling(evidence_with_images: Case) -> None:
    report = build_report(evidence_with_images[0], POLICY)
    assert report["schema_version"] == "medgen.report/1"
    loss = report["derived"]["attacks"][0]
    assert [point["fpr"] for point in loss["tpr"]] == [0.01, 0.05, 0.1]
    assert all(point["low"] <= point["estimate"] <= point["high"] for point in loss["tpr"])
    assert loss["epsilon_lower_bound"] <= loss["power_ceiling"]
    assert "Gaussian" in loss["gaussian"]["label"]
    assert report["derived"]["caps"]["tpr"][0]["tpr"] == pytest.approx(0.256, abs=0.005)


def test_the_promise_is_that_of_the_plan_and_bounds_every_attack(evidence_factory: Make) -> None:
    core = TrainingStage(name="core", sampling_rate=0.15, steps=10, rounds=4, clip=1.0)
    plan = repeated(DPPlan(stages=(core,), delta=1e-5), 2).calibrate(8.0)
    words = plan.statement()
    report = build_report(evidence_factory(promise=Promise.from_statement(words)), POLICY)
    caps = report["derived"]["caps"]
    exact = {point["fpr"]: point["tpr"] for point in words["trade_off"]["points"]}
    assert all(point["tpr"] == pytest.approx(exact[point["fpr"]]) for point in caps["tpr"])
    assert caps["auc"] == pytest.approx(words["trade_off"]["auc"])
    assert caps["tpr"][0]["tpr"] < float(tpr_cap_gdp([0.01], plan.mu)[0])  # the curve, not the Gaussian above it
    curve = np.array([(point["fpr"], point["tpr"]) for point in caps["curve"]])
    assert (np.diff(curve, axis=0) >= 0).all()
    assert curve[-1].tolist() == [1.0, 1.0]
    text = Page(render_html(report, {})).text
    for shown in (
        f"{words['epsilon']:.2f}, 1e-5, {words['mu']:.2f}",
        f"PRV {words['epsilon_prv']:.2f} : agrees within 0.02",
        f"epsilon {words['epsilon_rdp']:.2f} , the kind",
        "2 of every training step, the best one kept; all are charged",
        f"Area under it: {caps['auc']:.3f}",
        *words["not_covered"],
    ):
        assert re.sub(r"\s+", "", shown) in re.sub(r"\s+", "", text), shown


def test_a_promise_without_its_profile_bounds_attacks_by_its_epsilon_alone(
    evidence_factory: Make, promise_factory: Callable[..., Promise]
) -> None:
    bare = promise_factory().model_copy(update={"profile": (), "epsilon_check": None, "check_text": "not asked: x"})
    report = build_report(evidence_factory(promise=bare), POLICY)
    caps = report["derived"]["caps"]
    assert caps["auc"] is None
    assert caps["tpr"][0]["tpr"] == pytest.approx(float(tpr_cap([0.01], bare.epsilon, bare.delta)[0]))
    text = Page(render_html(report, {})).text
    assert "the profile did not come with the evidence" in text
    assert "not asked: x" in text


def test_a_spend_that_may_be_larger_says_how_large_at_most(evidence_factory: Make) -> None:
    sites = evidence_factory().sites
    told = sites[0].model_copy(update={"epsilon_at_most": 7.77})
    known = sites[1].model_copy(update={"epsilon_at_most": sites[1].epsilon_spent})
    text = Page(render_html(build_report(evidence_factory(sites=(told, known)), POLICY), {})).text
    assert text.count("at most 7.77") == 1
    assert len(re.findall(r"\d, at most", text)) == 1


def test_a_study_without_privacy_says_so(evidence_factory: Make, promise_factory: Callable[..., Promise]) -> None:
    report = build_report(evidence_factory(promise=promise_factory(math.inf)), POLICY)
    text = Page(render_html(report, {})).text
    assert "Nothing: not private" in text
    assert "NOT PRIVATE" in text
    assert report["derived"]["caps"] is None
    json.loads(report_bytes(report))  # infinity is a word, not a bare constant


def test_an_empty_study_renders_as_hold_everywhere() -> None:
    report = build_report(Evidence(study="empty", created="2026-11-21"), POLICY)
    text = Page(render_html(report, {})).text
    assert report["verdict"]["decision"] == "HOLD"
    assert "No attack was run" in text
    assert "No valid result" in text
    assert "RELEASE" not in text


def test_an_attack_without_control_group_has_no_numbers(
    evidence_factory: Make, attack_factory: Callable[..., AttackCounts]
) -> None:
    whole = attack_factory("flow loss", 0.0, 21, 1, 0, access="final weights")
    empty = whole.model_copy(update={"trials_held_out": 0, "hits_held_out": (0,) * len(whole.thresholds)})
    report = build_report(evidence_factory(attacks=(empty,)), POLICY)
    (result,) = report["derived"]["attacks"]
    assert result["name"] == "flow loss"
    assert not any(value for key, value in result.items() if key != "name")
    assert "there is no control group" in Page(render_html(report, {})).text


def test_only_announced_pictures_enter(evidence_with_images: Case, tmp_path: Path) -> None:
    evidence, images = evidence_with_images
    name = next(iter(images))
    for wrong, message in (
        ({**images, "figures/patient.png": b"x"}, "not announced"),
        ({k: v for k, v in images.items() if k != name}, "not given"),
        ({**images, name: images[name] + b"x"}, "not the picture"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report(evidence, POLICY, wrong, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_contact_sheets_say_what_they_show() -> None:
    rng = np.random.default_rng(0)
    films, volumes = (
        rng.uniform(-1, 1, (5, 8, 6)).astype(np.float32),
        rng.uniform(-1, 1, (3, 4, 6, 8)).astype(np.float32),
    )
    for images in (films, volumes):
        body = contact_sheet(images, "synthetic")
        assert body == contact_sheet(images, "synthetic")
        with Image.open(io.BytesIO(body)) as picture:
            assert picture.info["synthetic"] == "yes"
    with Image.open(io.BytesIO(contact_sheet(films, "public"))) as picture:
        assert "synthetic" not in picture.info
    assert hashlib.sha256(contact_sheet(films, "public")).digest() != hashlib.sha256(body).digest()
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(films[:0], "synthetic")


def test_an_axial_slice_shows_the_front_up() -> None:
    volume = np.full((1, 8, 8, 8), -1.0, np.float32)
    volume[0, :, 6:, :] = 1.0  # bright in front (the second axis points to anterior)
    with Image.open(io.BytesIO(contact_sheet(volume, "public"))) as picture:
        pixels = np.asarray(picture)
    assert pixels[:10].mean() > 200
    assert pixels[-10:].mean() < 50
