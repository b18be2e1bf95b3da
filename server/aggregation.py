"""One masked round: ask, collect, unmask, add. The coordinator never holds one site's numbers in the clear.

Each parameter group (or statistic) is added over the sites that own it, with public weights; what a group's sum means is
the caller's affair. A group that enough sites own is masked; one whose few owners all agreed to it arrives under its
local noise alone; any other is frozen and is not asked for. While too few sites are reached, the same attempt is asked
again: stored answers are free. A round whose unmasking fails is asked again as a new attempt, which costs each site a spare.

Memory does not grow with the sites: each masked answer is added to its groups' sums as it arrives and is dropped.
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
from privacy.masking import Cohort, MaskedSum, Reveal, open_reveals
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
        max_attempts: how often it is asked before the study stops to be resumed: once, plus the stage's spare rounds.
    """

    stage: str
    round: int
    arrays: Arrays
    parts: tuple[str, ...]
    groups: Mapping[str, int]
    step: float
    max_attempts: int


class Arrivals:
    """What has arrived of one attempt: sums of what is masked, and the few vectors that are not.

    Attributes:
        masked: sum of each group that travels under masks, in the order of the plan; four bytes a number.
        plain: group -> site -> vector under local noise alone. Only a group of one or two owners travels so; its vectors are
            kept, because floats must be added in the order of sites and not in that of arrival.
        heads: site -> head of its ledger, of sites whose answers are in.
        codes: site -> why it is not.
    """

    def __init__(self, cohorts: Sequence[Cohort], groups: Mapping[str, int]) -> None:
        self.masked = [MaskedSum(cohort, groups[cohort.group]) for cohort in cohorts]
        self.plain: dict[str, dict[str, NDArray[np.float32]]] = {}
        self.heads: dict[str, Head] = {}
        self.codes: dict[str, str] = {}

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites that were added, sorted."""
        return tuple(sorted(self.heads))

    @property
    def alive(self) -> list[MaskedSum]:
        """The sums over sites enough to be opened."""
        return [total for total in self.masked if len(total.sites) >= total.cohort.smallest]

    @property
    def unreached(self) -> bool:
        """Whether nothing can be opened only because too few sites have answered yet."""
        return bool(self.masked) and not self.alive

    def add(self, site: str, groups: Arrays, head: Head) -> None:
        """Add a site's answer, whose groups, lengths and types have been checked."""
        left = dict(groups)
        for total in self.masked:
            if total.cohort.group in left:
                total.add(site, np.asarray(left.pop(total.cohort.group), np.uint32))
        for name, vector in left.items():
            self.plain.setdefault(name, {})[site] = np.asarray(vector, np.float32)
        self.heads[site] = head

    def plain_sum(self, name: str) -> Vector:
        """The sum of a group under local noise alone, in the order of sites."""
        own = self.plain[name]
        total = np.zeros(next(iter(own.values())).shape, np.float64)
        for site in sorted(own):
            total += own[site]
        return total


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
        first, asked, heads = attempt, 0, self._checkpoints.heads()
        refused: dict[str, str] = {}
        while asked < ask.max_attempts and invited:  # of this run; over all runs the ledgers are the limit
            told = {site: str(heads[site]) for site in invited if site in heads}
            task = sign_task(
                RoundTask(self._plan.hash, ask.stage, ask.round, attempt, invited, ask.parts, ask.arrays, told),
                self._key,
            )
            found = self._collect(task, groups, heads, replay=attempt == first)
            codes = dict(sorted(found.codes.items()))
            refused |= codes
            self._events.write(
                "answers", stage=ask.stage, round=ask.round, attempt=attempt, sites=list(found.survivors), refused=codes
            )
            sums, left = self._open(task, found, ask.step)
            if sums:
                self._pointer(ask).unlink(missing_ok=True)
                used = tuple(sorted({site for entry in sums.values() for site in entry.sites}))
                seen = {site: (head.seq, head.hash) for site, head in sorted(found.heads.items())}
                return RoundSums(sums, used, refused, attempt + 1, seen)
            asked += 1
            if found.unreached and set(codes.values()) == {"SITE_UNAVAILABLE"}:
                continue  # no seed of this attempt was asked for, so that it can still be opened: nobody pays for it twice
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

    def _collect(
        self, task: RoundTask, groups: Mapping[str, int], told: Mapping[str, Head], *, replay: bool
    ) -> Arrivals:
        """Ask, and add each answer as it arrives; the first answer of a site counts, and only if it is what was asked for.

        An answer whose ledger was put back or runs twice is left out. Only the first attempt after a start can be answered
        from a store (``replay``); its answers may be older than other heads.
        """
        found = Arrivals(self._cohorts(task, groups), groups)
        digest = task.digest()
        wanted = {
            site: {
                name: groups[name]
                for name in self._plan.asked(task.stage, task.invited)
                if name in groups and site in self._plan.owners(name)
            }
            for site in task.invited
        }

        def arrived(site: str, reply: Reply) -> None:
            if site not in wanted or site in found.heads or site in found.codes:
                return
            if not (
                isinstance(reply, MaskedAnswer) and reply.task_digest == digest and self._fits(reply, wanted[site])
            ):
                found.codes[site] = _code(reply)
                return
            head = Head(reply.ledger_seq, reply.ledger_hash)
            if why := self.known_heads.objection(site, head, told.get(site), replay=replay):
                self._events.write("sits-out", site=site, code="LEDGER_UNUSABLE", why=why)
                found.codes[site] = "LEDGER_UNUSABLE"
                return
            found.add(site, reply.groups, head)

        self._exchange.ask(dict.fromkeys(task.invited, task), on_reply=arrived)
        for site in task.invited:
            if site not in found.heads:
                found.codes.setdefault(site, "SITE_UNAVAILABLE")
        self.known_heads.learn(dict(sorted(found.heads.items())))
        return found

    def _fits(self, answer: MaskedAnswer, wanted: Mapping[str, int]) -> bool:
        """Whether an answer holds exactly the groups, lengths and kinds of numbers that were asked for."""
        kinds = {"masked": "uint32", "plain": "float32"}
        return set(answer.groups) == set(wanted) and all(
            array.shape == (wanted[name],) and str(array.dtype) == kinds[self._plan.exchange(name)]
            for name, array in answer.groups.items()
        )

    def _open(self, task: RoundTask, found: Arrivals, step: float) -> tuple[dict[str, GroupSum], tuple[str, ...]]:
        """The sums that can be opened, and the sites that are worth asking again if none can."""
        survivors = found.survivors
        sums = {name: self._weighed(found.plain_sum(name), tuple(sorted(own))) for name, own in found.plain.items()}
        cohorts = [total.cohort for total in found.masked]
        alive = found.alive
        if not alive:
            return sums, task.invited
        partners = sorted({site for total in alive for site in total.sites})
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
            for total in alive:
                sums[total.cohort.group] = self._weighed(total.open(seeds, step), total.sites)
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
