"""Scenario files: what comes with medgen is valid, a slip is named, and an override is what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from simulations.scenario import Scenario, load_scenario, scenario_names

MINIMAL = """\
schema = "demo"
[study]
name = "mine"
[public]
population = "phantoms"
[hospitals]
preset = "demo"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_the_scenarios_that_come_with_medgen() -> None:
    assert scenario_names() == ["autoencoders", "demo", "icu", "petmr"]


@pytest.mark.parametrize("name", ["autoencoders", "demo", "icu", "petmr"])
def test_each_is_valid_and_its_stages_fit_its_schema(name: str) -> None:
    scenario = load_scenario(name)
    schema = scenario.schema_of_study()
    assert scenario.study.name == name
    assert set(scenario.study.codec.slots) == {slot.name for slot in schema.slots if slot.codec == "vae"}
    assert scenario.study.privacy.delta <= 1e-5
    assert scenario.study.core.spare_rounds >= 1


def test_promises_are_those_that_are_written_about() -> None:
    assert load_scenario("demo").study.privacy.epsilon == 8.0
    assert load_scenario("icu").study.privacy.epsilon == 8.0
    assert load_scenario("autoencoders").study.privacy.epsilon == 8.0
    assert not load_scenario("petmr").study.privacy.private  # 21 patients: any finite epsilon is noise
    assert load_scenario("petmr", ["study.privacy.epsilon=8"]).study.privacy.epsilon == 8.0


def test_a_path_is_read_with_its_defaults(file: Path) -> None:
    scenario = load_scenario(str(file))
    assert (scenario.study.name, scenario.hospitals.share, scenario.public.seed) == ("mine", 1.0, 7)
    assert scenario.study.execution.deterministic is False
    again = Scenario.model_validate_json(scenario.model_dump_json(by_alias=True))
    assert again == scenario


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("study.core.rounds=2", lambda s: s.study.core.rounds, 2),
        ("study.privacy.epsilon=inf", lambda s: s.study.privacy.epsilon, math.inf),
        ("study.privacy.epsilon = 3.5", lambda s: s.study.privacy.epsilon, 3.5),
        ("study.execution.deterministic=true", lambda s: s.study.execution.deterministic, True),
        ("hospitals.preset=two-owners", lambda s: s.hospitals.preset, "two-owners"),
        ('hospitals.preset="two-owners"', lambda s: s.hospitals.preset, "two-owners"),
        ("schema=autoencoders", lambda s: s.schema_preset, "autoencoders"),
        ('study.codec.slots=["mri", "ehr"]', lambda s: s.study.codec.slots, ("mri", "ehr")),
    ],
)
def test_an_override_is_toml_or_else_text(file: Path, override: str, read: object, expected: object) -> None:
    assert read(load_scenario(str(file), [override])) == expected  # type: ignore[operator]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("study.core.rouns=2", "rouns"),
        ("study.core.rounds=0", "study.core.rounds"),
        ("study.privacy.epsilon=nan", "study.privacy"),
        ("study.privacy.epsilon=-1", "study.privacy.epsilon"),
        ("study.privacy.delta=1e-3", "study.privacy.delta"),
        ("hospitals.preset=moon", "hospitals.preset"),
        ("hospitals.share=2", "hospitals.share"),
        ("study.name=Über Studie", "study.name"),
        ("study.core.rounds", "section.key=value"),
        ("=3", "section.key=value"),
        ("planet.mass=1", "planet"),
        ("schema.too.deep=1", "schema"),
    ],
)
def test_a_slip_is_named(file: Path, override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_scenario(str(file), [override])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"known are autoencoders, demo, icu, petmr"):
        load_scenario("moon")
    with pytest.raises(ValueError, match="no scenario"):
        load_scenario(str(tmp_path / "gone.toml"))
    bad = tmp_path / "bad.toml"
    bad.write_text("[study\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.toml: not valid TOML"):
        load_scenario(str(bad))
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad\.toml"):
        load_scenario(str(bad))


def test_the_public_population_is_fixed_by_its_seed_and_never_the_reference(file: Path) -> None:
    scenario = load_scenario(str(file), ["public.patients=8", "public.reference=8"])
    schema = scenario.schema_of_study()
    first, second = scenario.population(schema), scenario.population(schema)
    for ours, theirs in zip(first, second, strict=True):
        assert ours.ids == theirs.ids
        assert (ours.values["mri.a"] == theirs.values["mri.a"]).all()
    assert (len(first[0]), len(first[1])) == (8, 8)
    assert not set(first[0].ids) & set(first[1].ids)
    other = load_scenario(str(file), ["public.patients=8", "public.reference=8", "public.seed=8"]).population(schema)
    assert not (other[0].values["mri.a"] == first[0].values["mri.a"]).all()
