"""The trained model as files that others can open: safetensors and a model card that says where it came from.

Layout of the folder: ``model.safetensors`` and ``card.json`` as :meth:`medgen_models.pretrain.PublicModel.load` reads them
(codecs included), and ``MODEL_CARD.md`` for people.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from medgen_models.adapters import merge_lora
from medgen_models.assembly import StudyModel

README = """\
# Model card: {name}

- What it is: codecs and a token-set diffusion core ({parameters} weights) over {slots}.
- Trained on: {patients} public patients; then at hospitals under plan `{plan}`.
- Privacy: {privacy}
- Sampling from it is post-processing of the training's guarantee. An output that was conditioned on a *real* patient is not
  covered by that guarantee and must not leave the place where the patient's data are.
- Limits: small resolution; not for clinical use; synthetic images may look plausible and be wrong.
- Integrity: weights SHA-256 `{digest}`; the bundle's signed manifest covers every file here.
"""


def save_release_model(model: StudyModel, folder: Path, plan_hash: str, private: bool) -> None:
    """Write the model with its adapters merged in, and its cards.

    Args:
        model: the final model of a study.
        folder: made if missing.
        plan_hash: SHA-256 of the plan that it was trained under.
        private: whether a finite epsilon with secret noise stands behind it.
    """
    core = merge_lora(model.core) if model.core.config.lora_rank else model.core
    provenance = {"plan_sha256": plan_hash, "private": private, "trained_group": model.which}
    final = dataclasses.replace(
        model.public, bank=model.bank, core=core, card={**model.public.card, "study": provenance}
    )
    final.save(folder)
    text = README.format(
        name=model.schema.name,
        parameters=sum(value.numel() for value in core.parameters()),
        slots=", ".join(model.layout.slots),
        patients=model.public.card.get("patients", "unknown"),
        plan=plan_hash[:16],
        privacy="patient-level differential privacy; epsilon and delta stand in the report."
        if private
        else "NOT PRIVATE.",
        digest=final.digest()[:16],
    )
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")
