"""Before a plan is written: what could never be carried is refused while it costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medgen_models.public_model import PublicModel
from server import preparation
from server.study import StudyConfig


def test_a_study_whose_weights_do_not_fit_into_one_message_is_refused_before_it_is_planned(
    study_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PublicModel.load(Path(study_base.folder.public_pointer.read_text(encoding="utf-8")), study_base.schema)
    everything = StudyConfig.model_validate({"name": "large", "core": {"group": "all"}})
    adapters = StudyConfig.model_validate({"name": "small", "core": {"group": "lora", "lora_rank": 1}})
    numbers = sum(value.numel() for value in model.core.parameters())
    preparation.check_message(everything, model)
    monkeypatch.setattr(preparation, "MAX_HEADER_BYTES", 0)
    monkeypatch.setattr(preparation, "MAX_BYTES", 4 * numbers)
    preparation.check_message(everything, model)
    monkeypatch.setattr(preparation, "MAX_BYTES", 4 * numbers - 1)
    with pytest.raises(ValueError, match=r"study\.core\.group = 'all'.*train 'attention' or 'lora'"):
        preparation.check_message(everything, model)
    preparation.check_message(adapters, model)
