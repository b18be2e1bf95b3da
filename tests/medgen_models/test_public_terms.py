from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medgen_models.codecs.bank import CodecBank
from medgen_models.codecs.vae import VaeCodec
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig
from medgen_models.pretrain import CoreTrainer, PretrainConfig, train_core
from medgen_models.public_terms import (
    PerceptualNet,
    PublicTerms,
    contrastive_loss,
    info_nce,
    refined,
    refined_bank,
)
from medgen_models.schema import PatientBatch

ROOT = Path(__file__).resolve().parents[2]


def test_info_nce_of_pairs_that_match_and_of_pairs_that_tell_nothing() -> None:
    """Orthogonal matching pairs: log(1 + (B - 1) exp(-1/T)). Identical rows: log B. One row: nothing to choose."""
    eye = torch.eye(3)
    expected = math.log(1 + 2 * math.exp(-1 / 0.5))
    assert float(info_nce(eye, 7.0 * eye, temperature=0.5)) == pytest.approx(expected, abs=1e-6)
    same = torch.ones(4, 3)
    assert float(info_nce(same, same)) == pytest.approx(math.log(4), abs=1e-6)
    assert float(info_nce(eye[:1], eye[:1])) == 0.0


def test_the_contrastive_term_reaches_the_trunk_and_couples_patients(
    models_core: TokenCore, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public.select(list(range(12))))
    loss = contrastive_loss(models_core, tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) > 0
    assert any(bool(p.grad.abs().sum() > 0) for n, p in models_core.named_parameters() if p.grad is not None)
    fewer = contrastive_loss(models_core, tokens.select(list(range(6))))
    more = contrastive_loss(models_core, tokens.select([0, 1, 2, 3, 4, 6]))
    assert float(fewer.detach()) != float(
        more.detach()
    )  # one other patient, another loss for all: not for private steps


def test_patients_without_images_or_without_anything_else_cost_nothing(
    models_core: TokenCore, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public.select([0, 1, 2]))
    images = torch.tensor(models_core.layout.of_kind("volume", "image"))
    for side in (images, ~images):
        half = dataclasses.replace(tokens, present_BVI=tokens.present_BVI & side)
        assert float(contrastive_loss(models_core, half)) == 0.0


def test_training_with_the_contrastive_term_lowers_it(models_bank: CodecBank, models_public: PatientBatch) -> None:
    tokens = models_bank.encode(models_public)
    plain = PretrainConfig(steps=30, batch=16, warmup=5, core=CoreConfig(width=16, layers=1, heads=2))
    with_term = dataclasses.replace(plain, terms=PublicTerms(contrastive=1.0))
    losses = [
        float(contrastive_loss(train_core(models_bank.layout, tokens, config, seed=0), tokens))
        for config in (plain, with_term)
    ]
    assert losses[1] < 0.9 * losses[0]


def test_the_perceptual_distance_is_zero_for_equal_images_and_grows_with_blur(tmp_path: Path) -> None:
    net = PerceptualNet.of(2, 0, "")
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    little = 0.7 * x + 0.3 * torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    much = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert torch.equal(net(x, x), torch.zeros(3))
    assert bool((net(x, little) < net(x, much)).all())
    other = PerceptualNet.of(2, 1, "")
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    again = PerceptualNet.of(2, 0, str(tmp_path / "weights.safetensors"))
    assert torch.equal(again(x, much), other(x, much))
    with pytest.raises(ValueError, match="name another file"):
        PerceptualNet.of(3, 0, str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match="name another file"):
        PerceptualNet.of(2, 0, str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize(
    "terms", [PublicTerms(adversarial=0.05), PublicTerms(perceptual=1.0)], ids=["adversarial", "perceptual"]
)
def test_refined_autoencoders_keep_their_form_and_the_global_stream(
    models_bank: CodecBank, models_public: PatientBatch, terms: PublicTerms
) -> None:
    terms = dataclasses.replace(terms, refine_steps=3)
    codec = models_bank.codecs["scope"]
    assert isinstance(codec, VaeCodec)
    records = models_public.values["scope"].flatten(0, 1)
    before, weights = torch.get_rng_state(), {n: v.clone() for n, v in codec.net.state_dict().items()}
    again = refined(codec, models_bank.schema.slot("scope"), records, terms, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, weights[n]) for n, v in codec.net.state_dict().items())  # the first one is left as it is
    assert again.encode(records).std() == pytest.approx(1.0, abs=0.2)
    assert not any(p.requires_grad for p in again.net.parameters())
    bank = refined_bank(models_bank, models_public, terms, seed=0)
    assert set(bank.tensors()) == set(models_bank.tensors())
    tokens = bank.encode(models_public)
    i = bank.layout.place("scope")
    own = tokens.z_BVNW[:, :, bank.layout.span(i)][tokens.present_BVI[:, :, i]]
    assert float(own.mean(dim=0).abs().max()) < 1e-4  # centred anew


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights >= 0"):
        PublicTerms(contrastive=-1.0)


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_private_step_can_reach_these_terms() -> None:
    """The module is imported by public pre-training and its command alone, and the private objective has no name for it."""
    users = {
        path.relative_to(ROOT).as_posix()
        for room in ("client", "server", "privacy", "medgen_models", "simulations")
        for path in (ROOT / room).rglob("*.py")
        if "medgen_models.public_terms" in _imports(path)
    }
    assert users <= {"medgen_models/pretrain.py", "simulations/pretraining.py", "simulations/cli.py"}
    words = {"contrastive", "adversarial", "perceptual"}
    assert not words & {field.name for field in dataclasses.fields(FlowConfig)}
    for room in ("client", "privacy"):
        for path in (ROOT / room).rglob("*.py"):
            assert "medgen_models.pretrain" not in _imports(path), f"{path} must not train in public"
    assert PretrainConfig().terms == PublicTerms()  # off by default
    assert CoreTrainer.__module__ == "medgen_models.pretrain"
