"""One local round: records only against a token, noise as promised, and nothing of a slot that the site does not own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from client import rounds
from client.policy import SiteConfig
from client.records.load import Records, load
from client.records.problems import NoAccess, NoPatients
from medgen_models.public_model import PublicModel
from medgen_models.schema import PatientBatch, Schema
from privacy.boundary.messages import MaskedAnswer
from privacy.boundary.refusals import Refused
from privacy.ledger import DpToken, Ledger, UncoveredToken

SITE = "alder-university"


@pytest.fixture
def known(study_known: Any, study_copy: Callable[..., Any], tmp_path: Path) -> Any:
    """A copy of the deterministic study, with the public model delivered to one site."""
    study = study_copy(study_known, tmp_path / "known")
    study.deliver(SITE)
    return study


def compute(study: Any, stage: str, site: str = SITE, **fields: Any) -> dict[str, np.ndarray]:
    """The site's own numbers before masking, charged like any round."""
    task = study.task(stage, **fields)
    config = SiteConfig.load(study.site(site))
    with config.open_ledger() as ledger:
        token = ledger.intend(task.plan_hash, task.stage, task.round, task.digest())
        return rounds.compute(config, study.plan, task, token)[0]


# -- access ------------------------------------------------------------------------------------------------------------


def test_every_stage_reads_records_only_after_its_charge_is_on_disk(
    study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader is handed a token of the very round, and the ledger file already holds its row."""
    seen: list[tuple[str, str]] = []
    real = rounds.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        token = args[4]
        with Ledger.open(study.site(SITE) / "ledger.sqlite", SITE, writable=False) as ledger:
            newest = ledger.rows()[-1]
        assert newest.seq == token.seq
        assert newest.data()["digest"] == token.digest
        seen.append((type(token).__name__, newest.kind))
        return real(*args, **kwargs)

    monkeypatch.setattr(rounds, "load", watched)
    study.deliver(SITE)
    for stage in ("marginals", "recentre", "core"):
        assert isinstance(study.send(SITE, study.task(stage)), MaskedAnswer)
    study.send(SITE, study.task("audit"))
    assert seen == [("DpToken", "intent")] * 3 + [("UncoveredToken", "uncovered")]


@pytest.mark.parametrize("token", [None, "dp", object(), 1])
def test_without_a_token_no_record_is_read(study: Any, token: Any) -> None:
    config = SiteConfig.load(study.site(SITE))
    with pytest.raises(NoAccess):
        rounds.read_records(config, study.plan, None, token)
    with pytest.raises(NoAccess):
        load(config.data, config.folder, study.schema, ("ehr",), token, b"k" * 32, 2)


def test_tokens_cannot_be_made_by_hand() -> None:
    for make in (
        lambda: DpToken(SITE, 1, object(), "0" * 64, "core", 0, "0" * 64, 8),
        lambda: UncoveredToken(SITE, 1, object(), "0" * 64, "audit", "0" * 64),
    ):
        with pytest.raises(PermissionError, match="only a ledger"):
            make()


def test_a_site_with_null_patients_only_answers_every_stage(study: Any) -> None:
    """Whether anybody's record is usable is no answer: the round is charged and noised like any other."""
    study.deliver(SITE)
    path = study.site(SITE) / "data" / "participants.tsv"
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([head, *(line + "\tx" for line in lines)]), encoding="utf-8")
    config = SiteConfig.load(study.site(SITE))
    with config.open_ledger() as ledger, pytest.raises(NoPatients):
        rounds.read_records(config, study.plan, None, ledger.local("test"))
    for stage in ("marginals", "recentre", "core"):
        assert isinstance(study.send(SITE, study.task(stage)), MaskedAnswer), stage


def test_a_site_where_nobody_is_of_the_plans_blocks_answers_too(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = PatientBatch.empty(study.schema, 0, ())
    monkeypatch.setattr(rounds, "load", lambda *_: Records(nobody, nobody, (), {}))
    study.deliver(SITE)
    for stage in ("marginals", "recentre", "core"):
        assert isinstance(study.send(SITE, study.task(stage)), MaskedAnswer), stage


# -- noise -------------------------------------------------------------------------------------------------------------


def test_known_noise_needs_a_site_that_admits_it(
    study_plan: Callable[..., Any], tmp_path: Path, study_sites: tuple[str, ...]
) -> None:
    """No site of this study admits the switch: none approves, none answers, and the round itself refuses too."""
    study = study_plan(tmp_path / "study", "study.execution.deterministic=true")
    refused = {event["site"]: event["code"] for event in study.events if event["kind"] == "not-approved"}
    assert refused == dict.fromkeys(study_sites, "DETERMINISTIC_NOISE")
    study.deliver(SITE)
    assert study.send(SITE, study.task()).code == "NOT_APPROVED"
    with pytest.raises(Refused) as found:
        rounds.noise_for(SiteConfig.load(study.site(SITE)), study.plan, study.task())
    assert found.value.code == "DETERMINISTIC_NOISE"
    assert not (study.site(SITE) / "ledger.sqlite").exists() or "reserve" not in study.kinds(SITE)


def test_a_site_that_withdraws_the_switch_refuses_the_next_task(known: Any, study_edit: Callable[..., None]) -> None:
    study_edit(known, "deterministic_noise = true", "deterministic_noise = false", SITE)
    assert known.send(SITE, known.task()).code == "DETERMINISTIC_NOISE"


def test_a_private_study_never_draws_from_a_known_stream(study: Any) -> None:
    noise = rounds.noise_for(SiteConfig.load(study.site(SITE)), study.plan, study.task())
    assert not noise.deterministic
    again = rounds.noise_for(SiteConfig.load(study.site(SITE)), study.plan, study.task())
    assert not torch.equal(noise.gaussian((64,), 1.0), again.gaussian((64,), 1.0))


@pytest.mark.parametrize("stage", ["marginals", "core"])
def test_the_switch_makes_a_round_repeatable_and_attempts_differ(known: Any, stage: str) -> None:
    first, second = compute(known, stage), compute(known, stage)
    for group, values in first.items():
        np.testing.assert_array_equal(values, second[group])
    other = compute(known, stage, attempt=1)
    assert all(not np.array_equal(values, other[group]) for group, values in first.items())


def test_marginals_carry_noise_of_the_promised_size(known: Any, study: Any) -> None:
    """Sum of |noise|² over all cells against its expectation, from the plan's own sigma and sensitivity."""
    from client.policy import dp_plan
    from medgen_models.table_prior import encode_rows
    from privacy.marginals import noisy_marginals
    from privacy.noise import system_noise

    study.deliver(SITE)
    config = SiteConfig.load(study.site(SITE))
    with config.open_ledger() as ledger:
        members = rounds.read_records(config, study.plan, None, ledger.local("test")).members
    coded = encode_rows(study.schema, members, study.plan.table.bins)
    queries = study.plan.table.marginals
    exact = noisy_marginals(coded.codes_BC, coded.domain, queries, 0.0, system_noise())
    noise = compute(study, "marginals")["table/ehr"] - np.concatenate([exact[query].ravel() for query in queries])
    query = dp_plan(study.plan).query("marginals")
    assert query.sensitivity == pytest.approx(np.sqrt(len(queries)))
    scaled = (noise / (query.sigma * query.sensitivity)) ** 2
    spread = 5 * np.sqrt(2 * scaled.size)
    assert abs(scaled.sum() - scaled.size) < spread


# -- what a site sends -------------------------------------------------------------------------------------------------


def test_a_site_trains_and_sends_only_what_it_owns(known: Any) -> None:
    """PET has two owners, so nobody trains it; the chest hospital knows no MRI."""
    known.deliver("elm-chest")
    assert set(compute(known, "core")) == {"trunk", "slot/ehr", "slot/mri", "slot/vitals"}
    assert set(compute(known, "core", "elm-chest")) == {"trunk", "slot/ehr", "slot/vitals"}
    assert set(compute(known, "recentre")) == {"mean/mri"}


def test_the_update_is_weighted_by_declared_capacity_alone(known: Any) -> None:
    before = {"trunk.a": torch.zeros(2, 2), "slot.mri.b": torch.ones(3)}
    after = {"trunk.a": torch.full((2, 2), 4.0), "slot.mri.b": torch.tensor([1.0, 2.0, 3.0])}
    out = rounds.changes(before, after, 0.5, ("slot/mri", "trunk"))
    np.testing.assert_array_equal(out["trunk"], [2.0] * 4)
    np.testing.assert_array_equal(out["slot/mri"], [0.0, 0.5, 1.0])
    assert rounds.changes(before, after, 1.0, ("slot/pet",))["slot/pet"].size == 0
    assert known.plan.weight(SITE) == 1.0


def test_one_round_moves_weights_by_at_most_what_the_optimizer_allows(known: Any) -> None:
    moved = np.concatenate(list(compute(known, "core").values()))
    stage = next(stage for stage in known.plan.dp["stages"] if stage["name"] == "core")
    assert 0 < np.abs(moved).max() <= 4 * known.plan.training.learning_rate * stage["steps"]


def test_optimizer_state_and_probe_stay_on_site(known: Any) -> None:
    compute(known, "core")
    folder = known.site(SITE) / "state" / known.plan.hash
    assert {path.name for path in folder.iterdir()} == {"core-0000.safetensors", "core-probe.json", "canaries"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.rglob("*") if path.is_file())
    assert json.loads((folder / "core-probe.json").read_text())
    state = load_file(folder / "core-0000.safetensors")
    assert state
    assert all(np.isfinite(value).all() for value in state.values())
    first = compute(known, "core", round=1)
    (folder / "core-0000.safetensors").unlink()
    without = compute(known, "core", round=1)
    assert not np.array_equal(first["trunk"], without["trunk"])  # the second round goes on from the first one's moments


@pytest.mark.parametrize("stale", [{"torch": "1.0"}, {"parameters": ["trunk.only"]}, None])
def test_gradients_are_proved_once_and_again_where_something_changed(
    known: Any, monkeypatch: pytest.MonkeyPatch, stale: dict[str, Any] | None
) -> None:
    """A proof of other groups, or under another torch, is no proof; a good one is not repeated every round."""
    compute(known, "core")
    mark = known.site(SITE) / "state" / known.plan.hash / "core-probe.json"
    written, asked = json.loads(mark.read_bytes()), []
    if stale is not None:
        mark.write_text(json.dumps(written | {"proved": written["proved"] | stale}))
    probed = rounds.probe
    monkeypatch.setattr(rounds, "probe", lambda *given: asked.append(1) or probed(*given))
    compute(known, "core", round=1)
    assert len(asked) == (stale is not None)
    assert json.loads(mark.read_bytes()) == written


def test_arrays_that_do_not_fit_the_public_model_are_a_bad_message(known: Any) -> None:
    for arrays in ({"trunk.unknown": np.zeros(3, np.float32)}, {"mean/pet": np.zeros(1, np.float32)}):
        before = known.kinds(SITE).count("intent")
        reply = known.send(SITE, known.task("core", arrays=arrays, attempt=before))
        assert reply.code == "BAD_MESSAGE", arrays
    assert known.ledger(SITE).stages[2].intents == 2  # charged first: nothing is read before its charge


def test_a_changed_public_model_is_not_used(known: Any) -> None:
    for path in (known.site(SITE) / "parts").iterdir():
        path.write_bytes(path.read_bytes() + b"\x00")
    assert known.send(SITE, known.task("core")).code == "PARTS_MISSING"


def test_a_site_may_sit_out_with_any_bad_record(known: Any, study_edit: Callable[..., None]) -> None:
    from simulations.hospital_faults import plant_bad_input

    plant_bad_input(known.site(SITE), "nan-volume")
    assert isinstance(known.send(SITE, known.task()), MaskedAnswer)  # the default: a null patient
    study_edit(known, 'bad_record = "null"', 'bad_record = "refuse"', SITE)
    charged = {stage.name: stage.intents for stage in known.ledger(SITE).stages}
    assert known.send(SITE, known.task(attempt=1)).code == "SITE_UNAVAILABLE"
    assert {stage.name: stage.intents for stage in known.ledger(SITE).stages} == charged  # refused before the charge


def test_annealing_is_public_and_ends_at_a_quarter() -> None:
    values = [rounds.anneal(round, 5) for round in range(5)]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (1.0, 0.25)
    assert rounds.anneal(0, 1) == 1.0


def test_the_site_assembles_the_model_that_the_coordinator_published(known: Any) -> None:
    from client.sitemodel import public_model

    here = public_model(known.site(SITE), known.plan)
    place = Path(known.folder.public_pointer.read_text(encoding="utf-8"))
    assert here.digest() == PublicModel.load(place, Schema.model_validate(known.plan.study_schema)).digest()
