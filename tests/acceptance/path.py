"""Walks the acceptance lines of the whole path and prints PASS, SHORT (with the number) or SKIP (with the reason) for each.

    python tests/acceptance/path.py [--lines 1,2,3] [--work FOLDER]

Line 1 and 2 make a fresh clone and install it, line 3 needs ../shared/data, line 1 wants `unshare -n` (root) to cut the
network; the whole walk takes about an hour on two cores.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from walk import QUIET, ROOT, Shortfall, Skipped, sh, walk

BIN = Path(sys.executable).parent
SMALL = (
    "public.steps=60", "public.patients=200", "public.reference=150", "hospitals.share=0.2",
    "study.core.rounds=2", "study.core.steps=6", "study.release.patients=24",
)  # fmt: skip


def simulate(work: Path, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    return sh([str(BIN / "medgen"), "simulate", *words, "--runs", str(work / "runs")], ok=ok)


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def latest(work: Path, name: str) -> Path:
    return sorted((work / "runs").glob(f"{name}-2*"))[-1]


def ledgers(run: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    """Every site's ledger as the hospital would read it."""
    from privacy.ledger import Ledger

    found = {}
    for site in sorted((run / "hospitals").iterdir()):
        with Ledger.open(site / "ledger.sqlite", site.name, writable=False) as ledger:
            ledger.verify()
            found[site.name] = ledger.summary().to_dict()
    return found


def clone(work: Path) -> Path:
    """A fresh clone with its own environment, beside the shared folder as in a checkout."""
    place = work / "clone"
    if not place.is_dir():
        sh(["git", "clone", "--quiet", str(ROOT), str(place)])
        if (ROOT.parent / "shared").is_dir() and not (work / "shared").exists():
            (work / "shared").symlink_to(ROOT.parent / "shared")
        sh(["make", "install"], cwd=place)
    return place


def line_1(work: Path) -> str:
    """`make demo` in a fresh clone: exit 0, under ten minutes, under 6 GiB, offline, no process left, twice."""
    place = clone(work)
    offline = shutil.which("unshare") is not None and os.geteuid() == 0
    inner = "ip link set lo up 2>/dev/null; exec make demo"
    command = ["unshare", "-n", "sh", "-c", inner] if offline else ["make", "demo"]
    before = flower_processes()
    took = []
    for _ in range(2):
        started = time.monotonic()
        out = sh(command, cwd=place).stdout
        took.append(time.monotonic() - started)
        if "report" not in out:
            raise Shortfall("make demo did not say where the report is")
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    left = flower_processes() - before
    runs = len(list((place / "runs").glob("demo-2*")))
    text = f"{took[0]:.0f} s, again {took[1]:.0f} s, peak {peak_gib:.2f} GiB, {'offline' if offline else 'online'}, {runs} runs"
    if took[0] > 600 or peak_gib > 6 or left or runs != 2 or not offline:
        raise Shortfall(text + (f", left behind {left}" if left else ""))
    return text


def flower_processes() -> set[str]:
    done = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    words = ("flower-", "flwr", "ray::", "raylet", "gcs_server", "medgen simulate")
    return {line.split()[0] for line in done.stdout.splitlines() if any(word in line for word in words)}


def line_2(work: Path) -> str:
    """`make test` in a fresh clone: passes in under fifteen minutes and says what it skipped."""
    place = clone(work)
    started = time.monotonic()
    out = sh(["make", "test"], cwd=place).stdout
    took = time.monotonic() - started
    summary = re.findall(r"=+ (.*(?:passed|failed).*) =+", out)
    skipped = re.findall(r"SKIPPED .*", out)
    text = f"{took:.0f} s: {summary[-1] if summary else 'no summary'}; skipped: {'; '.join(skipped[:5]) or 'nothing'}"
    if took > 900:
        raise Shortfall(text)
    return text


def line_3(work: Path) -> str:
    """Both real scenarios run to their reports in under twenty minutes each."""
    if not (ROOT.parent / "shared" / "data").is_dir():
        raise Skipped("../shared/data is not here")
    said = []
    for name in ("petmr", "icu"):
        started = time.monotonic()
        simulate(work, name, "--keep-hospitals")
        took = time.monotonic() - started
        report = json.loads((latest(work, name) / "report" / "report.json").read_text())
        said.append(f"{name} {took:.0f} s {report['verdict']['decision']}")
        if took > 1200:
            raise Shortfall("; ".join(said))
    return "; ".join(said)


def line_4(work: Path) -> str:
    """A killed round resumes; one spare consumed, no ceiling passed; a further study that would pass it is refused."""
    words = [
        str(BIN / "medgen"),
        "simulate",
        "demo",
        "--keep-hospitals",
        "--runs",
        str(work / "runs"),
        *settings(*SMALL),
    ]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **QUIET}, stdout=subprocess.DEVNULL)
    if not wait_for(lambda: in_core(work), 900):
        process.kill()
        raise Shortfall("the study never reached a core round")
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = latest(work, "demo")
    simulate(work, "demo", "--resume", "--keep-hospitals")
    spares = {
        site: sum(s["spares_used"] for p in ledger["plans"] for s in p["stages"])
        for site, ledger in ledgers(run).items()
    }
    over = [
        site for site, ledger in ledgers(run).items() if any(p["spent_epsilon"] > p["epsilon"] for p in ledger["plans"])
    ]
    again = simulate(work, "demo", "--hospitals", str(run / "hospitals"), *settings(*SMALL), ok=False)
    events = (latest(work, "demo") / "events.jsonl").read_text()
    refused = events.count("OVER_LIFETIME_CEILING")
    text = (
        f"spares used {spares}; a further study: exit {again.returncode}, refused by {refused} of {len(spares)} sites"
    )
    if sum(spares.values()) != 1 or over or again.returncode == 0 or refused < len(spares):
        raise Shortfall(text)
    return text


def in_core(work: Path) -> bool:
    """Whether a site has begun, and not finished, a round of the core."""
    import sqlite3

    for ledger in (work / "runs").glob("demo-2*/hospitals/*/ledger.sqlite"):
        try:
            with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as file:
                rows = list(file.execute("select seq, kind, body from rows order by seq"))
        except sqlite3.Error:
            continue
        if rows and rows[-1][1] == "intent" and json.loads(rows[-1][2])["stage"] == "core":
            return True
    return False


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def line_5(work: Path) -> str:
    """Under the deterministic switch, inprocess and ray give bit-identical final weights."""
    import numpy as np

    from server.checkpoints import Checkpoints

    finals = {}
    for backend in ("inprocess", "ray"):
        simulate(work, "demo", "--backend", backend, *settings(*SMALL, "study.execution.deterministic=true"))
        last = Checkpoints(latest(work, "demo") / "checkpoints").last("core")
        assert last is not None
        finals[backend] = last.arrays
        time.sleep(1.1)
    one, other = finals.values()
    same = set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)
    if not same:
        worst = max(float(np.abs(one[name] - other[name]).max()) for name in one)
        raise Shortfall(f"the weights differ by up to {worst:.3g}")
    return f"{len(one)} arrays, {sum(a.size for a in one.values())} weights, all equal bit for bit"


def line_6(work: Path) -> str:
    """The DP step equals a hand-written loop; the noise has the promised deviation; ledger epsilon = dp_accounting."""
    out = sh([str(BIN / "pytest"), "-q", "tests/privacy/test_training.py", "tests/privacy/test_gradients.py",
              "tests/privacy/test_noise.py", "tests/privacy/test_accounting.py", "tests/privacy/test_ledger.py"]).stdout  # fmt: skip
    return out.strip().splitlines()[-1]


def line_7(work: Path) -> str:
    """Image-attribute correlations: given rows 0.6 of the phantoms' own, jointly 0.85 (not private); private beside."""
    said, short = [], False
    for label, extra in (("not private", ("study.privacy.epsilon=inf",)), ("epsilon 8", ())):
        simulate(work, "demo", "--keep-hospitals", *settings(*extra))
        run = latest(work, "demo")
        file = work / f"correlations-{label.replace(' ', '-')}.json"
        sh([str(BIN / "medgen"), "bench", "correlations", "--run", str(run), "--json", str(file)], ok=False)
        rows = json.loads(file.read_text())["rows"]
        said.append(f"{label}: given rows {rows[0]['value']:.2f}, jointly {rows[1]['value']:.2f}")
        short |= any(row["holds"] is False for row in rows)
        time.sleep(1.1)
    if short:
        raise Shortfall("; ".join(said))
    return "; ".join(said)


def line_8(work: Path) -> str:
    """README: what leaves a hospital, the two commands, the flow, the tree, covered / not covered, what works today."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = ("What leaves a hospital", "make demo", "make test", "flow", "covered", "not covered", "works today")
    missing = [word for word in wanted if word.lower() not in text.lower()]
    listed = set(re.findall(r"^\s*[│├└─ ]*([a-z_]+\.py)", text, flags=re.MULTILINE))
    real = {
        path.name
        for room in ("client", "server", "medgen_models", "privacy", "simulations")
        for path in (ROOT / room).rglob("*.py")
    }
    gone = sorted(listed - real - {"medgen.py"})
    if missing or gone:
        raise Shortfall(f"missing {missing}, files that are not there {gone}")
    return f"all sections there; {len(listed)} files named, all exist"


if __name__ == "__main__":
    lines = {str(number): globals()[f"line_{number}"] for number in range(1, 9)}
    sys.exit(walk(lines, __doc__, os.environ.get("LINES_TO_WALK", ",".join(lines))))
