"""The study's model at a site: the public model from its delivered parts, moved by the arrays of a task."""

from __future__ import annotations

from pathlib import Path

from client.memory import Memory
from client.parts import PartStore
from medgen_models.assembly import StudyModel, assemble
from medgen_models.public_model import CARD_FILE, WEIGHTS_FILE, PublicModel
from medgen_models.schema import Schema
from privacy.boundary.messages import RoundTask
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.chain import canonical


def public_model(folder: Path, plan: StudyPlan, memory: Memory | None = None) -> PublicModel:
    """The public model that the approved plan names, from the site's own copy of its parts.

    Args:
        folder: the site folder.
        plan: names the parts by digest, so a model that was parsed from the same digests is the same model.
        memory: where such a model may lie.

    Raises:
        Refused: ``PARTS_MISSING`` if a part is not here; ``BAD_PLAN`` if the parts are no model of the plan's schema.
    """
    key = canonical([plan.study_schema, [[part.name, part.digest] for part in plan.public_model]])
    return (memory or Memory()).public_model.get(key, lambda: _parsed(folder, plan))


def _parsed(folder: Path, plan: StudyPlan) -> PublicModel:
    store = PartStore(folder)
    card = store.join(part.digest for part in plan.public_model if part.name == CARD_FILE)
    weights = store.join(part.digest for part in plan.public_model if part.name.startswith(WEIGHTS_FILE))
    try:
        return PublicModel.from_bytes(weights, card, Schema.model_validate(plan.study_schema))
    except ValueError as error:
        raise Refused("BAD_PLAN", f"the public model: {error}") from error


def model_of(folder: Path, plan: StudyPlan, task: RoundTask, memory: Memory | None = None) -> StudyModel:
    """The model with the weights that a task brought.

    Raises:
        Refused: as :func:`public_model`; ``BAD_MESSAGE`` if the arrays do not fit the public model.
    """
    public = public_model(folder, plan, memory)
    try:
        return assemble(public, task.arrays, plan.training.group, plan.training.lora_rank)
    except ValueError as error:
        raise Refused("BAD_MESSAGE", f"the arrays of the task: {error}") from error
