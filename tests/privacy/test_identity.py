from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.identity import (
    IdentityKey,
    MaskingKey,
    SecretKey,
    confirm_fingerprint,
    fingerprint,
    open_envelope,
    pre_authentication,
    seal_envelope,
    verify,
)

KEY = IdentityKey(bytes(range(32)))
OTHER = IdentityKey(bytes(32))


@given(st.binary(max_size=200), st.text(max_size=20))
def test_signature_holds_for_exactly_its_type_payload_and_key(payload: bytes, kind: str) -> None:
    signature = KEY.sign(kind, payload)
    assert verify(KEY.public, signature, kind, payload)
    assert not verify(OTHER.public, signature, kind, payload)
    assert not verify(KEY.public, signature, kind + "x", payload)
    assert not verify(KEY.public, signature, kind, payload + b"\0")


@given(st.binary(max_size=64), st.binary(max_size=100))
def test_malformed_keys_and_signatures_are_false_not_errors(public: bytes, signature: bytes) -> None:
    assert not verify(public, signature, "t", b"payload")


@given(st.text(max_size=8), st.binary(max_size=8), st.text(max_size=8), st.binary(max_size=8))
def test_no_two_inputs_share_an_encoding(kind: str, body: bytes, kind2: str, body2: bytes) -> None:
    assert (pre_authentication(kind, body) == pre_authentication(kind2, body2)) == ((kind, body) == (kind2, body2))


def test_masking_keys_agree_and_refuse_predictable_points() -> None:
    a, b = MaskingKey.generate(), MaskingKey.generate()
    assert a.shared(b.public) == b.shared(a.public) != a.shared(a.public)
    for low_order in (bytes(32), (1).to_bytes(32, "little")):
        with pytest.raises(ValueError, match="shared key"):
            a.shared(low_order)
    with pytest.raises(ValueError, match="32 bytes"):
        a.shared(bytes(31))


@pytest.mark.parametrize("kind", [IdentityKey, MaskingKey, SecretKey])
def test_key_files_are_private_and_never_replaced(tmp_path: Path, kind: type[SecretKey]) -> None:
    path = tmp_path / "keys" / "some.key"
    key = kind.generate()
    key.save(path)
    assert kind.load(path).secret_bytes() == key.secret_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileExistsError):
        kind.generate().save(path)
    assert kind.load(path).secret_bytes() == key.secret_bytes()


def test_unsafe_key_files_are_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "some.key"
    with pytest.raises(ValueError, match="missing"):
        SecretKey.load(path)
    SecretKey.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        SecretKey.load(path)
    path.chmod(0o600)
    link = path.with_name("link.key")
    link.symlink_to(path)
    with pytest.raises(ValueError, match="plain file"):
        SecretKey.load(link)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        SecretKey.load(path)


def test_a_key_prints_as_nothing_and_cannot_be_pickled() -> None:
    key = SecretKey(b"\x11" * 32)
    assert "11" not in repr(key)
    assert "\\x11" not in str(key)
    with pytest.raises(TypeError, match="private key"):
        pickle.dumps(key)


def test_envelopes_open_for_the_right_type_and_key_only() -> None:
    envelope = seal_envelope(KEY, "kind", b"payload")
    assert open_envelope(envelope, "kind", KEY.public) == b"payload"
    with pytest.raises(ValueError, match="type"):
        open_envelope(envelope, "other", KEY.public)
    with pytest.raises(ValueError, match="no signature"):
        open_envelope(envelope, "kind", OTHER.public)
    with pytest.raises(ValueError, match="no signature"):
        open_envelope(envelope.replace(b"cGF5bG9hZA==", b"cGF5bG9hRA=="), "kind", KEY.public)


@given(st.binary(max_size=100))
def test_envelope_garbage_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="envelope"):
        open_envelope(data, "kind", KEY.public)


def test_fingerprint_is_readable_and_depends_on_every_byte() -> None:
    assert len(fingerprint(KEY.public).split()) == 16
    assert fingerprint(KEY.public) != fingerprint(OTHER.public)


@pytest.mark.parametrize("typed", [fingerprint(KEY.public), fingerprint(KEY.public).replace(" ", "").upper()])
def test_a_fingerprint_is_confirmed_however_it_was_grouped(typed: str) -> None:
    confirm_fingerprint(f" {typed}\n", KEY.public, "site north")
    with pytest.raises(ValueError, match="site north"):
        confirm_fingerprint(f" {typed}\n", OTHER.public, "site north")


def test_a_fingerprint_that_differs_says_where_and_not_what_was_expected() -> None:
    heard = fingerprint(KEY.public).split()
    heard[2], heard[15] = "0000", "ffff"
    with pytest.raises(ValueError, match=r"fingerprint of site north: group 3, 16 of 16") as caught:
        confirm_fingerprint(" ".join(heard), KEY.public, "site north")
    assert not any(group in str(caught.value) for group in fingerprint(KEY.public).split())


@pytest.mark.parametrize(
    "typed", ["", "0", fingerprint(KEY.public)[:-1], fingerprint(KEY.public)[:19], "x" * 64, "ü" * 64]
)
def test_part_of_a_fingerprint_is_none(typed: str) -> None:
    with pytest.raises(ValueError, match="expected 64 hexadecimal digits"):
        confirm_fingerprint(typed, KEY.public, "site north")
