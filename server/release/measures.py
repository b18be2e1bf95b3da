"""Words and measures that evidence is made of: guarded text, and the cohort against the public reference population."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9@][A-Za-z0-9 ._@+=:%(),<>|/&*'–-]{0,79}$")]
GroupName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][A-Za-z0-9_.-]{0,47}(/[a-z0-9][A-Za-z0-9_.-]{0,47})?$")]
Sentence = Annotated[str, StringConstraints(min_length=1, max_length=600, pattern=r"^[^\\<>{}\x00-\x1f]*$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Figure = Annotated[str, StringConstraints(pattern=r"^figures/[a-z0-9][a-z0-9_-]{0,63}\.png$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    """Frozen; unknown keys are refused; infinity survives JSON as the word."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class FidelityRow(Frozen):
    """One measure of the cohort against the *public* reference population (never against real patients).

    Attributes:
        value: the measure for the cohort.
        floor: the same between two halves of the reference: as good as sampling allows.
        better: which direction is better.
    """

    part: Literal["table", "series", "image", "coherence"]
    subject: Name
    measure: Name
    value: float
    floor: float | None = None
    better: Literal["lower", "higher"] = "lower"


class Marginal(Frozen):
    """Shares per public bin or category of one table column."""

    column: Name
    unit: str = Field(default="", max_length=24)
    labels: tuple[str, ...] = Field(min_length=1, max_length=40)
    synthetic: tuple[Share, ...]
    public: tuple[Share, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.labels) == len(self.synthetic) == len(self.public):
            raise ValueError(f"column {self.column}: expected one share per label in both populations")
        return self


class Trace(Frozen):
    """One series channel over time: mean and 10 % to 90 % range of both populations; None where nothing was seen."""

    channel: Name
    unit: str = Field(default="", max_length=24)
    hours: tuple[float, ...] = Field(min_length=1)
    synthetic_mean: tuple[float | None, ...]
    synthetic_low: tuple[float | None, ...]
    synthetic_high: tuple[float | None, ...]
    public_mean: tuple[float | None, ...]
    public_low: tuple[float | None, ...]
    public_high: tuple[float | None, ...]


class Correlation(Frozen):
    """Correlation of something measured *in the image* with a table column of the same patient."""

    attribute: Name
    column: Name
    synthetic: float = Field(ge=-1, le=1)
    public: float = Field(ge=-1, le=1)
    shuffled: float | None = Field(default=None, ge=-1, le=1)


class Utility(Frozen):
    """A predictor's AUC as concordant pairs among pre-drawn (event, no event) pairs of real held-out patients.

    Attributes:
        concordant: pairs ordered rightly, ties counted one half and rounded down at each site.
        real: whether the pairs are real held-out patients (an entry of the audit message) or public ones.
    """

    task: Name
    trained_on: Literal["synthetic", "public", "real"]
    concordant: Count
    pairs: int = Field(ge=1)
    real: bool = True
    sites: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.concordant > self.pairs:
            raise ValueError(f"utility {self.task}: {self.concordant} concordant of {self.pairs} pairs")
        return self


class Sheet(Frozen):
    """Two contact sheets of one instance: synthetic patients, and public phantoms beside them.

    Attributes:
        synthetic: figure file drawn from the cohort.
        public: figure file drawn from the public reference population.
        synthetic_labels: factor levels of the synthetic tiles, row by row.
    """

    instance: Name
    title: Sentence
    unit: str = Field(default="", max_length=24)
    synthetic: Figure
    synthetic_sha256: Digest
    public: Figure
    public_sha256: Digest
    synthetic_labels: tuple[Name, ...] = ()
    public_labels: tuple[Name, ...] = ()
