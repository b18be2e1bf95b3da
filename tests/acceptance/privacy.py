"""Walks the acceptance lines of the privacy engine and prints PASS, SHORT (number, cause) or SKIP (reason) for each.

    python tests/acceptance/privacy.py [--lines plan,training,dp-step] [--work FOLDER]

Lines of tests run a part of the suite, lines of benchmarks print every bar. ``exhaustive`` kills a process at 200 instants and
``frontier`` trains about forty federations; the whole walk takes about an hour on two cores. Give ``--work`` the folder of an
earlier walk to go on with its frontier.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from walk import BIN, Check, Shortfall, Skipped, bench, figure, sh, suite, walk


def frontier(work: Path) -> str:
    """Utility at epsilon 1, 3, 8 and infinity and one factor at a time around epsilon 8, every cell with three seeds."""
    file = work / "frontier.json"
    sh([str(BIN / "medgen"), "bench", "frontier", "--json", str(file)], ok=False)
    if not file.is_file():
        raise Shortfall("the benchmark did not end; call this line again with the same --work to go on")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    undefined = [row["measure"] for row in rows if row["value"] is None]
    text = "\n   ".join(
        [f"{len(rows)} figures", *(f"{figure(row)} {row['interval'] or ''}: {row['measure']}" for row in rows)]
    )
    if undefined:
        raise Shortfall(f"{len(undefined)} figures are undefined\n   {text}")
    return text


def gpu(work: Path) -> str:
    """GPU figures of dp-step, where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped("there is no GPU on this machine; rounds run on the CPU (README, What works today)")
    raise Shortfall("a GPU is here, and the benchmark times the CPU only")


def promise(work: Path) -> str:
    """README's promise and the report's statement are generated from what plan and ledger say."""
    sh([sys.executable, "-m", "simulations.promise", "--check"])
    return "README is what plan and ledger say; " + suite(
        "", "tests/simulations/test_promise.py", "tests/server/release/test_report.py"
    )(work)


PRIVACY = "tests/privacy"
LINES: dict[str, Check] = {
    "plan": suite(
        "DPPlan: frozen, calibrated jointly, PLD checked by PRV, two ceilings, statement, trials, trade-off curve",
        f"{PRIVACY}/test_plan.py",
        f"{PRIVACY}/test_accounting.py",
        f"{PRIVACY}/test_trials.py",
        f"{PRIVACY}/audit/test_tradeoff.py",
        "tests/server/test_planning.py",
    ),
    "unit": suite(
        "Patient as unit: draws, visits and slots in one gradient; two ids of one identity are one patient",
        "tests/medgen_models/test_flow.py",
        "tests/client/records",
    ),
    "training": suite(
        "Training: Poisson, constants, chunks, empty batches, silence, no state left behind",
        f"{PRIVACY}/test_training.py",
        f"{PRIVACY}/test_clipping.py",
    ),
    "engines": suite(
        "Gradient engines behind one contract, measured once; ghost, ew, adaptive, GDP refused with the reason",
        f"{PRIVACY}/test_gradients.py",
        f"{PRIVACY}/test_convolutions.py",
        "tests/client/test_speed.py",
        "tests/simulations/test_bench_dp_step.py",
    ),
    "probe": suite(
        "Gradient probe: every network, layouts, draws, missing slots, batch 0/1/3; what is unsound is refused by name",
        f"{PRIVACY}/test_probe.py",
        f"{PRIVACY}/test_probe_networks.py",
    ),
    "noise": suite(
        "Noise and sampling from ChaCha20 keyed by the operating system",
        f"{PRIVACY}/test_noise.py",
        f"{PRIVACY}/test_discrete_gaussian.py",
    ),
    "ledger": suite(
        "Ledger: intent, commit, spares, blocks, ceilings, rollback, restore, forecast, export, heads, withdrawal",
        f"{PRIVACY}/test_ledger.py",
        f"{PRIVACY}/test_lifetime.py",
        f"{PRIVACY}/test_restore.py",
        f"{PRIVACY}/test_spendfile.py",
        f"{PRIVACY}/test_summary.py",
        f"{PRIVACY}/test_chain.py",
        "tests/client/test_ledger_console.py",
        "tests/client/test_withdraw.py",
        "tests/client/test_policy.py",
        "tests/client/test_agent.py",
        "tests/client/test_outbox.py",
    ),
    "durability": suite(
        "Kill -9, full disk, locked file, clock gone backwards, two processes: the short form",
        "tests/client/test_durability.py",
        f"{PRIVACY}/test_spendfile.py",
    ),
    "exhaustive": suite(
        "Kill -9 at 200 random instants: never lost, never double-spent, the study resumes; canaries with secret noise",
        "tests/client/test_durability.py",
        f"{PRIVACY}/test_canary_audit.py",
        marker="exhaustive",
    ),
    "statistics": suite(
        "Statistics under DP through the same ledger", f"{PRIVACY}/test_statistics.py", f"{PRIVACY}/test_marginals.py"
    ),
    "spy": suite("A spy dataset walks every code path and fails on an undeclared read", "tests/client/test_spy.py"),
    "levers": suite(
        "Levers wired to plans: draws, EMA, recentring, prototypes, public pre-training, trained group and clip, trials",
        "tests/server/test_stages.py",
        "tests/server/test_warmup.py",
        "tests/medgen_models/test_prototypes.py",
        "tests/medgen_models/test_adapters.py",
        "tests/medgen_models/test_pretrain.py",
    ),
    "shared-noise": suite(
        "Distributed noise: a benchmarked prototype that no plan can name", f"{PRIVACY}/test_shared_noise.py"
    ),
    "soundness": suite(
        "The ten soundness tests",
        f"{PRIVACY}/test_soundness.py",
        f"{PRIVACY}/test_canary_audit.py",
        f"{PRIVACY}/test_probe_networks.py",
        "tests/client/records/test_one_patient.py",
        "tests/test_leak_lint.py",
    ),
    "seeded-bugs": suite("Each seeded bug fails the test named for it", f"{PRIVACY}/test_seeded_bugs.py"),
    "edges": suite(
        "Sharp edges page: every pitfall has a class, a prevention and a test that exists", "tests/test_docs.py"
    ),
    "promise": promise,
    "canaries": bench("White-box canaries, 50,000 an arm: above 0.7 of the promise, never above it", "canaries"),
    "accounting": bench(
        "Fifty random schedules against an independent composition: never below, at most 1 % above", "accounting"
    ),
    "bench-shared": bench("Shared noise against full noise at each site", "shared-noise"),
    "dp-step": bench("Time and memory of a private step over a plain one", "dp-step"),
    "gpu": gpu,
    "frontier": frontier,
}

if __name__ == "__main__":
    sys.exit(walk(LINES, __doc__, os.environ.get("LINES_TO_WALK", ",".join(LINES))))
