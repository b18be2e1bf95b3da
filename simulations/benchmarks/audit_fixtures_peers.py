"""Run inside the peers' environment: what Anonymeter and SDMetrics say of one fixture. Called by file, imports none of ours.

Usage: ``python audit_fixtures_peers.py FOLDER EVALUATOR``, a folder with ``member.csv``, ``held_out.csv``, ``synthetic.csv``
and ``kinds.json`` (column -> numeric or categorical, and the secret). Writes ``answer.json``: a number, or null with why.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd


def main(folder: Path, evaluator: str) -> None:
    """One evaluator; if it fails, null with the reason."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    asked = json.loads((folder / "kinds.json").read_text(encoding="utf-8"))
    kinds, secret = asked["kinds"], asked["secret"]
    types = {name: "float64" if kind == "numeric" else "object" for name, kind in kinds.items()}
    member, held_out, synthetic = (
        pd.read_csv(folder / f"{name}.csv", dtype=types) for name in ("member", "held_out", "synthetic")
    )
    np.random.seed(0)  # noqa: NPY002 (these tools draw from the global generator)
    try:
        number, failed = EVALUATORS[evaluator](member, held_out, synthetic, kinds, secret), ""  # type: ignore[no-untyped-call]
    except Exception as error:
        number, failed = None, f"{type(error).__name__}: {error}"[:200]
    (folder / "answer.json").write_text(json.dumps({"number": number, "failed": failed}), encoding="utf-8")


def attacks(member: pd.DataFrame, held_out: pd.DataFrame) -> int:
    """As many as both groups allow, at most 500."""
    return min(500, len(member), len(held_out))


def singling_out(member, held_out, synthetic, kinds, secret):  # type: ignore[no-untyped-def]
    from anonymeter.evaluators import SinglingOutEvaluator  # type: ignore[import-not-found]

    columns = min(4, len(kinds))
    tool = SinglingOutEvaluator(
        ori=member, syn=synthetic, control=held_out, n_attacks=attacks(member, held_out), n_cols=columns
    )
    tool.evaluate(mode="multivariate")
    return float(tool.risk().value)


def linkability(member, held_out, synthetic, kinds, secret):  # type: ignore[no-untyped-def]
    from anonymeter.evaluators import LinkabilityEvaluator  # type: ignore[import-not-found]

    names = list(kinds)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    tool = LinkabilityEvaluator(
        ori=member,
        syn=synthetic,
        control=held_out,
        n_attacks=attacks(member, held_out),
        aux_cols=halves,
        n_neighbors=1,
    )
    tool.evaluate(n_jobs=1)
    return float(tool.risk().value)


def inference(member, held_out, synthetic, kinds, secret):  # type: ignore[no-untyped-def]
    from anonymeter.evaluators import InferenceEvaluator  # type: ignore[import-not-found]

    tool = InferenceEvaluator(
        ori=member,
        syn=synthetic,
        control=held_out,
        n_attacks=attacks(member, held_out),
        aux_cols=[name for name in kinds if name != secret],
        secret=secret,
        regression=kinds[secret] == "numeric",
    )
    tool.evaluate(n_jobs=1)
    return float(tool.risk().value)


def overfitting(member, held_out, synthetic, kinds, secret):  # type: ignore[no-untyped-def]
    from sdmetrics.single_table import DCROverfittingProtection  # type: ignore[import-not-found]

    kind = {"numeric": "numerical", "categorical": "categorical"}
    columns = {name: {"sdtype": kind[own]} for name, own in kinds.items()}
    metadata = {"tables": {"table": {"columns": columns}}}
    found = DCROverfittingProtection.compute_breakdown(member, synthetic, held_out, metadata, "table")
    return float(found["score"])


EVALUATORS = {
    "anonymeter singling out": singling_out,
    "anonymeter linkability": linkability,
    "anonymeter inference": inference,
    "sdmetrics overfitting": overfitting,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
