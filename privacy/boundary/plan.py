"""StudyPlan: the one canonical JSON that a coordinator signs and every site approves by its hash.

Everything that a site will do for a study is in here and nowhere else: a task only names a stage and a round of it. A
changed byte is another hash, and another hash needs another approval.

Covered: unknown keys, missing keys, wrong types, non-canonical bytes, a roster entry whose keys or numbers were changed
after its site signed them, slots that the schema does not declare.
Not covered: whether the promise in ``dp`` is good enough (the site's policy and ledger judge that), and whether the sites of
the roster are who they claim to be (fingerprints are compared out of band).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, model_validator

from privacy.boundary.audit import JOINT, Audit
from privacy.boundary.description import Statistics
from privacy.boundary.refusals import Refused
from privacy.chain import canonical
from privacy.identity import verify

MIN_COHORT = 3
SITE_BINDING_TYPE = "application/vnd.medgen.site-binding+json"

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Exchange = Literal["masked", "plain", "frozen"]


class _Public(BaseModel):
    """Frozen; unknown keys are refused. Every field of a plan is public."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Public):
    """One content-addressed file of the public model: what it is called, its SHA-256, its bytes."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./+-]{0,127}$")]
    digest: Hex32
    size: int = Field(ge=0)


class RosterEntry(_Public):
    """One site as it described itself, signed by its own identity key.

    Attributes:
        n_decl: declared capacity in patients, a public divisor. held_out_decl: patients held out of training.
        min_contributors: fewest sites whose sum this site joins; 1 admits updates under its local noise alone.
        binding: Ed25519 signature of the site over name, numbers, slots and both keys.
    """

    slots: tuple[Label, ...] = Field(min_length=1)
    n_decl: int = Field(ge=1, le=2**31 - 1)
    held_out_decl: int = Field(ge=0, le=2**31 - 1)
    min_contributors: int = Field(ge=1, le=256)
    identity_key: Hex32
    masking_key: Hex32
    binding: Hex64

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_contributors == 2:
            raise ValueError("min_contributors: expected 1, or 3 and more; a sum over two sites hides neither")
        return self

    def holds(self, site: str) -> bool:
        """Whether the site's own signature covers this entry."""
        return _holds(self, site)


@functools.lru_cache(maxsize=1024)
def _holds(entry: RosterEntry, site: str) -> bool:
    """Kept, because every message of a study brings its plan, and a plan has a signature for each site."""
    payload = binding_payload(
        site=site,
        slots=entry.slots,
        n_decl=entry.n_decl,
        held_out_decl=entry.held_out_decl,
        min_contributors=entry.min_contributors,
        identity_key=bytes.fromhex(entry.identity_key),
        masking_key=bytes.fromhex(entry.masking_key),
    )
    return verify(bytes.fromhex(entry.identity_key), bytes.fromhex(entry.binding), SITE_BINDING_TYPE, payload)


class Training(_Public):
    """Which weights train and how; noise, clip, rate and rounds are in ``dp``.

    Attributes:
        group: what is trained of the core.
        flow: settings of the flow objective, as the models room writes them.
    """

    group: Literal["all", "attention", "lora"]
    lora_rank: int = Field(default=0, ge=0)
    learning_rate: Positive
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    flow: dict[str, JsonValue] = Field(default_factory=dict)


class Table(_Public):
    """Marginals of the table that each site answers under noise: public bins, and the column sets to be counted."""

    slot: Label
    bins: int = Field(ge=2)
    marginals: tuple[tuple[int, ...], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.marginals)) != len(self.marginals):
            raise ValueError("marginals: a column set is named twice; each is counted once")
        for columns in self.marginals:
            if not columns or tuple(sorted(set(columns))) != columns or columns[0] < 0:
                raise ValueError(f"marginals: expected rising column numbers from 0, got {columns}")
        return self


class Recentre(_Public):
    """One noised mean-token query per slot; ``bound`` clips each patient's vector (L2)."""

    slots: tuple[Label, ...] = Field(min_length=1)
    bound: Positive


class Prototypes(_Public):
    """Noised mean tokens per level of a factor, for a warm-up at the coordinator; ``bound`` clips a patient's vector of
    each slot (L2). All slots are one release.
    """

    slots: tuple[Label, ...] = Field(min_length=1)
    factor: Label
    bound: Positive


class CodecTraining(_Public):
    """Codecs that the sites train under DP before the core."""

    slots: tuple[Label, ...] = Field(min_length=1)
    learning_rate: Positive
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)


class Release(_Public):
    """The candidate cohort: how many synthetic patients, and how they are sampled."""

    patients: int = Field(ge=1)
    steps: int = Field(ge=1)
    guidance: float = Field(ge=0.0, allow_inf_nan=False)
    table_prior: Literal["marginals", "core"]


class Quantisation(_Public):
    """Grid steps of the masked sums; with n sites the largest magnitude is step * 2^31 / n."""

    update: Positive = 2.0**-24
    statistic: Positive = 2.0**-10


class StudyPlan(_Public):
    """All that a site agrees to.

    Attributes:
        version: the medgen version whose code runs it.
        study_schema: the study's schema, as its owner room writes it.
        public_model: the files that every site fetches before it starts.
        roster: site name -> its signed entry.
        dp: the calibrated DPPlan, as JSON.
        deterministic: noise from a known stream, for tests; marks everything *not private*.
    """

    format: Literal[1] = 1
    study: Label
    created: str
    version: Label
    study_schema: dict[str, JsonValue]
    public_model: tuple[Part, ...]
    roster: dict[Label, RosterEntry] = Field(min_length=1, max_length=256)
    coordinator_key: Hex32
    dp: dict[str, JsonValue]
    training: Training
    statistics: Statistics | None = None
    table: Table | None = None
    recentre: Recentre | None = None
    prototypes: Prototypes | None = None
    codec: CodecTraining | None = None
    audit: Audit = Audit()
    release: Release
    quantisation: Quantisation = Quantisation()
    deterministic: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        declared = _declared_slots(self.study_schema)
        asked = {f"roster.{site}": entry.slots for site, entry in self.roster.items()}
        asked |= {"recentre": self.recentre.slots} if self.recentre else {}
        asked |= {"prototypes": self.prototypes.slots} if self.prototypes else {}
        asked |= {"codec": self.codec.slots} if self.codec else {}
        asked |= {"table": (self.table.slot,)} if self.table else {}
        asked |= {f"audit, {a.label}": (a.scope,) for a in self.audit.attacks if a.scope != JOINT}
        asked |= {f"audit, {r.risk}, {r.attack}": (r.slot,) for r in self.audit.risks if r.slot is not None}
        for place, slots in asked.items():
            if unknown := sorted(set(slots) - declared):
                raise ValueError(f"{place}: slots {unknown} are not in the schema, which has {sorted(declared)}")
        for site, entry in self.roster.items():
            if not entry.holds(site):
                raise ValueError(
                    f"roster.{site}: its keys or numbers are not those that the site signed; enrol it again"
                )
        if len({entry.masking_key for entry in self.roster.values()}) != len(self.roster):
            raise ValueError("roster: two sites share a masking key; each site makes its own")
        return self

    def canonical(self) -> bytes:
        """The bytes that are signed, hashed and approved."""
        return canonical(self.model_dump(mode="json")).encode()

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical bytes: the plan's name everywhere."""
        return plan_hash(self.canonical())

    @classmethod
    def from_bytes(cls, data: bytes) -> StudyPlan:
        """Parse canonical bytes.

        Raises:
            Refused: ``BAD_PLAN`` if they do not validate, or are not exactly the canonical bytes of what they say.
        """
        try:
            json.loads(data, parse_constant=_no_constant)
            plan = cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            raise Refused("BAD_PLAN", "; ".join(_sentence(entry) for entry in error.errors()[:5])) from error
        except (ValueError, RecursionError) as error:
            raise Refused("BAD_PLAN", str(error)[:200]) from error
        if plan.canonical() != data:
            raise Refused(
                "BAD_PLAN", "the bytes are not the plan's canonical JSON", "write it with StudyPlan.canonical()"
            )
        return plan

    def owners(self, group: str) -> tuple[str, ...]:
        """Sites that own a parameter group or statistic, sorted: ``slot/mri`` (any prefix) those with slot ``mri``,
        a name without a slash all sites.
        """
        _, slash, slot = group.partition("/")
        if not slash:
            return tuple(sorted(self.roster))
        if slot not in _declared_slots(self.study_schema):
            raise ValueError(f"group {group!r}: slot {slot!r} is not in the schema")
        return tuple(sorted(site for site, entry in self.roster.items() if slot in entry.slots))

    def min_cohort(self, group: str) -> int:
        """Fewest survivors whose sum of ``group`` may be opened: three, or more where an owner's policy says so."""
        return max([MIN_COHORT, *(self.roster[site].min_contributors for site in self.owners(group))])

    def exchange(self, group: str) -> Exchange:
        """How ``group`` leaves its owners: ``masked`` where enough sites own it; else ``plain`` (local noise alone) if
        every owner's policy says ``min_contributors = 1``; else ``frozen`` at public weights.
        """
        owners = self.owners(group)
        if len(owners) >= self.min_cohort(group):
            return "masked"
        if owners and all(self.roster[site].min_contributors == 1 for site in owners):
            return "plain"
        return "frozen"

    def groups(self, stage: str) -> tuple[str, ...]:
        """The groups that one stage sends, sorted, frozen ones left out; known to both sides from the plan alone.

        Raises:
            Refused: ``ROUND_NOT_IN_PLAN`` for a stage that the plan does not have.
        """
        slots = sorted(_declared_slots(self.study_schema))
        match stage:
            case "statistics" if self.statistics is not None:
                names = ["statistics"]
            case "marginals" if self.table is not None:
                names = [f"table/{self.table.slot}"]
            case "recentre" if self.recentre is not None:
                names = [f"mean/{slot}" for slot in self.recentre.slots]
            case "prototypes" if self.prototypes is not None:
                names = [f"prototype/{slot}" for slot in self.prototypes.slots]
            case "codec" if self.codec is not None:
                names = [f"codec/{slot}" for slot in self.codec.slots]
            case "core":
                names = ["trunk", *(f"slot/{slot}" for slot in slots if self.training.group == "all")]
            case "audit" if self.audit.attacks:
                names = ["audit"]
            case _:
                raise Refused("ROUND_NOT_IN_PLAN", f"stage {stage!r}")
        return tuple(name for name in sorted(names) if self.exchange(name) != "frozen")

    def asked(self, stage: str, invited: tuple[str, ...]) -> tuple[str, ...]:
        """The groups of a stage that these invited sites can send: plain ones, and masked ones with sites enough."""
        return tuple(
            name
            for name in self.groups(stage)
            if self.exchange(name) == "plain" or len(self.cohort(name, invited)) >= self.min_cohort(name)
        )

    def weight(self, site: str) -> float:
        """The public weight of a site's updates in a mean: its declared capacity over the largest one declared."""
        return self.roster[site].n_decl / max(entry.n_decl for entry in self.roster.values())

    def cohort(self, group: str, invited: tuple[str, ...]) -> tuple[str, ...]:
        """The invited owners of ``group``, sorted: the sites between which its masks run."""
        return tuple(site for site in self.owners(group) if site in invited)


def plan_hash(data: bytes) -> str:
    """SHA-256 of a plan's canonical bytes."""
    return hashlib.sha256(data).hexdigest()


def binding_payload(
    *,
    site: str,
    slots: tuple[str, ...],
    n_decl: int,
    held_out_decl: int,
    min_contributors: int,
    identity_key: bytes,
    masking_key: bytes,
) -> bytes:
    """What a site signs about itself, so that nobody can swap its masking key or its numbers in a roster."""
    return canonical(
        {
            "site": site,
            "slots": list(slots),
            "n_decl": n_decl,
            "held_out_decl": held_out_decl,
            "min_contributors": min_contributors,
            "identity_key": identity_key.hex(),
            "masking_key": masking_key.hex(),
        }
    ).encode()


def _declared_slots(schema: Mapping[str, JsonValue]) -> set[str]:
    slots = schema.get("slots")
    entries = slots if isinstance(slots, list) else []
    names = {str(entry["name"]) for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)}
    if not names:
        raise ValueError("study_schema: it declares no slots; give the schema as the models room writes it")
    return names


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of a plan; an infinite epsilon is written as the word 'inf'")


def _sentence(entry: Mapping[str, Any]) -> str:
    return f"{'.'.join(str(part) for part in entry['loc']) or 'plan'}: {entry['msg']}"
