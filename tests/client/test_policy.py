from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from client import enrolment, policy
from client.policy import SiteConfig
from privacy import accounting
from privacy.boundary.messages import PlanProposal
from privacy.boundary.plan import plan_hash
from privacy.boundary.refusals import Refused
from privacy.identity import IdentityKey, MaskingKey
from privacy.ledger import Ledger
from privacy.plan import DPPlan, TrainingStage

Propose = Callable[..., PlanProposal]
STRANGER = IdentityKey(b"\x66" * 32)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as found:
        call()
    return found.value.code


def approve(site: Path, proposal: PlanProposal) -> str:
    return policy.approve(site, proposal.plan, proposal.signature, by="officer")


def edit_toml(site: Path, old: str, new: str) -> None:
    text = (site / "site.toml").read_text()
    assert old in text
    (site / "site.toml").write_text(text.replace(old, new))


def reserved(site: Path) -> int:
    with Ledger.open(site / "ledger.sqlite", "north") as ledger:
        return len(ledger.summary().plans)


# -- site.toml ---------------------------------------------------------------------------------------------------------


def test_a_site_file_is_read_with_its_defaults(wall_site: Path) -> None:
    config = SiteConfig.load(wall_site)
    assert (config.site.name, config.site.slots, config.site.declared_capacity) == ("north", ("mri", "ehr"), 200)
    assert (config.policy.min_contributors, config.policy.deterministic_noise, config.policy.bad_record) == (
        3,
        False,
        "null",
    )
    assert config.ceilings.model_dump() == {"plan_epsilon": 8.0, "lifetime_epsilon": 16.0, "delta": 1e-5}
    assert config.data_root == wall_site / "data"
    assert config.folder == wall_site


def test_the_surface_is_frozen() -> None:
    keys = {
        name: sorted(section.annotation.model_fields)  # type: ignore[union-attr]
        for name, section in SiteConfig.model_fields.items()
        if name not in ("folder", "data")
    }
    assert keys == {
        "site": ["declared_capacity", "declared_held_out", "name", "slots"],
        "ceiling": ["delta", "lifetime_epsilon", "plan_epsilon", "uncovered_queries"],
        "policy": [
            "approvals",
            "approvers",
            "bad_record",
            "coordinator_key",
            "deterministic_noise",
            "max_canaries",
            "min_contributors",
            "officer_key",
            "peers",
            "quiet_hours",
        ],
        "speed": ["chunk", "engine", "threads"],
        "limits": ["cpu_threads", "gpu", "memory_gb", "nice"],
    }


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("declared_capacity = 200", "declared_capacity = 0", "site.declared_capacity"),
        ("declared_capacity = 200", "", "site.declared_capacity"),
        ('name = "north"', 'name = "../north"', "site.name"),
        ("plan_epsilon = 8.0", "plan_epsilon = nan", "ceiling.plan_epsilon"),
        ("plan_epsilon = 8.0", "plan_epsilon = -1.0", "ceiling.plan_epsilon"),
        ("lifetime_epsilon = 16.0", "lifetime_epsilon = 0.0", "ceiling.lifetime_epsilon"),
        ("[ceiling]", "[ceiling]\ndelta = 0.1", "ceiling.delta"),
        ("[ceiling]", "[policy]\nmin_contributors = 2\n[ceiling]", "hides neither"),
        ("[ceiling]", "[policy]\nminimum = 2\n[ceiling]", "policy.minimum"),
        ("[ceiling]", "[privacy]\n[ceiling]", "privacy"),
        ("[site]", 'folder = "/"\n[site]', "folder"),
        ("[site]", "[site", "no TOML file"),
    ],
)
def test_what_does_not_fit_is_named(wall_site: Path, old: str, new: str, place: str) -> None:
    edit_toml(wall_site, old, new)
    with pytest.raises(ValueError, match=place) as found:
        SiteConfig.load(wall_site)
    assert str(wall_site / "site.toml") in str(found.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        SiteConfig.load(tmp_path)


def test_infinite_ceilings_are_a_decision_that_can_be_written(wall_site: Path) -> None:
    edit_toml(wall_site, "plan_epsilon = 8.0", "plan_epsilon = inf")
    assert SiteConfig.load(wall_site).ceilings.plan_epsilon == math.inf


# -- the way of a plan -------------------------------------------------------------------------------------------------


def test_a_plan_waits_is_approved_and_admitted(wall_site: Path, wall_propose: Propose) -> None:
    proposal = wall_propose()
    name = plan_hash(proposal.plan)
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
    assert policy.propose(wall_site, proposal.plan, proposal.signature) == "pending"
    assert policy.propose(wall_site, proposal.plan, proposal.signature) == "pending"
    assert policy.pending(wall_site) == (name,)
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
    assert policy.approve_pending(wall_site, name, by="officer") == name
    assert policy.pending(wall_site) == ()
    assert policy.propose(wall_site, proposal.plan, proposal.signature) == "approved"
    assert policy.admit(wall_site, name).hash == name
    assert reserved(wall_site) == 1
    record = json.loads((wall_site / "approvals" / f"{name}.json").read_bytes())
    assert (record["by"], record["study"], record["delta"]) == ("officer", "demo", 1e-5)
    assert 0 < record["epsilon"] <= 4.0
    assert [link.kind for link in SiteConfig.load(wall_site).log().read()] == ["proposed", "approved"]
    assert approve(wall_site, proposal) == name
    assert reserved(wall_site) == 1


def test_a_rejected_plan_stays_rejected_until_a_person_approves(wall_site: Path, wall_propose: Propose) -> None:
    proposal = wall_propose()
    name = plan_hash(proposal.plan)
    assert code_of(lambda: policy.reject(wall_site, name)) == "NOT_APPROVED"
    policy.propose(wall_site, proposal.plan, proposal.signature)
    policy.reject(wall_site, name, by="officer", reason="no budget this year")
    assert policy.propose(wall_site, proposal.plan, proposal.signature) == "rejected"
    assert code_of(lambda: policy.admit(wall_site, name)) == "PLAN_REJECTED"
    assert reserved(wall_site) == 0
    approve(wall_site, proposal)
    assert policy.admit(wall_site, name).hash == name
    policy.reject(wall_site, name)  # an approval can be withdrawn
    assert code_of(lambda: policy.admit(wall_site, name)) == "PLAN_REJECTED"


def test_a_changed_byte_is_another_plan(wall_site: Path, wall_propose: Propose) -> None:
    approve(wall_site, wall_propose())
    other = wall_propose(version="0.1.1")
    assert code_of(lambda: policy.admit(wall_site, plan_hash(other.plan))) == "NOT_APPROVED"
    assert code_of(lambda: policy.admit(wall_site, "../../etc")) == "NOT_APPROVED"


def refused(site: Path, proposal: PlanProposal) -> str:
    """The code with which approval is refused; nothing may be left behind."""
    code = code_of(lambda: approve(site, proposal))
    assert reserved(site) == 0
    assert not (site / "approvals").exists()
    assert not (site / "plans").exists()
    assert code_of(lambda: policy.admit(site, plan_hash(proposal.plan))) == "NOT_APPROVED"
    return code


def test_only_the_pinned_coordinator_may_propose(wall_site: Path, wall_propose: Propose) -> None:
    assert refused(wall_site, wall_propose(key=STRANGER)) == "BAD_SIGNATURE"
    good = wall_propose()
    assert refused(wall_site, PlanProposal(good.plan + b" ", good.signature)) == "BAD_SIGNATURE"
    pinned = wall_site / "keys" / "coordinator.pub"
    pinned.unlink()
    assert refused(wall_site, good) == "COORDINATOR_UNKNOWN"
    edit_toml(wall_site, "[ceiling]", f'[policy]\ncoordinator_key = "{STRANGER.public.hex()}"\n[ceiling]')
    assert refused(wall_site, good) == "BAD_SIGNATURE"
    pinned.write_text(IdentityKey(b"\x42" * 32).public.hex())
    assert refused(wall_site, good) == "COORDINATOR_UNKNOWN"  # two keys are pinned


def test_proposals_of_strangers_are_not_stored(wall_site: Path, wall_propose: Propose) -> None:
    proposal = wall_propose(key=STRANGER)
    assert code_of(lambda: policy.propose(wall_site, proposal.plan, proposal.signature)) == "BAD_SIGNATURE"
    assert not (wall_site / "plans").exists()


def test_the_roster_must_say_what_the_site_says(wall_site: Path, wall_propose: Propose) -> None:
    assert refused(wall_site, wall_propose(own={"site": "south"})) == "NOT_IN_ROSTER"
    assert refused(wall_site, wall_propose(own={"identity": STRANGER})) == "ROSTER_KEYS"
    assert refused(wall_site, wall_propose(own={"masking_public": MaskingKey(b"\x09" * 32).public})) == "ROSTER_KEYS"
    assert refused(wall_site, wall_propose(own={"slots": ("mri", "pet")})) == "SLOTS"
    assert refused(wall_site, wall_propose(own={"n_decl": 201})) == "CAPACITY"
    assert refused(wall_site, wall_propose(own={"held_out_decl": 0})) == "CAPACITY"
    assert refused(wall_site, wall_propose(own={"min_contributors": 1})) == "MIN_CONTRIBUTORS"


def test_fewer_slots_than_offered_are_fine(wall_site: Path, wall_propose: Propose) -> None:
    name = approve(wall_site, wall_propose(own={"slots": ("ehr",)}))
    assert policy.admit(wall_site, name).roster[SiteConfig.load(wall_site).site.name].slots == ("ehr",)


def make_dp(epsilon: float, delta: float = 1e-5) -> dict[str, object]:
    stage = TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, clip=1.0)
    return DPPlan(stages=(stage,), delta=delta).calibrate(epsilon).to_dict()


def test_the_promise_must_fit_the_ceilings(wall_site: Path, wall_propose: Propose, wall_dp: DPPlan) -> None:
    assert refused(wall_site, wall_propose(dp=make_dp(8.5))) == "OVER_PLAN_CEILING"
    assert refused(wall_site, wall_propose(dp=make_dp(math.inf))) == "OVER_PLAN_CEILING"
    assert refused(wall_site, wall_propose(dp={"stages": []})) == "BAD_PLAN"
    assert refused(wall_site, wall_propose(dp={})) == "BAD_PLAN"
    cheated = wall_dp.to_dict()
    cheated["stages"][1]["sigma"] /= 2
    assert refused(wall_site, wall_propose(dp=cheated)) == "BAD_PLAN"  # it claims to be calibrated and is not
    raw = DPPlan(stages=(TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, clip=1.0),), delta=1e-5)
    assert refused(wall_site, wall_propose(dp=raw.to_dict())) == "NOT_CALIBRATED"
    edit_toml(wall_site, "[ceiling]", "[ceiling]\ndelta = 1e-6")
    assert refused(wall_site, wall_propose()) == "DELTA"
    edit_toml(wall_site, "lifetime_epsilon = 16.0", "lifetime_epsilon = 2.0")
    assert refused(wall_site, wall_propose(dp=make_dp(4.0, 1e-6))) == "OVER_LIFETIME_CEILING"


def test_a_plan_on_which_this_sites_accountants_disagree_is_refused_and_reserves_nothing(
    wall_site: Path, wall_propose: Propose, wall_dp: DPPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "_prv", lambda segments, delta: wall_dp.epsilon - 0.03)
    assert refused(wall_site, wall_propose()) == "BAD_PLAN"
    assert reserved(wall_site) == 0
    monkeypatch.undo()
    approve(wall_site, wall_propose())
    assert reserved(wall_site) == 1


def test_queries_outside_the_guarantee_are_capped(wall_site: Path, wall_propose: Propose) -> None:
    audit = {"attacks": [{"name": "loss", "thresholds": (0.0,)}], "cap": 3}
    assert refused(wall_site, wall_propose(audit=audit)) == "UNCOVERED_CAP"


def test_deterministic_noise_needs_the_sites_leave_and_marks_the_ledger(wall_site: Path, wall_propose: Propose) -> None:
    proposal = wall_propose(deterministic=True)
    assert refused(wall_site, proposal) == "DETERMINISTIC_NOISE"
    edit_toml(wall_site, "[ceiling]", "[policy]\ndeterministic_noise = true\n[ceiling]")
    approve(wall_site, proposal)
    with Ledger.open(wall_site / "ledger.sqlite", "north") as ledger:
        assert not ledger.summary().private


def test_a_second_study_that_passes_the_lifetime_is_refused(wall_site: Path, wall_propose: Propose) -> None:
    edit_toml(wall_site, "lifetime_epsilon = 16.0", "lifetime_epsilon = 5.0")
    approve(wall_site, wall_propose())
    second = wall_propose(study="second")
    assert code_of(lambda: approve(wall_site, second)) == "OVER_LIFETIME_CEILING"
    assert code_of(lambda: policy.admit(wall_site, plan_hash(second.plan))) == "NOT_APPROVED"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("plan_epsilon = 8.0", "plan_epsilon = 1.0", "OVER_PLAN_CEILING"),
        ("uncovered_queries = 2", "uncovered_queries = 1", "UNCOVERED_CAP"),
        ("declared_capacity = 200", "declared_capacity = 199", "CAPACITY"),
        ('slots = ["mri", "ehr"]', 'slots = ["ehr"]', "SLOTS"),
        ("[ceiling]", "[ceiling]\ndelta = 1e-6", "DELTA"),
    ],
)
def test_todays_site_file_wins_over_an_old_approval(
    wall_site: Path, wall_propose: Propose, old: str, new: str, code: str
) -> None:
    name = approve(wall_site, wall_propose())
    edit_toml(wall_site, old, new)
    assert code_of(lambda: policy.admit(wall_site, name)) == code


def test_edited_plan_record_or_log_is_not_approved(wall_site: Path, wall_propose: Propose) -> None:
    name = approve(wall_site, wall_propose())
    for path in (wall_site / "plans" / f"{name}.json", wall_site / "approvals" / f"{name}.json"):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"demo", b"demi"))
        assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
        path.unlink()
        assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
        path.write_bytes(whole)
    log = wall_site / "site.log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b"demo", b"demi"))
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
    log.write_bytes(whole)
    assert policy.admit(wall_site, name).hash == name


@pytest.mark.parametrize("step", ["write_durably", "_store", "log"])
def test_a_crash_inside_approval_leaves_no_approval_and_can_be_repeated(
    wall_site: Path, wall_propose: Propose, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    proposal = wall_propose()
    name = plan_hash(proposal.plan)
    if step == "log":
        monkeypatch.setattr(SiteConfig, "log", crash)
    else:
        monkeypatch.setattr(policy, step, crash)
    with pytest.raises(Crash):
        approve(wall_site, proposal)
    monkeypatch.undo()
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
    approve(wall_site, proposal)
    assert policy.admit(wall_site, name).hash == name
    assert reserved(wall_site) == 1


def test_missing_keys_are_named(wall_site: Path, wall_propose: Propose) -> None:
    proposal = wall_propose()
    (wall_site / "keys" / "masking.key").unlink()
    with pytest.raises(ValueError, match=r"masking\.key: the key is missing"):
        approve(wall_site, proposal)
    enrolment.make_keys(wall_site)
    assert refused(wall_site, proposal) == "ROSTER_KEYS"


def test_the_lifetime_is_counted_at_a_delta_that_the_capacity_allows(wall_site: Path) -> None:
    text = (wall_site / "site.toml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("declared_capacity"))
    (wall_site / "site.toml").write_text(text.replace(line, "declared_capacity = 20000"))
    assert SiteConfig.load(wall_site).ceilings.delta == 5e-6
