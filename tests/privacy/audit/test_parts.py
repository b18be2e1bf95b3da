"""What arrives is what was sent, byte by byte, or nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit.parts import FileEntry, PartEntry, PartsManifest, assemble, manifest_of, split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "sent"
    (root / "sub-SYN0001" / "anat").mkdir(parents=True)
    (root / "a.csv").write_bytes(b"id,x\n1,2\n")
    (root / "empty.json").write_bytes(b"")
    (root / "sub-SYN0001" / "anat" / "big.nii.gz").write_bytes(bytes(range(256)) * 40)
    return root


def test_round_trip_in_small_parts(folder: Path, tmp_path: Path) -> None:
    manifest, parts = split(folder, part_bytes=1000)
    assert len(parts) == 11
    assert all(len(body) <= 1000 for _, body in parts)
    assert all(hashlib.sha256(body).hexdigest() == digest for digest, body in parts)
    again = PartsManifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assemble(again, dict(parts).__getitem__, tmp_path / "got")
    assert split(tmp_path / "got", part_bytes=1000)[0] == manifest


def test_the_manifest_alone_is_that_of_the_parts(folder: Path) -> None:
    (folder / "large.bin").write_bytes(bytes(5 * 2**20))
    manifest, parts = split(folder)
    assert len(parts) == 2
    assert manifest_of(folder) == manifest


@settings(max_examples=20, deadline=None)
@given(bodies=st.lists(st.binary(max_size=50), min_size=1, max_size=6), size=st.integers(1, 64))
def test_any_sizes(bodies: list[bytes], size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("any")
    (root / "in").mkdir()
    for number, body in enumerate(bodies):
        (root / "in" / f"f{number}").write_bytes(body)
    manifest, parts = split(root / "in", part_bytes=size)
    assemble(manifest, dict(parts).__getitem__, root / "out")
    assert [(root / "out" / f"f{n}").read_bytes() for n in range(len(bodies))] == bodies


def test_a_changed_part_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    manifest, parts = split(folder, part_bytes=1000)
    store = dict(parts)
    store[parts[3][0]] = b"\x00" + parts[3][1][1:]
    with pytest.raises(ValueError, match="does not have its digest"):
        assemble(manifest, store.__getitem__, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["sent"]


def test_a_changed_file_digest_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest, parts = split(folder)
    files = (FileEntry(manifest.files[0].path, "0" * 64, manifest.files[0].size), *manifest.files[1:])
    with pytest.raises(ValueError, match=r"a\.csv"):
        assemble(PartsManifest(files, manifest.parts), dict(parts).__getitem__, tmp_path / "got")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/../b", "a\\b", "", ".hidden", "a/", "a\n"])
def test_paths_that_leave_the_folder_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="manifest is not ours"):
        FileEntry(path, "0" * 64, 1)


def test_lists_that_contradict_themselves_are_refused() -> None:
    entry, other = FileEntry("a", "0" * 64, 1), FileEntry("A", "0" * 64, 1)
    with pytest.raises(ValueError, match="upper and lower"):
        PartsManifest((other, entry), (PartEntry("0" * 64, 2),))
    with pytest.raises(ValueError, match="path order"):
        PartsManifest((entry, other), (PartEntry("0" * 64, 2),))
    with pytest.raises(ValueError, match="total size"):
        PartsManifest((entry,), (PartEntry("0" * 64, 2),))
    with pytest.raises(ValueError, match="both a file and a folder"):
        PartsManifest((entry, FileEntry("a/b", "0" * 64, 1)), (PartEntry("0" * 64, 2),))


def test_manifests_in_other_spellings_are_refused(folder: Path) -> None:
    body = split(folder)[0].to_bytes()
    for wrong in (
        b"",
        b"[]",
        b"{}",
        json.dumps(json.loads(body), indent=1).encode(),
        body.replace(b'"size":9', b'"size":9.0'),
    ):
        with pytest.raises(ValueError, match="manifest"):
            PartsManifest.from_bytes(wrong)


def test_links_are_refused(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "a.csv")
    with pytest.raises(ValueError, match="no links"):
        split(folder)
