"""``medgen server doctor``: every weakness of a coordinator that this program knows how to look for, each with its remedy.

Each check looks and changes nothing. What belongs to the running SuperLink is read from the process itself (its command
line, environment and sockets), not from what was meant to be started. A check that could not look says so and is a warning.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sqlite3
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from privacy import posture
from privacy.boundary.plan import StudyPlan
from privacy.nodekey import node_line_of_pem
from privacy.posture import Check, Process
from server import enrolment, processes
from server.coordinator import CoordinatorConfig
from server.runfolder import RunFolder

SECRETS = ("keys/identity.key", "ca/ca.key", "tls/server.key")
PRIVATE = (".", "keys", "ca", "tls", "roster", "roster/revoked", "flower", "run", "studies", "log.jsonl", *SECRETS)
PATHS = ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/openapi.json", "/health")
TURNED_AWAY = (400, 403, 404, 421, 444, 495, 496, 502, 503, 504)  # by the proxy; Flower itself answers none of PATHS so
LEGACY = {
    "FLWR_INTERNAL_GRPC_CONTROL_API": "the old gRPC Control API",
    "FLWR_INTERNAL_GRPC_FLEET_API": "the old Fleet API",
}
RESTART = "stop it and start it with `medgen server start`, which sets this"
INSTALLS = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the checks look at: the folder, and the SuperLinks that serve it (one, if all is well)."""

    config: CoordinatorConfig
    links: tuple[Process, ...]


def examine(folder: Path) -> tuple[Check, ...]:
    """All checks of one coordinator, in the order in which one would mend them."""
    try:
        config = CoordinatorConfig.load(folder)
    except ValueError as error:
        return (Check("server.toml", "fail", str(error), "correct the file; nothing else was looked at"),)
    scene = Scene(config, superlinks(config))
    return tuple(look(scene) for look in CHECKS)


def superlinks(config: CoordinatorConfig) -> tuple[Process, ...]:
    """The SuperLinks that carry this coordinator's Flower home or claim its port."""
    home, port = str(config.flower_home), str(config.superlink_port)
    return tuple(
        link
        for link in posture.processes("flower-superlink")
        if (link.environment or {}).get("FLWR_HOME") == home or (link.option("--port") or "8000") == port
    )


# -- the folder --------------------------------------------------------------------------------------------------------


def account(scene: Scene) -> Check:
    """The folder is the account's that runs this, so that what follows is seen as the SuperLink sees it."""
    owner = scene.config.folder.stat().st_uid
    if owner != os.geteuid():
        found = f"the folder belongs to user {owner}, this runs as {os.geteuid()}"
        return Check("account", "fail", found, f"run it as user {owner}: `sudo -u '#{owner}' medgen server doctor …`")
    if owner == 0:
        return Check("account", "warn", "everything runs as root", "give the coordinator an account of its own")
    return Check("account", "ok", "the folder is this account's own")


def modes(scene: Scene) -> Check:
    """Keys, roster, state and log are the coordinator's account's alone."""
    wide = []
    places = [scene.config.folder / name for name in PRIVATE]
    for path in (*places, *sorted(scene.config.flower_home.glob("*.db*")), *sorted(scene.config.roster.glob("*.json"))):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        if extra := stat.S_IMODE(found.st_mode) & 0o077:
            wide.append((path, extra))
        elif found.st_uid != os.geteuid():
            wide.append((path, 0))
    if wide:
        said = "; ".join(f"{path}: others may {_rights(extra)}" for path, extra in wide)
        fix = " ".join(str(path) for path, _ in wide)
        return Check("modes", "fail", said, f"chmod go= {fix}" + _if_read(scene, [path for path, _ in wide]))
    return Check("modes", "ok", "keys, state, roster and log are this account's alone")


def _rights(extra: int) -> str:
    if not extra:
        return "own it"
    names = {0o4: "read", 0o2: "change", 0o1: "pass"}
    return ", ".join(name for bit, name in names.items() if extra & (bit | bit << 3)) + " it"


def _if_read(scene: Scene, wide: Sequence[Path]) -> str:
    secrets = [path for path in wide if path in [scene.config.folder / name for name in SECRETS]]
    if not secrets:
        return ""
    return "; if somebody may have read a key, make a new one: `medgen server renew` for TLS, else a new coordinator"


def log(scene: Scene) -> Check:
    """The chain of who was enrolled and revoked is whole."""
    try:
        links = scene.config.log().read()
    except (OSError, ValueError) as error:
        return Check("log", "fail", str(error), "restore log.jsonl from a backup and keep this copy")
    if not links:
        return Check("log", "fail", "log.jsonl is gone or empty", "restore it from a backup: it says who is a member")
    ahead = datetime.datetime.fromisoformat(links[-1].at) - datetime.datetime.now(datetime.UTC)
    if ahead.total_seconds() > posture.SKEW_S:
        return Check("log", "fail", f"its last link is {ahead} in the future", "the clock was put back: set it")
    return Check("log", "ok", f"{len(links)} links, the chain holds")


def roster(scene: Scene) -> Check:
    """Each request in ``roster/`` is the one that was accepted, and none lies there that never was."""
    try:
        members = enrolment.enrolled(scene.config.folder)
    except (OSError, ValueError) as error:
        return Check("roster", "fail", str(error), "restore roster/ and log.jsonl from one backup")
    if extra := sorted({path.stem for path in scene.config.roster.glob("*.json")} - set(members)):
        found = f"{', '.join(extra)} in roster/, and the log does not name them as members"
        return Check("roster", "fail", found, "move the files away; a site becomes a member by `medgen server enrol`")
    return Check("roster", "ok", f"{len(members)} members, as accepted")


def authority(scene: Scene) -> Check:
    """The authority that every kit carries has not expired and will not soon."""
    remedy = "make a new coordinator in time: every site must join it with a new kit"
    return posture.certificate("authority", scene.config.ca_certificate, remedy)


def certificate(scene: Scene) -> Check:
    """The server's certificate is valid, for the host that sites dial, and the authority's."""
    remedy = "`medgen server renew`, then restart proxy and SuperLink"
    try:
        scene.config.server_certificate()
    except ValueError as error:
        return Check("certificate", "fail", str(error), remedy)
    return posture.certificate("certificate", scene.config.tls_certificate, remedy)


def versions(scene: Scene) -> Check:
    """Flower is one that this medgen was written for, and no open study was planned for another medgen."""
    found = posture.flower_version("versions")
    if found.status != "ok":
        return found
    installed, other = version("medgen"), []
    for folder in sorted(scene.config.studies.glob("*")):
        run = RunFolder(folder)
        if run.plan.is_file() and not run.report_json.is_file():
            try:
                plan = StudyPlan.from_bytes(run.plan.read_bytes())
            except ValueError as error:
                return Check("versions", "fail", f"{run.plan}: {error}", "restore the plan: sites approved its bytes")
            if plan.version != installed:
                other.append(f"{folder.name} was planned for medgen {plan.version}")
    if other:
        found_text = f"{'; '.join(other)}, and {installed} is installed"
        return Check("versions", "fail", found_text, "finish these studies with that version, or plan them anew")
    return found


# -- the SuperLink as it runs ------------------------------------------------------------------------------------------


def superlink(scene: Scene) -> Check:
    """One SuperLink runs, of this installation."""
    if not scene.links:
        return Check(
            "superlink", "warn", "it does not run; what it would be is not known", "start it: `medgen server start`"
        )
    if len(scene.links) > 1:
        pids = ", ".join(str(link.pid) for link in scene.links)
        return Check("superlink", "fail", f"processes {pids} claim one home or port", "stop all and start one")
    (link,) = scene.links
    if not any(word.startswith(sys.prefix) for word in link.words[:2]):
        found = f"process {link.pid} runs {link.words[0]}, this medgen lives in {sys.prefix}"
        return Check("superlink", "fail", found, RESTART)
    if link.uid == 0:
        found = f"process {link.pid} runs as root"
        return Check("superlink", "warn", found, "run it as an account of its own: deploy/medgen-superlink.service")
    return Check("superlink", "ok", f"process {link.pid}")


def tls(scene: Scene) -> Check:
    """The SuperLink speaks TLS; in plain HTTP it could not tell its SuperNodes apart."""
    bare = [link for link in scene.links if "--insecure" in link.words or link.option("--ssl-certfile") is None]
    port = scene.config.superlink_port
    if bare or (scene.links and (line := posture.answers_plain("127.0.0.1", port))):
        found = "it was started without a certificate" if bare else f"port {port} answers plain HTTP: {line}"
        return Check("TLS at the SuperLink", "fail", found, RESTART)
    return _of_links(scene, "TLS at the SuperLink", "a certificate, and nothing in plain")


def node_authentication(scene: Scene) -> Check:
    """Only SuperNodes whose key was registered may sign in."""
    return _switched(scene, "node authentication", "--enable-supernode-auth", "every SuperNode that asks is let in")


def state(scene: Scene) -> Check:
    """Its state is on disk, in the private home; lost with a restart, no site could sign in again by itself."""
    for link in scene.links:
        place = link.option("--database")
        if place is None or ":" in place.partition("/")[0]:
            return Check("state", "fail", "it keeps its state in memory", RESTART)
        if not Path(place).resolve().is_relative_to(scene.config.flower_home):
            return Check("state", "fail", f"its state is {place}, outside {scene.config.flower_home}", RESTART)
    return _of_links(scene, "state", "on disk, in the private home")


def installs(scene: Scene) -> Check:
    """It installs no software at run time."""
    name = "run-time installs"
    for link in scene.links:
        off = "--disable-runtime-dependency-installation" in link.words or (link.environment or {}).get(INSTALLS) == "1"
        if not off or "--allow-runtime-dependency-installation" in link.words:
            found = f"process {link.pid} installs what an app asks for"
            return Check(name, "fail", found, RESTART)
    return _of_links(scene, name, "off")


def telemetry(scene: Scene) -> Check:
    """It asks nobody outside."""
    return posture.quiet("telemetry", scene.links, RESTART)


def sockets(scene: Scene) -> Check:
    """Everything that it listens on is the loopback's: whoever reaches its Control API runs programs at every site."""
    name = "control path, at the SuperLink"
    pids = {*(link.pid for link in scene.links), *processes.carrying(str(scene.config.flower_home))}
    heard = posture.listening(pids)
    if wide := [f"{address}:{port}" for address, port in heard if not posture.is_loopback(address)]:
        return Check(name, "fail", f"it listens on {', '.join(wide)}", RESTART)
    for link in scene.links:
        if old := [what for variable, what in LEGACY.items() if (link.environment or {}).get(variable) == "1"]:
            return Check(
                name, "fail", f"{' and '.join(old)} is served as well", f"unset {', '.join(LEGACY)}; {RESTART}"
            )
    if scene.links and not heard:
        found = "the SuperLink's sockets cannot be looked at from this account"
        return Check(name, "warn", found, "run this as the SuperLink's account")
    return _of_links(scene, name, f"loopback only: {', '.join(f'{address}:{port}' for address, port in heard)}")


def control_from_outside(scene: Scene) -> Check:
    """The SuperLink's own ports do not answer at an address by which other machines reach this one."""
    name, config = "control path, from outside", scene.config
    open_at = []
    for address in posture.own_addresses():
        for port in sorted({config.superlink_port, config.control_port}):
            answer = posture.ask(config.host, port, PATHS[0], config.ca_certificate, address=address, method="POST")
            if _let_in(answer) or posture.answers_plain(address, port):
                open_at.append(f"{address}:{port}")
    if open_at:
        remedy = "bind the SuperLink to 127.0.0.1 and close these ports in the firewall (deploy/nftables.conf)"
        return Check(name, "fail", f"Flower's Control API answers at {', '.join(open_at)}", remedy)
    return Check(name, "ok", "no address of this machine leads to it")


# -- what sites dial ---------------------------------------------------------------------------------------------------


def proxy(scene: Scene) -> Check:
    """What sites dial passes the Fleet API on, and neither the Control API nor anything else of Flower."""
    name, config = "control path, at the proxy", scene.config
    for path in PATHS:
        method = "POST" if path.startswith("/v1/") else "GET"
        answer = posture.ask(config.host, config.port, path, config.ca_certificate, method=method)
        if answer.status is None:
            found = f"{config.host}:{config.port} was not reached over TLS: {answer.error}"
            return Check(name, "warn", found, "start the proxy (deploy/), then run this again")
        if _let_in(answer):
            found = f"https://{config.host}:{config.port}{path} is answered ({answer.status})"
            return Check(name, "fail", found, "use deploy/fleet.conf or deploy/Caddyfile: /v1/fleet/ and nothing else")
    return Check(name, "ok", f"{config.host}:{config.port} passes on the Fleet API alone")


def endpoint(scene: Scene) -> Check:
    """What sites dial shows the certificate that their kits trust, and nothing in plain."""
    name, config = "TLS at the proxy", scene.config
    if line := posture.answers_plain(config.host, config.port):
        found = f"{config.host}:{config.port} answers plain HTTP: {line}"
        return Check(name, "fail", found, "let the proxy listen with TLS: deploy/fleet.conf or deploy/Caddyfile")
    answer = posture.ask(config.host, config.port, "/v1/fleet/", config.ca_certificate)
    if "certificate" in answer.error:
        return Check(name, "fail", answer.error, "give the proxy tls/server.crt and tls/server.key and restart it")
    if answer.status is None:
        return Check(name, "warn", f"not reached: {answer.error}", "start the proxy (deploy/), then run this again")
    return Check(name, "ok", "the certificate of the kits, and nothing in plain")


def clock(scene: Scene) -> Check:
    """This clock against that of what sites dial, which is another machine's where the proxy is."""
    config = scene.config
    answer = posture.ask(config.host, config.port, "/v1/fleet/", config.ca_certificate)
    return posture.clock("clock", answer.at)


def registered(scene: Scene) -> Check:
    """The SuperLink knows the keys of members and of nobody else, above all of none that was revoked."""
    name, place = "registered SuperNodes", scene.config.flower_home / "state.db"
    if not place.is_file():
        return Check(name, "ok", "no SuperNode was registered yet")
    try:
        wanted = {member.flower_key: site for site, member in enrolment.enrolled(scene.config.folder).items()}
        with closing(sqlite3.connect(f"{place.as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT public_key, status, name FROM node").fetchall()
        known = {node_line_of_pem(key): str(site) for key, status, site in rows if status != "unregistered" and key}
    except (sqlite3.Error, OSError, ValueError) as error:
        return Check(name, "warn", f"not looked at: {error}", "run this as the coordinator's account, roster in order")
    if extra := sorted(site for key, site in known.items() if key not in wanted):
        found = f"keys that no member has, registered as {', '.join(extra)}, may sign in"
        return Check(name, "fail", found, "`medgen server start` unregisters whoever was revoked")
    if waiting := sorted(site for key, site in wanted.items() if key not in known):
        return Check(
            name, "warn", f"{', '.join(waiting)} cannot sign in yet", "`medgen server start` registers members"
        )
    return Check(name, "ok", f"{len(known)} keys, all of members")


CHECKS: tuple[Callable[[Scene], Check], ...] = (
    account,
    modes,
    log,
    roster,
    authority,
    certificate,
    versions,
    superlink,
    tls,
    node_authentication,
    state,
    installs,
    telemetry,
    sockets,
    control_from_outside,
    proxy,
    endpoint,
    clock,
    registered,
)


def _let_in(answer: posture.Answer) -> bool:
    return answer.status is not None and answer.status not in TURNED_AWAY


def _switched(scene: Scene, name: str, flag: str, otherwise: str) -> Check:
    for link in scene.links:
        if flag not in link.words:
            return Check(name, "fail", f"process {link.pid} was started without {flag}: {otherwise}", RESTART)
    return _of_links(scene, name, "on")


def _of_links(scene: Scene, name: str, found: str) -> Check:
    """*ok*, if there was a process to look at."""
    if not scene.links:
        return Check(name, "warn", "not looked at: the SuperLink does not run", "start it, then run this again")
    return Check(name, "ok", found)
