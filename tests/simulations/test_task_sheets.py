"""Every task of a model has its sheet, and records are swapped without the films."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from simulations import phantoms, task_sheets
from simulations.benchmarks.tasks_world import Place, Sizes
from simulations.task_sheets import Panel


def test_a_sheet_is_as_large_as_its_rows(tmp_path: Path) -> None:
    rows: list[tuple[str, list[Panel | None]]] = [
        ("one", [Panel(np.zeros((4, 4)), "a"), None]),
        ("two", [Panel(np.ones((4, 4)), "b", "change")]),
    ]
    few, many = (task_sheets.draw_sheet(tmp_path / f"{n}.png", "title", rows * n) for n in (1, 3))
    height, width, _ = imread(few).shape
    assert imread(many).shape[0] > 2 * height
    assert imread(many).shape[1] == width
    with pytest.raises(ValueError, match="nothing to draw"):
        task_sheets.draw_sheet(tmp_path / "none.png", "title", [])


def test_windows_are_the_same_for_every_panel(tmp_path: Path) -> None:
    """A panel that is dark throughout stays dark beside a bright one: no panel is stretched to its own range."""
    rows = [("row", [Panel(np.full((4, 4), -1.0)), Panel(np.full((4, 4), 1.0))])]
    shown = imread(task_sheets.draw_sheet(tmp_path / "sheet.png", "t", rows))[..., 0]
    assert (shown == 0.0).mean() > 0.2


class _Schema:
    schema = phantoms.demo_schema()


def test_records_are_swapped_and_films_stay() -> None:
    batch = phantoms.to_batch(_Schema.schema, phantoms.make_patients(4, 1))
    found = task_sheets.swap_records(batch, _Schema())  # type: ignore[arg-type]
    assert torch.equal(found.values["cxr.current"], batch.values["cxr.current"])
    for key in ("ehr", "vitals", "note"):
        assert torch.equal(found.values[key].nan_to_num(-9.0), batch.values[key].flip(0).nan_to_num(-9.0))
        place = _Schema.schema.keys().index(key)
        assert torch.equal(found.present_BVI[:, :, place], batch.present_BVI.flip(0)[:, :, place])


def test_sheets_of_a_tiny_model(tmp_path: Path) -> None:
    found = task_sheets.sheets(Place(tmp_path / "work", Sizes.tiny(), 0, "public"), tmp_path / "sheets")
    assert [path.name for path in found] == [
        "1-real.png", "2-joint.png", "3-row.png", "4-impute-pet.fdg.png", "4-impute-pet.av45.png",
        "4-impute-mri.a.png", "5-cells.png", "6-update.png", "7-counterfactual.png",
    ]  # fmt: skip
    assert all(imread(path).std() > 0.05 for path in found)
