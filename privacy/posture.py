"""How a machine stands: what the two doctors, a site's and the coordinator's, both look at. Nothing here changes anything.

Covered: certificates before they expire, what answers at an address with and without TLS, a clock that is off, a Flower
process that would phone home or install software, the sockets that a process listens on, versions outside their range.
Not covered: a machine whose administrator lies, and processes of other accounts, whose environment only they and root may
read: what could not be looked at is said to be so and is never *ok*.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import email.utils
import http.client
import importlib.metadata
import ipaddress
import itertools
import os
import socket
import ssl
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from privacy.certificates import read_certificate

Status = Literal["ok", "warn", "fail"]

SKEW_S = 60.0  # Flower refuses a node whose signed time is 300 s off; a clock that drifts is found well before
EXPIRY_DAYS = 30
ANSWERS_WITHIN = 5.0  # seconds
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": ("0", "telemetry is on"),
    "FLWR_DISABLE_UPDATE_CHECK": ("1", "the update check is on"),
}
LISTEN = "0A"


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        found: what is there. remedy: what to do; empty where nothing is.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def worst(checks: Iterable[Check]) -> Status:
    """The worst status of all; *ok* for none."""
    found = {check.status for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"


# -- certificates and clocks -------------------------------------------------------------------------------------------


def certificate(name: str, path: Path, remedy: str, now: datetime.datetime | None = None) -> Check:
    """Whether the certificate in ``path`` is valid now and for :data:`EXPIRY_DAYS` more."""
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        last = read_certificate(path.read_bytes(), str(path), now).not_valid_after_utc
    except (OSError, ValueError) as error:
        return Check(name, "fail", str(error), remedy)
    if last - now < datetime.timedelta(days=EXPIRY_DAYS):
        return Check(name, "warn", f"expires on {last:%Y-%m-%d}, in {(last - now).days} days", remedy)
    return Check(name, "ok", f"valid until {last:%Y-%m-%d}")


def clock(name: str, theirs: datetime.datetime | None, ours: datetime.datetime | None = None) -> Check:
    """This machine's clock against another's, and against what the kernel knows of itself.

    Args:
        theirs: the other's time at about now; None if it could not be asked.
        ours: this machine's time at that moment.
    """
    ours = ours or datetime.datetime.now(datetime.UTC)
    kept = "kept by a time service" if disciplined() else "the kernel knows of no time service"
    remedy = "let a time service set the clock (chrony, systemd-timesyncd), on both machines"
    if theirs is None:
        return Check(name, "warn", f"not compared: nobody answered; {kept}", remedy)
    skew_s = (ours - theirs).total_seconds()
    if abs(skew_s) > SKEW_S:
        return Check(name, "fail", f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the other's", remedy)
    return Check(name, "ok", f"within {max(1.0, abs(skew_s)):.0f} s of the other's; {kept}")


def disciplined() -> bool:
    """Whether the kernel says that a time service keeps its clock (``adjtimex``); False also where it cannot be asked."""
    unsynchronised, room = 5, ctypes.create_string_buffer(512)  # struct timex of all zeros: read only
    try:
        return 0 <= int(ctypes.CDLL(None, use_errno=True).adjtimex(room)) < unsynchronised
    except (OSError, AttributeError):
        return False


# -- what answers at an address ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an address answered over TLS.

    Attributes:
        status: of HTTP; None if nothing came back.
        at: the other's time in its answer. error: why nothing came back, or why its certificate was not taken.
    """

    status: int | None
    at: datetime.datetime | None = None
    error: str = ""


def ask(host: str, port: int, path: str, authority: Path, *, address: str = "", method: str = "GET") -> Answer:
    """One HTTPS request to ``host:port``, whose certificate must be for ``host`` and signed by ``authority``.

    Args:
        address: where to connect, if it is not what ``host`` resolves to.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority))
        connection = _Connection(host, port, address or host, context)
        try:
            connection.request(method, path, headers={"Connection": "close"}, body=b"" if method == "POST" else None)
            answer = connection.getresponse()
            return Answer(answer.status, _date(answer.getheader("Date")))
        finally:
            connection.close()
    except ssl.SSLCertVerificationError as error:
        return Answer(None, error=f"its certificate is not taken: {error.verify_message}")
    except (OSError, http.client.HTTPException) as error:
        return Answer(None, error=str(error) or type(error).__name__)


class _Connection(http.client.HTTPSConnection):
    """HTTPS to an address under another name."""

    def __init__(self, host: str, port: int, address: str, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=ANSWERS_WITHIN, context=context)
        self._address, self._tls = address, context

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), ANSWERS_WITHIN)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _date(text: str | None) -> datetime.datetime | None:
    with contextlib.suppress(ValueError, TypeError):
        return email.utils.parsedate_to_datetime(text or "").astimezone(datetime.UTC)
    return None


def answers_plain(address: str, port: int) -> str:
    """The first line with which ``address:port`` answers HTTP without TLS; empty if it turns it away (400) or is silent."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), ANSWERS_WITHIN) as probe:
        probe.sendall(f"GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        line = probe.recv(256).partition(b"\r\n")[0].decode("ascii", "replace")
        if line.startswith("HTTP/") and line.split(" ")[1:2] != ["400"]:
            return line
    return ""


def own_addresses() -> tuple[str, ...]:
    """Addresses of this machine that others may reach it by: none of the loopback, none of one link only."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/fib_trie").read_text(encoding="ascii").splitlines()
        for above, line in itertools.pairwise(lines):
            if "/32 host LOCAL" in line:
                found.add(above.split()[-1])
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            found.add(str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))))
    usable = (ipaddress.ip_address(text) for text in found)
    return tuple(sorted(str(each) for each in usable if not each.is_loopback and not each.is_link_local))


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Process:
    """A process of this machine.

    Attributes:
        words: its command line. uid: of its account.
        environment: its variables as it was started; None if this account may not read them.
    """

    pid: int
    words: tuple[str, ...]
    uid: int
    environment: Mapping[str, str] | None = dataclasses.field(repr=False)

    def option(self, flag: str) -> str | None:
        """The value of an option, given as ``--flag value`` or ``--flag=value``; None if it is not there."""
        for place, word in enumerate(self.words):
            if word == flag:
                return self.words[place + 1] if place + 1 < len(self.words) else ""
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
        return None


def processes(tool: str) -> tuple[Process, ...]:
    """The processes that run the command ``tool``, as far as this account may see them."""
    found = []
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            words = tuple(os.fsdecode(word) for word in (folder / "cmdline").read_bytes().split(b"\0")[:-1])
            if any(Path(word).name == tool for word in words[:5]):  # python -P -c PROGRAM NAME
                found.append(Process(int(folder.name), words, folder.stat().st_uid, _environment(folder)))
    return tuple(found)


def _environment(folder: Path) -> dict[str, str] | None:
    try:
        entries = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if entry)
    return {name: value for name, _, value in pairs}


def listening(pids: Iterable[int]) -> tuple[tuple[str, int], ...]:
    """Address and port of every TCP socket on which these processes listen, as far as this account may look."""
    mine = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    mine.add(os.readlink(handle))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and f"socket:[{fields[9]}]" in mine:
                    address, port = fields[1].split(":")
                    found.append((_address(address), int(port, 16)))
    return tuple(sorted(set(found)))


def _address(text: str) -> str:
    """An address as the kernel prints it: words of four bytes in the machine's own order."""
    words = (int(text[place : place + 8], 16) for place in range(0, len(text), 8))
    return str(ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words)))


def is_loopback(address: str) -> bool:
    """Whether a socket bound there can be reached from this machine alone."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def quiet(name: str, found: Iterable[Process], remedy: str) -> Check:
    """Whether Flower's telemetry and update check are off in every one of these processes."""
    seen = tuple(found)
    loud, hidden = [], []
    for process in seen:
        if process.environment is None:
            hidden.append(str(process.pid))
            continue
        loud += [
            f"{what} in process {process.pid} ({variable} is {process.environment.get(variable, 'not set')})"
            for variable, (wanted, what) in SWITCHES.items()
            if process.environment.get(variable) != wanted
        ]
    if loud:
        return Check(name, "fail", "; ".join(loud), remedy)
    if hidden or not seen:
        why = f"the environment of process {', '.join(hidden)} is another account's" if hidden else "nothing runs"
        return Check(name, "warn", f"not looked at: {why}", "run this again as that account while it runs")
    return Check(name, "ok", "telemetry and update check are off")


# -- versions ----------------------------------------------------------------------------------------------------------


def flower_version(name: str) -> Check:
    """Whether the installed Flower is one that the installed medgen was written for."""
    installed = importlib.metadata.version("flwr")
    wanted = next(
        found.specifier
        for found in map(Requirement, importlib.metadata.requires("medgen") or ())
        if found.name == "flwr" and found.marker is None
    )
    if installed not in wanted:
        return Check(
            name, "fail", f"flwr {installed}, medgen asks for {wanted}", "pip install --force-reinstall medgen"
        )
    return Check(name, "ok", f"flwr {installed}, within {wanted}")
