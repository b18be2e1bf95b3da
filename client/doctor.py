"""``medgen site doctor``: whether this site is set up as it should be, one check after the other, each with its remedy.

Each check looks and changes nothing, but for one question to the coordinator's address. What could not be looked at, above
all the environment of a SuperNode that runs under its own account, is a warning and says from where to look.
"""

from __future__ import annotations

import os
import shutil
import stat
import urllib.request
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from client import policy, site_log
from client.control import agent_status, check_modes
from client.joining import AUTHORITY, KIT, Uplink, membership, uplink
from client.rundir import PID, RUN, SOCKET, AgentError
from client.site import SiteConfig
from privacy import posture
from privacy.boundary.plan import StudyPlan
from privacy.posture import Answer, Check, Process

UNIT = Path("/etc/systemd/system/medgen-supernode.service")
GB = 10**9
LITTLE_GB, TOO_LITTLE_GB = 5.0, 0.5  # an answer has at most 64 MB and stays; a public model and a cohort have more
NODE_FILES = ("flower.key", "flower.pub", "ca.crt", "endpoint.json")
UNREACHABLE = "open the firewall outbound to it (nftables.conf of `medgen site recipes`), or ask the coordinator"


def examine(folder: Path) -> tuple[Check, ...]:
    """All checks of one site, in the order in which one would mend them."""
    try:
        config = SiteConfig.load(folder.resolve())
    except (OSError, ValueError) as error:
        return (Check("site.toml", "fail", str(error), "correct the file; nothing else was looked at"),)
    return (*(look(config) for look in CHECKS), *_of_the_coordinator(config))


# -- the folder --------------------------------------------------------------------------------------------------------


def account(config: SiteConfig) -> Check:
    """The folder is the account's that runs this, so that what follows is seen as the agent sees it."""
    owner = config.folder.stat().st_uid
    if owner != os.geteuid():
        found = f"the site folder belongs to user {owner}, this runs as {os.geteuid()}"
        return Check(
            "account", "fail", found, f"run it as the agent's account: `sudo -u '#{owner}' medgen site doctor …`"
        )
    if owner == 0:
        return Check("account", "warn", "everything runs as root", "give the agent an account of its own")
    return Check("account", "ok", "the site folder is this account's own")


def modes(config: SiteConfig) -> Check:
    """Keys, ledger, approvals and data are the agent's alone; the SuperNode may reach the socket and its own folder."""
    node = config.folder / "supernode"
    found = [
        *check_modes(config.folder),
        *_wide(node, 0o750, "the SuperNode's group may read"),
        *(text for name in NODE_FILES for text in _wide(node / name, 0o640, "the SuperNode's group may read")),
        *(
            text
            for key in sorted((config.folder / "keys").glob("*.key"))
            for text in _wide(key, 0o600, "a private key")
        ),
    ]
    if found:
        return Check("modes", "fail", "; ".join(found), "run the chmod or chown named with each")
    return Check("modes", "ok", "keys, ledger and data are the agent's alone; the group may open the socket")


def _wide(path: Path, most: int, rule: str) -> list[str]:
    if path.exists() and (mode := stat.S_IMODE(path.lstat().st_mode) & 0o777) & ~most:
        return [f"{path}: mode {mode:04o} is too wide; {rule}; `chmod {mode & most:04o} {path}`"]
    return []


def data(config: SiteConfig) -> Check:
    """The agent can read the records, and cannot change them."""
    root = config.data_root
    if not os.access(root, os.R_OK | os.X_OK):
        found = f"{root}: it is not there, or this account may not read it"
        return Check("data", "fail", found, "mount it, or correct [data] root")
    if os.access(root, os.W_OK):
        found = f"{root}: this account may change the records"
        return Check("data", "warn", found, "mount it read-only, or leave the agent the right to read alone")
    return Check("data", "ok", "readable, and not to be changed by the agent")


def predictable_noise(config: SiteConfig) -> Check:
    """Noise that can be recomputed is admitted nowhere where there are real patients."""
    if config.policy.deterministic_noise:
        found = "[policy] deterministic_noise admits plans whose noise protects nobody"
        return Check("noise", "fail", found, "take it out of site.toml; it is for tests on made-up patients")
    return Check("noise", "ok", "plans with predictable noise are refused")


def disk(config: SiteConfig) -> Check:
    """There is room for answers, models and the ledger; on a full disk the site sits out."""
    free = shutil.disk_usage(config.folder).free / GB
    remedy = f"make room: answers, the public model and the cohort of a study need some; {LITTLE_GB:g} GB are plenty"
    if free < LITTLE_GB:
        return Check("disk", "fail" if free < TOO_LITTLE_GB else "warn", f"{free:.2f} GB are free", remedy)
    return Check("disk", "ok", f"{free:.0f} GB are free")


def ledger(config: SiteConfig) -> Check:
    """The spend file holds: chain, mirror, and the heads that the site log remembers."""
    try:
        if not config.ledger_path.exists() and not any(link.kind == "approved" for link in config.log().read()):
            return Check("ledger", "ok", "no plan was approved yet")
        with config.read_ledger() as found:
            seq, digest = found.verify()
    except (OSError, ValueError) as error:
        return Check("ledger", "fail", str(error), "keep every file as it is and call the privacy officer")
    return Check("ledger", "ok", f"{seq} rows, head {seq}:{digest[:16]}…")


def log(config: SiteConfig) -> Check:
    """The site log's chain holds."""
    try:
        head, _ = site_log.verify(config)
    except (OSError, ValueError) as error:
        return Check("site log", "fail", str(error), "nothing is admitted over a broken log; call the privacy officer")
    return Check("site log", "ok", f"{head.seq} links, head {head.seq}:{head.hash[:16]}…")


def versions(config: SiteConfig) -> Check:
    """Flower is one that this medgen was written for, and each plan that may still run names this medgen."""
    found = posture.flower_version("versions")
    if found.status != "ok":
        return found
    installed, other = version("medgen"), []
    try:
        for plan in _open_plans(config):
            if plan.version != installed:
                other.append(f"{plan.study} (plan {plan.hash[:16]}) was approved for medgen {plan.version}")
    except (OSError, ValueError) as error:
        return Check(
            "versions", "fail", f"an approved plan cannot be read: {error}", "let the coordinator send it again"
        )
    if other:
        text = f"{'; '.join(other)}, and {installed} is installed"
        return Check("versions", "fail", text, "install that version until these studies are over, or reject the plans")
    return Check("versions", "ok", f"medgen {installed}, {found.found}")


def _open_plans(config: SiteConfig) -> list[StudyPlan]:
    """The approved plans that are not closed."""
    approved = [entry.plan_hash for entry in policy.decisions(config.folder) if entry.status == "approved"]
    with config.look_at_ledger() as ledger:
        closed = {plan.plan_hash for plan in ledger.summary().plans if plan.closed}
    names = [name for name in approved if name not in closed]
    return [StudyPlan.from_bytes(policy.stored_plan(config.folder, name)[0]) for name in names]


# -- agent and SuperNode -----------------------------------------------------------------------------------------------


def agent(config: SiteConfig) -> Check:
    """The agent runs and answers on its socket."""
    try:
        status = agent_status(config.folder)
    except AgentError as error:
        return Check("agent", "fail", str(error), "run this as the agent's account")
    if status.stop is not None:
        found = f"an emergency stop is in force{f', by {status.stop.by}' if status.stop.by else ''}"
        return Check("agent", "warn", found, "when its reason is gone: `medgen site start SITE --clear-stop`")
    if status.pid is None:
        before = _stale(config.folder / RUN / PID)
        died = f"; agent {before} ended without having been stopped" if before else ""
        return Check("agent", "warn", f"none runs{died}", "`medgen site start SITE`, or start its unit")
    if not status.answers:
        found = f"process {status.pid} holds the folder and does not answer on its socket"
        return Check(
            "agent", "fail", found, "`medgen site stop SITE --emergency --reason …`, then look at run/agent.out"
        )
    if status.version != version("medgen"):
        found = f"process {status.pid} runs medgen {status.version}, installed is {version('medgen')}"
        return Check("agent", "fail", found, "`medgen site stop SITE` and start it again")
    return Check("agent", "ok", f"process {status.pid} answers")


def _stale(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def supernodes(config: SiteConfig) -> tuple[Process, ...]:
    """The SuperNodes that carry this site's messages: they know its socket, or sign in with its key."""
    socket, key = str(config.folder / RUN / SOCKET), str(Path(config.folder.name) / "supernode" / "flower.key")
    return tuple(
        node
        for node in posture.processes("flower-supernode")
        if socket in (node.option("--node-config") or "")
        or (node.option("--auth-supernode-private-key") or "").endswith(key)
    )


def accounts(config: SiteConfig) -> Check:
    """Agent and SuperNode run under different accounts, so that what comes over Flower can read nothing here."""
    nodes = supernodes(config)
    owner = config.folder.stat().st_uid
    if not nodes:
        return Check("accounts", "warn", "not looked at: no SuperNode runs", "start it, then run this again")
    if same := [str(node.pid) for node in nodes if node.uid in (owner, 0)]:
        found = f"SuperNode {', '.join(same)} runs as {'root' if owner == 0 else 'the agent does, or as root'}"
        remedy = "run the SuperNode as an account of its own: medgen-supernode.service of `medgen site recipes`"
        return Check("accounts", "warn", found, remedy)
    return Check("accounts", "ok", f"the agent's is {owner}, the SuperNode's {nodes[0].uid}")


def supernode(config: SiteConfig) -> Check:
    """The SuperNode speaks TLS, installs nothing, and asks nobody but the coordinator."""
    name, nodes = "SuperNode", supernodes(config)
    for node in nodes:
        for flag, what in (
            ("--insecure", "speaks without TLS"),
            ("--allow-runtime-dependency-installation", "installs what an app asks for"),
        ):
            if flag in node.words:
                found = f"process {node.pid} {what} ({flag})"
                return Check(name, "fail", found, "start it with `medgen site connect SITE` alone")
    remedy = "start it with `medgen site connect SITE`, or name flower.env as EnvironmentFile in its unit"
    if all(node.environment is None for node in nodes) and (planned := _unit_environment()) is not None:
        meant = Process(nodes[0].pid if nodes else 0, (), 0, planned)
        found_check = posture.quiet(name, (meant,), remedy)
        if found_check.status == "ok":
            return Check(name, "ok", f"by {UNIT}, telemetry and update check are off")
        return Check(name, found_check.status, f"{UNIT}: {found_check.found}", found_check.remedy)
    return posture.quiet(name, nodes, remedy)


def _unit_environment() -> Mapping[str, str] | None:
    """The variables that the SuperNode's unit sets; None without a unit, or where this account may not read it all."""
    found: dict[str, str] = {}
    try:
        for line in UNIT.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("=")
            if key == "Environment":
                found |= _variables(value.split())
            elif key == "EnvironmentFile":
                found |= _variables(Path(value.lstrip("-")).read_text(encoding="utf-8").splitlines())
    except OSError:
        return None
    return found


def _variables(entries: list[str]) -> dict[str, str]:
    pairs = (entry.strip().strip('"').partition("=") for entry in entries if not entry.lstrip().startswith("#"))
    return {name: value for name, sign, value in pairs if sign}


# -- the coordinator ---------------------------------------------------------------------------------------------------


def kit(config: SiteConfig) -> Check:
    """The site has joined, and what it dials and trusts is what the coordinator signed."""
    try:
        found = membership(config.folder)
    except (OSError, ValueError) as error:
        return Check("kit", "fail", str(error), "`medgen site join SITE KIT` with the coordinator's kit")
    return Check("kit", "ok", f"{found.consortium}, {found.endpoint.host}:{found.endpoint.port}")


def authority(config: SiteConfig) -> Check:
    """The only authority that the SuperNode trusts has not expired and will not soon."""
    return posture.certificate(
        "authority", config.folder / AUTHORITY, "ask the coordinator for a kit with a new authority, and join with it"
    )


def _of_the_coordinator(config: SiteConfig) -> tuple[Check, ...]:
    """Endpoint and clock, from one question; for a site that has not joined, there is nobody to ask."""
    try:
        found = uplink(config.folder)
    except (OSError, ValueError):
        words = f"not looked at: no valid kit ({KIT})"
        return tuple(Check(name, "warn", words, "join, then run this again") for name in ("endpoint", "clock"))
    answer = posture.ask(found.host, found.port, "/v1/fleet/", found.authority)
    return endpoint(found, answer), posture.clock("clock", answer.at)


def endpoint(found: Uplink, answer: Answer) -> Check:
    """The coordinator answers over TLS, with a certificate for its name from the kit's authority."""
    name, where = "endpoint", f"{found.host}:{found.port}"
    if "certificate" in answer.error:
        remedy = (
            "compare with the coordinator by telephone: somebody may stand between, or they changed it: ask for a kit"
        )
        return Check(name, "fail", f"{where}: {answer.error}", remedy)
    if answer.status is None:
        if urllib.request.getproxies().get("https") and not urllib.request.proxy_bypass(found.host):
            words = f"{where}: {answer.error}; the way out leads through a proxy (HTTPS_PROXY), and it was not asked"
            return Check(name, "warn", words, "look whether the SuperNode reports that it is connected")
        return Check(name, "fail", f"{where}: {answer.error}", UNREACHABLE)
    if answer.status in (502, 503, 504):
        words = f"{where} answers over TLS, and the SuperLink behind it does not ({answer.status})"
        return Check(name, "warn", words, "tell the coordinator: `medgen server doctor`")
    return Check(name, "ok", f"{where} answers over TLS, with the kit's authority")


CHECKS: tuple[Callable[[SiteConfig], Check], ...] = (
    account,
    modes,
    data,
    predictable_noise,
    disk,
    ledger,
    log,
    versions,
    agent,
    accounts,
    supernode,
    kit,
    authority,
)
