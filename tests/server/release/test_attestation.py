"""Statements and envelopes are those of in-toto and DSSE, byte for byte, and can be read in one way only."""

from __future__ import annotations

import base64
import json

import pytest

from privacy.identity import IdentityKey, pre_authentication
from server.release.attestation import PAYLOAD_TYPE, Envelope, Statement, about

KEY, OTHER = (IdentityKey(bytes([n]) * 32) for n in (1, 2))


def test_what_is_signed_is_the_encoding_of_the_dsse_specification() -> None:
    """The example of the specification: lengths in bytes, so an umlaut counts as two."""
    assert pre_authentication("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pre_authentication("tä", "ü".encode()) == b"DSSEv1 3 t\xc3\xa4 2 \xc3\xbc"


def test_a_statement_has_the_fields_of_in_toto_v1() -> None:
    body = json.loads(Statement(subject=(about("a.csv", "0" * 64),)).to_bytes())
    assert body == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "a.csv", "digest": {"sha256": "0" * 64}}],
    }


def test_an_envelope_carries_several_signatures_and_no_more_than_one_of_a_key() -> None:
    envelope = Envelope(b"{}").signed(KEY).signed(OTHER).signed(KEY)
    content = json.loads(envelope.to_line())
    assert content["payloadType"] == PAYLOAD_TYPE == "application/vnd.in-toto+json"
    assert base64.b64decode(content["payload"]) == b"{}"
    assert sorted(entry["keyid"] for entry in content["signatures"]) == sorted(k.public.hex() for k in (KEY, OTHER))
    assert Envelope.from_line(envelope.to_line()) == envelope
    assert envelope.misfits() == ()


def test_a_signature_belongs_to_its_bytes_and_its_key() -> None:
    signed = Envelope(b"{}").signed(KEY)
    assert Envelope(b"{ }", signed.signatures).misfits() == (KEY.public,)
    assert Envelope(b"{}", {OTHER.public: signed.signatures[KEY.public]}).misfits() == (OTHER.public,)
    assert Envelope(b"{}", {b"no key": b"no signature"}).misfits() == (b"no key",)


def respelled(change: str) -> bytes:
    line = Envelope(b"{}").signed(KEY).signed(OTHER).to_line()
    content = json.loads(line)
    match change:
        case "spaces":
            return json.dumps(content, sort_keys=True).encode()
        case "capitals":
            return line.replace(KEY.public.hex().encode(), KEY.public.hex().upper().encode())
        case "order":
            content["signatures"].reverse()
        case "twice":
            content["signatures"] = [content["signatures"][0]] * 2
        case "more":
            content["note"] = "trust me"
        case "type":
            content["payloadType"] = "application/json"
        case "nested":
            return b"[" * 100_000
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("change", ["spaces", "capitals", "order", "twice", "more", "type", "nested"])
def test_another_spelling_is_refused(change: str) -> None:
    with pytest.raises(ValueError, match=r"canonical form|twice|no signed envelope"):
        Envelope.from_line(respelled(change))
