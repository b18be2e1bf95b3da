"""The coordinator's folder: made whole by :func:`make_coordinator`, and ``server.toml``, read here and nowhere else.

A coordinator is made once. Its identity key is what every site pins, and its authority is what every SuperNode trusts, so
neither is ever replaced in place.
"""

from __future__ import annotations

import datetime
import secrets
import shutil
import tomllib
from pathlib import Path
from typing import Self

import tomli_w
from cryptography import x509
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from privacy.boundary.enrolment import Host, Port, check_plain, check_toml
from privacy.boundary.plan import Label
from privacy.chain import ChainFile, sync_folder, write_durably
from privacy.identity import IdentityKey, fingerprint, write_secret
from server.authority import (
    Credential,
    check_server_certificate,
    make_authority,
    make_server_certificate,
    read_credential,
)

CONFIG = "server.toml"
POLICY_TEMPLATE = "site-policy.toml"
FOLDERS = ("roster", "roster/revoked", "flower", "run", "studies")

SERVER_TOML = """\
# The coordinator of a medgen consortium. Unknown keys are refused. After a change of host, run `medgen server renew`
# and give every site a new kit (`medgen server kit`); after a change of another key, restart the SuperLink.

# name: of the consortium, in every kit and certificate.
# host: what sites dial: a DNS name or an IP address; it is in the TLS certificate.
# port: of the proxy that sites reach; hospitals' firewalls let 443 out more often than anything else.
# superlink_port: Flower's SuperLink, loopback only; the proxy forwards /v1/fleet/ to it and nothing else.
# control_port: Flower's Control API, loopback only; Flower 1.41 and 1.42 have it on superlink_port.
"""

POLICY_TOML = """\
# What the consortium proposes for a hospital's site.toml. It travels in every kit, is shown when a site joins, and is
# applied by nobody: each hospital decides for itself. Plain ASCII.
[ceiling]
plan_epsilon = 8.0
lifetime_epsilon = 16.0
delta = 1e-5
uncovered_queries = 1

[policy]
min_contributors = 3
"""


class CoordinatorConfig(BaseModel):
    """``[server]`` of a coordinator folder's ``server.toml``, and where everything in that folder lies.

    Attributes:
        folder: the coordinator's folder, absolute; not a key of the file.
        name: of the consortium. host, port: what sites dial.
        superlink_port, control_port: loopback ports of Flower's SuperLink and of its Control API; equal where a version of
            Flower has both on one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    name: Label
    host: Host
    port: Port = 443
    superlink_port: Port = 8000
    control_port: Port = 8000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port in (self.superlink_port, self.control_port):
            raise ValueError(f"port {self.port}: the proxy and the SuperLink need different ports")
        return self

    @classmethod
    def load(cls, folder: Path) -> CoordinatorConfig:
        """Read ``folder/server.toml``.

        Raises:
            ValueError: naming file, key, value and rule of everything that does not fit.
        """
        path = folder / CONFIG
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; `medgen server init {folder}` makes a coordinator") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: it is no TOML file: {error}") from error
        section = tables.pop("server", None)
        if not isinstance(section, dict) or tables or "folder" in section:
            unknown = sorted(
                [*tables, *(["server.folder"] if isinstance(section, dict) and "folder" in section else [])]
            )
            wrong = f"unknown key {unknown[0]!r}; remove it" if unknown else "there is no table [server]; write one"
            raise ValueError(f"{path}: {wrong}")
        try:
            return cls.model_validate({**section, "folder": folder.resolve()})
        except ValidationError as error:
            found = error.errors()
            places = [
                f"  {'.'.join(map(str, ('server', *e['loc'])))}: {e['msg']} (got {str(e['input'])[:60]!r})"
                for e in found
            ]
            raise ValueError(f"{path}: {len(places)} keys do not fit; correct them:\n" + "\n".join(places)) from error

    @property
    def identity_path(self) -> Path:
        """The key that signs plans, tasks and kits; sites pin its public half."""
        return self.folder / "keys" / "identity.key"

    @property
    def ca_key(self) -> Path:
        """The authority's private key; needed to renew the server's certificate and for nothing else."""
        return self.folder / "ca" / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        """The authority's certificate, which every kit carries."""
        return self.folder / "ca" / "ca.crt"

    @property
    def tls_key(self) -> Path:
        """The server's private key, for proxy and SuperLink."""
        return self.folder / "tls" / "server.key"

    @property
    def tls_certificate(self) -> Path:
        """The server's certificate, for proxy and SuperLink."""
        return self.folder / "tls" / "server.crt"

    @property
    def roster(self) -> Path:
        """Folder of the accepted enrolment requests."""
        return self.folder / "roster"

    @property
    def flower_home(self) -> Path:
        """The private FLWR_HOME."""
        return self.folder / "flower"

    @property
    def run(self) -> Path:
        """Process id and log of the SuperLink."""
        return self.folder / "run"

    @property
    def studies(self) -> Path:
        """Run folders of studies."""
        return self.folder / "studies"

    @property
    def policy_template(self) -> Path:
        """What the consortium proposes to its sites."""
        return self.folder / POLICY_TEMPLATE

    def log(self) -> ChainFile:
        """The hash-chained log of who was enrolled, given a kit, and revoked: the authority about who is a member."""
        return ChainFile(self.folder / "log.jsonl")

    def identity(self) -> IdentityKey:
        """The coordinator's signing key.

        Raises:
            ValueError: it is missing, damaged, or readable by others.
        """
        return IdentityKey.load(self.identity_path)

    def authority(self) -> Credential:
        """The authority's key and certificate.

        Raises:
            ValueError: one is missing, or others may read the key.
        """
        return read_credential(self.ca_key, self.ca_certificate)

    def server_certificate(self, now: datetime.datetime | None = None) -> x509.Certificate:
        """The server's certificate, if sites would accept it now; see :func:`server.authority.check_server_certificate`.

        Raises:
            ValueError: it would be refused, and why; or a file is missing.
        """
        try:
            authority, found = self.ca_certificate.read_bytes(), self.tls_certificate.read_bytes()
        except OSError as error:
            raise ValueError(f"{error.filename}: {error.strerror}; restore it from the coordinator's backup") from error
        return check_server_certificate(authority, found, self.host, now)


def make_coordinator(
    folder: Path,
    *,
    host: str,
    port: int = 443,
    name: str = "consortium",
    superlink_port: int = 8000,
    control_port: int | None = None,
    now: datetime.datetime | None = None,
) -> CoordinatorConfig:
    """Make a coordinator: identity, authority, server certificate, ``server.toml``, log, recipes; folder 0700, files 0600.

    It is built beside ``folder`` and appears there whole or not at all.

    Raises:
        ValueError: the folder is there and not empty, a value does not fit, or the place cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: it is not an empty folder; a coordinator is made once: name a new folder")
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.new")
    section = {"name": name, "host": host, "port": port, "superlink_port": superlink_port}
    section["control_port"] = superlink_port if control_port is None else control_port
    try:
        draft.mkdir(mode=0o700, parents=True)
        write_durably(draft / CONFIG, f"{SERVER_TOML}{tomli_w.dumps({'server': section})}".encode())
        config = CoordinatorConfig.load(draft)
        _fill(config, now)
        draft.replace(folder)
    except OSError as error:
        raise ValueError(
            f"{folder}: {error.strerror}; name a folder on a disk with room, in one that this user may write"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(folder.parent)
    config = CoordinatorConfig.load(folder)
    try:
        _write_recipes(config)
    except BaseException:
        shutil.rmtree(folder)  # seconds old, and nobody was told of its keys
        raise
    return config


def renew_certificate(folder: Path, now: datetime.datetime | None = None) -> x509.Certificate:
    """Write a new server certificate for today's ``[server] host``, signed by the same authority, over the same key.

    Sites need no new kit while the host is the same. Proxy and SuperLink must be restarted to show it. For a new key, move
    ``tls/server.key`` away first.

    Raises:
        ValueError: the authority has expired, or a key or the folder cannot be read or written.
    """
    config = CoordinatorConfig.load(folder)
    key = read_credential(config.tls_key, config.ca_certificate).key_pem if config.tls_key.exists() else None
    renewed = make_server_certificate(config.authority(), config.host, now, key)
    if key is None:
        write_secret(config.tls_key, renewed.key_pem)
    write_durably(config.tls_certificate, renewed.certificate_pem)
    found = config.server_certificate(now)
    config.log().append(
        "certificate", {"host": config.host, "until": found.not_valid_after_utc.isoformat(timespec="seconds")}
    )
    return found


def read_policy_template(config: CoordinatorConfig) -> str:
    """What the consortium proposes to its sites; empty without a file.

    Raises:
        ValueError: it is no TOML, or not plain ASCII, or too long.
    """
    path = config.policy_template
    if not path.exists():
        return ""
    try:
        return check_toml(check_plain(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; correct it: it goes into every kit") from error


def _fill(config: CoordinatorConfig, now: datetime.datetime | None) -> None:
    """Everything in a new coordinator's folder but ``server.toml``."""
    for name in FOLDERS:
        (config.folder / name).mkdir(mode=0o700)
    key = IdentityKey.generate()
    key.save(config.identity_path)
    write_durably(config.identity_path.with_suffix(".pub"), key.public.hex().encode() + b"\n")
    authority = make_authority(config.name, now)
    write_secret(config.ca_key, authority.key_pem)
    write_durably(config.ca_certificate, authority.certificate_pem)
    server = make_server_certificate(authority, config.host, now)
    write_secret(config.tls_key, server.key_pem)
    write_durably(config.tls_certificate, server.certificate_pem)
    write_durably(config.policy_template, POLICY_TOML.encode())
    config.log().append(
        "made", {"name": config.name, "host": config.host, "port": config.port, "key": fingerprint(key.public)}
    )


def _write_recipes(config: CoordinatorConfig) -> None:
    from server.recipes import write_recipes

    write_recipes(config, config.folder)
