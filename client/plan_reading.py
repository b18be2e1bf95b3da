"""A plan in words that an officer can decide on: what each step reads and sends, what is new, what no epsilon covers.

Nothing here decides. Every number is the plan's own; what a step may not do (another group, a further round) is refused by
the agent whatever these words say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from client.policy import decisions, dp_plan, stored_plan
from client.site import SiteConfig
from privacy.boundary.plan import RosterEntry, StudyPlan
from privacy.boundary.refusals import Refused
from privacy.identity import fingerprint
from privacy.stages import QueryStage, Stage, TrainingStage

LONGEST_VALUE = 60
MIN_PREFIX = 8


@dataclasses.dataclass(frozen=True)
class Step:
    """One private stage as this site would take part in it.

    Attributes:
        reads: what is computed on the records. rounds: planned and spare. noise: its size beside one patient's share.
        sends: each group that leaves, and how.
    """

    name: str
    reads: str
    rounds: str
    noise: str
    sends: tuple[str, ...]


def steps(plan: StudyPlan, site: str) -> tuple[Step, ...]:
    """The plan's private stages in order."""
    return tuple(
        Step(
            name=stage.name,
            reads=_reads(plan, stage),
            rounds=f"{stage.rounds} + {stage.spare_rounds} spare",
            noise=_noise(stage),
            sends=sends(plan, stage.name, site),
        )
        for stage in dp_plan(plan).stages
    )


def _reads(plan: StudyPlan, stage: Stage) -> str:
    match stage.name:
        case "statistics" if plan.statistics is not None:
            shape = f"{len(plan.statistics.columns)} columns, presence of {len(plan.statistics.present)} instances"
            return f"counts, means, variances, quantiles: {shape}"
        case "marginals" if plan.table is not None:
            return f"counts of {len(plan.table.marginals)} sets of columns of {plan.table.slot}"
        case "recentre" if plan.recentre is not None:
            return f"mean of the codec's numbers for {', '.join(plan.recentre.slots)}"
        case "prototypes" if plan.prototypes is not None:
            return f"the same mean for each {plan.prototypes.factor}, for {', '.join(plan.prototypes.slots)}"
        case "codec" if plan.codec is not None:
            return f"training of the codecs of {', '.join(plan.codec.slots)}; {_training(stage)}"
        case "core":
            lora = f" (LoRA, rank {plan.training.lora_rank})" if plan.training.group == "lora" else ""
            return f"training of the generative model, group {plan.training.group}{lora}; {_training(stage)}"
    return "the plan does not describe this step, so no task of it is answered"


def _training(stage: Stage) -> str:
    if not isinstance(stage, TrainingStage):
        return "a query"
    return f"{stage.steps} steps a round, each patient drawn at rate {stage.sampling_rate:g}"


def _noise(stage: Stage) -> str:
    match stage:
        case TrainingStage():
            return f"{stage.sigma:.3g} x clip {stage.clip:.3g}"
        case QueryStage():
            return f"{stage.sigma:.3g} x sensitivity {stage.sensitivity:.3g}"


def sends(plan: StudyPlan, stage: str, site: str) -> tuple[str, ...]:
    """Each group that ``site`` sends in a stage, and who could see it."""
    words = []
    for group in groups(plan, stage):
        owners = plan.owners(group)
        if site in owners:
            masked = f"masked, seen only as a sum over {plan.min_cohort(group)} or more of {len(owners)} sites"
            words.append(f"{group}: {masked if plan.exchange(group) == 'masked' else 'PLAIN, under your noise alone'}")
    return tuple(words) or ("nothing",)


def groups(plan: StudyPlan, stage: str) -> tuple[str, ...]:
    """The groups that a stage sends; none where the plan's promise counts a stage that the plan does not describe."""
    try:
        return plan.groups(stage)
    except Refused:  # any task of it is refused with the same code
        return ()


def made_up(plan: StudyPlan) -> str:
    """What goes through training beside the patients, to try the promise; empty where nothing does."""
    if plan.audit.canaries is None:
        return ""
    return (
        f"{plan.audit.canaries.per_site} made-up patients go through training in coordinates of their own: they read no "
        "record, change no weight and cost no budget. Your site tosses a secret coin for each, and shows coins and scores, "
        "which are made of coins and noise alone, when training is over"
    )


def outside(plan: StudyPlan, site: str) -> tuple[str, ...]:
    """What is asked of real patients without noise, which no epsilon covers."""
    if not plan.audit.attacks or not plan.audit.cap:
        return ()
    names = ", ".join(dict.fromkeys(attack.name for attack in plan.audit.attacks))
    entry = plan.roster.get(site)
    trials = plan.audit.trials or (entry.held_out_decl if entry else 0)
    lines = [
        f"audit of the finished cohort: counts of {len(plan.audit.attacks)} attacks ({names}) on {trials} members and as "
        f"many held-out patients, at most {plan.audit.cap} times"
    ]
    if plan.audit.risks:
        named = ", ".join(dict.fromkeys(risk.risk for risk in plan.audit.risks))
        lines.append(
            f"{len(plan.audit.risks)} attacks of the three risks ({named}) on the same patients, in the same answer"
        )
    if plan.audit.groups:
        named = ", ".join(group.name for group in plan.audit.groups)
        lines.append(
            f"the joint attacks by group of patients ({named}), and how many of yours are in each; groups of fewer than "
            f"{plan.audit.fewest} send nothing"
        )
    if plan.audit.pairs:
        lines.append(f"utility: a concordance over {plan.audit.pairs} pairs of held-out patients, in the same answer")
    if "audit" not in {group.partition(":")[0] for group in sends(plan, "audit", site)}:
        lines.append("too few sites could mask these counts, so none are answered")
    return tuple(lines)


def before(config: SiteConfig, plan: StudyPlan) -> StudyPlan | None:
    """The plan of the same coordinator that this site approved last, other than this one; None if there is none.

    Raises:
        Refused: ``NOT_APPROVED`` if its file was changed.
    """
    last = None
    for link in config.log().read():
        if link.kind == "approved" and (name := link.data()["plan_hash"]) != plan.hash:
            stored = StudyPlan.from_bytes(stored_plan(config.folder, name)[0])
            last = stored if stored.coordinator_key == plan.coordinator_key else last
    return last


def changes(old: StudyPlan, new: StudyPlan) -> tuple[str, ...]:
    """Every field that differs, by its name in the plan, with both values; sites that came or went first."""
    gone, come = sorted(set(old.roster) - set(new.roster)), sorted(set(new.roster) - set(old.roster))
    lines = [f"site {site} is new" for site in come] + [f"site {site} is gone" for site in gone]
    for site in sorted(set(old.roster) & set(new.roster)):
        lines += [f"site {site}: {text}" for text in _roster_changes(old.roster[site], new.roster[site])]
    was, now = (dict(_flat(plan.model_dump(mode="json", exclude={"roster", "created"}))) for plan in (old, new))
    for name in sorted(set(was) | set(now)):
        if was.get(name) != now.get(name):
            lines.append(f"{name}: {_short(was.get(name))} -> {_short(now.get(name))}")
    return tuple(lines)


def _roster_changes(old: RosterEntry, new: RosterEntry) -> Iterator[str]:
    for name in ("identity_key", "masking_key"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            yield f"ANOTHER {name}: {_print(was)} -> {_print(now)}; ask that site over another channel"
    for name in ("slots", "n_decl", "held_out_decl", "min_contributors"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            yield f"{name}: {_short(was)} -> {_short(now)}"


def _print(key: str) -> str:
    return fingerprint(bytes.fromhex(key))[:19] + "…"


def _flat(value: JsonValue, name: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Dotted name and value of every leaf; a list of objects that have names is walked by those."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
        yield f"{name} in order", [entry["name"] for entry in value if isinstance(entry, dict)]
        for entry in value:
            assert isinstance(entry, dict)
            yield from _flat({key: inner for key, inner in entry.items() if key != "name"}, f"{name}[{entry['name']}]")
    else:
        yield name, value


def _short(value: object) -> str:
    if value is None:
        return "(none)"
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if len(text) <= LONGEST_VALUE:
        return text
    return (
        f"{text[:LONGEST_VALUE]}… ({len(value)} entries)"
        if isinstance(value, (list, tuple))
        else f"{text[:LONGEST_VALUE]}…"
    )


def find(site_dir: Path, name: str) -> str:
    """The full hash of the plan that ``name`` names: its hash, or eight letters or more of its beginning.

    Raises:
        ValueError: no plan of this site, or more than one, begins so.
    """
    found = [decision.plan_hash for decision in decisions(site_dir) if decision.plan_hash.startswith(name)]
    if len(name) < MIN_PREFIX or len(found) != 1:
        raise ValueError(
            f"{name!r} names {len(found)} plans of this site; give {MIN_PREFIX} letters or more of one hash that "
            "`medgen site pending --all` lists"
        )
    return found[0]
