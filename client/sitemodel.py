"""The study's model at a site: the public model from its delivered parts, moved by the arrays of a task."""

from __future__ import annotations

from pathlib import Path

from client.parts import PartStore
from medgen_models.assembly import StudyModel, assemble
from medgen_models.public_model import CARD_FILE, PublicModel
from medgen_models.schema import Schema
from privacy.boundary.messages import RoundTask
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused


def public_model(folder: Path, plan: StudyPlan) -> PublicModel:
    """The public model that the approved plan names, from the site's own copy of its parts.

    Raises:
        Refused: ``PARTS_MISSING`` if a part is not here; ``BAD_PLAN`` if the parts are no model of the plan's schema.
    """
    store = PartStore(folder)
    card = store.join(part.digest for part in plan.public_model if part.name == CARD_FILE)
    weights = store.join(part.digest for part in plan.public_model if part.name != CARD_FILE)
    try:
        return PublicModel.from_bytes(weights, card, Schema.model_validate(plan.study_schema))
    except ValueError as error:
        raise Refused("BAD_PLAN", f"the public model: {error}") from error


def model_of(folder: Path, plan: StudyPlan, task: RoundTask) -> StudyModel:
    """The model with the weights that a task brought.

    Raises:
        Refused: as :func:`public_model`; ``BAD_MESSAGE`` if the arrays do not fit the public model.
    """
    public = public_model(folder, plan)
    try:
        return assemble(public, task.arrays, plan.training.group, plan.training.lora_rank)
    except ValueError as error:
        raise Refused("BAD_MESSAGE", f"the arrays of the task: {error}") from error
