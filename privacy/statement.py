"""A plan's promise in words and numbers, as reports and README print it.

Stage: everything said about epsilon in a report is generated here from the plan, so text and numbers cannot disagree.

Covered
    * Unit, relation, sampling assumption and both neighbouring figures stand beside every epsilon.
    * A plan without noise says "not private" and carries no finite number.
    * The whole privacy profile and the trade-off curve that follows from it, not only one (epsilon, delta).
    * What the promise covers and what it does not: one list, printed by report and README alike.

Not covered
    * What was spent: that is the ledger's statement. Here is what the plan allows, spare rounds included.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from privacy.accounting import MU_DELTA
from privacy.audit.tradeoff import auc_cap_of_profile, tpr_cap_of_profile
from privacy.plan import DPPlan
from privacy.stages import QueryStage, Stage, TrainingStage

RELATION = (
    "zero-out: one patient with all visits, images and rows is replaced by an empty record; the declared capacity is "
    "public and stays. The privacy loss equals that of adding or removing a patient."
)
SAMPLING = (
    "Poisson: at every step each patient of the site is drawn independently at the stated rate, with secret fresh coins; "
    "empty draws add noise and are charged. No amplification by rounds or sites is claimed."
)
ACCOUNTANT = "privacy loss distributions (dp_accounting, pessimistic, both directions); cross-check PRV (Opacus)"
DIVISOR = "Sums are divided by sampling rate times declared capacity: public constants."
COVERAGE = (
    (
        "Members: everything trained or counted on them is noised",
        "Held-out patients; they serve as the control of attacks",
    ),
    (
        "All private stages of a plan, spare rounds included, in one calibration",
        "Queries without noise, audit and utility counts among them: exact, counted, capped",
    ),
    (
        "The cohort and the weights, whatever is done with them",
        "What is true of the population rather than of one patient",
    ),
    (
        "A patient of two sites: the larger epsilon is printed",
        "A patient of more than two sites, or under two names at one where no column tells",
    ),
    (
        "All plans of a site together, by a lifetime ceiling for each data block",
        "Choosing the best of several studies, unless their trials are in the plan",
    ),
    ("Interrupted rounds: charged before a record is opened", "A coordinator that adds up or samples wrongly"),
    (
        "An edited or older ledger, its mirror put back with it: site and coordinator compare heads",
        "Ledger, mirror, site log and every remembered head put back together",
    ),
    ("One site's numbers, from a curious coordinator", "The sum of two others, from a peer in a cohort of three"),
    ("Replayed, forged, changed plans and tasks", "Encryption and signed answers on the network"),
    (
        "Errors: one closed code, whatever the records hold",
        "Timing of answers, and the silence of a site that chose to sit out when it has a bad record",
    ),
    ("Seeds: noise comes from the operating system", "Noise exact to the last float bit (it lies on a public grid)"),
    ("A study without noise says *not private* everywhere", "A study without noise protects nobody"),
)
NOT_COVERED = tuple(right for _, right in COVERAGE)
FALSE_ALARMS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)


def statement(plan: DPPlan) -> dict[str, Any]:
    """The promise of a calibrated plan; JSON-ready, None where a number is infinite or was not computed.

    Raises:
        ValueError: the plan is not calibrated, so it promises nothing yet.
        accounting.AccountantsDisagree: two accountants differ by more than 0.02 on it.
    """
    if not plan.calibrated:
        raise ValueError("the plan is not calibrated; call calibrate() before stating what it promises")
    costs = {cost.name: cost for cost in plan.stage_costs()}
    check, profile = plan.cross_check(), plan.profile()
    return {
        "private": plan.private,
        "sentence": _sentence(plan),
        "unit": plan.unit,
        "relation": plan.relation,
        "relation_text": RELATION,
        "sampling_text": SAMPLING,
        "divisor_text": DIVISOR,
        "max_visits": plan.max_visits,
        "trials": plan.trials,
        "epsilon": _number(plan.epsilon),
        "delta": plan.delta,
        "target_epsilon": _number(plan.target_epsilon),
        "mu": _number(plan.mu),
        "mu_min_delta": MU_DELTA,
        "epsilon_prv": _number(check.epsilon_prv),
        "cross_check": check.note,
        "epsilon_rdp": _number(plan.rdp()),
        "replace_one_epsilon": _number(plan.replace_one_epsilon),
        "two_site_epsilon": _number(plan.two_site_epsilon),
        "profile": [list(point) for point in profile],
        "trade_off": trade_off(profile),
        "accountant": ACCOUNTANT,
        "stages": [
            _row(stage)
            | {
                "epsilon_alone": _number(costs[stage.name].alone),
                "saved_without": _number(costs[stage.name].saved_without),
            }
            for stage in plan.stages
        ],
        "covered": [left for left, _ in COVERAGE],
        "not_covered": list(NOT_COVERED),
    }


def trade_off(profile: tuple[tuple[float, float], ...]) -> dict[str, Any] | None:
    """The most that any attack can reach while the promise holds; None where nothing is promised.

    Args:
        profile: pairs (epsilon, delta) of :meth:`DPPlan.profile`.

    Returns:
        ``points``: the largest true-positive rate at each of :data:`FALSE_ALARMS`; ``auc``: the largest AUC.
    """
    if not profile:
        return None
    epsilons, deltas = np.array(profile).T
    caps = tpr_cap_of_profile(FALSE_ALARMS, epsilons, deltas)
    return {
        "points": [{"fpr": fpr, "tpr": cap} for fpr, cap in zip(FALSE_ALARMS, caps.tolist(), strict=True)],
        "auc": auc_cap_of_profile(epsilons, deltas),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


def _row(stage: Stage) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": stage.name,
        "kind": stage.kind,
        "sigma": stage.sigma,
        "rounds": stage.rounds,
        "spare_rounds": stage.spare_rounds,
    }
    match stage:
        case TrainingStage():
            return row | {
                "sampling_rate": stage.sampling_rate,
                "steps": stage.steps,
                "clip": stage.clip,
                "draws": stage.draws,
            }
        case QueryStage():
            return row | {"sensitivity": stage.sensitivity, "noise_std": stage.noise_std}


def _sentence(plan: DPPlan) -> str:
    if not plan.private:
        return "NOT PRIVATE: this study adds no noise (epsilon = infinity); what it releases may reveal its patients."
    tried = f", all {plan.trials} trials" if plan.trials > 1 else ""
    return (
        f"At each site, ({plan.epsilon:.3g}, {plan.delta:.0e})-differential privacy for one patient under zero-out "
        f"(mu = {plan.mu:.2f}), all stages{tried} and spare rounds together; epsilon {plan.replace_one_epsilon:.3g} if a "
        f"patient is exchanged for another, {plan.two_site_epsilon:.3g} for a patient of two sites."
    )
