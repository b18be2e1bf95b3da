"""Gate G2 on canaries: an incident blocks, an invalid audit holds, a weak one clears nothing."""

from __future__ import annotations

import dataclasses

import pytest

from privacy.audit.gates import GatePolicy
from privacy.audit.in_training import TrainingBounds
from privacy.audit.training_gate import canaries, no_canaries

FOUND = TrainingBounds(
    one_run=1.0, f_dp=1.5, mu=0.5, gaussian=2.0, one_run_ceiling=5.5, f_dp_ceiling=9.0, gaussian_ceiling=30.0,
    epsilon=4.0, accounted_mu=1.0, gaussian_epsilon=4.4, delta=1e-5, confidence=0.98,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problems", "status", "words"),
    [
        ({}, (), "PASS", "contradict nothing"),
        ({"one_run": 4.01}, (), "BLOCK", "INCIDENT"),
        ({"f_dp": 4.41}, (), "BLOCK", "INCIDENT"),
        ({"f_dp": 4.2}, (), "PASS", "contradict nothing"),  # the Gaussian that was promised allows it
        ({"mu": 1.01}, (), "BLOCK", "INCIDENT"),
        ({"one_run": 4.01}, ("north: not opened.",), "BLOCK", "INCIDENT"),
        ({}, ("north: not opened.",), "HOLD", "invalid: north"),
        ({"one_run": 4.5, "epsilon": 5.0}, (), "HOLD", "nearly all"),
        ({"epsilon": 6.0, "gaussian_epsilon": 31.0}, (), "INFO", "could not have shown"),
    ],
)
def test_what_the_bounds_say(change: dict[str, float], problems: tuple[str, ...], status: str, words: str) -> None:
    found = canaries(dataclasses.replace(FOUND, **change), problems, GatePolicy())
    assert (found.rule, found.status) == ("G2 promise", status)
    assert words in found.sentence


def test_an_audit_that_nobody_opened_is_missing_evidence() -> None:
    assert canaries(None, (), GatePolicy()).status == "HOLD"
    assert canaries(None, ("north: silent.",), GatePolicy()).status == "HOLD"


def test_a_plan_without_canaries_is_told_and_clears_nothing() -> None:
    assert no_canaries().status == "INFO"
