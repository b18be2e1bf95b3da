"""The plan: one joint calibration over every private stage, from public numbers only."""

from __future__ import annotations

import math
from typing import Any

import pytest

from medgen_models.schema import Schema
from privacy import accounting
from privacy.audit.gates import GatePolicy
from privacy.boundary.plan import Part, StudyPlan
from privacy.plan import DPPlan
from server.audit_plan import LOSS_THRESHOLDS, RATIO_THRESHOLDS
from server.planning import PublicFacts, build_plan, dp_plan
from server.study import StudyConfig
from simulations.phantoms import autoencoder_schema, demo_schema

FACTS = PublicFacts(
    parts=(Part(name="card.json", digest="a" * 64, size=10),),
    core_clip=3.5,
    codec_clip=7.0,
    recentre_bound=2.5,
    marginals=((0,), (1,), (0, 1), (2,)),
)


def config(**fields: Any) -> StudyConfig:
    return StudyConfig.model_validate({"name": "planned"} | fields)


def names(plan: DPPlan) -> list[str]:
    return [stage.name for stage in plan.stages]


def test_every_private_stage_is_in_one_calibration_spares_included() -> None:
    plan = dp_plan(config(), demo_schema(), FACTS)
    assert names(plan) == ["marginals", "recentre", "core"]
    assert plan.calibrated
    assert 0.98 * 8.0 < plan.epsilon <= 8.0
    reserved = {stage.name: stage.rounds + stage.spare_rounds for stage in plan.stages}
    assert plan.epsilon_after(reserved) == pytest.approx(plan.epsilon)
    without_spares = plan.epsilon_after({stage.name: stage.rounds for stage in plan.stages})
    assert without_spares < plan.epsilon - 0.1


def test_public_numbers_become_clip_sensitivity_and_bound() -> None:
    plan = dp_plan(config(), demo_schema(), FACTS)
    assert plan.training("core").clip == 3.5
    assert plan.query("marginals").sensitivity == pytest.approx(2.0)  # four tables, one cell of each per patient
    assert plan.query("recentre").sensitivity == 2.5
    fixed = dp_plan(config(core={"clip": 1.25}), demo_schema(), FACTS)
    assert fixed.training("core").clip == 1.25


def test_codecs_are_calibrated_together_with_the_core() -> None:
    plan = dp_plan(config(codec={"slots": ["mri", "ehr"]}), autoencoder_schema(), FACTS)
    assert names(plan) == ["marginals", "codec", "recentre", "core"]
    assert plan.training("codec").clip == 7.0
    assert plan.epsilon <= 8.0
    assert plan.training("core").sigma > dp_plan(config(), autoencoder_schema(), FACTS).training("core").sigma
    with pytest.raises(ValueError, match="vitals"):
        dp_plan(config(codec={"slots": ["vitals"]}), autoencoder_schema(), FACTS)
    with pytest.raises(ValueError, match="no vae codec"):
        dp_plan(config(codec={"slots": ["mri"]}), demo_schema(), FACTS)


def test_prototypes_are_one_release_over_all_image_slots_and_need_public_codecs() -> None:
    schema = demo_schema()
    plan = dp_plan(config(prototypes={"enabled": True}), schema, FACTS)
    assert names(plan) == ["marginals", "recentre", "prototypes", "core"]
    assert plan.epsilon <= 8.0
    assert plan.training("core").sigma > dp_plan(config(), schema, FACTS).training("core").sigma
    # by default a slot's bound is the bound of recentring over root 3; three slots, root 2 for vector and presence
    assert plan.query("prototypes").sensitivity == pytest.approx(2.5 * math.sqrt(2.0))
    bounded = dp_plan(config(prototypes={"enabled": True, "bound": 2.0}), schema, FACTS)
    assert bounded.query("prototypes").sensitivity == pytest.approx(2.0 * math.sqrt(6.0))
    with pytest.raises(ValueError, match="unknown factor 'grade'"):
        dp_plan(config(prototypes={"enabled": True, "factor": "grade"}), schema, FACTS)
    with pytest.raises(ValueError, match="turn one of the two off"):
        dp_plan(config(prototypes={"enabled": True}, codec={"slots": ["mri"]}), autoencoder_schema(), FACTS)


def test_stages_that_a_study_lacks_cost_nothing() -> None:
    schema = demo_schema()
    images = Schema(name="films", slots=tuple(slot for slot in schema.slots if slot.name == "cxr"))
    table = Schema(name="rows", slots=tuple(slot for slot in schema.slots if slot.name == "ehr"))
    assert names(dp_plan(config(), images, FACTS)) == ["recentre", "core"]
    assert names(dp_plan(config(), table, FACTS)) == ["marginals", "core"]
    assert names(dp_plan(config(table={"prior": "core"}, recentre={"enabled": False}), schema, FACTS)) == ["core"]


def test_a_plan_on_which_two_accountants_disagree_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_prv", lambda segments, delta: 8.0 + 0.03)
    with pytest.raises(accounting.AccountantsDisagree, match=r"8\.0300 by PRV"):
        dp_plan(config(), demo_schema(), FACTS)


def test_infinity_means_no_noise_and_says_so() -> None:
    plan = dp_plan(config(privacy={"epsilon": math.inf}), demo_schema(), FACTS)
    assert not plan.private
    assert all(stage.sigma == 0 for stage in plan.stages)
    assert math.isinf(plan.epsilon)


def test_noise_of_the_queries_alone_above_the_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epsilon|target"):
        dp_plan(config(privacy={"epsilon": 0.1}, table={"sigma": 1.0}), demo_schema(), FACTS)


# -- the signed plan ---------------------------------------------------------------------------------------------------


def plan_of(study: Any, **fields: Any) -> StudyPlan:
    return build_plan(config(**fields), study.schema, FACTS, study.plan.roster, study.key.public)


def test_the_plan_holds_what_sites_act_on_and_survives_its_own_bytes(study_prepared: Any) -> None:
    plan = plan_of(study_prepared)
    assert StudyPlan.from_bytes(plan.canonical()) == plan
    assert plan.coordinator_key == study_prepared.key.public.hex()
    assert plan.study_schema == study_prepared.schema.model_dump(mode="json")
    assert plan.public_model == FACTS.parts
    assert plan.table is not None
    assert (plan.table.slot, plan.table.marginals) == ("ehr", FACTS.marginals)
    assert plan.recentre is not None
    assert plan.recentre.slots == ("mri", "pet")
    assert (plan.training.group, plan.training.lora_rank) == ("all", 0)
    assert plan_of(study_prepared, core={"group": "lora", "lora_rank": 3}).training.lora_rank == 3
    assert plan_of(study_prepared, table={"prior": "core"}).table is None
    assert plan_of(study_prepared, recentre={"enabled": False}).recentre is None
    assert not plan.deterministic


def test_the_plan_of_the_study_promises_what_the_study_file_asks(study_prepared: Any) -> None:
    promise = DPPlan.from_dict(dict(study_prepared.plan.dp))
    assert (promise.delta, promise.target_epsilon) == (1e-5, 8.0)
    assert promise.epsilon <= 8.0
    stage = promise.training("core")
    assert (stage.rounds, stage.steps, stage.spare_rounds, stage.sampling_rate) == (2, 2, 2, 0.15)


def test_a_delta_that_is_large_for_a_hospital_is_refused_by_its_name(study_prepared: Any) -> None:
    roster = study_prepared.plan.roster
    large = roster["elm-chest"].model_copy(update={"n_decl": 200_000})
    with pytest.raises(ValueError, match=r"site elm-chest: delta 1e-05 is above 5e-07"):
        build_plan(config(), study_prepared.schema, FACTS, roster | {"elm-chest": large}, study_prepared.key.public)


def test_thresholds_were_fixed_before_anybody_looked(study_prepared: Any) -> None:
    """Changing one of these is a decision, not a slip: reports compare across studies."""
    audit = plan_of(study_prepared).audit
    weights = ["loss", "loss-ratio", "loss-grid", "sima", "pia", "secmi"]
    cohort = ["domias", "gen-lra", "classifier", "nearest-ratio"]
    files = ["nearest-neighbour", "copies", "image-copies", "recognition", "blind"]
    assert list(dict.fromkeys(attack.name for attack in audit.attacks)) == weights + files  # without public patients
    assert not audit.risks
    whole = study_prepared.plan.audit
    assert list(dict.fromkeys(attack.name for attack in whole.attacks)) == weights + cohort + files
    assert {attack.scope for attack in whole.attacks if attack.name == "domias"} == {
        "joint",
        "mri",
        "pet",
        "ehr",
        "vitals",
    }
    assert {attack.scope for attack in whole.attacks if attack.name == "recognition"} == {"mri", "pet"}
    assert [risk.attack for risk in whole.risks if risk.main] == [
        "multivariate predicates", "halves of the row, 1 nearest", "outcome",
    ]  # fmt: skip
    assert {risk.slot for risk in whole.risks if risk.risk == "linkability"} == {None, "mri", "pet"}
    assert [group.name for group in whole.groups][:3] == [
        "age_years 18 to 40",
        "age_years 40 to 65",
        "age_years 65 to 101",
    ]
    assert whole.policy == GatePolicy().model_dump(mode="json")
    assert audit.attacks[0].thresholds == LOSS_THRESHOLDS
    assert (len(LOSS_THRESHOLDS), LOSS_THRESHOLDS[0], LOSS_THRESHOLDS[-1]) == (161, -8.0, 8.0)
    assert (len(RATIO_THRESHOLDS), RATIO_THRESHOLDS[0], RATIO_THRESHOLDS[-1]) == (161, -2.0, 2.0)
    assert plan_of(study_prepared, audit={"enabled": False}).audit.attacks == ()
    assert plan_of(study_prepared, audit={"enabled": False}).audit.cap == 0


def test_a_group_with_two_owners_is_frozen_and_the_others_are_masked(study_prepared: Any) -> None:
    plan = study_prepared.plan
    assert plan.owners("slot/pet") == ("alder-university", "birch-memory")
    assert plan.exchange("slot/pet") == plan.exchange("mean/pet") == "frozen"
    assert plan.groups("core") == ("slot/ehr", "slot/mri", "slot/vitals", "trunk")
    assert plan.groups("recentre") == ("mean/mri",)
    assert all(plan.exchange(name) == "masked" for name in plan.groups("core"))
