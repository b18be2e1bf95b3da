"""Baselines that the one core is compared with: their forms, their budget, and statistics with known answers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.flow import FlowConfig
from medgen_models.schema import PatientBatch, Schema
from medgen_models.tokens import TokenBatch
from simulations import phantoms
from simulations.benchmarks import peer_fused, peer_latent_unet, peer_per_target, task_peers
from simulations.benchmarks.peer_per_target import TARGETS
from simulations.benchmarks.peer_training import (
    Budget,
    Widths,
    beside,
    estimate,
    flow_loss,
    integrate,
    parameters,
    sample,
    seeded,
    train,
)
from simulations.benchmarks.peers_joint import Cohort, of_images, of_pairs, of_tables, seen_pairs
from simulations.benchmarks.tasks_world import HELD_CELLS, Place, Sizes
from simulations.phantom_population import PATHOLOGIES, SEQUENCES

SHORT = Budget(steps=2, batch=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def schema() -> Schema:
    return phantoms.demo_schema()


@pytest.fixture(scope="module")
def public(schema: Schema) -> PatientBatch:
    return phantoms.to_batch(schema, phantoms.make_patients(24, 7))


@pytest.fixture(scope="module")
def bank(schema: Schema, public: PatientBatch) -> CodecBank:
    return CodecBank.fit_public(schema, public, 7)


@pytest.fixture(scope="module")
def tokens(bank: CodecBank, public: PatientBatch) -> TokenBatch:
    return bank.encode(public)


def _nothing(x: torch.Tensor, time_B: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def test_a_network_that_adds_nothing_gives_the_best_guess_from_the_tokens_alone() -> None:
    x = torch.full((1, 2), 3.0)
    # at t = .5 a standard normal number has posterior mean x_t (1 - t) / ((1 - t)^2 + t^2) = 3 * .5 / .5
    torch.testing.assert_close(estimate(_nothing, x, torch.tensor([0.5])), torch.full((1, 2), 3.0))
    torch.testing.assert_close(estimate(_nothing, x, torch.tensor([1.0])), torch.zeros(1, 2))


def test_a_network_that_knows_the_answer_loses_nothing_and_is_sampled_exactly() -> None:
    z = torch.tensor([[1.0, -2.0], [0.5, 0.0]])

    def knows(scaled: torch.Tensor, time_B: torch.Tensor) -> torch.Tensor:
        t = time_B[:, None]
        root = ((1.0 - t).square() + t.square()).sqrt()
        skip, out = (1.0 - t) / root.square(), t / root
        return (z - skip * scaled * root) / out

    assert float(flow_loss(knows, z, torch.ones_like(z), torch.Generator().manual_seed(1))) < 1e-6
    torch.testing.assert_close(sample(knows, torch.randn(2, 2), 20), z, atol=1e-4, rtol=0.0)


def test_loss_counts_weighted_numbers_and_caps_early_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # at t = .25, 1/t^2 is 16 and the cap is 6; with the noise at zero the guess is 1.2 z, off by .2 on the number that counts
    monkeypatch.setattr("simulations.benchmarks.peer_training.draw_times", lambda n, _: torch.full((n,), 0.25))
    monkeypatch.setattr("torch.randn", lambda shape, generator=None: torch.zeros(shape))
    found = flow_loss(_nothing, torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 0.0]]), torch.Generator())
    x_t, skip = 0.75, 0.75 / (0.75**2 + 0.25**2)
    assert float(found) == pytest.approx(FlowConfig().cap * (skip * x_t - 1.0) ** 2, rel=1e-5)


def test_one_euler_step_is_the_one_step_estimate() -> None:
    noise = torch.randn(3, 4)
    torch.testing.assert_close(integrate(lambda x, t: 0.5 * x, noise, 1), 0.5 * noise)


def test_training_moves_towards_the_answer_and_forgets_gradients() -> None:
    with seeded(3):
        module = torch.nn.Linear(1, 1)
    seconds = train(
        module, lambda rows, random: (module(torch.ones(4, 1)) - 2.0).square().mean(), 4, Budget(400, 4, 0.05), 0
    )
    assert abs(float(module(torch.ones(1, 1))) - 2.0) < 0.1
    assert seconds >= 0.0
    assert not any(p.requires_grad for p in module.parameters())


def test_training_without_records_is_refused() -> None:
    with pytest.raises(ValueError, match="larger public population"):
        train(torch.nn.Linear(1, 1), lambda rows, random: torch.zeros(()), 0, SHORT, 0)


def test_initial_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    weights = []
    for _ in range(2):
        with seeded(5):
            weights.append(torch.nn.Linear(3, 3).weight)
    assert torch.equal(*weights)
    assert torch.equal(state, torch.random.get_rng_state())


def test_peers_are_everybody_but_the_core() -> None:
    figure = beside("x", {"core": 1.0, "other": 2.0}, "dB")
    assert (figure.value, figure.peers, figure.unit) == (1.0, {"other": 2.0}, "dB")


def test_every_form_has_about_the_parameters_of_the_core(schema: Schema, bank: CodecBank, tokens: TokenBatch) -> None:
    core = 721_591  # of width 96 and 4 layers on this schema
    widths, layout = Widths.like(96), bank.layout
    with seeded(0):
        pairs = peer_fused.pairs(layout, tokens)
        fused = parameters(
            peer_fused.FusedVae(pairs, schema.table_columns(), len(SEQUENCES), widths.fused),
            peer_fused.LatentDenoiser(len(SEQUENCES), widths.fused),
        )
        generators = [
            peer_per_target.TargetGenerator(peer_per_target.examples(layout, tokens, target), widths.target)
            for target in TARGETS
        ]
        unet = parameters(peer_latent_unet.LatentUnet(64, (4, 5), widths.unet))
    assert 0.9 * core < fused < 1.1 * core
    assert 0.9 * core < parameters(*generators) < 1.1 * core
    assert core < unet < 3.1 * core


# One generator per target -------------------------------------------------------------------------------------------------


def test_an_example_is_the_target_the_sources_the_row_and_the_sequence(bank: CodecBank, tokens: TokenBatch) -> None:
    layout = bank.layout
    found = peer_per_target.examples(layout, tokens, TARGETS[2])
    a, fdg = layout.place("mri.a"), layout.place("pet.fdg")
    torch.testing.assert_close(found.target_BD, tokens.z_BVNW[:, 0, layout.span(a), :8].flatten(1))
    torch.testing.assert_close(found.sources_BSD[:, 0], tokens.z_BVNW[:, 0, layout.span(fdg), :8].flatten(1))
    assert torch.equal(found.has_BS[:, 0] > 0, tokens.present_BVI[:, 0, fdg])
    factor = [each.name for each in layout.factors].index("sequence")
    level_B = tokens.factor_BVIF[:, 0, a, factor]
    assert torch.equal(found.sequence_BL.sum(1), (level_B > 0).float())
    assert torch.equal(found.sequence_BL.argmax(1)[level_B > 0], level_B[level_B > 0] - 1)


def test_a_patient_without_target_or_any_source_teaches_nothing(bank: CodecBank, tokens: TokenBatch) -> None:
    layout = bank.layout
    present = torch.ones_like(tokens.present_BVI[:3])
    present[0, 0, layout.place("mri.a")] = False
    present[1, 0, layout.place("pet.fdg")] = False
    present[2, 0, [layout.place("pet.fdg"), layout.place("pet.av45")]] = False
    three = dataclasses.replace(tokens.select([0, 1, 2]), present_BVI=present)
    assert peer_per_target.teaching(layout, three, TARGETS[0]).tolist() == [False, False, False]
    assert peer_per_target.teaching(layout, three, TARGETS[1]).tolist() == [False, True, False]
    assert peer_per_target.teaching(layout, three, TARGETS[2]).tolist() == [False, True, False]


def test_an_absent_source_and_a_dropped_record_are_not_read(bank: CodecBank, tokens: TokenBatch) -> None:
    layout, target = bank.layout, TARGETS[2]
    generator = peer_per_target.fit_per_target(layout, tokens, SHORT, 8, 0).generators[target.key]
    given = peer_per_target.examples(layout, tokens, target)
    given = dataclasses.replace(given, has_BS=torch.tensor([1.0, 0.0]).expand(len(given), 2))
    other = dataclasses.replace(given, sources_BSD=given.sources_BSD + torch.tensor([0.0, 9.0])[None, :, None])
    noise = torch.randn(given.target_BD.shape)
    torch.testing.assert_close(*(peer_per_target.one_step(generator, each, noise) for each in (given, other)))


def test_thinning_takes_one_of_two_sources_from_half_and_the_record_from_a_tenth(
    bank: CodecBank, tokens: TokenBatch
) -> None:
    given = peer_per_target.examples(bank.layout, tokens, TARGETS[2]).select(torch.zeros(4000, dtype=torch.int64))
    given = dataclasses.replace(given, has_BS=torch.ones(4000, 2), row_BR=torch.ones(4000, 3))
    found = peer_per_target.thinned(given, torch.Generator().manual_seed(0))
    assert float((found.has_BS.sum(1) == 1).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(found.has_BS.mean(0)[0]) == pytest.approx(0.75, abs=0.03)
    assert float((found.row_BR.sum(1) == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert int(found.has_BS.sum(1).min()) == 1


# Fused --------------------------------------------------------------------------------------------------------------------


def test_pairs_are_all_images_with_a_row(bank: CodecBank, tokens: TokenBatch) -> None:
    layout = bank.layout
    here = tokens.present_BVI[:, 0]
    both = here[:, list(layout.members("mri"))].sum(1) * here[:, layout.place("ehr")]
    assert len(peer_fused.pairs(layout, tokens)) == int(both.sum())


def test_image_and_row_both_move_the_fused_latent(schema: Schema, bank: CodecBank, tokens: TokenBatch) -> None:
    pairs = peer_fused.pairs(bank.layout, tokens)
    with seeded(1):
        vae = peer_fused.FusedVae(pairs, schema.table_columns(), len(SEQUENCES), 8)
    vae.requires_grad_(False)
    mean = vae.encode(pairs)[0]
    for moved in (
        dataclasses.replace(pairs, image_BTW=pairs.image_BTW + 1.0),
        dataclasses.replace(pairs, row_BCW=pairs.row_BCW + 1.0),
    ):
        assert float((vae.encode(moved)[0] - mean).abs().max()) > 1e-3


def test_a_row_is_drawn_at_the_chances_of_its_decoder(schema: Schema, bank: CodecBank, tokens: TokenBatch) -> None:
    pairs = peer_fused.pairs(bank.layout, tokens)
    with seeded(1):
        vae = peer_fused.FusedVae(pairs, schema.table_columns(), len(SEQUENCES), 8)
    sex = [column.name for column in schema.table_columns()].index("sex")
    logits = torch.zeros(4000, len(schema.table_columns()), 5)
    logits[:, 0, 0] = math.log(0.8 / 0.2)
    logits[:, 0, 1] = 1.25
    logits[:, sex, 2] = math.log(3.0)
    drawn = vae.draw_row(logits, torch.Generator().manual_seed(0))
    assert float((drawn[:, 0, 0] > 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(drawn[:, 0, 1], torch.full((4000,), 1.25))
    assert float(drawn[:, sex, 2].mean()) == pytest.approx(0.75, abs=0.02)
    assert torch.equal(drawn[:, sex, 1] + drawn[:, sex, 2], torch.ones(4000))


def test_a_value_that_was_not_recorded_costs_nothing(schema: Schema, bank: CodecBank, tokens: TokenBatch) -> None:
    pairs = peer_fused.pairs(bank.layout, tokens).select(torch.tensor([0]))
    row = pairs.row_BCW.clone()
    row[..., 0] = -1.0
    gone = dataclasses.replace(pairs, row_BCW=row)
    with seeded(1):
        vae = peer_fused.FusedVae(pairs, schema.table_columns(), len(SEQUENCES), 8)
    told = torch.full_like(row, -20.0)
    wrong = told.clone()
    wrong[..., 1:] = 7.0
    assert float(vae._row_loss(told, gone)) == pytest.approx(float(vae._row_loss(wrong, gone)))
    assert float(vae._row_loss(told, gone)) < 1e-6


# Latent U-Net -------------------------------------------------------------------------------------------------------------


def test_the_grid_holds_what_the_block_codec_holds(schema: Schema, public: PatientBatch) -> None:
    images, level_BF = peer_latent_unet.images_of(schema, public)
    codec = peer_latent_unet.GridCodec.fit(schema.slot("mri"), images)
    grid = codec.encode(images)
    assert grid.shape == (len(images), 64, 4, 4, 4)
    assert level_BF.shape == (len(images), 2)
    torch.testing.assert_close(grid.mean(dim=0), torch.zeros(64, 4, 4, 4), atol=1e-4, rtol=0.0)
    plain = codec.codec.decode(codec.codec.encode(images)).clamp(-1.0, 1.0)
    torch.testing.assert_close(codec.decode(grid), plain, atol=1e-5, rtol=0.0)
    # channel 0 is the mean of a block: a block that is bright shows at its own place and nowhere else
    lit = images[:1].clone()
    lit[0, 8:16, 24:32, 0:8] += 0.1
    moved = (codec.encode(lit) - grid[:1])[0, 0].abs()
    assert float(moved[1, 3, 0]) > 0.0
    assert float(moved.sum() - moved[1, 3, 0]) < 1e-4


def test_without_guidance_only_the_asked_factors_are_read(schema: Schema, public: PatientBatch) -> None:
    model = peer_latent_unet.fit_latent_unet(schema, public, SHORT, 0, (16, 16))
    asked = torch.tensor([[1, 2], [3, 1]])
    first, again, other = (
        peer_latent_unet.draw_images(model, level, 2, 0, guidance)
        for level, guidance in ((asked, (1.0, 1.0)), (asked, (1.0, 1.0)), (asked, (3.0, 1.0)))
    )
    assert first.shape == (2, 32, 32, 32)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert float(np.abs(first).max()) <= 1.0


# What is compared ---------------------------------------------------------------------------------------------------------


def test_patients_of_held_out_cells_are_left_out_of_joint_sampling(schema: Schema, public: PatientBatch) -> None:
    names = [factor.name for factor in schema.factors()]
    pathology, sequence = HELD_CELLS[0]
    factor = public.factor_BVIF[:2].clone()
    factor[:, 0, 0, names.index("pathology")] = PATHOLOGIES.index(pathology) + 1
    factor[:, 0, 0, names.index("sequence")] = torch.tensor([SEQUENCES.index(sequence) + 1, SEQUENCES.index("T1w") + 1])
    present = torch.ones_like(public.present_BVI[:2])
    two = dataclasses.replace(public.select([0, 1]), factor_BVIF=factor, present_BVI=present)
    assert seen_pairs(schema, two).ids == public.ids[1:2]


def test_equal_images_have_no_distance_and_far_ones_no_precision() -> None:
    real = np.random.default_rng(0).standard_normal((40, 3))
    figures = {f.name: f for f in of_images(real, real, {"core": real, "far": real + 100.0})}
    distance = figures["FD of jointly drawn MRI to real"]
    assert distance.value == pytest.approx(0.0, abs=1e-6)
    assert distance.peers["far"] == pytest.approx(3 * (100.0 / real.std(axis=0)).mean() ** 2, rel=0.1)
    precision = figures["precision of jointly drawn MRI, real ones through the codec"]
    assert (precision.value, precision.peers["far"]) == (1.0, 0.0)


def test_pairs_that_are_the_real_ones_keep_everything_and_shuffled_ones_nothing(
    schema: Schema, public: PatientBatch
) -> None:
    rng = np.random.default_rng(0)
    columns = len(schema.table_columns())
    rows = rng.standard_normal((400, columns))
    measured = rows[:, [0, 2, 5]] + 0.1 * rng.standard_normal((400, 3))
    real = Cohort(np.zeros((400, 1)), measured, rows, public)
    other = dataclasses.replace(real, measured_BA=rng.permutation(measured))
    (figure,) = of_pairs(schema, real, {"core": real, "shuffled": other})
    assert figure.value == pytest.approx(1.0)
    assert abs(figure.peers["shuffled"]) < 0.15


def test_the_real_table_scores_one_against_itself(schema: Schema, public: PatientBatch) -> None:
    empty = PatientBatch.empty(schema, 24)
    figures = {f.name: f for f in of_tables(schema, public, {"core": public, "nothing": empty}, 0)}
    assert figures["column shapes, jointly drawn table"].value == pytest.approx(1.0)
    assert figures["pair trends, jointly drawn table"].value == pytest.approx(1.0)
    assert math.isnan(figures["column shapes, jointly drawn table"].peers["nothing"])


def test_a_tiny_call_gives_every_comparison(tmp_path: Path) -> None:
    found = task_peers.figures(Place(tmp_path, Sizes.tiny(), 10, "public"))
    assert len({figure.name for figure in found}) == len(found)
    assert all(figure.peers and math.isfinite(figure.value) for figure in found)
    sizes = next(figure for figure in found if figure.name.startswith("parameters"))
    assert {"conditional latent U-Net", "fused autoencoder and latent diffusion"} < set(sizes.peers)
    assert all(count > 0 for count in sizes.peers.values())
