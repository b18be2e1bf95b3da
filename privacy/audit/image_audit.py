"""The audit of images that medgen did not make, and of images with a table beside them: one decision over both.

Members, held-out patients of the same population who never trained, the released images, and, if there are any, images of
the population. A patient may have several images. It runs where the images lie; the result holds counts and no patient.

Covered
    - Validity first: people or images on both sides, too few patients, groups that differ by themselves (in their images'
      contents, brightness, or number) end the audit with HOLD.
    - With a table beside the images: its own audit, and whether an image leads to the right row. The levels of both audits
      are halved, so that together they alarm no more often than one.

Not covered
    - Images of different shapes or kinds in one audit: audit T1 and PET each by itself, on one grid.
    - Any promise: without a plan there is no epsilon to hold results against, and no result here is a proof of privacy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from privacy.audit import gates, image_attacks, image_gates, standalone, table_gates
from privacy.audit.bounds import Interval
from privacy.audit.gates import Decision, Finding, decision
from privacy.audit.image_attacks import COMPONENTS, Scene, directions, halves
from privacy.audit.image_copies import (
    ImageCopies,
    Pictures,
    Resemblance,
    copies,
    copy_thresholds,
    recognition,
    resemblance,
    usual,
)
from privacy.audit.image_links import LINK_MAIN, linked_rows
from privacy.audit.likeness import Floats, Likeness
from privacy.audit.multiplicity import holm
from privacy.audit.risks import Risk
from privacy.audit.standalone import TableAudit, Tables, attack_json
from privacy.audit.table_attacks import Attacked
from privacy.audit.table_gates import TablePolicy
from privacy.audit.validity import Overlap, blind_auc, blind_counts

SCHEMA_VERSION = "medgen.image-audit/1"
_EQUAL = 0.9999  # coarse likeness of an image with itself, saved again at another brightness


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images and whose they are.

    Attributes:
        pixels_N: (N, D, ...) numbers.
        owners: the patient of each image.
    """

    pixels_N: npt.NDArray[np.generic]
    owners: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.owners) != len(self.pixels_N) or not self.owners:
            raise ValueError(f"expected a patient for each of {len(self.pixels_N)} images, got {len(self.owners)}")

    @property
    def patients(self) -> tuple[str, ...]:
        """Every patient once, in order."""
        return tuple(sorted(set(self.owners)))

    def pictures(self, likeness: Likeness) -> Pictures:
        """Ready to be compared; patients numbered as in :attr:`patients`."""
        number = {patient: i for i, patient in enumerate(self.patients)}
        return Pictures.of(likeness, self.pixels_N, [number[owner] for owner in self.owners], len(number))


@dataclasses.dataclass(frozen=True)
class ImageSets:
    """What is audited.

    Attributes:
        member, held_out, synthetic: images, all of one shape.
        reference: images of the population, of neither side.
        tables: one row per patient beside the images, with the members' and held-out patients' identifiers.
        synthetic_ids: identifiers of the synthetic table's rows, where there is a table.
    """

    member: ImageSet
    held_out: ImageSet
    synthetic: ImageSet
    reference: ImageSet | None = None
    tables: Tables | None = None
    synthetic_ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = self.member.pixels_N.shape[1:]
        for name in ("held_out", "synthetic", "reference"):
            own = getattr(self, name)
            if own is not None and own.pixels_N.shape[1:] != shape:
                raise ValueError(
                    f"{name}: images have shape {own.pixels_N.shape[1:]}, the members' {shape}; resample them to one grid"
                )


@dataclasses.dataclass(frozen=True)
class ImageAudit:
    """Everything that was measured, and what the rules say of it.

    Attributes:
        decision: RELEASE, HOLD or BLOCK, over images and table.
        valid: whether the controls of the images allow any conclusion.
        findings: one per rule and subject, the table's not among them.
        overlap: of members and held-out patients.
        blind: AUC of a classifier that never saw the cohort; None where it was not measured.
        recognition: AUC of coarse likeness on other images of the same patients.
        attacks, copies, risks: what was found; empty where the audit is invalid.
        adjusted: p-values of copies and risks after Holm, in that order.
        patients, images: numbers of members, held-out, synthetic and reference patients and images.
        shape: of an image.
        table: the audit of the table beside the images.
        policy: thresholds, before they were halved for two audits.
        seed: of all randomness.
    """

    decision: Decision
    valid: bool
    findings: tuple[Finding, ...]
    overlap: Overlap
    blind: Interval | None
    recognition: float | None
    attacks: tuple[Attacked, ...]
    copies: tuple[ImageCopies, ...]
    risks: tuple[Risk, ...]
    adjusted: tuple[float, ...]
    patients: tuple[int, ...]
    images: tuple[int, ...]
    shape: tuple[int, ...]
    table: TableAudit | None
    policy: TablePolicy
    seed: int

    @property
    def sentence(self) -> str:
        """The decision in plain words."""
        if not self.valid and self.decision == "HOLD":
            return "The audit is not valid, so it says nothing for or against these images."
        match self.decision:
            case "RELEASE":
                return "No attack that was tried finds members; that is evidence, not proof."
            case "HOLD":
                return "An officer must decide: evidence is missing, weak or doubtful."
            case "BLOCK":
                return "This cohort gives members away."

    def to_json(self) -> dict[str, Any]:
        """Counts, intervals and findings; the source of every other form of the result."""
        sides = ("members", "held_out", "synthetic", "reference")
        cut = len(self.copies)
        return {
            "schema_version": SCHEMA_VERSION,
            "decision": self.decision,
            "valid": self.valid,
            "sentence": self.sentence,
            "patients": dict(zip(sides, self.patients, strict=True)),
            "images": dict(zip(sides, self.images, strict=True)),
            "shape": list(self.shape),
            "policy": self.policy.model_dump(mode="json"),
            "policy_digest": self.policy.digest,
            "seed": self.seed,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "overlap": dataclasses.asdict(self.overlap),
            "blind_auc": None if self.blind is None else dataclasses.asdict(self.blind),
            "recognition_auc": self.recognition,
            "attacks": [attack_json(attack, self.policy) for attack in self.attacks],
            "copies": [
                {**dataclasses.asdict(found), "adjusted_p_value": p}
                for found, p in zip(self.copies, self.adjusted[:cut], strict=True)
            ],
            "risks": [
                {**dataclasses.asdict(risk), "adjusted_p_value": p}
                for risk, p in zip(self.risks, self.adjusted[cut:], strict=True)
            ],
            "table": None if self.table is None else self.table.to_json(),
        }


def audit_images(
    sets: ImageSets, policy: TablePolicy, seed: int, progress: Callable[[str], None] = lambda step: None
) -> ImageAudit:
    """Audit released images, and the table beside them if there is one.

    Args:
        sets: what is audited.
        policy: thresholds.
        seed: of all randomness: the same images and seed give the same result.
        progress: told the name of each step before it starts.

    Raises:
        ValueError: images of fewer than 8 pixels a side, not finite, or all the same everywhere.
    """
    generator = np.random.default_rng(seed)
    table: TableAudit | None = None
    used = policy
    if sets.tables is not None:
        half = {"level_block": policy.level_block / 2, "level_hold": policy.level_hold / 2}
        confidence = gates.joint_confidence(policy.gates, 2)
        used = policy.model_copy(update={**half, "gates": policy.gates.model_copy(update={"confidence": confidence})})
        table = standalone.audit(sets.tables, used, seed, lambda step: progress(f"table: {step}"))
    progress("validity of the images")
    known = sets.member, sets.held_out, sets.synthetic
    reference = (0, 0) if sets.reference is None else (len(sets.reference.patients), len(sets.reference.owners))
    patients = (*(len(own.patients) for own in known), reference[0])
    images = (*(len(own.owners) for own in known), reference[1])
    small = image_gates.too_few(patients[0], patients[1], images[2], used)
    likeness = Likeness.of(np.concatenate([sets.member.pixels_N, sets.held_out.pixels_N]))
    pool = sets.member.pictures(likeness).joined(sets.held_out.pictures(likeness))
    shared = _overlap(sets, likeness, pool)
    blind = None if small else _blind(sets, likeness, pool, generator)
    baseline = gates.blind_baseline(blind, used.gates)
    split = gates.split_overlap(shared.shared + shared.equal_records)
    twice = image_gates.repeated(shared.repeated)
    controls = [table_gates.invalid(finding) for finding in (split, twice, small, baseline) if finding is not None]

    def result(valid: bool, findings: Sequence[Finding], **found: Any) -> ImageAudit:
        own: Decision = decision(findings) if valid else "HOLD"
        both = {own} if table is None else {own, table.decision}
        worst = next(verdict for verdict in ("BLOCK", "HOLD", "RELEASE") if verdict in both)
        empty = {"recognition": None, "attacks": (), "copies": (), "risks": (), "adjusted": ()}
        return ImageAudit(
            decision=worst, valid=valid, findings=tuple(findings), overlap=shared, blind=blind,
            patients=patients, images=images, shape=likeness.shape, table=table, policy=policy, seed=seed,
            **{**empty, **found},
        )  # fmt: skip

    if split.status != "PASS" or twice or small or baseline.status == "BLOCK":
        return result(False, controls)
    progress("likeness of strangers")
    strangers = usual(likeness, pool, images[2], generator)
    progress("likeness with the cohort")
    cohort = sets.synthetic.pictures(likeness)
    seen = resemblance(likeness, pool, cohort)
    scene = _scene(sets, likeness, pool, cohort, seen, strangers, generator)
    attacks = image_attacks.run(scene, generator, progress)
    progress("copies")
    copied = _copies(scene, strangers, used)
    risks: list[Risk] = []
    if sets.tables is not None:
        progress("linkability of image and table")
        row = {name: i for i, name in enumerate(sets.synthetic_ids or ())}
        names = sets.member.patients, sets.held_out.patients
        shown = [row.get(owner, -1) for owner in sets.synthetic.owners]
        risks = linked_rows(sets.tables, names, shown, pool, seen, used)
    adjusted = holm([found.p_value for found in copied] + [risk.p_value for risk in risks])
    power = recognition(likeness, pool)
    findings = [*controls, table_gates.planted(attacks, used), table_gates.null(attacks)]
    findings += [table_gates.membership(attack, len(attacks), used) for attack in attacks]
    findings.append(table_gates.outliers(attacks, used))
    if risks:
        own = list(adjusted[len(copied) :])
        found = table_gates.risk("linkability", risks, own, LINK_MAIN, used)
        findings.append(dataclasses.replace(found, subject="linkability of image and table"))
    findings += [image_gates.copies(found, p, used) for found, p in zip(copied, adjusted, strict=False)]
    findings.append(image_gates.recognised(attacks[0], power, len(attacks), used))
    if baseline.status != "PASS" and blind is not None:
        findings = image_gates.doubtful(findings, attacks, copied, blind, used)
    return result(
        True, findings, recognition=power, attacks=tuple(attacks), copies=tuple(copied), risks=tuple(risks), adjusted=adjusted
    )  # fmt: skip


def _overlap(sets: ImageSets, likeness: Likeness, pool: Pictures) -> Overlap:
    """People on both sides, images of two patients of one side, held-out images that are a member's."""
    members = len(sets.member.patients)
    features = likeness.features(pool.view_N)
    inside = pool.owner_N < members
    repeated, across = np.zeros(len(features), bool), np.zeros(len(features), bool)
    for start in range(0, len(features), 512):
        rows = slice(start, start + 512)
        alike = features[rows] @ features.T >= _EQUAL
        alike &= pool.owner_N[rows, None] != pool.owner_N[None]
        same = inside[rows, None] == inside[None]
        repeated[rows], across[rows] = (alike & same).any(axis=1), (alike & ~same).any(axis=1)
    shared = len(set(sets.member.patients) & set(sets.held_out.patients))
    return Overlap(shared, int(repeated.sum()), int((across & ~inside).sum()))


def _blind(sets: ImageSets, likeness: Likeness, pool: Pictures, generator: np.random.Generator) -> Interval:
    """The blind baseline on leading components, brightness, spread and number of images, and the squares of all."""
    features = likeness.features(pool.view_N)
    raw: list[Floats] = []
    for own in (sets.member, sets.held_out):
        flat = own.pixels_N.reshape(len(own.pixels_N), -1)
        raw.append(np.stack([flat.mean(axis=1), flat.std(axis=1), (flat == 0).mean(axis=1)], axis=1).astype(np.float64))
    table = np.concatenate([features @ directions(features, COMPONENTS), np.concatenate(raw)], axis=1)
    count = np.bincount(pool.owner_N, minlength=pool.patients)
    mean = np.stack([np.bincount(pool.owner_N, column, pool.patients) / count for column in table.T], axis=1)
    mean = np.concatenate([mean, count[:, None].astype(np.float64)], axis=1)
    spread = mean.std(axis=0)
    scaled = (mean - mean.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    both = np.concatenate([scaled, scaled**2], axis=1)
    members = len(sets.member.patients)
    return blind_auc(blind_counts(both[:members], both[members:], generator))


def _scene(
    sets: ImageSets,
    likeness: Likeness,
    pool: Pictures,
    cohort: Pictures,
    seen: Resemblance,
    strangers: Resemblance,
    generator: np.random.Generator,
) -> Scene:
    members = len(sets.member.patients)
    reference = None if sets.reference is None else sets.reference.pictures(likeness)
    easy = strangers.person_P <= np.quantile(strangers.person_P, 0.1)  # whom no stranger resembles
    return Scene(likeness, pool, members, cohort, halves(pool, members, reference, generator), seen, easy)


def _copies(scene: Scene, strangers: Resemblance, policy: TablePolicy) -> list[ImageCopies]:
    kinds = [("whole image", scene.seen.whole_P, strangers.whole_P)]
    if scene.seen.slice_P is not None and strangers.slice_P is not None:
        kinds.append(("single slice", scene.seen.slice_P, strangers.slice_P))
    return [
        copies(what, *scene.split(score), copy_thresholds(alike), policy.gates.confidence)
        for what, score, alike in kinds
    ]
