"""One masked round: ask, collect, unmask, add. The coordinator never holds one site's numbers in the clear.

Each parameter group (or statistic) is added over the sites that own it, with public weights; what a group's sum means is
the caller's affair. A group that enough sites own is masked; one whose few owners all agreed to it arrives under its
local noise alone; any other is frozen and is not asked for. A round whose sums cannot be opened is asked again as a new
attempt, which costs each site a spare, until nobody who answered is left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy.book import Head
from privacy.boundary.messages import Arrays, MaskedAnswer, Refusal, Reply, RoundTask, UnmaskAnswer, UnmaskRequest
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import sign_task, sign_unmask
from privacy.identity import IdentityKey
from privacy.masking import Cohort, Reveal, aggregate, open_reveals
from server.checkpoints import Checkpoints, write_atomically
from server.events import EventLog
from server.exchange import Exchange
from server.heads import KnownHeads
from server.runfolder import RunFolder

Vector = NDArray[np.float64]


class StudyError(RuntimeError):
    """The study cannot go on; the text is for the coordinator and holds nothing that a site did not send."""


@dataclass(frozen=True)
class GroupSum:
    """The sum of one group over ``sites``, whose public weights (declared capacity) add up to ``weight``."""

    values: Vector
    sites: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class RoundSums:
    """What one round gave.

    Attributes:
        groups: opened sums; a group that could not be opened is missing.
        answered: sites whose numbers are in a sum.
        refused: site -> refusal code of sites that sat out.
        attempts: how often it was asked.
        heads: site -> (seq, hash) of the ledger when it answered.
    """

    groups: dict[str, GroupSum]
    answered: tuple[str, ...]
    refused: dict[str, str]
    attempts: int
    heads: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """One round to be asked.

    Attributes:
        groups: group -> length of its vector; frozen groups are left out by the caller or dropped here.
        step: grid step of the masked numbers.
        max_attempts: one, plus the stage's spare rounds.
    """

    stage: str
    round: int
    arrays: Arrays
    parts: tuple[str, ...]
    groups: Mapping[str, int]
    step: float
    max_attempts: int


class Aggregator:
    """Runs masked rounds of one approved plan over one exchange.

    Attributes:
        known_heads: what is known of the sites' ledgers.
    """

    def __init__(
        self, plan: StudyPlan, key: IdentityKey, exchange: Exchange, folder: RunFolder, events: EventLog
    ) -> None:
        self._plan = plan
        self._key = key
        self._exchange = exchange
        self._folder = folder
        self._events = events
        self._checkpoints = Checkpoints(folder.checkpoints)
        self.known_heads = KnownHeads(folder.heads, self._checkpoints)

    def run(self, ask: Ask, sites: Sequence[str]) -> RoundSums:
        """Ask ``sites`` for one round and add what they send.

        Raises:
            StudyError: no attempt could be opened.
        """
        groups = {name: length for name, length in ask.groups.items() if self._plan.exchange(name) != "frozen"}
        owners = {site for name in groups for site in self._plan.owners(name)}
        everyone = tuple(sorted(owners & set(sites)))
        attempt, invited = self._begin(ask, everyone)
        first, heads = attempt, self._checkpoints.heads()
        last = attempt + ask.max_attempts  # of this run of the coordinator; over all runs the ledgers are the limit
        refused: dict[str, str] = {}
        while attempt < last and invited:
            told = {site: str(heads[site]) for site in invited if site in heads}
            task = sign_task(
                RoundTask(self._plan.hash, ask.stage, ask.round, attempt, invited, ask.parts, ask.arrays, told),
                self._key,
            )
            answers, codes = self._collect(task, groups)
            codes |= self._disbelieved(answers, heads, replay=attempt == first)
            refused |= codes
            self._events.write(
                "answers", stage=ask.stage, round=ask.round, attempt=attempt, sites=sorted(answers), refused=codes
            )
            sums, left = self._open(task, groups, answers, ask.step)
            if sums:
                self._pointer(ask).unlink(missing_ok=True)
                used = tuple(sorted({site for entry in sums.values() for site in entry.sites}))
                seen = {site: (answer.ledger_seq, answer.ledger_hash) for site, answer in sorted(answers.items())}
                return RoundSums(sums, used, refused, attempt + 1, seen)
            # Whoever refused for good is not asked again; whoever answered, or was cut off, may be there next time.
            final = {site for site, code in codes.items() if code != "SITE_UNAVAILABLE"}
            attempt, invited = attempt + 1, tuple(site for site in left if site not in final)
            self._remember(ask, attempt, invited)
        self._remember(ask, attempt, everyone)
        codes_seen = ", ".join(f"{site}: {code}" for site, code in sorted(refused.items())) or "none"
        raise StudyError(
            f"stage {ask.stage}, round {ask.round}: no group could be opened over enough sites (refusals: {codes_seen}); "
            "when the sites are back, resume the study"
        )

    def _collect(self, task: RoundTask, groups: Mapping[str, int]) -> tuple[dict[str, MaskedAnswer], dict[str, str]]:
        answers: dict[str, MaskedAnswer] = {}
        codes: dict[str, str] = {}
        digest = task.digest()
        for site, reply in self._exchange.ask(dict.fromkeys(task.invited, task)).items():
            wanted = {
                name: groups[name]
                for name in self._plan.asked(task.stage, task.invited)
                if self._sends(site, name, groups)
            }
            if isinstance(reply, MaskedAnswer) and reply.task_digest == digest and self._fits(reply, wanted):
                answers[site] = reply
            else:
                codes[site] = _code(reply)
        return answers, codes

    def _disbelieved(
        self, answers: dict[str, MaskedAnswer], told: Mapping[str, Head], *, replay: bool
    ) -> dict[str, str]:
        """Take out of ``answers`` those whose ledger was put back or runs twice; site -> code of these.

        Only the first attempt after a start can be answered from a store; its answers may be older than other heads.
        """
        codes: dict[str, str] = {}
        for site, answer in sorted(answers.items()):
            head = Head(answer.ledger_seq, answer.ledger_hash)
            if why := self.known_heads.objection(site, head, told.get(site), replay=replay):
                self._events.write("sits-out", site=site, code="LEDGER_UNUSABLE", why=why)
                codes[site] = "LEDGER_UNUSABLE"
                del answers[site]
        self.known_heads.learn({site: Head(a.ledger_seq, a.ledger_hash) for site, a in answers.items()})
        return codes

    def _sends(self, site: str, name: str, groups: Mapping[str, int]) -> bool:
        return name in groups and site in self._plan.owners(name)

    def _fits(self, answer: MaskedAnswer, wanted: Mapping[str, int]) -> bool:
        """Whether an answer holds exactly the groups, lengths and kinds of numbers that were asked for."""
        kinds = {"masked": "uint32", "plain": "float32"}
        return set(answer.groups) == set(wanted) and all(
            array.shape == (wanted[name],) and str(array.dtype) == kinds[self._plan.exchange(name)]
            for name, array in answer.groups.items()
        )

    def _open(
        self, task: RoundTask, groups: Mapping[str, int], answers: Mapping[str, MaskedAnswer], step: float
    ) -> tuple[dict[str, GroupSum], tuple[str, ...]]:
        """The sums that can be opened, and the sites that are worth asking again if none can."""
        survivors = tuple(sorted(answers))
        sums = {
            name: self._sum_plain(name, answers)
            for name in groups
            if self._plan.exchange(name) == "plain" and any(name in answer.groups for answer in answers.values())
        }
        cohorts = self._cohorts(task, groups)
        alive = [c for c in cohorts if len(set(c.members) & set(survivors)) >= c.smallest]
        if not alive:
            return sums, task.invited
        partners = sorted({site for cohort in alive for site in cohort.members} & set(survivors))
        request = sign_unmask(
            UnmaskRequest(task.plan_hash, task.stage, task.round, task.attempt, task.digest(), survivors), self._key
        )
        replies = self._exchange.ask(dict.fromkeys(partners, request))
        reveals = {
            site: Reveal(reply.sealed, dict(reply.agreement))
            for site, reply in replies.items()
            if isinstance(reply, UnmaskAnswer) and reply.task_digest == request.task_digest
        }
        try:
            seeds = open_reveals(reveals, cohorts, survivors)
            for cohort in alive:
                masked = {
                    site: np.asarray(answers[site].groups[cohort.group], np.uint32)
                    for site in survivors
                    if site in cohort.members
                }
                total = aggregate(masked, cohort, survivors, seeds, step)
                sums[cohort.group] = self._weighed(total, tuple(sorted(masked)))
        except Refused as problem:
            codes = {site: _code(reply) for site, reply in replies.items() if site not in reveals}
            self._events.write(
                "discarded", stage=task.stage, round=task.round, attempt=task.attempt, why=problem.code, refused=codes
            )
            return {}, tuple(site for site in task.invited if site not in codes or codes[site] == "SITE_UNAVAILABLE")
        return sums, task.invited

    def _cohorts(self, task: RoundTask, groups: Mapping[str, int]) -> list[Cohort]:
        """Mask cohorts of a task, in the order of the groups' names; a cohort that began too small has none."""
        return [
            Cohort(task.digest(), name, self._plan.cohort(name, task.invited), self._plan.min_cohort(name))
            for name in self._plan.asked(task.stage, task.invited)
            if self._plan.exchange(name) == "masked" and name in groups
        ]

    def _sum_plain(self, name: str, answers: Mapping[str, MaskedAnswer]) -> GroupSum:
        owners = tuple(site for site in self._plan.owners(name) if site in answers and name in answers[site].groups)
        total = np.zeros(answers[owners[0]].groups[name].shape, np.float64)
        for site in owners:
            total += np.asarray(answers[site].groups[name], np.float64)
        return self._weighed(total, owners)

    def _weighed(self, total: Vector, sites: tuple[str, ...]) -> GroupSum:
        return GroupSum(total, sites, sum(self._plan.weight(site) for site in sites))

    def _begin(self, ask: Ask, sites: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
        """Attempt and invited set: as remembered if the same sites are there, so that stored answers replay for free."""
        pointer = self._pointer(ask)
        if pointer.is_file():
            known = json.loads(pointer.read_text(encoding="utf-8"))
            invited = tuple(known["invited"])
            if invited and set(invited) <= set(sites):
                return int(known["attempt"]), invited
            self._remember(ask, int(known["attempt"]) + 1, sites)
            return int(known["attempt"]) + 1, sites
        self._remember(ask, 0, sites)
        return 0, sites

    def _remember(self, ask: Ask, attempt: int, invited: tuple[str, ...]) -> None:
        body = json.dumps({"attempt": attempt, "invited": list(invited)}).encode()
        write_atomically(self._pointer(ask), body)

    def _pointer(self, ask: Ask) -> Path:
        return self._folder.checkpoints / f"open-{ask.stage}-{ask.round:04d}.json"


def _code(reply: Reply) -> str:
    return reply.code if isinstance(reply, Refusal) else "SITE_UNAVAILABLE"
