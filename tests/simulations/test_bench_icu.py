"""The ICU benchmark reads a cohort from its files and tests it on real stays; without the data set it is skipped."""

import dataclasses
from pathlib import Path

import pytest

from client.enrolment import make_keys
from server.release.cohort_files import synthetic_ids, write_cohort
from server.runfolder import RunFolder
from simulations.benchmarks import icu
from simulations.preparation import make_sites
from simulations.public_populations import icu_population
from simulations.real_schemas import icu_schema
from simulations.scenario import load_scenario

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ehr_physionet2012_set_a"


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/ehr_physionet2012_set_a")
def test_a_bare_cohort_is_scored_beside_real_and_public_training(tmp_path: Path) -> None:
    schema = icu_schema()
    cohort = dataclasses.replace(icu_population(schema, 120, 3), ids=synthetic_ids(120))
    write_cohort(cohort, schema, tmp_path / "cohort")
    result = icu.run(tmp_path / "cohort", DATA)
    rows = {row.measure: row for row in result.rows}
    real = rows[f"mortality AUC on real held-out stays, {icu.MEMBERS} (logistic regression)"]
    ours = rows[f"mortality AUC on real held-out stays, {icu.SYNTHETIC} (logistic regression)"]
    # what summaries of real stays reach on this set, and a cohort of textbook patients must not
    assert real.value is not None
    assert 0.79 < real.value < 0.88
    assert ours.value is not None
    assert 0.5 < ours.value < real.value
    assert ours.interval is not None
    assert ours.interval[0] < ours.value < ours.interval[1]
    assert set(ours.peers) == {icu.MEMBERS, icu.AS_MANY, icu.PUBLIC, "chance"}
    assert any("open split" in measure for measure in rows)
    assert all(row.bar is None for row in result.rows)


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/ehr_physionet2012_set_a")
def test_a_run_is_tested_on_the_stays_that_its_own_sites_held_out(tmp_path: Path) -> None:
    folder, schema = RunFolder(tmp_path / "run"), icu_schema()
    scenario = load_scenario("icu", (f'hospitals.data="{DATA}"',))
    make_sites(scenario, schema, folder.hospitals)
    for site in folder.hospitals.iterdir():
        make_keys(site)
    folder.sites_dir.write_text(str(folder.hospitals), encoding="utf-8")
    real = icu.read_real(schema, DATA, folder)
    assert real.sites_own
    assert len(real.held_out) == 800
    assert len(real.members) == 3200
    assert not set(real.members.ids) & set(real.held_out.ids)
    assert set(real.held_out.ids) != set(icu.read_real(schema, DATA, None).held_out.ids)
    # the study's own ledgers were not touched
    assert not list(folder.hospitals.glob("*/ledger*"))


def test_a_folder_without_a_cohort_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no synthetic cohort"):
        icu.run(tmp_path, DATA)
