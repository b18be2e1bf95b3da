from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medgen_models.codecs.text import (
    folder_digest,
    hash_encode,
    model_folder,
    note_encoder,
    sentence_code,
    sentence_embedding,
)
from medgen_models.schema import Slot

HASH = Slot(name="note", kind="text", codec="text", tokens=2, width=4)


def _slot(encoder: str) -> Slot:
    return Slot(name="note", kind="text", codec="text", tokens=2, width=4, encoder=encoder)


def _folder(place: Path, **files: bytes) -> Path:
    place.mkdir()
    for name, body in ({"config.json": b"{}", "model.safetensors": b"weights"} | files).items():
        (place / name).write_bytes(body)
    return place


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``transformers`` as far as it is used: word pieces are letters, a letter's state is its code in all numbers."""
    asked: dict[str, Any] = {}

    class Net(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return types.SimpleNamespace(last_hidden_state=input_ids[..., None].float() * torch.arange(1.0, 9.0))

    class AutoModel:
        @staticmethod
        def from_pretrained(place: str, **options: Any) -> Net:
            asked.update(options, place=place)
            torch.rand(3)
            return Net()

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(place: str, **options: Any) -> Any:
            def tokens(text: str, **_: Any) -> dict[str, Tensor]:
                ids = torch.tensor([[ord(letter) - ord("a") + 1 for letter in text if letter.isalpha()] + [0]])
                return {"input_ids": ids, "attention_mask": (ids > 0).long()}

            return tokens

    package = types.ModuleType("transformers")
    package.AutoModel, package.AutoTokenizer = AutoModel, AutoTokenizer  # type: ignore[attr-defined]
    package.__spec__ = importlib.util.spec_from_loader("transformers", loader=None)
    monkeypatch.setitem(sys.modules, "transformers", package)
    return asked


def test_the_default_hashes_words_and_reads_no_folder(tmp_path: Path) -> None:
    assert torch.equal(note_encoder(HASH)("falls often"), hash_encode("falls often", 2, 4))
    assert torch.equal(note_encoder(HASH, tmp_path / "nowhere")("falls"), hash_encode("falls", 2, 4))


def test_digest_is_of_names_and_contents_alone(tmp_path: Path) -> None:
    first = _folder(tmp_path / "a", **{"b.txt": b"2", "a.txt": b"1"})
    same = _folder(tmp_path / "b", **{"a.txt": b"1", "b.txt": b"2"})
    assert folder_digest(first) == folder_digest(same)
    (same / ".cache").mkdir()
    (same / ".cache" / "x").write_bytes(b"x")
    (same / "a.pyc").write_bytes(b"x")
    assert folder_digest(first) == folder_digest(same)
    (same / "a.txt").write_bytes(b"3")
    assert folder_digest(first) != folder_digest(same)
    moved = _folder(tmp_path / "c", **{"a.txt": b"2", "b.txt": b"1"})
    assert folder_digest(first) != folder_digest(moved)
    with pytest.raises(ValueError, match="expected a folder"):
        folder_digest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"encoder": "bert"}, "encoder is 'hash' or"),
        ({"encoder": "sha256:12"}, "encoder is 'hash' or"),
        (
            {"kind": "image", "codec": "dct", "shape": (8, 8), "voxel_mm": (1, 1), "encoder": f"sha256:{'0' * 64}"},
            "hash",
        ),
    ],
)
def test_the_schema_refuses_other_encoders(facts: dict[str, Any], match: str) -> None:
    base: dict[str, Any] = {"name": "note", "kind": "text", "codec": "text", "tokens": 1, "width": 4}
    with pytest.raises(ValueError, match=match):
        Slot.model_validate(base | facts)


def test_sites_without_the_studys_encoder_are_refused(tmp_path: Path) -> None:
    own = _folder(tmp_path / "own")
    slot = _slot(f"sha256:{'0' * 64}")
    with pytest.raises(ValueError, match="give this site's folder or package"):
        note_encoder(slot)
    with pytest.raises(ValueError, match="neither a folder nor an installed package"):
        note_encoder(slot, "no_such_package_anywhere")
    with pytest.raises(ValueError, match="copy the study's encoder unchanged"):
        note_encoder(slot, own)


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medgen_models.codecs.text.importlib.util.find_spec", lambda _name: None)
    own = _folder(tmp_path / "own")
    with pytest.raises(ValueError, match="needs the package transformers"):
        note_encoder(_slot(folder_digest(own)), own)
    (own / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="needs the package sentence-transformers"):
        note_encoder(_slot(folder_digest(own)), own)


def test_pickled_weights_are_refused(tmp_path: Path, fake_package: dict[str, Any]) -> None:
    own = _folder(tmp_path / "own")
    (own / "model.safetensors").rename(own / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected weights as safetensors"):
        sentence_embedding(own)


def test_declared_encoder_is_read_locally_with_the_mean_over_pieces(
    tmp_path: Path, fake_package: dict[str, Any]
) -> None:
    own, before = _folder(tmp_path / "own"), torch.get_rng_state()
    encode = note_encoder(_slot(folder_digest(own)), own)
    assert fake_package["local_files_only"]
    assert fake_package["use_safetensors"]
    assert not fake_package["trust_remote_code"]
    assert torch.equal(torch.get_rng_state(), before)
    numbers = torch.arange(1.0, 9.0)
    expected = numbers * (8 / numbers.square().sum()).sqrt()
    torch.testing.assert_close(encode("ac").flatten(), expected)  # mean of 1 and 3, the padding left out, times 1 to 8
    assert float(encode("  ").abs().max()) == 0.0
    torch.testing.assert_close(sentence_embedding(own)("ac"), 2.0 * numbers)


def test_an_embedding_that_does_not_fill_the_slot_is_named_at_once(
    tmp_path: Path, fake_package: dict[str, Any]
) -> None:
    own = _folder(tmp_path / "own")
    slot = _slot(folder_digest(own)).model_copy(update={"tokens": 3})
    with pytest.raises(ValueError, match=r"gives 8 numbers, tokens \* width is 12"):
        note_encoder(slot, own)


def test_a_number_that_is_not_finite_is_named() -> None:
    encode = sentence_code(HASH, lambda _text: torch.full((8,), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        encode("a note")


def test_an_installed_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _folder(tmp_path / "tiny_sentence_encoder", **{"__init__.py": b"raise RuntimeError"})
    monkeypatch.syspath_prepend(tmp_path)
    assert model_folder("tiny_sentence_encoder") == package
    assert model_folder(package) == package
