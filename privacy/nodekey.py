"""The P-384 key with which a site's SuperNode signs in at Flower's SuperLink, in the OpenSSH form that Flower reads.

It opens the transport and nothing else: it signs no plan, no answer and no mask, so whoever steals it can carry messages in
a site's name and read none.

Covered: keys of another kind or curve, comments and stray bytes in the public line.
Not covered: Flower signs a timestamp, not a body, so inside the TLS endpoints a request may be replayed for minutes;
messages carry their own digests and signatures for that reason.
"""

from __future__ import annotations

import base64

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from privacy.identity import fingerprint


def make_node_key() -> bytes:
    """A fresh private key: P-384, OpenSSH, without a passphrase, as Flower needs it."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def node_public_line(private: bytes) -> str:
    """The public half of a private key as one OpenSSH line without a comment.

    Raises:
        ValueError: it is no P-384 key in OpenSSH form, or it has a passphrase.
    """
    try:
        key = load_ssh_private_key(private, password=None)
    except (ValueError, UnsupportedAlgorithm, TypeError) as error:
        raise ValueError("expected a P-384 private key in OpenSSH form without a passphrase; make it again") from error
    return _line(key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else None)


def check_node_line(line: str) -> str:
    """The same line, if it is a P-384 public key as :func:`node_public_line` writes it, byte for byte.

    Raises:
        ValueError: it is anything else.
    """
    try:
        key = load_ssh_public_key(line.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("expected one line 'ecdsa-sha2-nistp384 …', got something else") from error
    if _line(key if isinstance(key, ec.EllipticCurvePublicKey) else None) != line:
        raise ValueError("expected one line 'ecdsa-sha2-nistp384 …' without a comment")
    return line


def node_line_of_pem(pem: bytes) -> str:
    """The line of a public key that Flower reports (PEM); empty for whatever is no P-384 key, which is no site's."""
    try:
        key = load_pem_public_key(pem)
        return _line(key if isinstance(key, ec.EllipticCurvePublicKey) else None)
    except (ValueError, UnsupportedAlgorithm):
        return ""


def node_fingerprint(line: str) -> str:
    """SHA-256 of the key's bytes, in groups of four."""
    return fingerprint(base64.b64decode(check_node_line(line).split()[1]))


def _line(key: ec.EllipticCurvePublicKey | None) -> str:
    if key is None or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("expected a key on the curve P-384, got another; make it with `medgen site init` or `request`")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
