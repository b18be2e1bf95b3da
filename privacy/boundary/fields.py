"""Rules for the fields of messages: one function each, which raises with value, rule and remedy.

Covered: types (a bool is no integer), lengths, alphabets and ranges, so that a field cannot carry free text or more bytes
than its meaning needs.
Not covered: whether a value is true; that is for signatures, policy and ledger.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Rule = Callable[[str, Any], None]

MAX_SITES = 256
MAX_ENTRIES = 4096
MAX_COUNT = 2**31 - 1
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
_GROUP = re.compile(r"[A-Za-z0-9@][A-Za-z0-9_.@,:/+-]{0,199}")
_STAGE = re.compile(r"[a-z0-9][a-z0-9._/-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HEAD = re.compile(r"[1-9][0-9]{0,9}:[0-9a-f]{64}")


def _need(valid: bool, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {wanted}, got {str(value)[:80]!r}")


def label(name: str, value: Any) -> None:
    """A name: 1 to 64 letters, digits and ``_ . + -``, starting with a letter or digit."""
    _need(isinstance(value, str) and bool(_LABEL.fullmatch(value)), name, value, "1 to 64 letters, digits, _ . + -")


def stage(name: str, value: Any) -> None:
    """A stage of a plan: like a name, lower case, with ``/`` allowed inside."""
    _need(isinstance(value, str) and bool(_STAGE.fullmatch(value)), name, value, "1 to 64 of a-z, 0-9, . _ / -")


def digest(name: str, value: Any) -> None:
    """A SHA-256 digest in lower-case hexadecimal."""
    _need(isinstance(value, str) and bool(_DIGEST.fullmatch(value)), name, value, "64 lower-case hexadecimal digits")


def digest_or_none(name: str, value: Any) -> None:
    """A digest, or nothing."""
    if value != "":
        digest(name, value)


def counts(name: str, value: Any) -> None:
    """At most 16 entries, stage -> count."""
    _need(isinstance(value, Mapping) and len(value) <= 16, name, value, "at most 16 entries")
    for key, entry in value.items():
        stage(f"{name} key", key)
        count(f"{name}.{key}", entry)


def salt(name: str, value: Any) -> None:
    """32 bytes."""
    _need(isinstance(value, bytes) and len(value) == 32, name, value, "a salt of 32 bytes")


def count(name: str, value: Any) -> None:
    """An integer from 0 to 2^31 - 1."""
    _need(type(value) is int and 0 <= value <= MAX_COUNT, name, value, f"an integer from 0 to {MAX_COUNT}")


def positive(name: str, value: Any) -> None:
    """An integer from 1 to 2^31 - 1."""
    _need(type(value) is int and 1 <= value <= MAX_COUNT, name, value, f"an integer from 1 to {MAX_COUNT}")


def cohort_size(name: str, value: Any) -> None:
    """1 (own noise alone is enough), or 3 and more: a sum over two sites shows each of them the other's update."""
    valid = type(value) is int and 1 <= value <= MAX_SITES and value != 2
    _need(valid, name, value, f"1, or 3 to {MAX_SITES}")


def digests(name: str, value: Any) -> None:
    """A tuple of at most 4096 different digests."""
    _tuple_of(digest, name, value, MAX_ENTRIES)


def labels(name: str, value: Any) -> None:
    """A tuple of at most 256 different names."""
    _tuple_of(label, name, value, MAX_SITES)


def sites(name: str, value: Any) -> None:
    """A sorted tuple of 1 to 256 different site names."""
    _tuple_of(label, name, value, MAX_SITES)
    _need(len(value) >= 1 and tuple(sorted(value)) == value, name, value, "one site or more, sorted by name")


def public_key(name: str, value: Any) -> None:
    """32 bytes."""
    _need(isinstance(value, bytes) and len(value) == 32, name, value, "a public key of 32 bytes")


def signature(name: str, value: Any) -> None:
    """64 bytes."""
    _need(isinstance(value, bytes) and len(value) == 64, name, value, "a signature of 64 bytes")


def signature_or_none(name: str, value: Any) -> None:
    """64 bytes, or none before signing."""
    _need(isinstance(value, bytes) and len(value) in (0, 64), name, value, "a signature of 64 bytes, or nothing yet")


def sealed(name: str, value: Any) -> None:
    """16 to 65536 bytes: a sealed box with its tag."""
    _need(isinstance(value, bytes) and 16 <= len(value) <= 65536, name, value, "16 to 65536 bytes")


def short_texts(name: str, value: Any) -> None:
    """At most 16 entries, name -> name."""
    _need(isinstance(value, Mapping) and len(value) <= 16, name, value, "at most 16 entries")
    for key, entry in value.items():
        label(f"{name} key", key)
        label(f"{name}.{key}", entry)


def heads(name: str, value: Any) -> None:
    """At most 256 entries, site -> ``SEQ:HASH`` of a row of its ledger."""
    _need(isinstance(value, Mapping) and len(value) <= MAX_SITES, name, value, f"at most {MAX_SITES} entries")
    for key, entry in value.items():
        label(f"{name} key", key)
        _need(isinstance(entry, str) and bool(_HEAD.fullmatch(entry)), f"{name}.{key}", entry, "SEQ:HASH")


def shares(name: str, value: Any) -> None:
    """At most 256 entries, site -> 32 bytes."""
    _need(isinstance(value, Mapping) and len(value) <= MAX_SITES, name, value, f"at most {MAX_SITES} entries")
    for key, entry in value.items():
        label(f"{name} key", key)
        public_key(f"{name}.{key}", entry)


def raw(limit: int) -> Rule:
    """Bytes, at most ``limit`` of them."""

    def check(name: str, value: Any) -> None:
        _need(isinstance(value, bytes), name, type(value).__name__, "bytes")
        _need(len(value) <= limit, name, f"{len(value)} bytes", f"at most {limit} bytes")

    return check


def one_of(*allowed: str) -> Rule:
    """One of these words."""

    def check(name: str, value: Any) -> None:
        _need(isinstance(value, str) and value in allowed, name, value, f"one of {', '.join(allowed)}")

    return check


def arrays(*dtypes: str) -> Rule:
    """At most 4096 named numpy arrays of these little-endian types, floats finite."""

    def check(name: str, value: Any) -> None:
        _need(isinstance(value, Mapping) and len(value) <= MAX_ENTRIES, name, type(value).__name__, "named arrays")
        for key, array in value.items():
            _need(isinstance(key, str) and bool(_GROUP.fullmatch(key)), f"{name} key", key, "a group name")
            _need(isinstance(array, np.ndarray), f"{name}[{key}]", type(array).__name__, "a numpy array")
            valid = str(array.dtype) in dtypes and array.dtype.byteorder in "=<|"
            _need(valid, f"{name}[{key}]", array.dtype, f"type {' or '.join(dtypes)}")
            finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
            _need(finite, f"{name}[{key}]", "NaN or infinity", "finite numbers")

    return check


def _tuple_of(rule: Rule, name: str, value: Any, limit: int) -> None:
    _need(isinstance(value, tuple) and len(value) <= limit, name, type(value).__name__, f"a tuple of at most {limit}")
    for entry in value:
        rule(name, entry)
    _need(len(set(value)) == len(value), name, "a repeated entry", "entries that differ")
