"""A site that trusts the authority accepts the coordinator's certificate for its host, in its time, and nothing else."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from privacy.certificates import read_authority, read_certificate
from server.authority import Credential, check_server_certificate, make_authority, make_server_certificate

NOW = datetime.datetime(2030, 6, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> Credential:
    return make_authority("demo")


def shake_hands(folder: Path, trusted: bytes, server: Credential, host: str) -> None:
    """A TLS handshake in memory: the client trusts one authority and checks the host, as a SuperNode does."""
    (folder / "key").write_bytes(server.key_pem)
    (folder / "crt").write_bytes(server.certificate_pem)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "crt", folder / "key")
    dialling = ssl.create_default_context(cadata=trusted.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = dialling.wrap_bio(down, up, server_hostname=host)
    other = serving.wrap_bio(up, down, server_side=True)
    done: set[int] = set()
    for _ in range(6):
        for number, side in enumerate((client, other)):
            try:
                side.do_handshake()
                done.add(number)
            except ssl.SSLWantReadError:
                continue
        if done == {0, 1}:
            return
    raise AssertionError("the handshake did not end")


@pytest.mark.parametrize("host", ["coordinator.example.org", "192.0.2.7", "2001:db8::7"])
def test_a_site_that_dials_the_host_is_answered_and_so_is_the_loopback(
    tmp_path: Path, authority: Credential, host: str
) -> None:
    server = make_server_certificate(authority, host)
    for name in (host, "localhost", "127.0.0.1"):
        shake_hands(tmp_path, authority.certificate_pem, server, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, authority.certificate_pem, server, "other.example.org")


def test_another_consortiums_certificate_is_not_believed(tmp_path: Path, authority: Credential) -> None:
    stranger = make_authority("demo")
    server = make_server_certificate(stranger, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, authority.certificate_pem, server, "localhost")
    with pytest.raises(ValueError, match="not signed by"):
        check_server_certificate(authority.certificate_pem, server.certificate_pem, "localhost")


def test_keys_and_limits_of_what_each_certificate_may_do(authority: Credential) -> None:
    top = read_authority(authority.certificate_pem, "authority")
    server = read_certificate(make_server_certificate(authority, "localhost").certificate_pem, "server")
    for certificate in (top, server):
        public = certificate.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert isinstance(public.curve, ec.SECP384R1)
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA384)
    constraints = top.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = top.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    usage = server.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (False, True)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = list(server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    with pytest.raises(ValueError, match="no certificate authority"):
        read_authority(server.public_bytes(Encoding.PEM), "server")


def test_validity_is_a_year_within_the_authoritys_ten() -> None:
    authority = make_authority("demo", NOW)
    top = read_authority(authority.certificate_pem, "authority", NOW)
    assert top.not_valid_after_utc - NOW == 3652 * DAY
    server = read_certificate(make_server_certificate(authority, "localhost", NOW).certificate_pem, "server", NOW)
    assert server.not_valid_after_utc - NOW == 397 * DAY
    assert NOW - server.not_valid_before_utc == datetime.timedelta(hours=1)
    late = NOW + 3652 * DAY - DAY
    short = read_certificate(make_server_certificate(authority, "localhost", late).certificate_pem, "server", late)
    assert short.not_valid_after_utc == top.not_valid_after_utc


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (NOW + 398 * DAY, r"expired on 2031-07-03 12:00 UTC; this machine's clock says 2031-07-04 12:00 UTC.*renew"),
        (NOW - DAY, r"not valid before 2030-06-01 11:00 UTC; this machine's clock says 2030-05-31 12:00 UTC.*set it"),
    ],
    ids=["expired", "not yet valid"],
)
def test_the_wrong_day_is_named_with_the_clock_as_a_possible_cause(now: datetime.datetime, words: str) -> None:
    authority = make_authority("demo", NOW - 2 * DAY)
    server = make_server_certificate(authority, "localhost", NOW)
    with pytest.raises(ValueError, match=rf"tls/server\.crt\): {words}"):
        check_server_certificate(authority.certificate_pem, server.certificate_pem, "localhost", now)


def test_an_expired_authority_signs_nothing(authority: Credential) -> None:
    old = make_authority("demo", NOW - 4000 * DAY)
    with pytest.raises(ValueError, match=r"ca/ca\.crt\): expired on"):
        make_server_certificate(old, "localhost", NOW)


def test_a_key_that_is_not_the_authoritys_or_no_key_is_refused(authority: Credential) -> None:
    mixed = Credential(make_authority("demo").key_pem, authority.certificate_pem)
    with pytest.raises(ValueError, match="not the key of"):
        make_server_certificate(mixed, "localhost")
    with pytest.raises(ValueError, match=r"tls/server\.key: expected a private key"):
        make_server_certificate(authority, "localhost", key_pem=b"nothing")


def test_a_renewal_over_the_same_key_keeps_it_and_nothing_shows_a_key(authority: Credential) -> None:
    first = make_server_certificate(authority, "localhost")
    second = make_server_certificate(authority, "localhost", key_pem=first.key_pem)
    assert second.key_pem == first.key_pem
    assert second.certificate_pem != first.certificate_pem
    assert (
        load_pem_private_key(first.key_pem, None).public_key()
        == read_certificate(second.certificate_pem, "server").public_key()
    )
    assert "PRIVATE" not in repr(first)


@pytest.mark.parametrize(
    "pem", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_named(pem: bytes) -> None:
    with pytest.raises(ValueError, match="server: expected one certificate"):
        read_certificate(pem, "server")


def test_a_bundle_of_certificates_is_not_taken_for_one(authority: Credential) -> None:
    with pytest.raises(ValueError, match="expected one certificate, got 2"):
        read_certificate(authority.certificate_pem * 2, "server")
