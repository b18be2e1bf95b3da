"""What both sides ask of a certificate: that it parses, that it is for this, and that today lies in its validity.

Covered: a file that is no certificate, an expired one, one that is not valid yet, an authority that may not sign.
Not covered: revocation lists, which nothing here publishes, and a clock that is wrong by less than what validity shows; a
wrong clock is named as a possible cause, because it looks the same.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature


def read_certificate(pem: bytes, what: str, now: datetime.datetime | None = None) -> x509.Certificate:
    """The one certificate in ``pem``, if ``now`` (default: this machine's clock) lies in its validity.

    Args:
        what: how messages name it: a path, or "the kit's authority".

    Raises:
        ValueError: it is no certificate, it has expired, or it is not valid yet.
    """
    try:
        certificate, *more = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(
            f"{what}: expected one certificate (PEM), got something else; ask for the file again"
        ) from error
    if more:
        raise ValueError(f"{what}: expected one certificate, got {1 + len(more)}; keep the one of the authority")
    now = now or datetime.datetime.now(datetime.UTC)
    clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC; if that is wrong, set it"
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < first:
        raise ValueError(f"{what}: not valid before {first:%Y-%m-%d %H:%M} UTC; {clock}, else wait")
    if now > last:
        raise ValueError(
            f"{what}: expired on {last:%Y-%m-%d %H:%M} UTC; {clock}, else the coordinator runs `medgen server renew`, and "
            "for an expired authority makes a new coordinator"
        )
    return certificate


def read_authority(pem: bytes, what: str, now: datetime.datetime | None = None) -> x509.Certificate:
    """The certificate in ``pem``, if it is valid as by :func:`read_certificate` and an authority that signed itself.

    Raises:
        ValueError: as :func:`read_certificate`; or it is no authority.
    """
    certificate = read_certificate(pem, what, now)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(certificate)
        may_sign = constraints.ca
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        may_sign = False
    if not may_sign:
        raise ValueError(f"{what}: it is no certificate authority that signed itself; ask for the file again")
    return certificate
