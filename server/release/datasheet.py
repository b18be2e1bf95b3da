"""The bundle for people who have not seen the study: a label of figures, and a datasheet under its usual questions.

The questions are those of Gebru et al., Datasheets for Datasets (2021); the label on top is in the manner of the Dataset
Nutrition Label (Holland et al., 2018). Answers come from the report and the schema; where there is none, that is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgen_models.schema import Schema, Slot
from server.release.cohort_read import read_schema

FILE = "datasheet.md"


def write(folder: Path, report: Mapping[str, Any], version: str) -> None:
    """Write the datasheet into a bundle folder that holds cohort and report."""
    (folder / FILE).write_text(text(read_schema(folder / "cohort"), report, version), encoding="utf-8")


def text(schema: Schema, report: Mapping[str, Any], version: str) -> str:
    """The datasheet as Markdown."""
    evidence, verdict = report["evidence"], report["verdict"]
    cohort, promise, public = evidence["cohort"], evidence["promise"], evidence["public"]
    promised = (
        promise["sentence"]
        if promise and verdict["private"]
        else "**Nothing is promised:** treat this cohort like the patient data behind the model."
    )
    open_rules = sorted({f["rule"] for f in verdict["findings"] if f["status"] in ("HOLD", "BLOCK")})
    sites = len(evidence["sites"])
    label = {
        "Synthetic patients": cohort["patients"],
        "Real patients in it": "none",
        "Parts": ", ".join(cohort["slots"]),
        "Files, megabytes": f"{cohort['files']}, {cohort['bytes'] / 1e6:.1f}",
        "Verdict": f"{verdict['decision']} (policy {verdict['policy']})",
        "Rules that are open": ", ".join(open_rules) or "none",
        "Epsilon, delta": f"{promise['epsilon']}, {promise['delta']} per patient and site" if promise else "not stated",
        "Attempts to pass": evidence["attempt"],
        "Licence": cohort["licence"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in label.items())
    slots = "\n".join(_slot(slot) for slot in schema.slots)
    fidelity = _fidelity(evidence["fidelity"])
    source = (
        f"public data: {public['name']} (overlap with patients: {public['overlap']})" if public else "no public data"
    )
    return f"""# Datasheet: {evidence["study"]} synthetic patients

| label | |
|---|---|
{rows}

## Motivation

**Why was it made?** {cohort["intended_use"]}

**By whom?** By the consortium of the study {evidence["study"]}, {sites} sites, with medgen {version}.

## Composition

**What are the instances?** Synthetic patients, `sub-SYN0001` and on. Each is drawn as a whole: table row first, then images and
series that fit it. A patient may lack a part, as real ones do.

| part | kind | content | public range or grid |
|---|---|---|---|
{slots}

**Is anything missing?** Missing values were drawn as missing. Notes are never written.

**Does it say anything about people?** Nobody in it exists. About the patients behind the model: {promised}

**What does the promise not cover?** {_list(promise["not_covered"]) if promise else "There is none."}

## Collection

**How was it acquired?** Not at all: no record was collected. The model was trained at the sites, on records that never left them, and
on {source}.

**Were patients asked?** That is for each site to answer; the plan `{evidence["plan_sha256"] or "not stated"}` was approved at each.

## Preprocessing

Numbers are rounded to a hundred-thousandth of their public range, images stored with 16 bits. `cohort/` holds the files that were
attacked; `dicom/`, where it is, the same pixels again.

## Uses

**Intended.** {cohort["intended_use"]}

**Forbidden.** {cohort["forbidden_use"]}

**What should a user know?** Rare findings are rarer here than in the clinic, and under privacy may be missing. No rate in this cohort is
an estimate about real patients.

{fidelity}

## Distribution and maintenance

The bundle is signed; check it with `medgen release verify`, and with the consortium's revocation list. It is never updated: a
release that must no longer be used is named in that list. Licence: {cohort["licence"]}.
"""


def _slot(slot: Slot) -> str:
    match slot.kind:
        case "volume" | "image":
            content = ", ".join(instance.name or slot.name for instance in slot.instances)
            grid = " × ".join(map(str, slot.shape)) + (
                f", {' × '.join(f'{step:g}' for step in slot.voxel_mm)} mm" if slot.voxel_mm else ""
            )
        case "table" | "series":
            content = ", ".join(
                f"{column.name} [{column.unit}]" if column.unit else column.name for column in slot.columns
            )
            grid = (
                f"{len(slot.columns)} columns"
                if slot.kind == "table"
                else f"{len(slot.columns)} channels, {slot.hours:g} h"
            )
        case _:
            content, grid = "not released", "none"
    return f"| {slot.name} | {slot.kind} | {content} | {grid} |"


def _fidelity(rows: list[Mapping[str, Any]]) -> str:
    if not rows:
        return "**How close is it to a known population?** Not measured."
    lines = "\n".join(
        f"| {row['part']} | {_cell(row['subject'])} | {_cell(row['measure'])} | {row['value']} | "
        f"{'' if row['floor'] is None else row['floor']} | {row['better']} |"
        for row in rows
    )
    return (
        "**How close is it to the public reference population?** (`floor`: between two halves of that population.)\n\n"
        "| part | subject | measure | value | floor | better |\n|---|---|---|---|---|---|\n" + lines
    )


def _cell(name: str) -> str:
    """A name in a table, where a bar would begin the next cell."""
    return name.replace("|", "\\|")


def _list(sentences: list[str]) -> str:
    return "Nothing is named." if not sentences else "".join(f"\n- {sentence}" for sentence in sentences)
