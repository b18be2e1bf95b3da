"""The site's side of the in-training audit: coins told to nobody before training is over, and no trace in what leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import canaries
from client.plan_reading import made_up
from client.policy import SiteConfig
from privacy.audit.in_training import Coins
from privacy.boundary.messages import (
    Approval,
    CanaryOpening,
    CanaryRequest,
    MaskedAnswer,
    PlanProposal,
    parse_as,
    to_bytes,
)
from privacy.boundary.signing import sign_canary_request
from privacy.identity import IdentityKey

SITE, OTHER = "alder-university", "birch-memory"


def proposal(study: Any) -> PlanProposal:
    return PlanProposal(study.folder.plan.read_bytes(), bytes.fromhex(study.folder.plan_signature.read_text()))


def committed(study: Any, site: str = SITE) -> str:
    answer = study.send(site, proposal(study))
    assert isinstance(answer, Approval)
    return answer.canaries


def asked(study: Any, key: IdentityKey | None = None) -> CanaryRequest:
    return sign_canary_request(CanaryRequest(study.plan.hash), key or study.key)


def folder(study: Any, site: str = SITE) -> Path:
    return study.site(site) / "state" / study.plan.hash / "canaries"


def trained(study: Any, **fields: Any) -> Any:
    answer = study.send(SITE, study.task("core", **fields))
    assert isinstance(answer, MaskedAnswer)
    return answer


def test_coins_are_drawn_once_kept_for_the_site_alone_and_differ_between_sites(study: Any) -> None:
    first, again, other = committed(study), committed(study), committed(study, OTHER)
    assert first == again != other
    assert made_up(study.plan).startswith("1000 made-up patients")
    path = folder(study) / "coins.json"
    assert path.stat().st_mode & 0o777 == 0o600
    kept = [Coins.from_bytes((folder(study, s) / "coins.json").read_bytes(), study.plan.hash, s) for s in (SITE, OTHER)]
    assert [coins.commitment for coins in kept] == [first, other]
    assert (kept[0].enrolled_D != kept[1].enrolled_D).mean() == pytest.approx(0.5, abs=0.1)


def test_a_site_that_has_not_decided_commits_to_nothing(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from client import policy

    monkeypatch.setattr(policy, "propose", lambda *_: "pending")
    assert committed(study) == ""
    assert not folder(study).exists()


def test_training_is_opened_once_with_the_coins_that_were_committed_to(study: Any) -> None:
    """Two rounds and a spare; the opening is the same bytes whenever it is asked for, and later rounds have no canaries."""
    study.deliver(SITE)
    commitment = committed(study)
    for fields in ({}, {"round": 1}, {"round": 1, "attempt": 1}):
        trained(study, **fields)
    opening = study.send(SITE, asked(study))
    assert isinstance(opening, CanaryOpening)
    assert dict(opening.rounds) == {"core": 3}
    enrolled = opening.arrays["coins"].astype(bool)
    assert Coins(study.plan.hash, SITE, enrolled, opening.salt).keeps(commitment)
    inside, outside = opening.arrays["scores"][enrolled], opening.arrays["scores"][~enrolled]
    assert inside.mean() > outside.mean()  # of 1,000 canaries in six steps: three standard errors and more
    trained(study, round=1, attempt=2)
    assert study.send(SITE, asked(study)) == opening
    assert len(list((folder(study) / "scores").iterdir())) == 3
    last = study.site(SITE) / "outbox" / "left.jsonl"
    assert '\\"canaries\\"' in last.read_text() or '"canaries"' in last.read_text()


def test_an_attempt_that_is_computed_again_counts_once(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is lost between computing and storing, as in a crash: the ledger charges twice, the scores hold one."""
    from client.outbox import Outbox

    study.deliver(SITE)
    committed(study)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "put", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        assert study.send(SITE, study.task("core")).code == "SITE_UNAVAILABLE"
    lost = next((folder(study) / "scores").iterdir()).read_bytes()
    trained(study)
    stored = [path.read_bytes() for path in (folder(study) / "scores").iterdir()]
    assert len(stored) == 1
    assert stored[0] != lost  # fresh noise
    trained(study)  # replayed from the store
    assert [path.read_bytes() for path in (folder(study) / "scores").iterdir()] == stored


def test_only_the_coordinator_of_an_approved_plan_sees_the_coins(study: Any) -> None:
    committed(study)
    assert study.send(SITE, CanaryRequest(study.plan.hash)).code == "BAD_SIGNATURE"
    assert study.send(SITE, asked(study, IdentityKey(b"\x66" * 32))).code == "BAD_SIGNATURE"
    assert study.send(SITE, sign_canary_request(CanaryRequest("0" * 64), study.key)).code == "NOT_APPROVED"
    assert not (folder(study) / "opened.bin").exists()


@pytest.fixture(scope="module")
def without(study_plan: Callable[..., Any], study_edit: Callable[..., None], tmp_path_factory: Any) -> Any:
    """The deterministic study of ``study_known`` with no canaries in its plan."""
    return study_plan(
        tmp_path_factory.mktemp("without"),
        "study.execution.deterministic=true",
        "study.table.spare_rounds=2",
        "study.audit.canaries=0",
        edit=lambda study: study_edit(study, "deterministic_noise = false", "deterministic_noise = true"),
    )


def test_a_plan_without_canaries_has_none_to_show(without: Any, study_copy: Callable[..., Any], tmp_path: Path) -> None:
    study = study_copy(without, tmp_path / "none")
    assert study.plan.audit.canaries is None
    assert made_up(study.plan) == ""
    assert committed(study) == ""
    assert study.send(SITE, asked(study)).code == "CANARIES"


def test_update_promise_and_ledger_are_the_same_with_and_without(
    without: Any, study_known: Any, study_copy: Callable[..., Any], tmp_path: Path
) -> None:
    """Under the switch the site's own numbers are equal bit for bit, group by group: no coordinate more, no noise else."""
    from client import rounds

    numbers, ledgers, promises = [], [], []
    for place, plan in (("with", study_known), ("without", without)):
        study = study_copy(plan, tmp_path / place)
        study.deliver(SITE)
        task, config = study.task("core"), SiteConfig.load(study.site(SITE))
        with config.open_ledger() as ledger:
            token = ledger.intend(task.plan_hash, task.stage, task.round, task.digest())
            numbers.append(rounds.compute(config, study.plan, task, token)[0])
        ledgers.append(study.ledger(SITE).epsilon if hasattr(study.ledger(SITE), "epsilon") else study.kinds(SITE))
        promises.append(study.plan.dp)
        assert folder(study).exists() == (place == "with")
    assert numbers[0].keys() == numbers[1].keys()
    for group, values in numbers[0].items():
        np.testing.assert_array_equal(values, numbers[1][group])
    assert promises[0] == promises[1]
    assert ledgers[0] == ledgers[1]


def test_the_switch_repeats_coins_and_scores(study_known: Any, study_copy: Callable[..., Any], tmp_path: Path) -> None:
    found = []
    for place in ("one", "two"):
        study = study_copy(study_known, tmp_path / place)
        study.deliver(SITE)
        trained(study)
        opening = study.send(SITE, asked(study))
        found.append(to_bytes(opening))
    assert found[0] == found[1]


def test_a_site_may_refuse_canaries(study: Any, study_edit: Callable[..., None]) -> None:
    study_edit(study, "[policy]", "[policy]\nmax_canaries = 999", SITE)
    assert study.send(SITE, study.task("core")).code == "CANARIES"
    study_edit(study, "max_canaries = 999", "max_canaries = 1000", SITE)
    study.deliver(SITE)
    trained(study)


def test_coins_cross_the_wall_in_the_opening_alone(study: Any) -> None:
    """Salt and coins are in no byte that leaves before; what leaves in the opening is what the disk holds."""
    from client.agent import SiteAgent

    study.deliver(SITE)
    said = [SiteAgent(study.site(SITE)).handle(to_bytes(r)) for r in (proposal(study), study.task("core"))]
    coins = Coins.from_bytes((folder(study) / "coins.json").read_bytes(), study.plan.hash, SITE)
    packed = np.packbits(coins.enrolled_D).tobytes()
    for body in said:
        for secret in (coins.salt, coins.salt.hex().encode(), packed, packed.hex().encode()):
            assert secret not in body
    opening = parse_as(SiteAgent(study.site(SITE)).handle(to_bytes(asked(study))), CanaryOpening)
    assert opening.salt == coins.salt
    assert canaries.commitment(SiteConfig.load(study.site(SITE)), study.plan) == coins.commitment
