"""Walks the acceptance lines of release and audit and prints PASS, SHORT (number, cause) or SKIP (reason) for each.

    python tests/acceptance/release.py [--lines bounds,tampering] [--work FOLDER]

Lines of tests run the tests that show them; lines of figures run one benchmark and print every bar. The lines ``demo``, ``petmr``
and ``icu`` run a whole study each and look at its report and bundle, four minutes and more; ``overfit`` and ``petmr`` and ``icu``
need ../shared/data. The whole walk takes about an hour on two cores.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from walk import BIN, ROOT, Check, Shortfall, Skipped, bench, sh, suite, walk

AUDIT = "tests/privacy/audit"
RELEASE = "tests/server/release"
DATA = Path("../shared/data")
FEWEST_MUTATIONS = 30
ANSWERS = ("What was promised?", "What was spent?", "What did attacks find?", "May it leave?")


def figures(says: str, name: str, needs_data: bool = False) -> Check:
    """A line of one benchmark, skipped where its real data are not there."""
    inner = bench(says, name)

    def check(work: Path) -> str:
        if needs_data and not (ROOT / DATA).is_dir():
            raise Skipped(f"{DATA} is not here")
        return inner(work)

    check.__doc__ = says
    return check


def tampering(work: Path) -> str:
    """A tampered bundle is refused in each of thirty ways, and an untouched one is not."""
    text = suite("", f"{RELEASE}/test_tampering.py")(work)
    listed = sh([str(BIN / "pytest"), "--collect-only", "-q", f"{RELEASE}/test_tampering.py"]).stdout
    ways = len(re.findall(r"::test_tampering_is_refused\[", listed)) + len(
        re.findall(r"_is_refused$", listed, re.MULTILINE)
    )
    if ways < FEWEST_MUTATIONS:
        raise Shortfall(f"{ways} ways; {text}")
    return f"{ways} ways; {text}"


def scenario(name: str, real: bool = True) -> Check:
    """A line that runs a scenario from start to bundle and looks at all that a reader gets."""

    def check(work: Path) -> str:
        if real and not (ROOT / DATA).is_dir():
            raise Skipped(f"{DATA} is not here")
        started = time.monotonic()
        sh([str(BIN / "medgen"), "simulate", name, "--runs", str(work / "runs")], ok=False)
        runs = sorted((work / "runs").glob(f"{name}-2*"))
        if not runs:
            raise Shortfall("no run folder")
        took = time.monotonic() - started
        return f"{took:.0f} s, {look(runs[-1], work)}"

    check.__doc__ = f"`medgen simulate {name}` produces the full report: JSON, page, PDF, framework pages, bundle"
    return check


def look(run: Path, work: Path) -> str:
    """What stands in a finished run's report, and whether its files do what they should."""
    import jsonschema

    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    schema = json.loads((ROOT / "docs" / "schema" / "medgen.report-1.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, schema)
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    if lacking := [question for question in ANSWERS if question not in page]:
        raise Shortfall(f"the page does not answer {', '.join(lacking)}")
    if outside := re.findall(r"(?:src|href)=\"https?://[^\"]+", page):
        raise Shortfall(f"the page fetches {outside[0]}")
    findings = report["verdict"]["findings"]
    unmeasured = sorted({f["rule"] for f in findings if f["sentence"].startswith("Not measured")})
    rules = sorted({f["rule"] for f in findings})
    tally = {status: sum(f["status"] == status for f in findings) for status in ("PASS", "INFO", "HOLD", "BLOCK")}
    out = work / f"{run.name}-pages"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    pdf = sh([str(BIN / "medgen"), "audit", "report", str(run), "--out", str(out / "report.html"), "--pdf"], ok=False)
    made = sorted(out.glob("*.pdf"))
    frames = sh(
        [str(BIN / "medgen"), "audit", "report", str(run), "--out", str(out / "report.html"), "--template", "all"],
        ok=False,
    )
    pages = len(list(out.glob("*.html")))
    said = [
        f"{report['verdict']['decision']}: {', '.join(f'{n} {status}' for status, n in tally.items())} over {len(rules)} rules",
        f"not measured: {', '.join(unmeasured) or 'nothing'}",
        f"PDF {made[0].stat().st_size // 1024} KiB" if made else f"no PDF: {_last(pdf.stdout)}",
        f"{pages} pages with the frameworks'"
        if frames.returncode == 0
        else f"no framework pages: {_last(frames.stdout)}",
    ]
    bundle = run / "bundle"
    if report["verdict"]["decision"] != "BLOCK":
        key = run / "coordinator" / "identity.pub"
        verified = sh(
            [str(BIN / "medgen"), "release", "verify", str(bundle), "--key", str(key), "--candidate"], ok=False
        )
        said.append(f"release verify ends with {verified.returncode}: {_last(verified.stdout)}")
    if not made or frames.returncode != 0 or len(rules) < 9:
        raise Shortfall("; ".join(said))
    return "; ".join(said)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing was said"


def pictures(work: Path) -> str:
    """The report's pages, rendered by a browser and as PDF, are kept under docs/img."""
    kept = sorted((ROOT / "docs" / "img").glob("report-*.png"))
    wanted = ("desktop", "phone", "grey", "pdf")
    if lacking := [word for word in wanted if not any(word in path.name for path in kept)]:
        raise Shortfall(f"no picture of {', '.join(lacking)} in docs/img")
    return ", ".join(f"{path.name} {path.stat().st_size // 1024} KiB" for path in kept)


LINES: dict[str, Check] = {
    # -- statistics ----------------------------------------------------------------------------------------------------
    "bounds": suite(
        "Bounds: Clopper-Pearson, Bayesian, GDP, one-run and f-DP with the reference's worked values, Wilson, Holm, ceilings",
        *(f"{AUDIT}/test_{name}.py" for name in ("bounds", "bayesian", "one_run", "multiplicity", "tradeoff")),
    ),
    "level": suite(
        "On random scores no bound exceeds zero more often than its level says",
        f"{AUDIT}/test_bounds.py::test_random_scores_seldom_give_a_bound",
        f"{AUDIT}/test_bayesian.py::test_noise_seldom_gives_a_credible_bound",
        f"{AUDIT}/test_one_run.py::test_noise_seldom_gives_a_bound_unless_the_best_is_picked_uncorrected",
        f"{AUDIT}/test_multiplicity.py::test_holm_keeps_the_family_wise_level_on_noise",
        f"{AUDIT}/test_in_training.py::test_scores_that_know_nothing_raise_a_bound_no_more_often_than_the_level_says",
        f"{AUDIT}/test_reference_models.py::test_no_reference_attack_finds_anything_in_noise",
    ),
    # -- attacks -------------------------------------------------------------------------------------------------------
    "weights": suite(
        "Attacks on weights: flow-loss grid, SimA, PIA, SecMI, codec reconstruction; RMIA, LiRA with shadow models",
        "tests/medgen_models/test_membership.py",
        f"{AUDIT}/test_reference_models.py",
    ),
    "cohort": suite(
        "Attacks on the cohort: DOMIAS, Gen-LRA, classifier, nearest neighbours with a size-matched control",
        *(f"{AUDIT}/test_{name}.py" for name in ("attacks", "table_scores", "cohort_attacks", "mixed")),
    ),
    "risks": suite(
        "Singling out, linkability with image to record, inference: members against held-out patients, exact tests",
        f"{AUDIT}/test_risks.py",
        f"{AUDIT}/test_patient_risks.py",
    ),
    "copies": suite("Copies and re-identification per imaging slot", f"{AUDIT}/test_image_copies.py"),
    "transcript": suite("Canary cosine of every round of a transcript", f"{AUDIT}/test_transcript.py"),
    "in-training": suite(
        "Canaries in spare coordinates of a study: committed before the first round, opened after the last, bounds over all sites",
        f"{AUDIT}/test_in_training.py",
        f"{AUDIT}/test_training_gate.py",
        "tests/client/test_canaries.py",
        "tests/server/test_canaries.py",
    ),
    # -- validity, federated, gates ------------------------------------------------------------------------------------
    "validity": suite(
        "Validity: blind baseline, planted leak, null, unit and split overlap; any failing shows as HOLD or BLOCK",
        f"{AUDIT}/test_validity.py",
        "tests/server/test_planting.py",
    ),
    "federated": suite(
        "Federated: one vector of counts of public length, masked, capped, ledgered; annex sealed; groups suppressed by trials",
        f"{AUDIT}/test_message.py",
        "tests/client/test_evidence.py",
        "tests/server/test_auditing.py",
    ),
    "gates": suite(
        "Gates: each rule, its number and its sentence; a versioned policy with a digest; missing evidence is never green",
        f"{AUDIT}/test_gates.py",
        f"{AUDIT}/test_study_gates.py",
        f"{RELEASE}/test_gate.py",
    ),
    # -- bundle --------------------------------------------------------------------------------------------------------
    "bundle": suite(
        "Bundle: NIfTI, DICOM, PNG, tables, weights, Croissant, datasheet; in-toto in DSSE, two signers, build, sign, verify, revoke",
        *(
            f"{RELEASE}/test_{name}.py"
            for name in ("bundle", "attestation", "assembly", "cards", "dicom", "revocations")
        ),
        f"{RELEASE}/test_cohort_files.py",
        "tests/server/test_release_console.py",
    ),
    "tampering": tampering,
    # -- report --------------------------------------------------------------------------------------------------------
    "report": suite(
        "Report: published schema, same evidence same bytes, nothing fetched, PDF, framework headings",
        *(
            f"{RELEASE}/test_{name}.py"
            for name in ("report", "schema", "pdf", "frameworks", "facts", "evidence", "fidelity")
        ),
        "tests/server/test_report_console.py",
    ),
    "pictures": pictures,
    # -- standalone ----------------------------------------------------------------------------------------------------
    "standalone": suite(
        "medgen audit run on tables, images and both; bad input refused by name or marked invalid",
        f"{AUDIT}/test_standalone.py",
        f"{AUDIT}/test_image_audit.py",
        "tests/server/test_audit_run.py",
        "tests/server/test_audit_images.py",
    ),
    # -- figures -------------------------------------------------------------------------------------------------------
    "fixtures": bench(
        "Adversarial fixtures on which named tools give a wrong safe verdict; medgen is right on all", "audit-fixtures"
    ),
    "power": bench("Power: detected leak against epsilon and copied share, false alarms against level", "audit-power"),
    "overfit": figures(
        "An overfitted model on real films is caught; at epsilon 8 every bound stays under the promise",
        "audit-overfit",
        True,
    ),
    "twin": bench("The plan's twin on phantoms: image canaries, and random directions in the transcript", "audit-twin"),
    "time": bench("5,000 patients x 40 columns in under ten minutes and 4 GiB; growth plotted", "audit-scaling"),
    # -- whole studies -------------------------------------------------------------------------------------------------
    "demo": scenario("demo", real=False),
    "petmr": scenario("petmr"),
    "icu": scenario("icu"),
}


def main(checks: dict[str, Callable[[Path], str]]) -> int:
    """Walk the lines that were asked for."""
    return walk(checks, "Acceptance walk of release and audit.", ",".join(checks))


if __name__ == "__main__":
    sys.exit(main(LINES))
