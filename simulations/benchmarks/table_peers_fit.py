"""Fit one peer on a table and draw rows: a program for the peers' own environment, which medgen never imports.

``python -P table_peers_fit.py REQUEST ANSWER``: REQUEST is JSON (``peer``, ``epochs``, ``seed``, ``rows`` to draw, ``discrete``
places of columns) beside a ``.npy`` of numbers without gaps, of the same name; ANSWER is a ``.npy`` of as many columns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request: Path, answer: Path) -> None:
    """Read, fit, draw, write."""
    import ctgan  # type: ignore[import-not-found]  # only there
    import numpy as np
    import pandas as pd
    import torch

    asked: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    torch.manual_seed(asked["seed"])
    np.random.seed(asked["seed"])  # noqa: NPY002  # both peers draw from the global generators
    table = np.load(request.with_suffix(".npy"))
    discrete = [f"c{place}" for place in asked["discrete"]]
    frame = pd.DataFrame(table, columns=[f"c{place}" for place in range(table.shape[1])])
    frame[discrete] = frame[discrete].astype(int)
    peer = {"CTGAN": ctgan.CTGAN, "TVAE": ctgan.TVAE}[asked["peer"]](epochs=asked["epochs"], enable_gpu=False)
    peer.fit(frame, discrete)
    np.save(answer, peer.sample(asked["rows"]).astype(float).to_numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
