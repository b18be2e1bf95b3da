"""Walks the acceptance lines of the models and prints PASS, SHORT (number, cause) or SKIP (reason) for each.

    python tests/acceptance/models.py [--lines schema,impute,speed] [--work FOLDER]

Lines of tests run a part of the suite; lines of the tasks benchmark run one row of it, three seeds, and print every bar (and
every ablation, with the full model beside it). The first row trains the models that the others share; the whole walk takes
up to three hours on two cores. Give ``--work`` the folder of an earlier walk to go on with what it finished.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from walk import BIN, Check, Shortfall, Skipped, bench, figure, sh, suite, walk

DATA = Path("../shared/data")


def row(part: str, says: str, everything: bool = False) -> Check:
    """A line that runs one row of the tasks benchmark; ``everything`` prints figures without a bar too."""

    def check(work: Path) -> str:
        file = work / "tasks.json"
        file.unlink(missing_ok=True)
        done = sh([str(BIN / "medgen"), "bench", "tasks", "--rows", part, "--json", str(file)], ok=False, timeout=14400)
        if not file.is_file():
            raise Shortfall(f"no result: {(done.stdout + done.stderr)[-500:]}")
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        if not rows:
            raise Skipped(f"the row has no figure: its real data are not in {DATA}")
        barred = [each for each in rows if each["bar"] is not None]
        said = [f"{'holds ' if each['holds'] else 'MISSED'} {_line(each)}" for each in barred]
        if everything:
            said += [_line(each) for each in rows if each["bar"] is None]
        text = "\n   ".join([f"{len(rows)} figures, {len(barred)} with a bar", *said])
        if not all(each["holds"] for each in barred):
            raise Shortfall(text)
        return text

    check.__doc__ = says
    return check


def _line(each: dict[str, object]) -> str:
    bar = "" if each["bar"] is None else f" (bar {each['bar']:g})"
    interval, peers = each["interval"], each["peers"]
    around = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if isinstance(interval, list) and None not in interval else ""
    beside = ", ".join(f"{name} {_short(number)}" for name, number in peers.items()) if isinstance(peers, dict) else ""
    return f"{figure(each)}{around} {each['unit']}{bar}: {each['measure']}{' | ' + beside if beside else ''}"


def _short(number: object) -> str:
    return f"{number:.3g}" if isinstance(number, float | int) else "undefined"


def readme(work: Path) -> str:
    """Every row of the table of tasks has its line in the README's table of what works."""
    page = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    section = page[page.index("## What works today") : page.index("## Figures")]
    wanted = ("bench tasks --rows joint", "--rows impute", "--rows cells", "--rows update", "--rows standard")
    missing = [name for name in wanted if not re.search(re.escape(name), section)]
    if missing:
        raise Shortfall(f"no line names {', '.join(missing)}")
    return f"{len(wanted)} lines"


def gpu(work: Path) -> str:
    """The base preset trains and samples one step on one GPU in bf16, its memory stated."""
    import torch

    from medgen_models.devices import best_device
    from medgen_models.layout import Layout
    from medgen_models.presets import core_preset, schema_preset
    from medgen_models.step_cost import measured_step, step_memory
    from simulations.phantoms import demo_schema

    layout = Layout.of(schema_preset(demo_schema(), "base"))
    counted = step_memory(layout, core_preset("base"))
    if not torch.cuda.is_available():
        raise Skipped(f"there is no GPU on this machine; counted for {layout.tokens} tokens: {counted}")
    return str(measured_step(layout, core_preset("base"), 4, best_device()))


MODELS, BENCH = "tests/medgen_models", "tests/simulations"
LINES: dict[str, Check] = {
    "schema": suite(
        "Schema: slots, instances, factors, kinds, public ranges, presets, one dial",
        f"{MODELS}/test_layout.py",
        f"{MODELS}/test_presets.py",
        f"{MODELS}/test_batches.py",
    ),
    "codecs": suite(
        "Codecs: one contract, every kind, vae of images, table and series, encoders of notes", f"{MODELS}/codecs"
    ),
    "core": suite(
        "Core and objective: states, terms, categories, adapters, one value per patient, exact gradients",
        f"{MODELS}/test_core.py",
        f"{MODELS}/test_flow.py",
        f"{MODELS}/test_terms.py",
        f"{MODELS}/test_gaussian_prior.py",
        f"{MODELS}/test_adapters.py",
        f"{MODELS}/test_assembly.py",
    ),
    "tasks": suite(
        "Tasks as data, counterfactual, uncertainty with intervals, influence, heads",
        f"{MODELS}/test_tasks.py",
        f"{MODELS}/test_counterfactual.py",
        f"{MODELS}/test_uncertainty.py",
        f"{MODELS}/test_influence.py",
        f"{MODELS}/test_heads.py",
        f"{MODELS}/test_token_heads.py",
    ),
    "tables-first": suite(
        "Tables first: DP marginals to rows with presence",
        f"{MODELS}/test_table_prior.py",
        f"{MODELS}/test_table_bins.py",
    ),
    "pretrain": suite(
        "Pre-training with its card, public-only terms, resume; sample",
        f"{MODELS}/test_pretrain.py",
        "tests/test_cli.py",
    ),
    "metrics": suite(
        "Metrics with hand-computed cases",
        *(
            f"{MODELS}/test_metrics_{name}.py"
            for name in (
                "coherence",
                "features",
                "image",
                "series",
                "sets",
                "standard",
                "table",
                "uncertainty",
                "utility",
            )
        ),
    ),
    "export": suite("safetensors, a MONAI bundle that MONAI runs, model card", f"{MODELS}/test_export.py"),
    "probe": suite("The probe: every shipped network, folds, refusals by name", "tests/privacy/test_probe_networks.py"),
    "bench": suite(
        "Each row of the benchmark on a tiny case",
        *(
            f"{BENCH}/test_bench_{name}.py"
            for name in (
                "tasks",
                "joint",
                "tables",
                "task_impute",
                "petmr",
                "cells",
                "update",
                "serial_cxr",
                "task_standard",
                "peers",
                "ablations",
                "task_codecs",
            )
        ),
        f"{BENCH}/test_task_sheets.py",
    ),
    "joint": row(
        "joint", "Joint MRI + table: FD, precision and recall, coherence, correlations within .15 of real rows"
    ),
    "tables": row("tables", "Column shapes and pair trends on real tables, beside CTGAN and TVAE"),
    "impute": row("impute", "Imputation of every mask at 0, 50 and 80 % missing; intervals that cover"),
    "petmr": row("petmr", "MRI to PET on real patients, one vendor left out"),
    "cells": row("cells", "Pathology x sequence, cells held out of training generated and recognised"),
    "update": row("update", "X-ray update: against carry-forward, EHR swapped, by staleness"),
    "serial": row("serial", "Real serial films"),
    "standard": row("standard", "The review's gaps: one standard, validation use, subgroups"),
    "peers": row("peers", "Baselines under the same data and steps", everything=True),
    "ablations": row("ablations", "Ablations as the papers report them", everything=True),
    "codec-figures": row("codecs", "PSNR, FD, lesion contrast of every codec, public and federated"),
    "speed": bench("Speed and size of the smoke core", "core-speed"),
    "gpu": gpu,
    "readme": readme,
}


def main(checks: dict[str, Callable[[Path], str]]) -> int:
    """Walk the lines that were asked for."""
    return walk(checks, "Acceptance walk of the models.", ",".join(checks))


if __name__ == "__main__":
    sys.exit(main(LINES))
