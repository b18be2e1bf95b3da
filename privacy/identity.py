"""Keys, signatures and envelopes of sites and coordinator.

Ed25519 (RFC 8032) signs, X25519 (RFC 7748) agrees on masking secrets. Private keys are files of 32 raw bytes, mode 0600,
in a folder of mode 0700, made where they are used; they are never part of a message.

Covered: a signature binds a payload *type* and its bytes (DSSE v1 pre-authentication encoding), so that a signed plan can
never pass for a signed task; a key file that others may read is refused.
Not covered: an attacker who runs as the same OS user, and keys at rest on a stolen unencrypted disk.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from privacy.chain import sync_folder

KEY_BYTES = 32
SIGNATURE_BYTES = 64


class _KeyFile:
    """32 secret bytes that print as nothing."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"expected a key of {KEY_BYTES} bytes, got {len(secret)}; make the key again")
        self._secret = secret

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<secret>)"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(f"{type(self).__name__} is not picklable: a private key stays in the process that loaded it")

    @classmethod
    def generate(cls) -> Self:
        """A fresh key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a key written by :meth:`save`; see :func:`read_secret` for what is refused."""
        return cls(read_secret(path))

    def save(self, path: Path) -> None:
        """Write the key, mode 0600, in a folder of mode 0700; an existing file is never replaced."""
        write_secret(path, self._secret)

    def secret_bytes(self) -> bytes:
        """The raw key, for key derivation inside the site."""
        return self._secret


class IdentityKey(_KeyFile):
    """Ed25519 signing key: who a site or a coordinator is."""

    @property
    def public(self) -> bytes:
        """Public half, 32 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self._secret).public_key().public_bytes_raw()

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """64-byte Ed25519 signature over the pre-authentication encoding of type and payload."""
        return Ed25519PrivateKey.from_private_bytes(self._secret).sign(pre_authentication(payload_type, payload))


class MaskingKey(_KeyFile):
    """X25519 key: what pairwise masks are agreed on with."""

    @property
    def public(self) -> bytes:
        """Public half, 32 bytes."""
        return X25519PrivateKey.from_private_bytes(self._secret).public_key().public_bytes_raw()

    def shared(self, peer: bytes) -> bytes:
        """The 32-byte shared secret with ``peer``; input of a key derivation, never used as it is.

        Raises:
            ValueError: ``peer`` is no X25519 key, or one of the points that would make the secret predictable.
        """
        key = X25519PublicKey.from_public_bytes(peer)
        return X25519PrivateKey.from_private_bytes(self._secret).exchange(key)


class SecretKey(_KeyFile):
    """32 symmetric secret bytes (cache, split)."""


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1 PAE: what is signed, with both lengths in it so that no two inputs collide.

    >>> pre_authentication("t", b"body")
    b'DSSEv1 1 t 4 body'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def verify(public: bytes, signature: bytes, payload_type: str, payload: bytes) -> bool:
    """Whether ``signature`` over type and payload was made by the holder of ``public``; malformed input is False."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, pre_authentication(payload_type, payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(public: bytes) -> str:
    """SHA-256 of a public key in groups of four, to be read aloud over the telephone.

    >>> fingerprint(bytes(32))[:19]
    '6668 7aad f862 bd77'
    """
    digest = hashlib.sha256(public).hexdigest()
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def confirm_fingerprint(typed: str, public: bytes, whose: str) -> None:
    """Hold a fingerprint that somebody read aloud, and somebody else typed, against a public key.

    Raises:
        ValueError: it is not 64 hexadecimal digits, or not those of ``public``; the groups that differ are numbered, and the
            expected digits are not shown, because then they would be typed instead of read.
    """
    digits = "".join(typed.split()).lower()
    expected = fingerprint(public).replace(" ", "")
    if len(digits) != len(expected) or set(digits) - set("0123456789abcdef"):
        raise ValueError(
            f"fingerprint of {whose}: expected {len(expected)} hexadecimal digits in groups of four, got {len(digits)} "
            "characters; have it read to you again"
        )
    pairs = zip(range(0, len(digits), 4), range(4, len(digits) + 4, 4), strict=True)
    if wrong := [str(start // 4 + 1) for start, end in pairs if digits[start:end] != expected[start:end]]:
        raise ValueError(
            f"fingerprint of {whose}: group {', '.join(wrong)} of 16 is not that of the key in the file; have it read again, "
            "and if it differs again the file was changed on its way: do not use it"
        )


def seal_envelope(key: IdentityKey, payload_type: str, payload: bytes) -> bytes:
    """A DSSE envelope: one JSON object with payload, type, signature and the public key that signed."""
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": key.public.hex(), "sig": base64.b64encode(key.sign(payload_type, payload)).decode()}],
    }
    return json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode()


def open_envelope(envelope: bytes, payload_type: str, public: bytes) -> bytes:
    """The payload of an envelope that ``public`` signed as ``payload_type``.

    Raises:
        ValueError: the envelope does not parse, is of another type, or no signature in it fits ``public``.
    """
    try:
        parsed = json.loads(envelope)
        payload = base64.b64decode(parsed["payload"], validate=True)
        found = parsed["payloadType"]
        signatures = [base64.b64decode(entry["sig"], validate=True) for entry in parsed["signatures"]]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise ValueError("expected a signed envelope (payload, payloadType, signatures), got something else") from error
    if found != payload_type:
        raise ValueError(f"expected an envelope of type {payload_type!r}, got {found!r}")
    if not any(verify(public, signature, payload_type, payload) for signature in signatures):
        raise ValueError(f"no signature of this envelope fits the key {fingerprint(public)[:19]}…; check who signed it")
    return payload


def write_secret(path: Path, secret: bytes) -> None:
    """Write ``secret`` durably to a new file of mode 0600 in a folder of mode 0700.

    Raises:
        FileExistsError: the file is there already; a key is retired by moving it away, never by overwriting.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.fchmod(handle, 0o600)
        os.write(handle, secret)
        os.fsync(handle)
    finally:
        os.close(handle)
    sync_folder(path.parent)


def read_secret(path: Path) -> bytes:
    """Read a secret file.

    Raises:
        ValueError: it is missing, is no plain file, or someone other than its owner may read or write it.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"{path}: the key is missing; make the site's keys first") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: a key must be a plain file, not a link or folder; put the key itself there")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(
            f"{path}: mode {stat.S_IMODE(status.st_mode):04o} lets others read the key; run chmod 600 on it"
        )
    return path.read_bytes()
