"""The descriptive table: exact over all sites without noise, honest about its noise with it, and no stage depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import description
from server.planning import STATISTICS
from server.session import gather


def members(study: Any, name: str) -> Any:
    """The members of one site."""
    from client.policy import SiteConfig
    from client.rounds import read_records

    config = SiteConfig.load(study.site(name))
    with config.open_ledger() as ledger:
        return read_records(config, study.plan, None, ledger.local("test")).members


@pytest.fixture(scope="module")
def exact(
    study_plan: Callable[..., Any], study_edit: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The tiny study without any noise, with a descriptive table."""

    def unlimited(study: Any) -> None:
        study_edit(study, "_epsilon = 8.0", "_epsilon = inf")
        study_edit(study, "_epsilon = 12.0", "_epsilon = inf")

    root = tmp_path_factory.mktemp("exact")
    return study_plan(root, "study.privacy.epsilon=inf", "study.statistics.enabled=true", edit=unlimited)


def test_without_noise_it_is_the_statistics_of_all_members(exact: Any, study_sites: tuple[str, ...]) -> None:
    from medgen_models.description import values_and_presence

    session = exact.session()
    table = description.statistics(session, gather(session))
    assert table is not None
    assert json.loads((exact.folder.path / "statistics.json").read_text()) == table
    asked = exact.plan.statistics
    names = [column.name for column in asked.columns]
    assert names == ["age_years", "bnp_pg_ml", "crp_mg_l"]
    parts = [values_and_presence(exact.schema, members(exact, site), names, asked.present) for site in study_sites]
    values, flags = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert table["noise_std_patients"] == 0.0
    for c, column in enumerate(asked.columns):
        own = np.clip(values[np.isfinite(values[:, c]), c], column.low, column.high)
        found = table["columns"][column.name]
        unit = (column.high - column.low) / 2 * exact.plan.quantisation.statistic * len(study_sites)  # rounding
        assert found["patients"] == len(own) > 8
        assert found["mean"] == pytest.approx(own.mean(), abs=unit)
        assert found["deviation"] == pytest.approx(own.std(), abs=10 * unit)
        width = (column.high - column.low) / asked.bins
        assert found["quantiles"]["0.5"] == pytest.approx(np.median(own), abs=1.5 * width)
    assert list(table["patients_with"].values()) == flags.sum(axis=0).tolist()
    again = description.statistics(exact.session(), study_sites)  # a resumed study asks nobody
    assert again == table


def test_noise_is_promised_charged_and_stated(
    study_plan: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    from client.policy import dp_plan
    from privacy.summary import summary_sensitivity

    study = study_plan(tmp_path / "noised", "study.statistics.enabled=true", "study.statistics.sigma=30.0")
    layout = study.plan.statistics.layout
    stage = dp_plan(study.plan).query(STATISTICS)
    assert (stage.sigma, stage.sensitivity) == (30.0, summary_sensitivity(layout.columns, layout.flags))
    session = study.session()
    table = description.statistics(session, gather(session))
    assert table is not None
    assert table["noise_std_patients"] == pytest.approx(2 * stage.noise_std, abs=1e-3)  # four sites
    assert table["sites"] == list(study_sites)
    for column in study.plan.statistics.columns:
        found = table["columns"][column.name]
        assert column.low <= found["quantiles"]["0.05"] <= found["quantiles"]["0.95"] <= column.high
        assert column.low <= found["mean"] <= column.high
    for site in study_sites:
        account = next(entry for entry in study.ledger(site).stages if entry.name == STATISTICS)
        assert (account.intents, account.commits) == (1, 1)
        assert study.ledger(site).spent_epsilon > 0


def test_a_study_that_asks_for_none_gets_none(study: Any, study_sites: tuple[str, ...]) -> None:
    assert study.plan.statistics is None
    assert description.statistics(study.session(), study_sites) is None
    assert not (study.folder.path / "statistics.json").exists()
