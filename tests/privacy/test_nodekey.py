"""The SuperNode's key is exactly what Flower reads: P-384, OpenSSH, one line without a comment."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from privacy.identity import fingerprint
from privacy.nodekey import check_node_line, make_node_key, node_fingerprint, node_public_line


def openssh(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def test_the_two_halves_belong_together_and_load_as_flower_loads_them() -> None:
    private = make_node_key()
    line = node_public_line(private)
    loaded, public = load_ssh_private_key(private, password=None), load_ssh_public_key(line.encode())
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert isinstance(loaded.curve, ec.SECP384R1)
    assert loaded.public_key() == public
    assert check_node_line(line) == line
    assert make_node_key() != private


def test_another_curve_kind_or_form_is_refused() -> None:
    small = ec.generate_private_key(ec.SECP256R1())
    for private in (
        openssh(small),
        openssh(ed25519.Ed25519PrivateKey.generate()),
        small.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        b"",
    ):
        with pytest.raises(ValueError, match="P-384"):
            node_public_line(private)
    with pytest.raises(ValueError, match="P-384"):
        check_node_line(small.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


@pytest.mark.parametrize(
    "change", [lambda s: s + " site", lambda s: s + "\n", lambda s: s[:-4], lambda s: "ä" + s, str.upper]
)
def test_a_public_line_is_taken_byte_for_byte_or_not_at_all(change: object) -> None:
    line = node_public_line(make_node_key())
    with pytest.raises(ValueError, match="expected one line"):
        check_node_line(change(line))  # type: ignore[operator]


def test_the_fingerprint_is_of_the_key_not_of_the_text() -> None:
    line = node_public_line(make_node_key())
    assert node_fingerprint(line) != fingerprint(line.encode())
    assert len(node_fingerprint(line)) == 79
    assert node_fingerprint(line) != node_fingerprint(node_public_line(make_node_key()))
