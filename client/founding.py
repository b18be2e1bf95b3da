"""How a site folder comes to be: a commented ``site.toml``, the site's keys, and an empty place for its records."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from client.enrolment import make_keys, make_node_key_file
from client.policy import SiteConfig
from privacy.chain import sync_folder, write_durably

TEMPLATE = """\
# What this hospital offers and gives at most. Unknown keys are refused. Every key with its rule: docs/guide-hospital.md.
# A study proposes, this file disposes: its ceilings win over anything that is sent.

[site]
name = {name}
slots = {slots}  # slots of the study schema that this site takes part in
declared_capacity = {capacity}  # patients who may train; public, so typed in as a round number and never counted
declared_held_out = {held_out}  # patients who never train, the control of every attack; public

[ceiling]  # a plan above any of these is refused before anything is read
plan_epsilon = {plan_epsilon}  # most that one plan may cost, spare rounds included
lifetime_epsilon = {lifetime_epsilon}  # most that all plans together may cost
delta = 1e-5  # largest delta of a plan
uncovered_queries = 0  # queries outside the guarantee for one plan; an audit of the release needs 1 or more

[policy]
min_contributors = 3  # fewest sites whose sum this site joins; 1 also sends under its own noise alone
bad_record = "null"  # a bad record becomes a null patient; "refuse": the site sits out
peers = "seen"  # "compared": only plans whose every peer's fingerprint was compared, `medgen site peers`
officer_key = ""  # the privacy officer's public key: without it nobody can restore a lost ledger
# approvals = 2  # the rule of two persons; each of [policy.approvers] signs with a key of their own
# quiet_hours = ["07:00-19:00"]  # no round begins then

[data]
root = "data"  # relative to this folder, or absolute; mount it read-only
# format = "tables"  # tables only; the default, "bids", has a folder of images per patient

# [limits]
# cpu_threads = 4
# memory_gb = 16.0
"""


def make_site(
    folder: Path,
    *,
    name: str,
    slots: Sequence[str],
    capacity: int,
    held_out: int = 0,
    plan_epsilon: float = 1.0,
    lifetime_epsilon: float = 2.0,
) -> SiteConfig:
    """Make a site: ``site.toml``, keys, folders; folder 0710 (its group may pass, not look), everything private 0700 and 0600.

    It is built beside ``folder`` and appears there whole or not at all. The ceilings are low on purpose: a hospital raises
    them knowingly.

    Raises:
        ValueError: the folder is there and not empty, a value does not fit, or the place cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: it is not an empty folder, and nothing in it is overwritten; name a new folder")
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.new")
    text = TEMPLATE.format(
        name=json.dumps(name),
        slots=json.dumps(list(slots)),
        capacity=capacity,
        held_out=held_out,
        plan_epsilon=float(plan_epsilon),
        lifetime_epsilon=float(lifetime_epsilon),
    )
    try:
        draft.mkdir(mode=0o700, parents=True)
        write_durably(draft / "site.toml", text.encode())
        SiteConfig.load(draft)
        (draft / "data").mkdir(mode=0o700)
        make_keys(draft)
        make_node_key_file(draft)
        draft.chmod(0o710)
        draft.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ValueError(
            f"{folder}: {error.strerror}; name a folder on a disk with room, in one that this user may write"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return SiteConfig.load(folder)
