"""Notes: a fixed code of words, the same at every site; read as a condition, never generated.

Generating text is out of scope: a note's weight in the loss is 0 and decoding hands its code back. The default encoder
hashes words and needs no vocabulary, training or file. A study may declare an open sentence encoder instead, by the
digest of its folder; every site holds its own copy, in a folder or as an installed package, and nothing is downloaded.

Shape legend: B records, T tokens, W token width, L word pieces, E numbers of a sentence embedding = T * W.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medgen_models.codecs.base import bounded
from medgen_models.schema import Slot

NoteEncoder = Callable[[str], Tensor]
"""A note to its code (T, W): unit mean square, all zeros where nothing was read."""
_BREAKS = str.maketrans({";": " ", ".": " ", ",": " "})


def hash_encode(text: str, tokens: int, width: int) -> Tensor:
    """Signed feature hashing of the words of ``text``, scaled to unit mean square; an empty text is all zeros (T, W).

    Source: Weinberger et al. (2009), eq. 3, with SHA-256 as hash.
    """
    out_TW = torch.zeros(tokens, width)
    for word in text.lower().translate(_BREAKS).split():
        digest = hashlib.sha256(word.encode()).digest()
        out_TW[digest[0] % tokens, digest[1] % width] += 1.0 if digest[2] & 1 else -1.0
    return _unit(out_TW)


def folder_digest(folder: Path) -> str:
    """``sha256:`` and the digest over names and contents of all files below ``folder``, hidden ones left out.

    Two folders with one digest hold the same files under the same names, whatever their order on disk. Compiled Python
    files are left out as well: an installed package grows them on its own.

    Raises:
        ValueError: no folder, or no file in it.
    """
    files = []
    for path in folder.rglob("*") if folder.is_dir() else ():
        parts = path.relative_to(folder).parts
        if path.is_file() and path.suffix != ".pyc" and not any(part.startswith(".") for part in parts):
            files.append(("/".join(parts), path))
    if not files:
        raise ValueError(f"{folder}: expected a folder with the files of a sentence encoder; give its path")
    total = hashlib.sha256()
    for name, path in sorted(files):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        total.update(hashlib.sha256(name.encode()).digest() + content.digest())
    return f"sha256:{total.hexdigest()}"


def model_folder(place: str | Path) -> Path:
    """The folder of a sentence encoder: ``place`` itself, or that of the installed package of this name (not imported).

    Raises:
        ValueError: neither is there.
    """
    if Path(place).is_dir():
        return Path(place)
    found = importlib.util.find_spec(str(place)) if str(place).isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"{place}: neither a folder nor an installed package; give the path of the encoder's folder")
    return Path(found.submodule_search_locations[0])


def note_encoder(slot: Slot, place: str | Path | None = None) -> NoteEncoder:
    """The encoder that ``slot`` declares.

    Args:
        slot: a text slot.
        place: the site's copy of the sentence encoder; not read where the slot declares ``hash``.

    Raises:
        ValueError: no copy is given, it is another encoder than the study's, its package is not installed, or its
            embedding does not fill the slot's tokens.
    """
    if slot.encoder == "hash":
        return lambda text: hash_encode(text, slot.tokens, slot.width)
    if not place:
        raise ValueError(
            f"slot {slot.name}: the study reads notes by the sentence encoder {slot.encoder[:19]}...; "
            "give this site's folder or package of it"
        )
    folder = model_folder(place)
    own = folder_digest(folder)
    if own != slot.encoder:
        raise ValueError(
            f"slot {slot.name}: {folder} holds {own[:19]}..., the study declares {slot.encoder[:19]}...; all sites must "
            "read notes alike, so copy the study's encoder unchanged"
        )
    encode = sentence_code(slot, sentence_embedding(folder))
    encode("one note")  # an embedding that does not fill the slot is the study's error, not that of the first patient
    return encode


def sentence_code(slot: Slot, embed: Callable[[str], Tensor]) -> NoteEncoder:
    """Codes of ``slot`` from sentence embeddings (E,); the embedding is cut into tokens as it is.

    The encoder returned raises ValueError for an embedding of another length or with a number that is not finite.
    """

    def encode(text: str) -> Tensor:
        if not text.strip():
            return torch.zeros(slot.tokens, slot.width)
        embedding_E = embed(text).detach().to("cpu", torch.float32).flatten()
        if len(embedding_E) != slot.tokens * slot.width:
            raise ValueError(
                f"slot {slot.name}: the encoder gives {len(embedding_E)} numbers, tokens * width is "
                f"{slot.tokens * slot.width}; change them in the schema"
            )
        if not bool(torch.isfinite(embedding_E).all()):
            raise ValueError(f"slot {slot.name}: the encoder gives a number that is not finite; mend the note")
        return _unit(embedding_E.reshape(slot.tokens, slot.width))

    return encode


def sentence_embedding(folder: Path) -> Callable[[str], Tensor]:
    """A local sentence encoder, in evaluation mode on the CPU.

    A folder with ``modules.json`` is read by the package ``sentence-transformers``, any other by ``transformers`` with the
    mean over word pieces (Reimers and Gurevych (2019), section 3). The folder decides, not what happens to be
    installed, so that sites agree. Weights must be safetensors, and no code in the folder is run.

    Raises:
        ValueError: the package is not installed, or the folder holds no such model.
    """
    package = "sentence_transformers" if (folder / "modules.json").is_file() else "transformers"
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{folder}: this sentence encoder needs the package {package.replace('_', '-')}; install it at this site, or "
            'declare encoder = "hash" in the schema'
        )
    if not any(folder.rglob("*.safetensors")):
        raise ValueError(f"{folder}: expected weights as safetensors; convert them, pickled weights can run code")
    return _by_sentence_transformers(folder) if package == "sentence_transformers" else _by_transformers(folder)


def _by_sentence_transformers(folder: Path) -> Callable[[str], Tensor]:
    package = importlib.import_module("sentence_transformers")  # optional, no dependency
    safe = {"use_safetensors": True}
    with torch.random.fork_rng(devices=[]):
        model: Any = package.SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs=safe)
    model.eval()

    def embed(text: str) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(model.encode(text, show_progress_bar=False))

    return embed


def _by_transformers(folder: Path) -> Callable[[str], Tensor]:
    package = importlib.import_module("transformers")  # optional, no dependency
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        with torch.random.fork_rng(devices=[]):
            tokenizer: Any = package.AutoTokenizer.from_pretrained(str(folder), **own)
            model: Any = package.AutoModel.from_pretrained(str(folder), use_safetensors=True, **own).eval()
    except OSError as error:
        raise ValueError(f"{folder}: no model that transformers reads ({error}); give the encoder's folder") from error

    def embed(text: str) -> Tensor:
        pieces = tokenizer(text, return_tensors="pt", truncation=True)
        with torch.no_grad():
            hidden_LE = model(**pieces).last_hidden_state[0]
        here_L1 = pieces["attention_mask"][0, :, None].to(hidden_LE.dtype)
        mean_E: Tensor = (hidden_LE * here_L1).sum(dim=0) / here_L1.sum().clamp_min(1.0)
        return mean_E

    return embed


def _unit(code_TW: Tensor) -> Tensor:
    """``code_TW`` scaled to unit mean square; zeros stay zeros."""
    norm = float(code_TW.norm())
    return code_TW * (code_TW.numel() ** 0.5 / norm) if norm > 0 else code_TW


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """Notes come in as codes already; their weight is 0, because notes are given and never a target."""

    tokens: int
    width: int

    @staticmethod
    def of(slot: Slot) -> TextCodec:
        """The codec of a text slot."""
        return TextCodec(slot.tokens, slot.width)

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, W) as it is, within ±(T * W), which no code of unit mean square reaches."""
        return bounded(x, float(self.tokens * self.width))

    def weight(self, x: Tensor) -> Tensor:
        """Zero: never a target."""
        return torch.zeros_like(x)

    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) as it is."""
        return z_BTW

    def tensors(self) -> dict[str, Tensor]:
        """Nothing was fitted."""
        return {}
