from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.devices import placed
from medgen_models.flow import fixed_losses
from medgen_models.gaussian_prior import fit_gaussian_prior
from medgen_models.layout import Layout
from medgen_models.pretrain import CoreTrainer, Keep, PretrainConfig, pretrain, train_core
from medgen_models.public_model import CARD_FILE, WEIGHTS_FILE, PublicModel
from medgen_models.schema import PatientBatch, Schema

CONFIG = PretrainConfig(steps=40, batch=16, vae_steps=5, warmup=5, core=CoreConfig(width=16, layers=1, heads=2))


@pytest.fixture(scope="module")
def losses() -> list[float]:
    return []


@pytest.fixture(scope="module")
def model(models_schema: Schema, models_public: PatientBatch, losses: list[float]) -> PublicModel:
    return pretrain(models_schema, models_public, CONFIG, seed=0, on_step=lambda step, loss: losses.append(loss))


def test_every_step_is_told(model: PublicModel, losses: list[float]) -> None:
    assert len(losses) == CONFIG.steps


def test_training_and_the_prior_each_lower_the_loss(models_bank: CodecBank, models_public: PatientBatch) -> None:
    """On fixed draws: steps without a prior, and a prior without steps, are both better than neither."""
    tokens, layout = models_bank.encode(models_public), models_bank.layout
    still = dataclasses.replace(CONFIG, steps=0)
    ranked = dataclasses.replace(still, core=dataclasses.replace(CONFIG.core, prior_rank=8))
    prior = fit_gaussian_prior(layout, tokens, rank=8)
    found = [
        float(fixed_losses(core, tokens, CONFIG.flow, 8, 0).mean())
        for core in (
            train_core(layout, tokens, still, 0),
            train_core(layout, tokens, CONFIG, 0),
            train_core(layout, tokens, ranked, 0, prior=prior),
        )
    ]
    assert found[1] < found[0]
    assert found[2] < found[0]


def test_public_numbers_are_there_for_planning(model: PublicModel) -> None:
    assert set(model.clip_norms) == {"all", "attention", "lora", "codec"}
    assert all(value > 0 for value in model.clip_norms.values())
    assert model.clip_norms["attention"] < model.clip_norms["all"]
    assert model.recentre_norm > 0
    assert list(model.loss_quantiles) == sorted(model.loss_quantiles)
    assert model.gap_quantiles["film.before"][0] == 24.0


def test_same_seed_same_model_and_global_stream_untouched(
    model: PublicModel, models_schema: Schema, models_public: PatientBatch
) -> None:
    before = torch.get_rng_state()
    again = pretrain(models_schema, models_public, CONFIG, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.digest() == model.digest()


def test_storage_round_trip(
    model: PublicModel, models_schema: Schema, models_public: PatientBatch, tmp_path: Path
) -> None:
    model.save(tmp_path)
    again = PublicModel.load(tmp_path, models_schema)
    assert again.digest() == model.digest()
    torch.testing.assert_close(again.bank.encode(models_public).z_BVNW, model.bank.encode(models_public).z_BVNW)
    assert again.flow == model.flow


def test_a_model_of_another_schema_or_another_digest_is_refused(
    model: PublicModel, models_schema: Schema, tmp_path: Path
) -> None:
    model.save(tmp_path)
    other = models_schema.model_copy(update={"name": "other"})
    with pytest.raises(ValueError, match="trained for schema 'toy'"):
        PublicModel.load(tmp_path, other)
    body = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    body[-1] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(body))
    with pytest.raises(ValueError, match="digest"):
        PublicModel.load(tmp_path, models_schema)
    (tmp_path / CARD_FILE).write_text("{")
    with pytest.raises(ValueError, match="torn"):
        PublicModel.load(tmp_path, models_schema)
    with pytest.raises(ValueError, match="no public model"):
        PublicModel.load(tmp_path / "nowhere", models_schema)


def test_gaps_are_drawn_where_a_reference_is(model: PublicModel) -> None:
    present = torch.zeros(5, 2, model.layout.instances, dtype=torch.bool)
    before = model.layout.place("film.before")
    present[:3, 0, before] = True
    gap = model.draw_gaps(present, torch.Generator().manual_seed(0))
    assert gap[:3, 0, before].tolist() == [24.0] * 3
    assert float(gap.sum()) == 72.0


class Interrupted(Exception):
    pass


def _stop_at(step: int) -> Callable[[int, float], None]:
    def stop(done: int, _loss: float) -> None:
        if done == step:
            raise Interrupted

    return stop


def test_an_interrupted_training_that_goes_on_is_the_uninterrupted_one(
    model: PublicModel, models_schema: Schema, models_public: PatientBatch, tmp_path: Path
) -> None:
    keep = Keep(tmp_path / "state.safetensors", "recipe", every=7)
    with pytest.raises(Interrupted):
        pretrain(models_schema, models_public, CONFIG, seed=0, on_step=_stop_at(24), keep=keep)
    later: list[int] = []
    again = pretrain(models_schema, models_public, CONFIG, 0, lambda step, _: later.append(step), keep=keep)
    assert later == list(range(22, 41))  # the state of step 21 is the last that was kept
    assert again.digest() == model.digest()


def test_a_kept_state_of_another_recipe_or_torn_is_refused(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "state.safetensors", "one recipe")
    assert keep.read() is None
    keep.write({"done": torch.tensor(1)})
    assert keep.read() == {"done": torch.tensor(1)}
    with pytest.raises(ValueError, match="remove it to start afresh"):
        dataclasses.replace(keep, recipe="another").read()
    keep.file.write_bytes(b"torn")
    with pytest.raises(ValueError, match="torn"):
        keep.read()


def test_a_state_of_another_core_is_refused(
    models_layout: Layout, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public)
    wider = dataclasses.replace(CONFIG, core=CoreConfig(width=32, layers=1, heads=2))
    state = CoreTrainer(models_layout, tokens, wider, 0).tensors()
    with pytest.raises(ValueError, match="another model"):
        CoreTrainer(models_layout, tokens, CONFIG, 0).restore(state)


def test_bfloat16_gives_nearly_the_same_prediction_and_trains(
    models_core: TokenCore, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public.select([0, 1, 2]))
    state = torch.where(tokens.present_BVI[:, 0], 2, 0)
    inputs = (tokens.z_BVNW[:, 0], state, 0.5 * (state == 2), tokens.factor_BVIF[:, 0], tokens.gap_BVI[:, 0])
    exact, rounded = placed(models_core, bf16=False)(*inputs), placed(models_core, bf16=True)(*inputs)
    assert torch.equal(exact, models_core(*inputs))
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().max().detach()) < 0.1
    rounded.square().mean().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in models_core.parameters())


def test_no_public_patients_is_an_error(models_schema: Schema) -> None:
    with pytest.raises(ValueError, match="no public patients"):
        pretrain(models_schema, PatientBatch.empty(models_schema, 0), CONFIG, seed=0)


def test_presets_do_not_share_state() -> None:
    assert dataclasses.replace(PretrainConfig(), steps=3).core == CoreConfig()
