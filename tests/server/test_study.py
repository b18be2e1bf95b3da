"""The study file: unknown keys and impossible values are refused; its keys are frozen."""

import math

import pytest
from pydantic import ValidationError

from server.study import PrivacyConfig, StudyConfig

KEYS = {
    "name": None,
    "sites": None,
    "seed": None,
    "privacy": {"epsilon", "delta"},
    "codec": {"slots", "rounds", "steps", "spare_rounds", "sampling_rate", "learning_rate", "clip", "draws", "average"},
    "statistics": {"enabled", "sigma", "bins", "spare_rounds"},
    "table": {"prior", "bins", "sigma", "pairs", "spare_rounds"},
    "recentre": {"enabled", "sigma", "bound", "spare_rounds"},
    "prototypes": {"enabled", "factor", "sigma", "bound", "spare_rounds", "steps", "learning_rate"},
    "core": {
        "group", "lora_rank", "rounds", "steps", "spare_rounds", "sampling_rate", "learning_rate", "clip", "draws", "average",
    },
    "release": {"patients", "steps", "guidance", "formats"},
    "audit": {"enabled", "draws", "pairs", "cap", "canaries", "groups"},
    "policy": {
        "version", "confidence", "blind_auc_block", "planted_tpr", "planted_fpr", "epsilon_hold", "epsilon_block",
        "membership_fpr", "membership_tpr_block", "membership_auc_block", "ceiling_share", "level_block", "level_hold",
        "risk_point_block", "risk_upper_block", "risk_upper_hold", "outlier_fpr", "outlier_tpr_block", "group_judged",
        "coherence_floor", "coherence_hold", "attempts", "uncovered_allowed", "required_signatures",
    },
    "execution": {"deadline_s", "deterministic"},
}  # fmt: skip


def test_the_keys_of_a_study_file_are_frozen() -> None:
    study = StudyConfig(name="x")
    found = {
        key: set(type(getattr(study, key)).model_fields) if hasattr(getattr(study, key), "model_fields_set") else None
        for key in StudyConfig.model_fields
    }
    assert found == KEYS


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Has Spaces"},
        {"name": "x", "privacy": {"epsilon": 0}},
        {"name": "x", "privacy": {"epsilon": -1}},
        {"name": "x", "privacy": {"epsilon": math.nan}},
        {"name": "x", "privacy": {"delta": 1e-3}},
        {"name": "x", "core": {"sampling_rate": 0}},
        {"name": "x", "core": {"group": "everything"}},
        {"name": "x", "epsilon": 8},
    ],
)
def test_impossible_values_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StudyConfig.model_validate(change)


def test_infinite_epsilon_is_not_private() -> None:
    assert not PrivacyConfig(epsilon=math.inf).private
    assert PrivacyConfig().private
