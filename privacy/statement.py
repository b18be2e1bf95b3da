"""A plan's promise in words and numbers, as reports and README print it.

Stage: everything said about epsilon in a report is generated here from the plan, so text and numbers cannot disagree.

Covered
    * Unit, relation, sampling assumption and both neighbouring figures stand beside every epsilon.
    * A plan without noise says "not private" and carries no finite number.

Not covered
    * What was spent: that is the ledger's statement. Here is what the plan allows, spare rounds included.
"""

from __future__ import annotations

import math
from typing import Any

from privacy.accounting import MU_DELTA
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
NOT_COVERED = (
    "patients held out from training, and every query without noise (counted and capped by the ledger)",
    "harm from what is true of the population rather than of one patient",
    "a patient recorded under two names at one site, or at more than two sites",
    "timing of answers, unless they go out at a public deadline",
)


def statement(plan: DPPlan) -> dict[str, Any]:
    """The promise of a calibrated plan; JSON-ready, None where a number is infinite.

    Raises:
        ValueError: the plan is not calibrated, so it promises nothing yet.
    """
    if not plan.calibrated:
        raise ValueError("the plan is not calibrated; call calibrate() before stating what it promises")
    costs = {cost.name: cost for cost in plan.stage_costs()}
    return {
        "private": plan.private,
        "sentence": _sentence(plan),
        "unit": plan.unit,
        "relation": plan.relation,
        "relation_text": RELATION,
        "sampling_text": SAMPLING,
        "max_visits": plan.max_visits,
        "epsilon": _number(plan.epsilon),
        "delta": plan.delta,
        "target_epsilon": _number(plan.target_epsilon),
        "mu": _number(plan.mu),
        "mu_min_delta": MU_DELTA,
        "epsilon_prv": _number(plan.epsilon_prv),
        "epsilon_rdp": _number(plan.rdp()),
        "replace_one_epsilon": _number(plan.replace_one_epsilon),
        "two_site_epsilon": _number(plan.two_site_epsilon),
        "accountant": "privacy loss distributions (dp_accounting, pessimistic, both directions); cross-check PRV (Opacus)",
        "stages": [
            _row(stage)
            | {
                "epsilon_alone": _number(costs[stage.name].alone),
                "saved_without": _number(costs[stage.name].saved_without),
            }
            for stage in plan.stages
        ],
        "not_covered": list(NOT_COVERED),
    }


def _number(value: float) -> float | None:
    return None if math.isinf(value) else value


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
    return (
        f"At each site, ({plan.epsilon:.3g}, {plan.delta:.0e})-differential privacy for one patient under zero-out "
        f"(mu = {plan.mu:.2f}), all stages and spare rounds together; epsilon {plan.replace_one_epsilon:.3g} if a patient "
        f"is exchanged for another, {plan.two_site_epsilon:.3g} for a patient of two sites."
    )
