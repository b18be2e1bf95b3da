"""Every reading of private data is declared, charged and on disk first; every number that leaves is one that was declared.

A spy (``conftest.py``) watches the files that are opened and the numbers that leave while a site takes every path it has.
Each thing that it claims to find is planted once below, so that a spy that sees nothing fails.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import rounds
from medgen import app
from privacy.audit.parts import split
from privacy.boundary.messages import (
    Approval,
    Capabilities,
    CapabilitiesRequest,
    MaskedAnswer,
    PartQuery,
    PartsMissing,
    PlanProposal,
    Refusal,
    UnmaskAnswer,
)
from privacy.identity import IdentityKey
from privacy.ledger import Ledger

SITE = "alder-university"
STRANGER = IdentityKey(b"\x66" * 32)


def cli(spy: Any, study: Any, *words: object) -> int:
    """A command of the site's staff."""
    with spy.watching(study.site(SITE), f"- {' '.join(map(str, words[:2]))}"):
        return CliRunner().invoke(app, [*map(str, words)], env={"TERM": "dumb"}).exit_code


def cohort_parts(study: Any) -> dict[str, bytes]:
    """The manifest first, then the cohort's parts."""
    manifest, parts = split(study.folder.cohort)
    head = manifest.to_bytes()
    return {hashlib.sha256(head).hexdigest(): head} | dict(parts)


def audit_task(study: Any, **fields: Any) -> Any:
    public = tuple(part.digest for part in study.plan.public_model)
    final = {name: value for name, value in study.weights.items() if not name.startswith("average:")}
    return study.task("audit", parts=public + tuple(cohort_parts(study)), arrays=final, **fields)


def private(study: Any) -> list[str]:
    """The private stages of the study, in its plan's order."""
    return [stage["name"] for stage in study.plan.dp["stages"]]


def kinds(spy: Any) -> list[tuple[str, str]]:
    """Token and purpose of each reading."""
    return [(reading.token, reading.purpose) for reading in spy.readings]


# -- every path --------------------------------------------------------------------------------------------------------


def test_every_private_stage_reads_against_its_charge_and_sends_noised_numbers_only(
    study: Any, spy: Any, study_sites: tuple[str, ...]
) -> None:
    study.deliver(SITE)
    assert {"marginals", "recentre", "core"} <= set(private(study))
    for stage in private(study):
        assert isinstance(study.send(SITE, study.task(stage)), MaskedAnswer)
    assert isinstance(study.send(SITE, study.task("core", round=1)), MaskedAnswer)
    assert isinstance(study.send(SITE, study.task(attempt=1)), MaskedAnswer)  # a spare, from the cache
    assert spy.problems == []
    assert kinds(spy) == [("DpToken", stage) for stage in (*private(study), "core", "marginals")]
    # the spy sees with open eyes: participants, table, images and the cache were among what was opened
    assert {"data/participants.tsv", "data"} & spy.files
    for ending in (".tsv", ".nii.gz", ".records"):
        assert any(name.endswith(ending) for name in spy.files), ending
    assert any(name.startswith("data/ehr.") for name in spy.files)
    before = len(spy.readings), set(spy.files)
    assert isinstance(study.send(SITE, study.task()), MaskedAnswer)  # stored
    assert isinstance(study.send(SITE, study.unmask(study.task(), study_sites)), UnmaskAnswer)
    assert (len(spy.readings), spy.files) == before
    assert spy.problems == []


def test_the_queries_that_a_study_may_add_are_declared_too(
    study_plan: Callable[..., Any], tmp_path: Path, spy: Any
) -> None:
    """A descriptive table and prototypes, which the tiny study leaves out."""
    from client.policy import dp_plan

    more = ("study.statistics.enabled=true", "study.prototypes.enabled=true")
    study = study_plan(tmp_path / "more", *more)
    spy.promise = dp_plan(study.plan)
    study.deliver(SITE)
    assert private(study) == ["statistics", "marginals", "recentre", "prototypes", "core"]
    for stage in ("statistics", "prototypes"):
        assert isinstance(study.send(SITE, study.task(stage)), MaskedAnswer), stage
    assert spy.problems == []
    assert kinds(spy) == [("DpToken", "statistics"), ("DpToken", "prototypes")]


def test_the_audit_reads_against_its_count_and_sends_counts_only(
    study_finished: Any, study_copy: Callable[..., Any], tmp_path: Path, spy: Any
) -> None:
    study = study_copy(study_finished, tmp_path / "finished")
    shutil.rmtree(study.site(SITE) / "state" / "opened")  # as if its audit had never been opened
    assert isinstance(study.send(SITE, audit_task(study, attempt=1)), MaskedAnswer)
    assert spy.problems == []
    assert set(kinds(spy)) == {("UncoveredToken", "audit")}
    assert len(spy.readings) == 2  # the hospital's own records, then the cohort's files


def test_requests_about_nobody_read_nothing(study: Any, spy: Any) -> None:
    study.deliver(SITE)
    assert isinstance(study.send(SITE, CapabilitiesRequest("tiny")), Capabilities)
    assert isinstance(study.send(SITE, PartQuery(tuple(study.parts))), PartsMissing)
    proposal = PlanProposal(study.plan.canonical(), bytes.fromhex(study.folder.plan_signature.read_text()))
    assert isinstance(study.send(SITE, proposal), Approval)
    assert (spy.problems, spy.readings, spy.files) == ([], [], set())


def test_refused_requests_read_nothing(study: Any, spy: Any, study_edit: Callable[..., None]) -> None:
    assert study.send(SITE, study.task()).code == "PARTS_MISSING"
    study.deliver(SITE)
    good = study.task()
    refused = {
        "BAD_SIGNATURE": study.task(key=STRANGER),
        "NOT_APPROVED": study.task(plan_hash="0" * 64),
        "NOT_INVITED": study.task(invited=("birch-memory", "dune-neurology", "elm-chest")),
        "ROUND_NOT_IN_PLAN": study.task("harvest"),
        "PARTS_MISSING": study.task("audit"),
        "COHORT_TOO_SMALL": study.task(invited=(SITE, "birch-memory"), attempt=2),
        "UNKNOWN_TASK": study.unmask(good, (SITE, "birch-memory", "elm-chest")),
    }
    for code, request in refused.items():
        reply = study.send(SITE, request)
        assert isinstance(reply, Refusal), code
        # an audit without a cohort is found out after its records were asked for: counted first, never answered
        assert reply.code == code
    assert spy.problems == []
    assert {purpose for _, purpose in kinds(spy)} <= {"audit"}
    study_edit(study, "plan_epsilon = 8.0", "plan_epsilon = 1.0", SITE)
    readings = len(spy.readings)
    assert study.send(SITE, study.task(attempt=3)).code == "OVER_PLAN_CEILING"
    assert len(spy.readings) == readings


def test_a_site_with_bad_records_looks_locally_before_it_is_charged(
    study: Any, spy: Any, study_edit: Callable[..., None]
) -> None:
    from simulations.hospital_faults import plant_bad_input

    study.deliver(SITE)
    study_edit(study, 'bad_record = "null"', 'bad_record = "refuse"', SITE)
    assert isinstance(study.send(SITE, study.task()), MaskedAnswer)
    assert kinds(spy) == [("LocalToken", "records checked before a round"), ("DpToken", "marginals")]
    plant_bad_input(study.site(SITE), "nan-volume")
    assert study.send(SITE, study.task(attempt=1)).code == "SITE_UNAVAILABLE"
    assert kinds(spy)[2:] == [("LocalToken", "records checked before a round")]
    (study.site(SITE) / "data" / "participants.tsv").unlink()
    assert study.send(SITE, study.task(attempt=2)).code == "SITE_UNAVAILABLE"
    assert spy.problems == []


def test_the_staffs_commands_read_locally(study: Any, spy: Any) -> None:
    schema, site = study.folder.schema, study.site(SITE)
    assert cli(spy, study, "site", "check", site, "--schema", schema) == 0
    assert cli(spy, study, "site", "withdraw", site, "sub-nobody") == 0
    assert cli(spy, study, "site", "withdraw", site, "--list") == 0
    assert cli(spy, study, "site", "ledger", "show", site) == 0
    assert cli(spy, study, "site", "ledger", "verify", site) == 0
    assert spy.problems == []
    assert kinds(spy) == [("LocalToken", "site check"), ("LocalToken", "withdrawal of a patient")]


def test_the_codec_stage_reads_with_the_token_that_it_was_given(
    study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny study trains no codec: its stage is run up to the first use of its model."""
    from client.policy import SiteConfig

    class Model:
        schema = study.schema

        def codec_weights(self, slots: tuple[str, ...]) -> None:
            raise InterruptedError("nothing to train")

    study.deliver(SITE)
    plan, config, task = study.plan, SiteConfig.load(study.site(SITE)), dataclasses.replace(study.task(), stage="codec")
    monkeypatch.setattr(rounds, "model_of", lambda *_: Model())
    monkeypatch.setattr(rounds, "owned_groups", lambda *_: ("codec/mri",))
    with config.open_ledger() as ledger, spy.watching(study.site(SITE), "codec RoundTask"):
        token = ledger.intend(task.plan_hash, "core", 0, task.digest())
        with pytest.raises(InterruptedError):
            rounds.compute(config, plan, task, token)
    assert spy.problems == []
    assert [kind for kind, _ in kinds(spy)] == ["DpToken"]


def test_every_stage_that_a_site_can_be_asked_for_is_declared(spy: Any) -> None:
    """A new ``case`` in ``rounds.compute`` has to be declared to the spy, and walked above."""
    tree = ast.parse(Path(rounds.__file__).read_text(encoding="utf-8"))
    compute = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "compute")
    patterns = [case.pattern for node in ast.walk(compute) if isinstance(node, ast.Match) for case in node.cases]
    asked = {p.value.value for p in patterns if isinstance(p, ast.MatchValue) and isinstance(p.value, ast.Constant)}
    assert {"marginals", "recentre", "core", "codec"} <= asked <= set(spy.stages)


# -- what leaves does not depend on who is there -----------------------------------------------------------------------


def without_one_patient(study: Any) -> None:
    """Delete everything of the first patient, but not the declared numbers."""
    data = study.site(SITE) / "data"
    first = sorted(data.glob("sub-*"))[0]
    shutil.rmtree(first)
    for table in data.glob("*.[ct]sv"):
        lines = table.read_text(encoding="utf-8").splitlines()
        table.write_text("\n".join(line for line in lines if first.name not in line) + "\n", encoding="utf-8")


def with_a_broken_patient(study: Any) -> None:
    """One volume is not finite: a null patient, named at the site only."""
    from simulations.hospital_faults import plant_bad_input

    plant_bad_input(study.site(SITE), "nan-volume")


def shape_of(reply: Any) -> Any:
    """All of a reply but noised numbers, ciphertexts, and hashes over times of day."""
    found = {name: value for name, value in vars(reply).items() if name not in ("ledger_hash", "sealed", "agreement")}
    if isinstance(reply, MaskedAnswer):
        found["groups"] = {name: (str(v.dtype), v.shape) for name, v in reply.groups.items()}
    if isinstance(reply, UnmaskAnswer):
        found["sizes"] = (len(reply.sealed), {name: len(v) for name, v in reply.agreement.items()})
    return type(reply).__name__, found


def conversation(study: Any, sites: tuple[str, ...]) -> list[Any]:
    """A study's worth of requests to one site, refused ones included."""
    study.deliver(SITE)
    task = study.task()
    requests = [
        CapabilitiesRequest("tiny"),
        task,
        *(study.task(stage) for stage in private(study) if stage != task.stage),
        study.task("core", round=1),
        study.task("core", round=2),
        study.task(attempt=1),
        study.task(attempt=2),
        study.task("audit"),
        study.unmask(task, sites),
        study.task(key=STRANGER),
    ]
    return [shape_of(study.send(SITE, request)) for request in requests]


@pytest.mark.parametrize("change", [without_one_patient, with_a_broken_patient])
def test_two_sites_that_differ_by_a_patient_say_the_same(
    study: Any,
    study_copy: Callable[..., Any],
    tmp_path: Path,
    change: Callable[[Any], None],
    study_sites: tuple[str, ...],
) -> None:
    twin = study_copy(study, tmp_path / "twin")
    change(twin)
    said = conversation(study, study_sites)
    assert conversation(twin, study_sites) == said
    assert {kind for kind, _ in said} == {"Capabilities", "MaskedAnswer", "Refusal", "UnmaskAnswer"}


# -- planted faults: each one is found ---------------------------------------------------------------------------------


def planted(study: Any, spy: Any, stage: str = "marginals", **fields: Any) -> str:
    """What the spy says of one round; empty if it finds nothing."""
    study.deliver(SITE)
    study.send(SITE, study.task(stage, **fields))
    return " ".join(spy.problems)


def test_planted_a_record_is_opened_past_the_readers(study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    real = rounds.noise_for

    def peeks(config: Any, plan: Any, task: Any) -> Any:
        pd.read_csv(config.data_root / "participants.tsv", sep="\t")
        return real(config, plan, task)

    monkeypatch.setattr(rounds, "noise_for", peeks)
    assert "data/participants.tsv was opened without a token" in planted(study, spy)


def test_planted_files_are_counted_without_a_token(study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rounds.noise_for
    monkeypatch.setattr(rounds, "noise_for", lambda c, p, t: (list(c.data_root.iterdir()), real(c, p, t))[1])
    assert "data was opened without a token" in planted(study, spy)


def test_planted_a_reader_is_called_without_a_token(study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from client.records import load as loading

    def careless(*args: Any) -> Any:
        everything: list[Any] = list(args)
        everything[4] = None
        return loading.load(*everything)

    monkeypatch.setattr(rounds, "load", careless)
    assert "read_everyone was called without a token" in planted(study, spy)


def test_planted_a_private_stage_reads_as_if_it_stayed_at_the_site(
    study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ledger.intend

    def local(self: Ledger, *args: Any) -> Any:
        real(self, *args)
        return self.local("site check")

    monkeypatch.setattr(Ledger, "intend", local)
    assert planted(study, spy) == ""
    assert "PermissionError" in (study.site(SITE) / "agent.log").read_text()  # the round itself refuses such a token
    monkeypatch.setattr(rounds, "need_charge", lambda *_: None)
    assert "LocalToken was shown where DpToken is declared" in planted(study, spy, attempt=1)


def test_planted_a_record_is_opened_before_the_intent_is_on_disk(
    study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that hands out the token first and would write its row afterwards."""
    from privacy.tokens import SEAL, DpToken

    def late(self: Ledger, plan_hash: str, stage: str, number: int, digest: str) -> DpToken:
        return DpToken(SITE, self.head[0] + 1, SEAL, plan_hash, stage, number, digest, 8)

    monkeypatch.setattr(Ledger, "intend", late)
    assert "the row of its DpToken is not on disk" in planted(study, spy)


def test_planted_a_local_reading_with_a_purpose_of_its_own(study: Any, spy: Any) -> None:
    from client.policy import SiteConfig
    from client.records import load as loading

    site = study.site(SITE)
    config = SiteConfig.load(site)
    with config.open_ledger() as ledger, spy.watching(site, "- curiosity"):
        loading.read_everyone(config.data, site, study.schema, ("ehr",), ledger.local("curiosity"))
    assert "a local reading for 'curiosity' is not declared" in spy.problems[0]


def test_planted_counts_leave_exact(study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from privacy import marginals

    def exact(codes: Any, domain: Any, queries: Any, sigma: float, noise: Any) -> Any:
        return {query: marginals.count_table(codes, domain, query) for query in queries}

    monkeypatch.setattr(rounds, "noisy_marginals", exact)
    assert "numbers of group table/ehr are none that a mechanism gave" in planted(study, spy)


def test_planted_half_the_noise(study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from privacy.marginals import noisy_marginals as real

    monkeypatch.setattr(rounds, "noisy_marginals", lambda c, d, q, sigma, noise: real(c, d, q, sigma / 2, noise))
    assert "is not the plan's" in planted(study, spy)


def test_planted_a_count_of_patients_beside_the_update(study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rounds.changes

    def counted(*args: Any) -> Any:
        found = real(*args)
        found["trunk"][0] = 8.0
        return found

    monkeypatch.setattr(rounds, "changes", counted)
    assert "1 numbers of group trunk are none that a mechanism gave" in planted(study, spy, "core")


def test_planted_another_stage_trains(study: Any, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rounds._training
    monkeypatch.setattr(rounds, "_training", lambda p, n: real(p, n).model_copy(update={"clip": 1e6}))
    assert "the training stage is not that of the plan" in planted(study, spy, "core")


def test_planted_a_code_that_depends_on_who_is_there(
    study: Any,
    study_copy: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    study_sites: tuple[str, ...],
) -> None:
    """The comparison of twins fails for a site that refuses when a patient is missing."""
    from privacy.boundary.refusals import Refused

    real, full = rounds.read_records, len(list((study.site(SITE) / "data").glob("sub-*")))

    def tells(config: Any, *args: Any) -> Any:
        if len(list(config.data_root.glob("sub-*"))) < full:
            raise Refused("SITE_UNAVAILABLE")
        return real(config, *args)

    twin = study_copy(study, tmp_path / "twin")
    without_one_patient(twin)
    monkeypatch.setattr(rounds, "read_records", tells)
    with pytest.raises(AssertionError):
        assert conversation(study, study_sites) == conversation(twin, study_sites)
