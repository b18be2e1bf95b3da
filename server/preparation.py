"""Everything at the coordinator before the first round: a run folder with study, schema, public facts and a signed plan.

The same functions prepare a study between hospitals and a simulated one. The plan file is written last, so that an
interrupted preparation leaves no plan and may be run again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import save

from medgen_models.assembly import assemble
from medgen_models.batches import batch_from_bytes, batch_to_bytes
from medgen_models.prototypes import levels_of
from medgen_models.public_model import CARD_FILE, WEIGHTS_FILE, PublicModel
from medgen_models.schema import PatientBatch, Schema
from medgen_models.table_prior import choose_pairs, default_queries, encode_rows, public_positions
from privacy.audit.population import POPULATION_FILE
from privacy.boundary.messages import MAX_BYTES, MAX_HEADER_BYTES, PlanProposal
from privacy.boundary.plan import Part, RosterEntry, StudyPlan
from privacy.boundary.signing import sign_plan
from privacy.identity import IdentityKey
from server.checkpoints import write_atomically
from server.planning import PublicFacts, build_plan
from server.planting import public_people
from server.runfolder import RunFolder
from server.session import split_parts
from server.study import StudyConfig
from server.warmup import PublicPatients

PARTS = "parts"
PUBLIC_FILE, REFERENCE_FILE = "public.safetensors", "reference.safetensors"
"""Public patients beside a public model: those that it was trained on, and others."""


def write_study(folder: RunFolder, study: StudyConfig, schema: Schema, key: IdentityKey | Path) -> None:
    """Write study and schema into a run folder, and who signs: a key of this run alone, or the place of the coordinator's."""
    write_atomically(folder.study, study.model_dump_json(indent=2).encode())
    write_atomically(folder.schema, schema.model_dump_json(indent=2).encode())
    if isinstance(key, Path):
        write_atomically(folder.key_pointer, str(key.resolve()).encode())
    else:
        key.save(folder.own_key)
    write_atomically(folder.coordinator / "identity.pub", folder.signing_key().public.hex().encode() + b"\n")


def write_public(model: PublicModel, place: Path) -> None:
    """Save a public model and cut it into the parts that sites fetch; the card is written last."""
    model.save(place)
    write_parts(place)


def write_parts(model: Path) -> None:
    """Cut a saved public model's files into pieces that sites fetch one by one, beside the model; the card last."""
    place = model / PARTS
    for number, (_, piece) in enumerate(split_parts((model / WEIGHTS_FILE).read_bytes())):
        write_atomically(place / f"{WEIGHTS_FILE}.{number:03d}", piece)
    write_atomically(place / CARD_FILE, (model / CARD_FILE).read_bytes())


def use_public_model(folder: RunFolder, model: Path, reference: PatientBatch, schema: Schema) -> None:
    """Name the public model of a run, and store the public patients that fidelity is measured against."""
    write_atomically(folder.public_pointer, str(model.resolve()).encode())
    write_atomically(folder.reference, batch_to_bytes(reference, schema))


def public_facts(
    study: StudyConfig, schema: Schema, model: PublicModel, public: PatientBatch, folder: RunFolder
) -> PublicFacts:
    """What planning takes from the public model and the public patients that it was trained on; stages find their part of
    it in the run folder.
    """
    place = [
        Part(name=path.name, digest=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
        for path in sorted((Path(folder.public_pointer.read_text(encoding="utf-8")) / PARTS).iterdir())
    ]
    people = public_people(model.bank, batch_from_bytes(folder.reference.read_bytes(), schema))
    attacked = study.audit.enabled and people.population.large_enough
    if attacked:
        body = people.population.to_bytes()
        write_atomically(folder.population, body)
        place.append(Part(name=POPULATION_FILE, digest=hashlib.sha256(body).hexdigest(), size=len(body)))
    rows = encode_rows(schema, public, study.table.bins) if schema.table() is not None else None
    marginals: tuple[tuple[int, ...], ...] = ()
    if rows is not None:
        wanted = len(rows.domain) if study.table.pairs is None else study.table.pairs
        pairs = choose_pairs(rows.codes_BC, rows.domain, wanted)
        positions = public_positions(schema, public, study.table.bins)
        write_atomically(folder.public_rows, save({"codes": rows.codes_BC, "positions": positions}))
        marginals = tuple(tuple(query) for query in default_queries(schema, rows.domain, pairs))
    if study.prototypes.enabled:
        levels = levels_of(schema, public, study.prototypes.factor)
        write_atomically(folder.public_patients, PublicPatients(model.bank.encode(public), levels).to_bytes())
    return PublicFacts(
        parts=tuple(place),
        core_clip=model.clip_norms[study.core.group],
        codec_clip=model.clip_norms.get("codec", 1.0),
        recentre_bound=study.recentre.bound or model.recentre_norm,
        marginals=marginals,
        population=attacked,
    )


def check_message(study: StudyConfig, model: PublicModel) -> None:
    """Refuse a study whose weights would not fit into one message, before anybody is asked to approve it.

    Raises:
        ValueError: they do not.
    """
    start = assemble(model, {}, study.core.group, study.core.lora_rank)
    trained = [*start.core_weights().values(), *start.codec_weights(study.codec.slots).values()]
    size = 4 * sum(value.numel() for value in trained)
    if size > MAX_BYTES - MAX_HEADER_BYTES:
        raise ValueError(
            f"study.core.group = {study.core.group!r}: a round's weights are {size / 2**20:.1f} MiB, and a message holds "
            f"{(MAX_BYTES - MAX_HEADER_BYTES) / 2**20:.0f}; train 'attention' or 'lora', fewer codecs, or a smaller core"
        )


def make_plan(
    study: StudyConfig,
    schema: Schema,
    model: PublicModel,
    public: PatientBatch,
    roster: Mapping[str, RosterEntry],
    folder: RunFolder,
) -> StudyPlan:
    """The plan of a study over ``roster``; nothing of it is written.

    Raises:
        ValueError: as :func:`server.planning.build_plan`, or the trained weights do not fit into one message.
    """
    check_message(study, model)
    facts = public_facts(study, schema, model, public, folder)
    return build_plan(study, schema, facts, roster, folder.signing_key().public)


def sign(folder: RunFolder, plan: StudyPlan) -> PlanProposal:
    """The plan with the coordinator's signature; nothing of it is written."""
    return sign_plan(plan, folder.signing_key())


def write_plan(folder: RunFolder, proposal: PlanProposal) -> None:
    """Store a signed plan; from now on the run can be started."""
    write_atomically(folder.plan_signature, proposal.signature.hex().encode())
    write_atomically(folder.plan, proposal.plan)
