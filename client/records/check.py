"""`medgen site check`: what a site's files hold and what is wrong with them. Local: the report never leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from client.records.config import DataConfig
from client.records.load import read_everyone
from client.records.problems import BadSite, Problem
from medgen_models.schema import Schema
from privacy.ledger import AccessToken


@dataclasses.dataclass(frozen=True)
class InstanceCount:
    """One instance of a slot: patients and visits that have it."""

    key: str
    patients: int
    visits: int


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What would be used.

    Attributes:
        usable: at least one patient has a usable record.
        listed: patients of the participants file that fit the filter.
        null: pseudonyms of null patients (a bad record, or none at all).
        instances: counts per instance of the site's slots.
        problems: everything that is wrong.
        counts: what was left out by rule.
    """

    usable: bool
    listed: int
    null: tuple[str, ...]
    instances: tuple[InstanceCount, ...]
    problems: tuple[Problem, ...]
    counts: Mapping[str, int]


def check(
    config: DataConfig,
    site_dir: Path,
    schema: Schema,
    slots: Iterable[str],
    token: AccessToken,
    patient_key: bytes | None = None,
) -> CheckReport:
    """Read everything as training would, without a cache, and say what was found.

    ``patient_key`` is the site's key of the fixed split, where it is made already.

    Raises:
        NoAccess: ``token`` is no token of the ledger. A site that cannot be read is reported, not raised.
    """
    owned = frozenset(slots)
    try:
        everyone = read_everyone(config, site_dir, schema, owned, token, patient_key=patient_key)
    except BadSite as error:
        return CheckReport(False, 0, (), (), error.problems, {})
    batch = everyone.batch
    patients = batch.present_BVI.any(dim=1).sum(dim=0).tolist()
    visits = batch.present_BVI.sum(dim=(0, 1)).tolist()
    rows = tuple(
        InstanceCount(slot.key(instance), int(patients[i]), int(visits[i]))
        for i, (slot, instance) in enumerate(schema.instances())
        if slot.name in owned
    )
    there = batch.visit_BV.any(dim=1).tolist()
    null = tuple(name for name, seen in zip(batch.ids, there, strict=True) if not seen)
    return CheckReport(any(there), len(batch), null, rows, everyone.problems, everyone.counts)
