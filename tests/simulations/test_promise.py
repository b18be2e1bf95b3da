"""The README says about the promise what plan and ledger say, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from privacy.plan import DPPlan, QueryStage, TrainingStage
from privacy.statement import COVERAGE, NOT_COVERED
from simulations import promise
from simulations.hospitals import SitePolicy
from simulations.promise import BEGIN, END, README, main, render, replaced, uninterrupted


@pytest.fixture(scope="module")
def plan() -> DPPlan:
    return DPPlan(
        stages=(
            QueryStage(name="gate", sigma=20.0, sensitivity=2.0),
            TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, spare_rounds=1, clip=1.0),
        ),
        delta=1e-5,
    ).calibrate(3.0)


def test_the_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, f"run `python -m simulations.promise --write`:\n{capsys.readouterr().out}"


def test_an_edited_number_is_found_and_writing_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = promise.section()
    monkeypatch.setattr(promise, "section", lambda: text)
    copy = tmp_path / "README.md"
    page = README.read_text(encoding="utf-8")
    copy.write_text(page.replace("| a patient of two sites | ", "| a patient of two sites | 1"), encoding="utf-8")
    assert main(["--check"], copy) == 1
    assert "-| a patient of two sites | 1" in capsys.readouterr().out
    assert main(["--write"], copy) == 0
    assert copy.read_text(encoding="utf-8") == page
    assert main([]) == 0
    assert capsys.readouterr().out == text


def test_every_figure_comes_from_plan_and_ledger(plan: DPPlan) -> None:
    rules = SitePolicy(plan_epsilon=4.0, lifetime_epsilon=6.0, uncovered_queries=5)
    ledger = uninterrupted(plan, rules, 200)
    text = render(plan, ledger, rules)
    words, spent = plan.statement(), ledger.plans[0]
    for shown in (
        words["sentence"][:70],
        f"{plan.mu:.2f} |",
        f"{plan.epsilon_prv:.2f}: agrees within 0.02",
        f"{plan.rdp():.2f} |",
        f"{plan.replace_one_epsilon:.1f} |",
        f"{plan.two_site_epsilon:.1f} |",
        "| core (training) | 3 + 1 | 5 | 0.2 |",
        "| gate (query) | 1 + 1 | 1 | 1 | 20 |",
        f"{spent.epsilon:.2f} of 4 a plan",
        f"{spent.spent_epsilon:.2f} |",
        "gate 1 + 1, core 3 + 1",
        f"{ledger.lifetime_epsilon:.2f} of 6",
        "0 of 5 |",
    ):
        assert shown in " ".join(text.split("\n")), shown
    assert 0 < spent.spent_epsilon < spent.epsilon < plan.epsilon + 1e-9
    assert all(f"| {covered} | {left_out} |" in text for covered, left_out in COVERAGE)
    assert words["not_covered"] == list(NOT_COVERED)
    tighter = render(plan.calibrate(2.0), uninterrupted(plan.calibrate(2.0), rules, 200), rules)
    assert tighter != text


def test_a_plan_that_the_ledger_does_not_hold_or_that_promises_nothing_is_refused(plan: DPPlan) -> None:
    rules = SitePolicy()
    with pytest.raises(ValueError, match="a ledger that holds it"):
        render(plan.calibrate(2.0), uninterrupted(plan, rules, 200), rules)
    endless = SitePolicy(plan_epsilon=math.inf, lifetime_epsilon=math.inf)
    open_plan = plan.calibrate(math.inf)
    with pytest.raises(ValueError, match="private plan"):
        render(open_plan, uninterrupted(open_plan, endless, 200), endless)


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_missing_markers_are_named(page: str) -> None:
    with pytest.raises(ValueError, match="put both around the section"):
        replaced(page, "text")
