"""What a site folder remembers of a lost ledger: heads in stored answers and approvals, and plans that were approved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from client.outbox import Outbox
from client.policy import dp_plan, stored_plan
from client.site import SiteConfig
from privacy.book import RESTORE_TYPE, Head, Restoration
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.identity import IdentityKey
from privacy.ledger import EVERYONE
from privacy.restore import ApprovedPlan, read_backup, restore


def restore_ledger(site_dir: Path, backup: Path, heads: Sequence[Head], officer_key: Path) -> Restoration:
    """Restore the site's ledger from a backup; see :func:`privacy.restore.restore` for what is charged.

    Args:
        site_dir: the site folder.
        backup: a copy of the ledger file, or what ``medgen site ledger export`` wrote.
        heads: heads that others remember: the last report, the coordinator's ``heads.json``. Stored answers, the site log
            and the mirror are looked at as well.
        officer_key: file of the officer's private key, whose public half ``[policy] officer_key`` pins.

    Raises:
        Refused: ``BAD_SIGNATURE`` if no key or another one is pinned, ``NOT_APPROVED`` if the file of a plan that was
            approved, and is not in the backup, is gone; :class:`LedgerError` as in ``restore``.
        ValueError: the key file is missing, damaged or readable by others; the site log is broken.
    """
    config = SiteConfig.load(site_dir)
    if not config.policy.officer_key:
        raise Refused(
            "BAD_SIGNATURE",
            "no officer's key is pinned, so nobody can sign a restoration",
            "put the public key in [policy] officer_key",
        )
    officer, pinned = IdentityKey.load(officer_key), bytes.fromhex(config.policy.officer_key)
    if officer.public != pinned:
        raise Refused("BAD_SIGNATURE", f"{officer_key} is not the key that [policy] officer_key pins")
    links = read_backup(backup, config.site.name, recover=backup.resolve() == config.ledger_path.resolve())
    present = {link.data()["plan_hash"] for link in links if link.kind == "reserve"}
    return restore(
        config.ledger_path,
        config.site.name,
        backup=backup,
        heads=[*heads, *_approval_heads(config), *Outbox(site_dir).heads()],
        approved=[_approved(config, name) for name in _approvals(config) if name not in present],
        ceilings=config.ceilings,
        officer=pinned,
        sign=lambda payload: officer.sign(RESTORE_TYPE, payload),
    )


def _approval_heads(config: SiteConfig) -> list[Head]:
    entries = [link.data() for link in config.log().read() if link.kind == "approved"]
    return [Head.parse(entry["ledger"]) for entry in entries if "ledger" in entry]


def _approvals(config: SiteConfig) -> list[str]:
    """Hashes of all plans that were ever approved, withdrawn ones included, in the order in which they were."""
    named = [link.data()["plan_hash"] for link in config.log().read() if link.kind == "approved"]
    filed = sorted(path.stem for path in (config.folder / "approvals").glob("*.json"))
    return list(dict.fromkeys([*named, *filed]))


def _approved(config: SiteConfig, name: str) -> ApprovedPlan:
    plan = StudyPlan.from_bytes(stored_plan(config.folder, name)[0])
    record = config.folder / "approvals" / f"{name}.json"
    known = json.loads(record.read_bytes()) if record.is_file() else {}
    return ApprovedPlan(
        plan_hash=name,
        plan=dp_plan(plan),
        n_decl=plan.roster[config.site.name].n_decl,
        deterministic=plan.deterministic,
        blocks=tuple(known.get("blocks", (EVERYONE,))),
        block_column=str(known.get("block_column", "")),
    )
