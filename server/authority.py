"""The consortium's own certificate authority and the coordinator's server certificate (X.509, P-384, SHA-384).

Sites trust the authority for the coordinator's host and for nothing else; where mutual TLS is wanted, it also signs for the
sites' outbound proxies (``deploy/certify.sh``). Validity begins an hour before now, so that a site whose clock is late by less
is not turned away.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privacy.certificates import read_authority, read_certificate
from privacy.identity import read_secret

AUTHORITY_DAYS = 3652
SERVER_DAYS = 397  # what public certificates were allowed for years; renewed with `medgen server renew`
CLOCK_SLACK = datetime.timedelta(hours=1)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True)
class Credential:
    """A private key with its certificate, both PEM; the key is not printed."""

    key_pem: bytes = dataclasses.field(repr=False)
    certificate_pem: bytes


def make_authority(consortium: str, now: datetime.datetime | None = None) -> Credential:
    """A new authority: valid for ten years, may sign server certificates and nothing below them."""
    now = now or datetime.datetime.now(datetime.UTC)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{consortium} medgen authority"[:64])])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(name, name, key.public_key(), now, now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return Credential(_key_pem(key), certificate.public_bytes(Encoding.PEM))


def make_server_certificate(
    authority: Credential, host: str, now: datetime.datetime | None = None, key_pem: bytes | None = None
) -> Credential:
    """A certificate for ``host`` and the loopback, valid for 397 days but never longer than the authority.

    Args:
        host: a host name or an IP address: what sites dial.
        key_pem: the server's key to go on with; without it a new one is made.

    Raises:
        ValueError: the authority has expired, or a key is not P-384.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    issuer = read_authority(authority.certificate_pem, "the certificate authority (ca/ca.crt)", now)
    signer = _private(authority.key_pem, "ca/ca.key")
    if signer.public_key() != issuer.public_key():
        raise ValueError("ca/ca.key is not the key of ca/ca.crt; restore both from one backup")
    key = _private(key_pem, "tls/server.key") if key_pem else ec.generate_private_key(ec.SECP384R1())
    last = min(now + datetime.timedelta(days=SERVER_DAYS), issuer.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys((host, *LOOPBACK))])
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), now, last)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
        .sign(signer, hashes.SHA384())
    )
    return Credential(_key_pem(key), certificate.public_bytes(Encoding.PEM))


def read_credential(key: Path, certificate: Path) -> Credential:
    """A key and its certificate as they lie on disk.

    Raises:
        ValueError: a file is missing, or others may read the key.
    """
    try:
        return Credential(read_secret(key), certificate.read_bytes())
    except OSError as error:
        raise ValueError(f"{certificate}: {error.strerror}; restore it from the coordinator's backup") from error


def check_server_certificate(
    authority_pem: bytes, certificate_pem: bytes, host: str, now: datetime.datetime | None = None
) -> x509.Certificate:
    """The server's certificate, if sites that trust this authority and dial ``host`` would accept it now.

    Raises:
        ValueError: either certificate has expired or is not valid yet (a wrong clock looks the same), another authority
            signed it, or it is for another host.
    """
    issuer = read_authority(authority_pem, "the certificate authority (ca/ca.crt)", now)
    found = read_certificate(certificate_pem, "the server's certificate (tls/server.crt)", now)
    try:
        found.verify_directly_issued_by(issuer)
    except Exception as error:  # the library raises four kinds, all of which say the same
        raise ValueError("tls/server.crt is not signed by ca/ca.crt; run `medgen server renew`") from error
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if _general_name(host) not in names:
        raise ValueError(f"tls/server.crt is not for {host}, which sites dial; run `medgen server renew`")
    return found


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    last: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(last)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(**set_bits: bool) -> x509.KeyUsage:
    bits = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**(bits | set_bits))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host.lower())


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{what}: expected a private key (PEM) without a passphrase; restore it from a backup"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"{what}: expected a P-384 key; restore it from a backup")
    return key
