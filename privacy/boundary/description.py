"""The part of a plan that asks for a descriptive table: public columns with their ranges, records, bins.

Covered: a column without a range, anything named twice, a table that asks for nothing.
Not covered: whether the schema has these columns and records; a plan made by ``server.planning`` takes them from it.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from privacy.summary import Layout

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Public(BaseModel):
    """Frozen; unknown keys are refused. Every field of a plan is public."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NumericColumn(_Public):
    """A column of the table with the public range in which it is described."""

    name: str = Field(min_length=1, max_length=64)
    low: Finite
    high: Finite

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"{self.name}: expected low < high, got {self.low} and {self.high}")
        return self


class Statistics(_Public):
    """A descriptive table as one release: means, variances and quantiles of columns, and who has which records.

    Attributes:
        columns: numeric columns of the table.
        present: keys of the instances whose patients are counted.
        bins: equal bins of each column, for its quantiles.
    """

    columns: tuple[NumericColumn, ...]
    present: tuple[str, ...]
    bins: int = Field(ge=2, le=1024)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names) or len(set(self.present)) != len(self.present):
            raise ValueError("statistics: a column or instance is named twice; each is described once")
        if not names and not self.present:
            raise ValueError("statistics: nothing is asked for; name a column or an instance, or leave it out")
        return self

    @property
    def layout(self) -> Layout:
        """What each number of an answer means."""
        low, high = tuple(c.low for c in self.columns), tuple(c.high for c in self.columns)
        return Layout(low=low, high=high, bins=self.bins, flags=len(self.present))
