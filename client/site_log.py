"""The site log for people and for a log collector: what was proposed, signed, approved, rejected and refused, and by whom.

The export carries a closed list of fields, none of which is typed freely or computed from records: reasons that people
wrote stay at the site. Each event carries its number and hash, so the collector's copy shows when the site's was cut short.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

from client.site import SiteConfig
from privacy.book import Head
from privacy.chain import GENESIS, Link

APP_NAME = "medgen-site"
FACILITY = 13  # log audit (RFC 5424, table 1)
NOTICE, WARNING = 5, 4  # severities (RFC 5424, table 2)
FIELDS = (
    *("plan_hash", "study", "by", "os_user", "code", "what", "key", "ledger"),
    *("consortium", "coordinator", "endpoint", "kit", "fingerprint"),
)
"""The fields of an event that are exported; anything else of a link, now or later, is not."""


def verify(config: SiteConfig, heads: tuple[Head, ...] = ()) -> tuple[Head, tuple[Head, ...]]:
    """Recompute the log's chain.

    Args:
        heads: heads that somebody else remembers, such as the log collector.

    Returns:
        The newest head (0 and zeros for no log), and those of ``heads`` that the log does not hold.

    Raises:
        ChainError: a byte was changed.
    """
    links = config.log().read()
    held = {(link.seq, link.hash) for link in links}
    head = Head(links[-1].seq, links[-1].hash) if links else Head(0, GENESIS)
    return head, tuple(known for known in heads if (known.seq, known.hash) not in held)


def events(config: SiteConfig, after: int = 0) -> Iterator[str]:
    """One JSON object a line for each link beyond number ``after``, named as in a syslog message (RFC 5424).

    Raises:
        ChainError: the log's chain is broken; nothing is exported then.
    """
    host = socket.gethostname()
    for link in config.log().read():
        if link.seq > after:
            yield json.dumps(_event(config, link, host), sort_keys=True)


def _event(config: SiteConfig, link: Link, host: str) -> dict[str, Any]:
    entry = link.data()
    severity = WARNING if link.kind in ("refused", "rejected") else NOTICE
    return {
        "timestamp": link.at,
        "hostname": host,
        "app_name": APP_NAME,
        "procid": "-",
        "msgid": link.kind,
        "facility": FACILITY,
        "severity": severity,
        "priority": FACILITY * 8 + severity,
        "structured_data": {
            "site": config.site.name,
            "seq": link.seq,
            "hash": link.hash,
            **({"peer": entry["site"]} if link.kind == "peer" else {}),
            **{name: entry[name] for name in FIELDS if isinstance(entry.get(name), str) and entry[name]},
        },
    }
