"""The published JSON Schema of ``report.json``, generated from the types that write it.

    python -m server.release.schema docs/schema     # writes medgen.report-1.json; a test keeps file and types equal

Versions. ``medgen.report/1`` names a set of fields and their meaning. Within it fields may be added, each with a default
that says "not known"; none is removed or changes its meaning. What needs more is ``medgen.report/2``. A reader that knows
version 1 fills what an older file lacks with those defaults, and refuses every other version. The schema of a release is
closed (no unknown fields): it describes what that release writes, and ``versions`` in the evidence says which one did.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from server.release.document import Report

FILE = "medgen.report-1.json"
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`|``([^`]+)``")
_ATTRIBUTE = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", flags=re.MULTILINE)


class _WithWords(GenerateJsonSchema):
    """Floats may be the words that stand for what JSON cannot write, unless a bound forbids them."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        number = super().float_schema(schema)
        above, below = (
            schema.get("le") is None and schema.get("lt") is None,
            "ge" not in schema and "gt" not in schema,
        )
        words = [
            *(["Infinity"] if above else []),
            *(["-Infinity"] if below else []),
            *(["NaN"] if above and below else []),
        ]
        return {"anyOf": [number, {"enum": words}]} if words else number


def report_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what :func:`server.release.report.build_report` returns."""
    schema = Report.model_json_schema(mode="serialization", schema_generator=_WithWords)
    for kind in (schema, *schema["$defs"].values()):
        _describe(kind)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": "urn:medgen:report:1",
        **schema,
        "title": "medgen release report, version 1",
    }


def _describe(kind: dict[str, Any]) -> None:
    """Move what a docstring says of each attribute to the property that it describes."""
    text, _, attributes = _ROLE.sub(lambda found: found[1] or found[2], kind.get("description", "")).partition(
        "\nAttributes:\n"
    )
    if text:
        kind["description"] = " ".join(text.split())
    for names, meaning in _ATTRIBUTE.findall(attributes):
        for name in names.split(", "):
            if name in kind.get("properties", {}):
                kind["properties"][name]["description"] = " ".join(meaning.split())


def schema_bytes() -> bytes:
    """The file, byte for byte."""
    return (json.dumps(report_schema(), indent=1, sort_keys=True) + "\n").encode()


if __name__ == "__main__":
    (Path(sys.argv[1]) / FILE).write_bytes(schema_bytes())
