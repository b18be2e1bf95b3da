"""site.toml's [data]: defaults, refusals and stability of the digest."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from client.records.config import BidsSource, DataConfig, FilmSource, NotesSource, SeriesSource, TableSource
from medgen_models.schema import Schema


def test_an_empty_section_reads_every_slot_of_the_usual_layout(schema: Schema) -> None:
    kinds = [type(DataConfig().source(slot)) for slot in schema.slots]
    assert kinds == [BidsSource, BidsSource, FilmSource, TableSource, SeriesSource, NotesSource]
    assert [BidsSource().folder_for(schema.slot(name)) for name in ("mri", "pet")] == ["anat", "pet"]


def test_the_keys_of_the_section_are_frozen() -> None:
    """A change here is a change of every hospital's site.toml; the hospital guide lists the same keys."""
    assert sorted(DataConfig.model_fields) == [
        "block_column", "blocks", "format", "id_column", "identity_column", "ignore", "include", "participants", "root",
        "slots",
    ]  # fmt: skip
    guide = (Path(__file__).parents[3] / "docs" / "guide-hospital.md").read_text(encoding="utf-8")
    section = guide.split("### `[data]`")[1].split("**`reader")[0]
    assert all(f"| `{key}" in section for key in DataConfig.model_fields)


def test_blocks_need_the_column_that_tells_them_apart() -> None:
    with pytest.raises(ValidationError, match="block_column"):
        DataConfig(blocks=("2024",))
    with pytest.raises(ValidationError, match="no label"):
        DataConfig(block_column="year", blocks=("all",))
    assert DataConfig(block_column="year").blocks == ()


def test_toml_of_the_docstring() -> None:
    text = """
    root = "data"
    include = { column = "mr_vendor", values = ["SIEMENS"] }
    ignore = ["Survival"]
    [slots.mri]
    reader = "bids"
    intensity = "percentile"
    """
    config = DataConfig.model_validate(tomllib.loads(text))
    assert config.include is not None
    assert config.include.values == ("SIEMENS",)
    assert isinstance(config.slots["mri"], BidsSource)


@pytest.mark.parametrize(
    "data",
    [
        {"rooot": "data"},
        {"slots": {"mri": {"reader": "bids", "intensity": "zscore"}}},
        {"slots": {"mri": {"reader": "nifti"}}},
        {"slots": {"mri": {"reader": "bids", "percentiles": [99, 1]}}},
        {"include": {"column": "x", "values": []}},
    ],
)
def test_slips_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate(data)


def test_a_reader_must_fit_its_slot(schema: Schema) -> None:
    config = DataConfig(slots={"mri": TableSource()})
    with pytest.raises(ValueError, match="volume slot is read by 'bids'"):
        config.source(schema.slot("mri"))
    with pytest.raises(ValueError, match="no image files"):
        DataConfig(format="tables").source(schema.slot("cxr"))


def test_the_digest_follows_the_content() -> None:
    assert DataConfig().digest() == DataConfig(root="data").digest()
    assert DataConfig().digest() != DataConfig(root="other").digest()


def test_reading_the_configuration_imports_no_torch() -> None:
    code = "import sys, client.records.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
