"""Cells are what they say, the reader reads real ones, one slot alone is the same core, and no figure is left undefined."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_models.assembly import StudyModel, assemble
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.sampler import sample
from medgen_models.tasks import states_for
from simulations import phantoms
from simulations.benchmarks import cell_reader, task_cells
from simulations.benchmarks.cell_reader import CELLS, Reader
from simulations.benchmarks.tasks_world import HELD_CELLS, HOSPITALS, Place, Sizes
from simulations.phantom_population import PATHOLOGIES, SEQUENCES, Profile


@pytest.fixture(scope="module")
def real() -> dict[cell_reader.Cell, cell_reader.F32]:
    return task_cells.real_cells((Profile(),), 16, seed=5)


def _model(sizes: Sizes) -> StudyModel:
    schema = phantoms.demo_schema()
    batch = phantoms.to_batch(schema, phantoms.make_patients(sizes.public, 3))
    core = PretrainConfig().core
    config = PretrainConfig(steps=2, batch=8, core=type(core)(width=16, layers=1, heads=4))
    return assemble(pretrain(schema, batch, config, 0), {}, "all", 4)


def test_every_cell_has_its_images(real: dict[cell_reader.Cell, cell_reader.F32]) -> None:
    assert set(real) == {(p, s) for p in PATHOLOGIES for s in SEQUENCES}
    assert all(images.shape == (16, 32, 32, 32) for images in real.values())
    assert all(-1.0 <= images.min() < images.max() <= 1.0 for images in real.values())
    middle = (slice(None), slice(13, 19), slice(15, 18), slice(17, 20))  # ventricles: dark in T1w, bright in T2w
    assert real["dementia", "T1w"][middle].mean() < -0.2 < 0.0 < real["dementia", "T2w"][middle].mean()


def test_hospitals_take_turns() -> None:
    """The first hospital's gain is the lowest here, so its images are told from the others by their place alone."""
    bright, dark = Profile(mri_gain=1.0), Profile(mri_gain=0.3)
    images = task_cells.real_cells((bright, dark), 5, seed=1)["healthy", "T1w"]
    level = (images + 1.0).mean(axis=(1, 2, 3))
    assert (level[[0, 2, 4]].min() > level[[1, 3]].max()).all()
    assert len(task_cells.real_cells(HOSPITALS, 4, seed=2)["glioma", "PD"]) == 4


def test_a_reader_of_real_images_reads_others(real: dict[cell_reader.Cell, cell_reader.F32]) -> None:
    reader = Reader.fit(real, seed=0)
    told = reader.told(task_cells.real_cells((Profile(),), 4, seed=6))
    assert told.sequence > 0.8
    assert told.pathology > 0.4
    assert (told.constant_pathology, told.constant_sequence) == (0.25, 0.2)


def test_labels_follow_the_order_of_the_images() -> None:
    images = {
        ("glioma", "PD"): np.zeros((2, 8, 8, 8), np.float32),
        ("healthy", "T1w"): np.ones((1, 8, 8, 8), np.float32),
    }
    assert cell_reader.labels(images, 0).tolist() == [1, 1, 0]
    assert cell_reader.labels(images, 1).tolist() == [4, 4, 0]
    assert cell_reader.stacked(images)[:, 0, 0, 0].tolist() == [0.0, 0.0, 1.0]


def test_without_air_only_air_changes() -> None:
    image = np.asarray([[-0.99, -0.86, -0.84, 0.5]], np.float32)
    assert task_cells.without_air(image)[0].tolist() == pytest.approx([-1.0, -1.0, -0.84, 0.5])


def test_one_slot_alone_is_the_same_core() -> None:
    """Leaving out what is absent gives the estimate of the whole core, to rounding."""
    model = _model(Sizes.tiny())
    for value in model.core.parameters():  # a fresh core answers zero everywhere: that would compare nothing
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.2)
    cells = [("glioma", "FLAIR"), ("dementia", "T1ce")]
    core, bank = task_cells.narrowed(model, task_cells.SLOT)
    found = []
    noise = task_cells.image_noise(model, 2, 3)
    for layout, codecs, run in ((model.layout, model.bank, model.core), (bank.layout, bank, core)):
        rows = task_cells.conditional_rows(codecs.schema, cells)
        state_BVI = states_for("conditional", layout, rows.present_BVI, keys=(task_cells.PLACE,))
        given = codecs.encode(rows)
        start = torch.zeros_like(given.z_BVNW)
        span = layout.span(layout.place(task_cells.PLACE))
        start[:, 0, span, : noise.shape[-1]] = noise
        scales = {"pathology": 2.0, "sequence": 1.5}
        generator = torch.Generator().manual_seed(0)
        z_BVNW = sample(
            run, layout, given, state_BVI, generator=generator, steps=3, factor_guidance=scales, noise_BVNW=start
        )
        found.append(z_BVNW[:, 0, span, : noise.shape[-1]])
    assert found[0].std() > 0.1
    assert torch.allclose(found[0], found[1], atol=1e-4)


def test_same_noise_and_same_cell_is_the_same_image() -> None:
    model = _model(Sizes.tiny())
    noise = task_cells.image_noise(model, 3, 1)
    both = task_cells.draw_cells(model, [("healthy", "T1w"), ("glioma", "T1w")], 3, 2, 0, noise)
    again = task_cells.draw_cells(model, [("healthy", "T1w")], 3, 2, 9, noise)
    np.testing.assert_allclose(both["healthy", "T1w"], again["healthy", "T1w"], atol=1e-5)


def test_figures_of_a_tiny_world(tmp_path: Path) -> None:
    found = task_cells.figures(Place(tmp_path, Sizes.tiny(), 0, "public"))
    names = [figure.name for figure in found]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("MS-SSIM between") for name in names) == len(CELLS)
    assert sum("to real, held out of training" in name for name in names) == 2 * len(HELD_CELLS)
    assert all(np.isfinite(figure.value) for figure in found)
    assert {f.bar is not None for f in found if "of held-out cells that a classifier" in f.name} == {True}
