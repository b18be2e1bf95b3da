"""The bundle as data catalogues and loaders read it: Croissant 1.1 metadata with the responsible-AI fields (RAI 1.0).

JSON-LD written by hand: files with SHA-256, tables as record sets with columns and units, images as file sets, where the
data come from (PROV-O: made by software, derived from no data set that anybody could fetch), limits and uses in words.
Everything is taken from the report and the cohort's own schema; nothing is claimed here that is not said there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgen_models.schema import Column, Schema
from server.release.cohort_read import read_schema

FILE = "croissant.json"
CROISSANT, RAI = "http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"
LICENCES = {"CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/"}
_SETS = (
    ("volumes", "cohort/sub-SYN*/**/*.nii.gz", "application/gzip", "Synthetic volumes, NIfTI-1, gzipped."),
    ("films", "cohort/sub-SYN*/**/*.png", "image/png", "Synthetic X-ray films, 16-bit grey."),
    ("sidecars", "cohort/sub-SYN*/**/*.json", "application/json", "What each image is, and that it is synthetic."),
    ("dicom", "dicom/sub-SYN*/**/*.dcm", "application/dicom", "The same images as DICOM secondary captures."),
)
_TYPES = {
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    ".json": "application/json",
    ".md": "text/markdown",
    ".html": "text/html",
    ".pdf": "application/pdf",
    ".parquet": "application/vnd.apache.parquet",
    ".safetensors": "application/octet-stream",
}
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def metadata(folder: Path, report: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Croissant metadata of a bundle folder that holds cohort and report, and its other files.

    Args:
        folder: the bundle; the metadata file itself and the signed statements are not in it yet.
        report: its report.
        version: of the generator.
    """
    evidence = report["evidence"]
    cohort, created = evidence["cohort"], evidence["created"]
    schema = read_schema(folder / "cohort")
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "@id": f"urn:medgen:cohort:{cohort['manifest_sha256']}",
        "conformsTo": [CROISSANT, RAI],
        "name": f"{evidence['study']} synthetic patients",
        "description": (
            f"{cohort['patients']} synthetic patients who never existed, drawn by medgen from a model that hospitals trained "
            "together without pooling their records. report.json says what was promised, spent, attacked and decided."
        ),
        "license": LICENCES.get(cohort["licence"], cohort["licence"]),
        "url": f"urn:medgen:cohort:{cohort['manifest_sha256']}",
        "creator": {"@type": "sc:Organization", "name": f"consortium of the study {evidence['study']}"},
        "dateCreated": created,
        "datePublished": created,
        "version": "1.0.0",
        "isLiveDataset": False,
        "keywords": ["synthetic data", "synthetic patients", *cohort["slots"]],
        "citeAs": f"Synthetic patients of the study {evidence['study']}, cohort SHA-256 {cohort['manifest_sha256']}",
        "distribution": [*_files(folder), *_file_sets(folder)],
        "recordSet": [record for record in _record_sets(folder, schema)],
        **_provenance(evidence, version),
        **_responsible(report),
    }


def write(folder: Path, report: Mapping[str, Any], version: str) -> None:
    """Write :func:`metadata` into the bundle folder."""
    body = json.dumps(metadata(folder, report, version), indent=1, sort_keys=True) + "\n"
    (folder / FILE).write_text(body, encoding="utf-8")


def _files(folder: Path) -> list[dict[str, Any]]:
    """Every file that is not one of many images."""
    names = sorted(
        path
        for pattern in ("*", "cohort/*", "model/**/*", "figures/*")
        for path in folder.glob(pattern)
        if path.is_file() and path.name != FILE
    )
    return [
        {
            "@type": "cr:FileObject",
            "@id": path.relative_to(folder).as_posix(),
            "name": path.relative_to(folder).as_posix(),
            "contentUrl": path.relative_to(folder).as_posix(),
            "contentSize": f"{path.stat().st_size} B",
            "encodingFormat": _TYPES.get(
                path.suffix, "image/png" if path.suffix == ".png" else "application/octet-stream"
            ),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in names
    ]


def _file_sets(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "@type": "cr:FileSet",
            "@id": name,
            "name": name,
            "description": f"{text} {count} files; the SHA-256 of each is in the signed release statement.",
            "encodingFormat": kind,
            "includes": pattern,
        }
        for name, pattern, kind, text in _SETS
        if (count := sum(1 for _ in folder.glob(pattern)))
    ]


def _record_sets(folder: Path, schema: Schema) -> list[dict[str, Any]]:
    keys = ["participant_id", *(["session_id"] if schema.max_visits > 1 else [])]
    found = [
        _record_set(
            "participants", "cohort/participants.tsv", "One row per synthetic patient.", [_key("participant_id")]
        )
    ]
    for slot in schema.slots:
        file = f"cohort/{slot.name}.csv"
        if not (folder / file).is_file():
            continue
        if slot.kind == "table":
            fields = [_field(column) for column in slot.columns]
            text = "One row per synthetic patient" + (" and visit." if schema.max_visits > 1 else ".")
        else:
            units = "; ".join(f"{column.name} in {column.unit or 'no unit'}" for column in slot.columns)
            fields = [
                ("minute", "sc:Float", "Minutes since the start of the record."),
                ("channel", "sc:Text", f"What was measured: {units}."),
                ("value", "sc:Float", "The value, in the unit of its channel."),
            ]
            text = "One row per value of a series."
        found.append(_record_set(slot.name, file, text, [*map(_key, keys), *fields]))
    return found


def _key(name: str) -> tuple[str, str, str]:
    return (name, "sc:Text", "Made-up identifier; no person has it.")


def _field(column: Column) -> tuple[str, str, str]:
    if column.kind == "categorical":
        return (column.name, "sc:Text", f"One of: {', '.join(column.categories)}; empty if missing.")
    unit = f" {column.unit}" if column.unit else ""
    return (column.name, "sc:Float", f"From {column.low:g} to {column.high:g}{unit}; empty if missing.")


def _record_set(name: str, file: str, text: str, fields: list[tuple[str, str, str]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": text,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{name}/{column}",
                "name": column,
                "description": about,
                "dataType": kind,
                "source": {"fileObject": {"@id": file}, "extract": {"column": column}},
            }
            for column, kind, about in fields
        ],
    }


def _provenance(evidence: Mapping[str, Any], version: str) -> dict[str, Any]:
    """No source data set can be named: the records stay where they are. What can be named is the activity."""
    agent = {"@type": "prov:SoftwareAgent", "prov:label": f"medgen {version}, SyntheticDataGenerator"}
    activity = {
        "@type": "prov:Activity",
        "prov:label": "Federated training under patient-level differential privacy, then sampling of synthetic patients",
        "prov:wasAssociatedWith": agent,
    }
    if evidence["plan_sha256"]:
        activity["prov:used"] = {"@id": f"urn:medgen:plan:{evidence['plan_sha256']}"}
    return {"prov:wasGeneratedBy": activity, "prov:wasAttributedTo": agent}


def _responsible(report: Mapping[str, Any]) -> dict[str, Any]:
    evidence, verdict = report["evidence"], report["verdict"]
    cohort, promise = evidence["cohort"], evidence["promise"]
    public = evidence["public"]
    promised = (
        promise["sentence"] if promise and verdict["private"] else "No privacy promise protects the patients behind it."
    )
    return {
        "rai:hasSyntheticData": True,
        "rai:dataCollection": (
            "No record was collected for this data set. Every patient was drawn from a generative model; "
            f"{len(evidence['sites'])} sites trained it on records that never left them."
        ),
        "rai:dataCollectionType": "Synthetic",
        "rai:dataPreprocessingProtocol": (
            "Values were brought to the public ranges of the schema in cohort/dataset_description.json before training."
        ),
        "rai:dataManipulationProtocol": "Values are rounded to a hundred-thousandth of their public range; images have 16 bits.",
        "rai:dataImputationProtocol": "None: a value that is missing in a synthetic patient was drawn as missing.",
        "rai:personalSensitiveInformation": (
            f"Health data of people who never existed. Of the patients behind the model: {promised} "
            f"Verdict of the release: {verdict['decision']}."
        ),
        "rai:dataBiases": (
            "The model follows the populations of its sites"
            + (f" and of its public data ({public['name']})" if public else "")
            + "; groups that are rare there are rarer here, and under privacy may be missing."
        ),
        "rai:dataLimitations": f"Forbidden: {cohort['forbidden_use']} Detail that the codecs do not keep is not in the images.",
        "rai:dataUseCases": cohort["intended_use"],
        "rai:dataSocialImpact": "Makes method work possible where records cannot be shared; no estimate about real patients.",
        "rai:dataReleaseMaintenancePlan": (
            "Never updated. A release that must no longer be used is named in the consortium's signed revocation list; "
            "check it with medgen release verify --revocations."
        ),
    }
