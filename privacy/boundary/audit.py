"""The part of a plan that asks for an audit: attacks, risks, groups of patients and canaries, all fixed before anybody looks.

Covered: thresholds that do not rise, anything named twice, groups and guesses that contradict themselves.
Not covered: whether this version knows an attack of that name; the site that is asked to run it says so.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, model_validator

JOINT = "joint"

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
Words = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9@][A-Za-z0-9 ._@+=:%(),<>|/&*'-]{0,79}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Public(BaseModel):
    """Frozen; unknown keys are refused. Every field of a plan is public."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Attack(_Public):
    """One pre-registered attack with its thresholds, fixed before anyone looked.

    Attributes:
        scope: the slot attacked, or ``joint``.
    """

    name: Label
    scope: Label = JOINT
    thresholds: tuple[Finite, ...] = Field(min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(low >= high for low, high in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ValueError(f"attack {self.name}: expected thresholds that rise")
        return self

    @property
    def label(self) -> str:
        """Name and scope: unique in a plan."""
        return self.name if self.scope == JOINT else f"{self.name}, {self.scope}"


class PlannedRisk(_Public):
    """One attack of the three risks of opinion WP216, with no threshold: it works on a patient or it does not.

    Attributes:
        attack: its name, unique within the risk.
        main: the one that must be sharp for the risk to pass.
        slot: whose records the attacker holds, where it is not the table.
        secret: the column that the inference attack asks for.
        neighbours: of the linkability attack.
    """

    risk: Literal["singling out", "linkability", "inference"]
    attack: Words
    main: bool = False
    slot: Label | None = None
    secret: str = ""
    neighbours: int = Field(default=1, ge=1)


class PatientGroup(_Public):
    """Patients by one column of the table: a level of it, or a band ``low <= value < high`` in the column's unit."""

    column: Words
    level: str = ""
    low: Finite | None = None
    high: Finite | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        bands = [edge for edge in (self.low, self.high) if edge is not None]
        if len(bands) != (0 if self.level else 2) or bands != sorted(set(bands)):
            raise ValueError(f"group of {self.column}: expected a level, or low < high")
        return self

    @property
    def name(self) -> str:
        """Such as ``sex=F`` or ``age 40 to 65``."""
        return f"{self.column}={self.level}" if self.level else f"{self.column} {self.low:g} to {self.high:g}"


class Canaries(_Public):
    """Made-up patients in spare coordinates of training at each site, and how their coins are guessed: fixed in advance.

    Attributes:
        per_site: fair coins that each site tosses.
        guesses: pairs: so many highest scores are guessed "in", so many lowest "out"; the sums rise.
        thresholds: of the score, at which hits are counted.
    """

    per_site: int = Field(ge=100, le=100_000)
    guesses: tuple[tuple[int, int], ...] = Field(min_length=1, max_length=32)
    thresholds: tuple[Finite, ...] = Field(min_length=1, max_length=32)

    @model_validator(mode="after")
    def _check(self) -> Self:
        sums = [top + bottom for top, bottom in self.guesses]
        if any(min(pair) < 0 for pair in self.guesses) or sums != sorted(set(sums)) or not 0 < sums[0] <= sums[-1]:
            raise ValueError(f"canaries: expected numbers of guesses whose sums rise from 1, got {self.guesses}")
        if sums[-1] > self.per_site:
            raise ValueError(f"canaries: {sums[-1]} guesses of {self.per_site} coins; guess fewer")
        if any(low >= high for low, high in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ValueError("canaries: expected thresholds that rise")
        return self


class Audit(_Public):
    """What the sites measure on the candidate cohort, outside the guarantee.

    Attributes:
        risks: attacks of the three risks.
        predicates: conditions that the singling-out attack tries.
        tolerance: absolute error, in spans of the column, at which a number counts as told.
        groups: patients on whom the joint attacks are counted by themselves.
        fewest: patients of a group, of members and of held-out patients, below which a site says nothing of the group;
            no plan may ask for fewer than four, which over three sites is more than eleven.
        policy: thresholds of the release gate, as the privacy room writes them.
        cap: most queries outside the guarantee (*not covered*) that one site answers for this plan.
        pairs: pre-drawn pairs behind a concordance (utility) figure.
        trials: members, and as many held-out patients, that each site attacks; 0: its declared held-out size.
        draws: fixed (time, noise) draws on which losses are averaged.
        canaries: the in-training audit; None: no canary is put into training. It reads no record and costs no query.
    """

    attacks: tuple[Attack, ...] = Field(default=(), max_length=256)
    risks: tuple[PlannedRisk, ...] = Field(default=(), max_length=64)
    predicates: int = Field(default=32, ge=1, le=10_000)
    tolerance: float = Field(default=0.05, ge=0, lt=1)
    groups: tuple[PatientGroup, ...] = Field(default=(), max_length=64)
    fewest: int = Field(default=4, ge=4)
    policy: dict[str, JsonValue] = Field(default_factory=dict)
    cap: int = Field(default=0, ge=0)
    pairs: int = Field(default=0, ge=0)
    trials: int = Field(default=0, ge=0)
    draws: int = Field(default=8, ge=1)
    canaries: Canaries | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind, names in (
            ("attack", [attack.label for attack in self.attacks]),
            ("risk", [f"{risk.risk}, {risk.attack}" for risk in self.risks]),
            ("group", [group.name for group in self.groups]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"audit: {kind} names repeat: {names}; each is counted once")
        return self
