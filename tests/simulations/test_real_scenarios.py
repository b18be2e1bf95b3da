"""Both real-data studies run to report and verified bundle, at two short rounds; the data are read where they lie."""

import datetime
import json
from pathlib import Path

import pytest

from server.release.verifying import Trust, verify
from server.runfolder import RunFolder
from simulations.simulate import Request, run_scenario

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
SHORT = (
    "public.steps=25", "public.batch=16", "public.patients=120", "public.reference=60",
    "study.core.rounds=2", "study.core.steps=3", "study.release.patients=24", "study.release.steps=4",
    'study.release.formats=["dicom"]',
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "folder", "private"), [("petmr", "petmr_sts_bids", False), ("icu", "ehr_physionet2012_set_a", True)]
)
def test_a_real_study_ends_in_a_report_and_a_bundle_that_verifies(
    name: str, folder: str, private: bool, tmp_path: Path
) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"../shared/data/{folder} is not here")
    request = Request(
        scenario=name,
        backend="inprocess",
        resume=False,
        keep_hospitals=True,
        hospitals=None,
        runs=tmp_path,
        overrides=(*SHORT, f'hospitals.data="{DATA / folder}"'),
    )
    assert run_scenario(request) == 0
    run = RunFolder(next(tmp_path.glob(f"{name}-*")))
    report = json.loads(run.report_json.read_text(encoding="utf-8"))
    assert report["verdict"]["private"] is private
    assert report["verdict"]["decision"] in ("HOLD", "BLOCK")  # evidence is missing by design: never RELEASE
    stages = {stage["stage"]: stage for stage in report["evidence"]["sites"][0]["stages"]}
    assert stages["core"]["answered"] == 2
    if report["verdict"]["decision"] == "HOLD":
        key = bytes.fromhex((run.coordinator / "identity.pub").read_text().strip())
        trust = Trust(keys={key}, today=datetime.date(2026, 11, 24))
        assert verify(run.bundle, trust).whole
    if name == "petmr":
        assert any("siemens" in text for text in report["evidence"]["deviations"])  # an empty held-out is named


@pytest.mark.slow
@pytest.mark.realdata
def test_the_mechanics_of_a_finite_epsilon_on_few_patients(tmp_path: Path) -> None:
    folder = DATA / "petmr_sts_bids"
    if not folder.is_dir():
        pytest.skip("../shared/data/petmr_sts_bids is not here")
    overrides = (*SHORT, f'hospitals.data="{folder}"', "study.privacy.epsilon=8.0", "study.core.rounds=1")
    request = Request("petmr", "inprocess", False, True, None, tmp_path, overrides)
    assert run_scenario(request) == 0
    run = RunFolder(next(tmp_path.glob("petmr-*")))
    report = json.loads(run.report_json.read_text(encoding="utf-8"))
    assert report["verdict"]["private"] is True
    assert report["evidence"]["promise"]["epsilon"] <= 8.0
    assert all(site["epsilon_spent"] < 8.0 for site in report["evidence"]["sites"])
