from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from monai.bundle.scripts import verify_metadata
from safetensors.torch import load_file

from medgen_models.adapters import add_lora, trainable, with_weights
from medgen_models.assembly import StudyModel
from medgen_models.bundle_network import WEIGHTS, BundledNetwork
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import ABSENT, NOISED, CoreConfig, TokenCore
from medgen_models.export import (
    CARD,
    INFERENCE,
    METADATA,
    STATE,
    canonical,
    load_release_model,
    save_release_model,
)
from medgen_models.flow import FlowConfig
from medgen_models.public_model import PublicModel

PLAN = "ab" * 32
PROMISE = {"sentence": "epsilon 8 at delta 1e-5", "epsilon": 8.0}


@pytest.fixture(scope="module")
def study(models_bank: CodecBank) -> StudyModel:
    """Adapters and centres that differ from the public ones, so that what is released must be the study's."""
    core = TokenCore(models_bank.layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(0))
    core.requires_grad_(False)
    gaps = {"film.before": (12.0, 24.0, 48.0)}
    card = {"patients": 60, "seed": 0, "source": "a test", "licence": "none"}
    public = PublicModel(models_bank, core, FlowConfig(), {}, 1.0, (0.0,) * 33, gaps, card)
    adapted = add_lora(core, 2, torch.Generator().manual_seed(0))
    adapted = with_weights(adapted, {name: value + 0.1 for name, value in trainable(adapted, "lora").items()})
    return StudyModel(public, public.bank.recentre({"film": torch.ones(8)}), adapted, "lora")


@pytest.fixture(scope="module")
def released(study: StudyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "model"
    save_release_model(study, folder, PLAN, True, {"alder": "12:ff"}, inference={}, statement=PROMISE)
    return folder


def test_released_model_is_the_study_model_with_adapters_merged(study: StudyModel, released: Path) -> None:
    again = load_release_model(released)
    layout = study.layout
    x = torch.randn(2, layout.tokens, layout.width, generator=torch.Generator().manual_seed(1))
    state = torch.full((2, layout.instances), NOISED)
    half, none = torch.full(state.shape, 0.5), torch.zeros(state.shape)
    rest = (state, half, torch.zeros(2, layout.instances, 2, dtype=torch.int64), none)
    torch.testing.assert_close(again.core(x, *rest), study.core(x, *rest), atol=1e-5, rtol=1e-4)
    public = study.public.bank.centres["film.now"]
    torch.testing.assert_close(again.bank.centres["film.now"], public + 1.0)
    assert again.flow == study.public.flow
    assert again.facts["plan_hash"] == PLAN
    present = torch.ones(50, layout.schema.max_visits, layout.instances, dtype=torch.bool)
    gap = again.draw_gaps(present, torch.Generator().manual_seed(0))[:, :, layout.place("film.before")]
    assert 12.0 <= float(gap.min()) < float(gap.max()) <= 48.0


def test_two_exports_of_one_model_are_the_same_bytes(study: StudyModel, released: Path, tmp_path: Path) -> None:
    save_release_model(study, tmp_path, PLAN, True, {"alder": "12:ff"}, inference={}, statement=PROMISE)
    for name in (WEIGHTS, STATE, METADATA, INFERENCE, CARD):
        assert (tmp_path / name).read_bytes() == (released / name).read_bytes(), name


def test_the_state_dictionary_and_the_safetensors_hold_the_same_numbers(released: Path) -> None:
    state = torch.load(released / STATE, weights_only=True)
    tensors = load_file(released / WEIGHTS)
    assert len(state) == len(tensors)
    text = json.loads((released / METADATA).read_text())["medgen"]
    filled = BundledNetwork(text).fill(tensors).state_dict()
    assert all(torch.equal(filled[name], value) for name, value in state.items())


def test_the_card_says_what_was_seen_and_what_is_promised(study: StudyModel, released: Path, tmp_path: Path) -> None:
    card = (released / CARD).read_text()
    digest = hashlib.sha256(canonical(PROMISE)).hexdigest()
    for text in (PLAN, digest, "60 patients", "source: a test", "`alder`, ledger head `12:ff`", "## Limits"):
        assert text in card
    assert "Not private" not in card
    save_release_model(study, tmp_path, PLAN, False, inference={})
    assert "**Not private.**" in (tmp_path / CARD).read_text()


def test_metadata_have_every_key_that_the_specification_asks_for(released: Path, tmp_path: Path) -> None:
    """MONAI's own check, offline: the official schema lies on a server, so the keys of the published specification stand in."""
    tensor = {"type": "object", "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range",
                                             "is_patch_data", "channel_def"]}  # fmt: skip
    tensors = {"type": "object", "additionalProperties": tensor, "minProperties": 1}
    formats = {
        "type": "object",
        "required": ["inputs", "outputs"],
        "properties": {"inputs": tensors, "outputs": tensors},
    }
    keys = ["version", "changelog", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task",
            "description", "authors", "copyright", "network_data_format"]  # fmt: skip
    (tmp_path / "schema.json").write_text(
        json.dumps({"type": "object", "required": keys, "properties": {"network_data_format": formats}})
    )
    logging.getLogger("monai.apps.utils").setLevel(logging.ERROR)
    digest = hashlib.sha256((tmp_path / "schema.json").read_bytes()).hexdigest()
    place: dict[str, Any] = {"filepath": str(tmp_path / "schema.json"), "hash_val": digest, "hash_type": "sha256"}
    verify_metadata(meta_file=str(released / METADATA), **place)
    lacking = json.loads((released / METADATA).read_text())
    del lacking["authors"]
    (tmp_path / "metadata.json").write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match="authors"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), **place)


def test_the_network_estimates_a_patient_from_noise(study: StudyModel, released: Path) -> None:
    text = json.loads((released / METADATA).read_text())["medgen"]
    network, layout = BundledNetwork(text).read(released), study.layout
    x = torch.randn(2, layout.width, layout.tokens, generator=torch.Generator().manual_seed(1))
    state = torch.where(torch.tensor(layout.of_kind("text")), ABSENT, NOISED).expand(2, layout.instances)
    time = (state == NOISED).float()
    factors = torch.zeros(2, layout.instances, len(layout.factors), dtype=torch.int64)
    expected = study.core(x.mT, state, time, factors, torch.zeros_like(time)).mT
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", ["$__import__('os').getcwd()", "@device", "%/etc/passwd", "%", "a@##b"])
def test_no_text_of_the_metadata_is_an_expression_for_monai(study: StudyModel, tmp_path: Path, text: str) -> None:
    """MONAI's parser gives back what was put in, whatever the user's words on the source are."""
    public = dataclasses.replace(study.public, card={**study.public.card, "source": text})
    save_release_model(dataclasses.replace(study, public=public), tmp_path, PLAN, True, inference={})
    parser = ConfigParser()
    parser.read_config(str(tmp_path / INFERENCE))
    parser.read_meta(str(tmp_path / METADATA))
    parser.parse()
    assert not set("$@%") & set(json.loads((tmp_path / METADATA).read_text())["medgen"])
    assert json.loads(parser.get_parsed_content("_meta_#medgen"))["public"]["source"] == text
    assert type(parser.get_parsed_content("network_def")).__name__ == "BundledNetwork"


def test_torn_or_foreign_files_are_refused(study: StudyModel, released: Path, tmp_path: Path) -> None:
    save_release_model(study, tmp_path, PLAN, True, inference={})
    facts = json.loads(json.loads((tmp_path / METADATA).read_text())["medgen"])
    del facts["arrays"]
    for text in (json.dumps(facts), "{"):
        with pytest.raises(ValueError, match="export the model again"):
            BundledNetwork(text)
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match="verify the bundle"):
        load_release_model(tmp_path)
    with pytest.raises(ValueError, match="verify the bundle"):
        load_release_model(tmp_path / "nowhere")
    assert dataclasses.is_dataclass(load_release_model(released))
