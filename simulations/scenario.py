"""Scenario files: a study, the public population that it starts from, and the hospitals that take part."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medgen_models.schema import PatientBatch, Schema
from server.study import StudyConfig

Preset = Literal["demo", "autoencoders", "petmr", "icu"]
HospitalsPreset = Literal["demo", "two-owners", "petmr", "icu"]


class _Public(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class PublicConfig(_Public):
    """The public population and the pre-training on it; a change of any field makes another model.

    Attributes:
        patients: public patients that are trained on.
        reference: further public patients, never trained on, that fidelity is measured against.
        steps, batch: public training steps and patients in each.
    """

    population: Literal["phantoms", "limb", "icu"]
    patients: int = Field(default=600, ge=8)
    reference: int = Field(default=300, ge=8)
    seed: int = 7
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=32, ge=1)
    codec_steps: int = Field(default=300, ge=1)


class HospitalsConfig(_Public):
    """The hospitals of a simulated study.

    Attributes:
        preset: generated hospitals, or the natural sites of a real data set that is read where it lies.
        share: share of the preset's patients to generate (generated hospitals only).
        data: folder of the real data, relative to the folder that the command is started in.
    """

    preset: HospitalsPreset
    share: float = Field(default=1.0, gt=0, le=1)
    seed: int = 11
    data: str = ""


class Scenario(_Public):
    """One scenario file."""

    study: StudyConfig
    schema_preset: Preset = Field(alias="schema")
    public: PublicConfig
    hospitals: HospitalsConfig

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="strings")

    def schema_of_study(self) -> Schema:
        """The public schema of the study."""
        from simulations import phantoms, real_schemas

        match self.schema_preset:
            case "demo":
                return phantoms.demo_schema()
            case "autoencoders":
                return phantoms.autoencoder_schema()
            case "petmr":
                return real_schemas.petmr_schema()
            case "icu":
                return real_schemas.icu_schema()

    def population(self, schema: Schema) -> tuple[PatientBatch, PatientBatch]:
        """Public patients to train on, and others to measure against; deterministic in the seed."""
        from simulations import phantoms, public_populations

        total = self.public.patients + self.public.reference
        match self.public.population:
            case "phantoms":
                batch = phantoms.to_batch(schema, phantoms.make_patients(total, self.public.seed))
            case "limb":
                batch = public_populations.limb_population(schema, total, self.public.seed)
            case "icu":
                batch = public_populations.icu_population(schema, total, self.public.seed)
        split = self.public.patients
        return batch.select(list(range(split))), batch.select(list(range(split, total)))


def scenario_names() -> list[str]:
    """Scenarios that come with medgen."""
    folder = files("simulations") / "scenarios"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_scenario(name_or_path: str, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario by name or path, with ``section.key=value`` overrides (values in TOML).

    Raises:
        ValueError: no such scenario, bad TOML, an unknown key, or a value outside its rule.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = Path(str(files("simulations") / "scenarios" / f"{name_or_path}.toml"))
    if not path.is_file():
        raise ValueError(
            f"no scenario {name_or_path!r}; known are {', '.join(scenario_names())}, or give a path to a .toml file"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        for override in overrides:
            _override(values, override)
        return Scenario.model_validate(values)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not valid TOML: {error}; mend the line") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path.name}: {where}: {first['msg']} (got {first.get('input')!r})") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"override {override!r}: expected section.key=value, for example study.core.rounds=2")
    *sections, last = key.strip().split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(
                f"override {override!r}: {section!r} holds a value, not a section; leave out what follows it"
            )
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text
