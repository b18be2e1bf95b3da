"""The audit of a table that medgen did not make: validity first, then attacks, risks and copies, then one decision.

It needs members, held-out patients of the same population who never trained, the synthetic table, and, if there is one, a
reference table of the population. It runs where these tables lie; the result holds counts and no patient.

Covered
    - Controls before results: where members and held-out patients overlap, are too few or differ by themselves, nothing
      else is decided, and the decision is HOLD.
    - One correction over every test (Holm), one generator for all randomness, progress by callback.

Not covered
    - Images (:mod:`privacy.audit.image_audit`) and series; several rows of one patient (one row per patient, and repeated
      identifiers are refused).
    - Any promise: without a plan there is no epsilon to hold results against, and no result here is a proof of privacy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from privacy.audit import gates, table_gates
from privacy.audit.bayesian import best_credible_lower_bound, credible_power_ceiling
from privacy.audit.bounds import Interval, ThresholdCounts, auc, best_epsilon_lower_bound, power_ceiling, tpr_at_fpr
from privacy.audit.copies import repeated_rows
from privacy.audit.gates import Decision, Finding, decision
from privacy.audit.mixed import Columns, Encoder, Floats, Scale
from privacy.audit.multiplicity import excess_p_value, holm
from privacy.audit.neighbours import inferred, linked, nearest_distance, vulnerability
from privacy.audit.predicates import multivariate, single_out, univariate
from privacy.audit.risks import Risk, averaged, judge
from privacy.audit.table_attacks import ATTACKS, Attacked, folds, run
from privacy.audit.table_gates import INFERENCE_MAIN, SINGLING_OUT_MAIN, Copies, TablePolicy
from privacy.audit.validity import Overlap, blind_auc, blind_counts, overlap

SCHEMA_VERSION = "medgen.table-audit/1"
_NEVER_BY_CHANCE = 1e-3  # level at which held-out rows repeat members more than members repeat each other


@dataclasses.dataclass(frozen=True)
class Tables:
    """What is audited: (rows, C) numbers and level codes, NaN where missing, one row per patient.

    Attributes:
        columns: of all tables.
        member_PC, held_out_PC, synthetic_SC: the three tables.
        reference_RC: population rows, if there are any.
        member_ids, held_out_ids: identifiers, if there are any.
    """

    columns: Columns
    member_PC: Floats
    held_out_PC: Floats
    synthetic_SC: Floats
    reference_RC: Floats | None = None
    member_ids: tuple[str, ...] | None = None
    held_out_ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("member_PC", "held_out_PC", "synthetic_SC", "reference_RC"):
            table = getattr(self, name)
            if table is not None:
                object.__setattr__(self, name, self.columns.check(name, table))
        for name, ids, table in (
            ("member_ids", self.member_ids, self.member_PC),
            ("held_out_ids", self.held_out_ids, self.held_out_PC),
        ):
            if ids is not None and len(ids) != len(table):
                raise ValueError(f"{name}: expected {len(table)} identifiers, got {len(ids)}")
            if ids is not None and len(set(ids)) != len(ids):
                raise ValueError(
                    f"{name}: {len(ids) - len(set(ids))} rows repeat an identifier; the unit is the patient: "
                    "make it one row per patient before the audit"
                )
        for c, column in enumerate(self.columns.names):
            for side, table in (("members", self.member_PC), ("held-out patients", self.held_out_PC)):
                if len(table) and np.isnan(table[:, c]).all():
                    raise ValueError(f"column {column!r} holds no value for {side}; leave it out of all tables")
            pool = np.concatenate([self.member_PC[:, c], self.held_out_PC[:, c]])
            if len(pool) and not np.isnan(pool).any() and (pool == pool[0]).all():
                raise ValueError(
                    f"column {column!r} is constant and tells nobody from anybody; leave it out of all tables"
                )


@dataclasses.dataclass(frozen=True)
class TableAudit:
    """Everything that was measured, and what the rules say of it.

    Attributes:
        decision: RELEASE, HOLD or BLOCK: as far as these attacks go.
        valid: whether controls allow any conclusion.
        findings: one per rule and subject.
        overlap: of members and held-out patients.
        blind: AUC of a classifier that never saw the cohort; None where it was not measured.
        attacks, risks, copies: what was found; empty or None where the audit is invalid.
        adjusted: p-values of risks and of both copy tests after Holm, in that order.
        rows: rows of members, held-out, synthetic and reference tables.
        columns: of all tables.
        policy: thresholds.
        seed: of all randomness.
    """

    decision: Decision
    valid: bool
    findings: tuple[Finding, ...]
    overlap: Overlap
    blind: Interval | None
    attacks: tuple[Attacked, ...]
    risks: tuple[Risk, ...]
    copies: Copies | None
    adjusted: tuple[float, ...]
    rows: tuple[int, int, int, int]
    columns: Columns
    policy: TablePolicy
    seed: int

    @property
    def sentence(self) -> str:
        """The decision in plain words."""
        if not self.valid:
            return "The audit is not valid, so it says nothing for or against this table."
        match self.decision:
            case "RELEASE":
                return "No attack that was tried finds members; that is evidence, not proof."
            case "HOLD":
                return "An officer must decide: evidence is missing, weak or doubtful."
            case "BLOCK":
                return "This table gives members away."

    def to_json(self) -> dict[str, Any]:
        """Counts, intervals and findings; the source of every other form of the result."""
        policy = self.policy
        members, held_out, synthetic, reference = self.rows
        return {
            "schema_version": SCHEMA_VERSION,
            "decision": self.decision,
            "valid": self.valid,
            "sentence": self.sentence,
            "rows": {"members": members, "held_out": held_out, "synthetic": synthetic, "reference": reference},
            "columns": [{"name": n, "kind": k} for n, k in zip(self.columns.names, self.columns.kinds, strict=True)],
            "policy": policy.model_dump(mode="json"),
            "policy_digest": policy.digest,
            "seed": self.seed,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "overlap": dataclasses.asdict(self.overlap),
            "blind_auc": None if self.blind is None else dataclasses.asdict(self.blind),
            "attacks": [attack_json(attack, policy) for attack in self.attacks],
            "risks": [
                {**dataclasses.asdict(risk), "adjusted_p_value": p}
                for risk, p in zip(self.risks, self.adjusted[: len(self.risks)], strict=True)
            ],
            "copies": None
            if self.copies is None
            else {**dataclasses.asdict(self.copies), "adjusted_p_values": list(self.adjusted[len(self.risks) :])},
        }


def attack_json(attack: Attacked, policy: TablePolicy) -> dict[str, Any]:
    """An attack with every number that a reader needs to judge its silence: intervals, bounds and their ceilings."""
    counts, level = attack.counts, policy.gates.confidence
    sizes, tests = (counts.trials_member, counts.trials_held_out), len(counts.thresholds)
    return {
        **dataclasses.asdict(attack),
        "auc": dataclasses.asdict(auc(counts, level)),
        "tpr_at_fpr": {f"{fpr:g}": dataclasses.asdict(tpr_at_fpr(counts, fpr, level)) for fpr in (0.01, 0.05, 0.1)},
        "epsilon_lower": best_epsilon_lower_bound(counts, policy.delta, level),
        "epsilon_lower_ceiling": power_ceiling(*sizes, policy.delta, level, tests),
        "epsilon_credible": best_credible_lower_bound(counts, policy.delta, level).epsilon,
        "epsilon_credible_ceiling": credible_power_ceiling(*sizes, policy.delta, level, tests),
        "planted_found": table_gates.planted_rate(attack, policy),
    }


def audit(
    tables: Tables, policy: TablePolicy, seed: int, progress: Callable[[str], None] = lambda step: None
) -> TableAudit:
    """Audit a synthetic table.

    Args:
        tables: what is audited.
        policy: thresholds.
        seed: of all randomness: the same tables and seed give the same result.
        progress: told the name of each step before it starts.

    Raises:
        ValueError: the policy names a secret that is no column.
    """
    if unknown := set(policy.secrets) - set(tables.columns.names):
        raise ValueError(
            f"policy: secret {sorted(unknown)[0]!r} is no column; known are {', '.join(tables.columns.names)}"
        )
    generator = np.random.default_rng(seed)
    progress("validity")
    rows = (
        len(tables.member_PC),
        len(tables.held_out_PC),
        len(tables.synthetic_SC),
        0 if tables.reference_RC is None else len(tables.reference_RC),
    )
    shared = _overlap(tables)
    split = table_gates.invalid(gates.split_overlap(shared.shared + shared.equal_records))
    small = table_gates.too_few(*rows[:3], policy)
    interval: Interval | None = None
    if small is None:
        interval = _blind(tables, generator)
    baseline = gates.blind_baseline(interval, policy.gates)
    controls = [table_gates.invalid(finding) for finding in (split, *([small] if small else []), baseline)]

    def result(
        valid: bool,
        findings: Sequence[Finding],
        attacks: Sequence[Attacked] = (),
        risks: Sequence[Risk] = (),
        copies: Copies | None = None,
        adjusted: Sequence[float] = (),
    ) -> TableAudit:
        decided = decision(findings) if valid else "HOLD"
        evidence = tuple(attacks), tuple(risks), copies, tuple(adjusted)
        return TableAudit(
            decided, valid, tuple(findings), shared, interval, *evidence, rows, tables.columns, policy, seed
        )

    if split.status != "PASS" or small is not None or baseline.status == "BLOCK":
        return result(False, controls)
    attacks = _attacks(tables, generator, progress)
    risks = _risks(tables, policy, generator, progress)
    progress("copies")
    copies = _copies(tables, policy, generator)
    tested = [risk.p_value for risk in risks] + [copies.p_near, copies.repeats.p_value]
    adjusted = holm(tested)
    findings = [*controls, table_gates.planted(attacks, policy), table_gates.null(attacks)]
    findings += [table_gates.membership(attack, len(attacks), policy) for attack in attacks]
    findings.append(table_gates.outliers(attacks, policy))
    mains = {
        "singling out": SINGLING_OUT_MAIN,
        "linkability": _link_name(policy.neighbours[0]),
        "inference": INFERENCE_MAIN,
    }
    for name in ("singling out", "linkability", "inference"):
        own = [i for i, risk in enumerate(risks) if risk.name == name]
        chosen = [risks[i] for i in own], [adjusted[i] for i in own]
        findings.append(table_gates.risk(name, *chosen, mains[name], policy))
    findings += table_gates.copies(copies, adjusted[-2], adjusted[-1], policy)
    if baseline.status != "PASS" and interval is not None:
        findings = table_gates.doubtful(findings, attacks, copies, interval, policy)
    return result(True, findings, attacks, risks, copies, adjusted)


def _overlap(tables: Tables) -> Overlap:
    """Overlap by identifier, and by content where rows of one side do not repeat each other as often.

    In a coarse table equal rows are different people; there, held-out rows that repeat members are counted only as far as
    they do so more than members repeat each other.
    """
    member, held_out = tables.member_PC, tables.held_out_PC
    ids = tables.member_ids or (), tables.held_out_ids or ()
    found = overlap(*ids, member, held_out)
    if not len(member) or not len(held_out):
        return found
    order = np.where(np.isnan(member), np.inf, member)
    _, counts = np.unique(order, axis=0, return_counts=True)
    twins = int(counts[counts > 1].sum())
    chance = twins > 0 and excess_p_value(found.equal_records, len(held_out), twins, len(member)) > _NEVER_BY_CHANCE
    return dataclasses.replace(found, equal_records=0) if chance else found


def _blind(tables: Tables, generator: np.random.Generator) -> Interval:
    """The blind baseline on features and their squares, so that a difference in spread shows too."""
    pool = np.concatenate([tables.member_PC, tables.held_out_PC])
    features = Encoder.of(tables.columns, pool).transform(pool)
    both = np.concatenate([features, features**2], axis=1)
    return blind_auc(blind_counts(both[: len(tables.member_PC)], both[len(tables.member_PC) :], generator))


def _attacks(tables: Tables, generator: np.random.Generator, progress: Callable[[str], None]) -> list[Attacked]:
    progress("who is easy to recognise")
    pool = np.concatenate([tables.member_PC, tables.held_out_PC])
    far = vulnerability(Scale.of(tables.columns, pool).cells(pool))
    easy = far >= np.quantile(far, 0.9)
    sides: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] = (
        easy[: len(tables.member_PC)],
        easy[len(tables.member_PC) :],
    )
    split = folds(len(tables.member_PC), tables.held_out_PC, tables.reference_RC, generator)
    found = []
    for name in ATTACKS:
        progress(f"attack {name}")
        three = tables.member_PC, tables.held_out_PC, tables.synthetic_SC
        found.append(run(name, tables.columns, *three, split, sides, generator))
    return found


def _link_name(neighbours: int) -> str:
    return f"{neighbours} nearest"


def _risks(
    tables: Tables, policy: TablePolicy, generator: np.random.Generator, progress: Callable[[str], None]
) -> list[Risk]:
    """All attacks of the three risks that the table allows."""
    columns, level = tables.columns, policy.gates.confidence
    member, held_out, synthetic = tables.member_PC, tables.held_out_PC, tables.synthetic_SC
    found: list[Risk] = []
    for attack, make in (("univariate predicates", univariate), (str(SINGLING_OUT_MAIN), multivariate)):
        progress(f"singling out, {attack}")
        out = single_out(make, columns, member, held_out, synthetic, generator, policy.predicates, policy.draws)
        if out is not None:
            sides = (out.hits_member, out.predicates), (out.hits_held_out, out.predicates)
            guessed = out.hits_baseline, out.baseline_predicates
            found.append(judge("singling out", attack, *sides, guessed, level, out.p_value))
    scale = Scale.of(columns, np.concatenate([member, held_out]))
    cells_m, cells_h, cells_s = (scale.cells(table) for table in (member, held_out, synthetic))
    if len(columns.names) >= 2:
        progress("linkability")
        order = generator.permutation(len(columns.names)).tolist()
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        own_m, strange_m = linked(cells_m, cells_s, *halves, policy.neighbours)
        own_h, _ = linked(cells_h, cells_s, *halves, policy.neighbours)
        for i, k in enumerate(policy.neighbours):
            counted = [(int(hits[:, i].sum()), len(hits)) for hits in (own_m, own_h, strange_m)]
            found.append(judge("linkability", _link_name(k), counted[0], counted[1], counted[2], level))
        progress("inference")
        secrets = [c for c, n in enumerate(columns.names) if not policy.secrets or n in policy.secrets]
        # one call for both sides: ties must fall the same way for members and for held-out patients
        both = np.concatenate([cells_m, cells_h])
        told, drawn = inferred(both, cells_s, secrets, policy.inference_tolerance, generator)
        own_m, own_h, guessed_m = told[: len(cells_m)], told[len(cells_m) :], drawn[: len(cells_m)]
        found.append(averaged(INFERENCE_MAIN, own_m, own_h, guessed_m, generator, level, policy.draws))
        for i, c in enumerate(secrets):
            counted = [(int(hits[:, i].sum()), len(hits)) for hits in (own_m, own_h, guessed_m)]
            found.append(judge("inference", columns.names[c], counted[0], counted[1], counted[2], level))
    return found


def _copies(tables: Tables, policy: TablePolicy, generator: np.random.Generator) -> Copies:
    scale = Scale.of(tables.columns, np.concatenate([tables.member_PC, tables.held_out_PC]))
    member, held_out, synthetic = (
        scale.cells(table) for table in (tables.member_PC, tables.held_out_PC, tables.synthetic_SC)
    )
    near = [nearest_distance(side, synthetic) for side in (member, held_out)]
    twins = int((vulnerability(member, 1) <= policy.copy_tolerance).sum())
    hits = [int((distance <= policy.copy_tolerance).sum()) for distance in near]
    counts = ThresholdCounts((-policy.copy_tolerance,), (hits[0],), (hits[1],), len(near[0]), len(near[1]))
    repeats = repeated_rows(tables.member_PC, tables.held_out_PC, tables.synthetic_SC, generator, policy.draws)
    p_value = excess_p_value(hits[0], len(near[0]), hits[1], len(near[1]))
    return Copies(counts, twins, p_value, repeats)
