"""``medgen release``: exit codes that scripts can rely on, and words that name what is wrong and what to do."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medgen import app
from privacy.identity import IdentityKey

LATER = (datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=300)).isoformat()
ACCEPTED, REFUSED, OPEN = 0, 1, 3


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("officer", "stranger"):
        key = IdentityKey.generate()
        key.save(folder / f"{name}.key")
        (folder / f"{name}.pub").write_text(key.public.hex() + "\n")
    return folder


@pytest.fixture
def bundle(study_finished: Any, tmp_path: Path) -> Path:
    shutil.copytree(study_finished.folder.bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def coordinator(study_finished: Any) -> str:
    return str(study_finished.folder.coordinator / "identity.pub")


def medgen(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["release", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def accept(bundle: Path, keys: Path, **options: str) -> tuple[int, str]:
    given = {"role": "privacy-officer", "name": "A. Officer", "reason": "Bound by contract.", "until": LATER} | options
    words = [word for name, value in given.items() if value for word in (f"--{name}", value)]
    return medgen("sign", bundle, "--key", keys / "officer.key", *words)


def test_from_candidate_to_accepted_to_revoked(bundle: Path, keys: Path, coordinator: str, tmp_path: Path) -> None:
    code, text = medgen("verify", bundle, "--key", coordinator)
    assert code == OPEN
    assert "WHOLE" in text
    assert "no privacy officer has accepted it" in text
    code, text = medgen("verify", bundle, "--key", coordinator, "--candidate")
    assert code == ACCEPTED
    assert "NOT ACCEPTED" in text
    code, text = accept(bundle, keys)
    assert code == ACCEPTED
    assert "2 of 2 signatures" in text
    trusted = ("--key", f"coordinator={coordinator}", "--key", f"privacy-officer={keys / 'officer.pub'}")
    code, text = medgen("verify", bundle, *trusted)
    assert code == ACCEPTED
    assert "A. Officer, Bound by contract." in text
    assert "revoked not checked" in text
    listed = tmp_path / "revoked.jsonl"
    reason = ("--reason", "A site withdrew.")
    code, text = medgen("revoke", bundle, "--key", keys / "officer.key", *reason, "--out", listed)
    assert code == 0
    assert "head 1:" in text
    code, text = medgen("verify", bundle, *trusted, "--revocations", listed)
    assert code == REFUSED
    assert "A site withdrew." in text


def test_a_changed_byte_is_refused_also_as_a_candidate(bundle: Path, coordinator: str) -> None:
    (bundle / "datasheet.md").write_text("All is well.")
    code, text = medgen("verify", bundle, "--key", coordinator, "--candidate")
    assert code == REFUSED
    assert "datasheet.md: changed" in text


def test_a_key_in_another_role_is_refused(bundle: Path, keys: Path, coordinator: str) -> None:
    assert accept(bundle, keys)[0] == 0
    officer = f"data-lead={keys / 'officer.pub'}"
    code, text = medgen("verify", bundle, "--key", coordinator, "--key", officer)
    assert code == REFUSED
    assert "signed as privacy-officer; you know it as data-lead" in text


def test_an_unknown_signer_is_refused(bundle: Path, keys: Path, coordinator: str) -> None:
    assert accept(bundle, keys)[0] == 0
    code, text = medgen("verify", bundle, "--key", coordinator, "--key", keys / "stranger.pub")
    assert code == REFUSED
    assert "signed by an unknown key" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": ""}, "signs with a name and with the last day"),
        ({"until": ""}, "signs with a name and with the last day"),
        ({"reason": ""}, "give a reason"),
        ({"until": "2020-01-01"}, "--until 2020-01-01 is over"),
        ({"until": "tomorrow"}, "Invalid isoformat"),
        ({"reason": "<script>"}, "reason"),
    ],
)
def test_an_officer_who_leaves_something_out_signs_nothing(
    options: dict[str, str], words: str, bundle: Path, keys: Path
) -> None:
    before = (bundle / "release.intoto.jsonl").read_bytes()
    code, text = accept(bundle, keys, **options)
    assert code == REFUSED
    assert words in text
    assert (bundle / "release.intoto.jsonl").read_bytes() == before


def test_a_changed_bundle_is_not_signed(bundle: Path, keys: Path) -> None:
    (bundle / "report.html").write_text("<p>All is well.")
    code, text = accept(bundle, keys)
    assert code == REFUSED
    assert "nothing was signed: report.html: changed" in text


def test_a_key_that_others_may_read_is_not_used(bundle: Path, keys: Path, tmp_path: Path) -> None:
    loose = tmp_path / "officer.key"
    shutil.copy(keys / "officer.key", loose)
    loose.chmod(0o644)
    code, text = medgen("sign", bundle, "--key", loose, "--role", "data-lead")
    assert code == REFUSED
    assert "lets others read the key" in text


@pytest.mark.parametrize("content", ["", "zz" * 32, "ab" * 31, "ab" * 32 + "\nab"])
def test_a_file_that_holds_no_public_keys_is_named(content: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pub").write_text(content)
    code, text = medgen("verify", bundle, "--key", tmp_path / "bad.pub")
    assert code == REFUSED
    assert "bad.pub" in text


def test_a_finished_run_is_built_again_and_never_over_a_bundle(study_finished: Any, tmp_path: Path) -> None:
    run = study_finished.folder.path
    code, text = medgen("build", run, "--out", tmp_path / "again")
    assert code == 0
    assert "built" in text
    code, text = medgen("build", run)
    assert code == REFUSED
    assert "a bundle is written once" in text
    code, text = medgen("build", tmp_path)
    assert code == REFUSED


def test_wrong_words_are_a_usage_error(bundle: Path) -> None:
    assert medgen("verify", bundle)[0] == 2
    assert medgen("sign", bundle, "--key", "/nowhere", "--role", "data-lead")[0] == 2
    assert medgen("verify", bundle, "--key", "x", "--revocations", "/nowhere")[0] == 2
