"""Everything before the first round, through the functions that a real consortium uses: sites, public model, plan, approvals."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import tomli_w
import torch
from safetensors.numpy import save

from client import enrolment, policy
from medgen_models.batches import batch_to_bytes
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.prototypes import levels_of
from medgen_models.public_model import CARD_FILE, WEIGHTS_FILE, PublicModel
from medgen_models.schema import PatientBatch, Schema
from medgen_models.table_prior import choose_pairs, default_queries, encode_rows, public_positions
from privacy.boundary.plan import Part
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import sign_plan
from privacy.identity import IdentityKey, SecretKey
from server.checkpoints import write_atomically
from server.enrolment import roster_of
from server.events import EventLog
from server.planning import PublicFacts, build_plan
from server.runfolder import RunFolder
from server.session import COORDINATOR_KEY, split_parts
from server.warmup import PublicPatients
from simulations import hospitals, phantoms, real_schemas
from simulations.scenario import Scenario

STEP_EVERY = 10
LIFETIME_SHARE = 1.5  # a second study like the first does not fit


def write_study(folder: RunFolder, scenario: Scenario, schema: Schema) -> None:
    """Write study, schema and a fresh coordinator key into the run folder."""
    write_atomically(folder.path / "scenario.json", scenario.model_dump_json(indent=2, by_alias=True).encode())
    write_atomically(folder.study, scenario.study.model_dump_json(indent=2).encode())
    write_atomically(folder.schema, schema.model_dump_json(indent=2).encode())
    key = IdentityKey.generate()
    key.save(folder.coordinator / COORDINATOR_KEY)
    write_atomically(folder.coordinator / "identity.pub", key.public.hex().encode() + b"\n")


def make_sites(scenario: Scenario, schema: Schema, sites_dir: Path) -> None:
    """Make the site folders: generated hospitals, or folders that point at a real data set where it lies.

    Raises:
        ValueError: the data set is not there.
    """
    config = scenario.hospitals
    rules = site_policy(scenario)
    match config.preset:
        case "demo" | "two-owners":
            specs = hospitals.demo_hospitals() if config.preset == "demo" else hospitals.two_owner_hospitals()
            hospitals.make_hospitals(sites_dir, specs, schema, config.seed, share=config.share, policy=rules)
        case "petmr" | "icu":
            data = Path(config.data)
            if not data.is_dir():
                raise ValueError(
                    f"hospitals.data: no folder {config.data!r} seen from here; say where the data set lies"
                )
            make = real_schemas.petmr_sites if config.preset == "petmr" else real_schemas.icu_sites
            for name, tables in make(data).items():
                _write_site(sites_dir / name, tables, rules)


def public_model(
    scenario: Scenario, schema: Schema, cache: Path, folder: RunFolder, events: EventLog
) -> tuple[PublicModel, PatientBatch]:
    """The public model of a scenario and its public patients; trained once per content and reused."""
    trained_on, reference = scenario.population(schema)
    config = PretrainConfig(
        steps=scenario.public.steps,
        batch=scenario.public.batch,
        vae_steps=scenario.public.codec_steps,
        lora_rank=scenario.study.core.lora_rank,
    )
    recipe = [schema.digest(), _digest_of(trained_on, schema), repr(config), scenario.public.seed, torch.__version__]
    place = cache / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:24]
    if not (place / "parts" / CARD_FILE).is_file():
        started = time.monotonic()

        def on_step(step: int, loss: float) -> None:
            if step % STEP_EVERY == 0 or step == config.steps:
                events.write("public-step", step=step, steps=config.steps, loss=loss)

        known = phantoms.biomarkers(schema, trained_on) if scenario.public.population == "phantoms" else None
        model = pretrain(schema, trained_on, config, scenario.public.seed, on_step, biomarkers=known)
        model.save(place)
        weights = (place / WEIGHTS_FILE).read_bytes()
        for number, (_, piece) in enumerate(split_parts(weights)):
            write_atomically(place / "parts" / f"{WEIGHTS_FILE}.{number:03d}", piece)
        write_atomically(place / "parts" / CARD_FILE, (place / CARD_FILE).read_bytes())
        events.write("public-model", reused=False, seconds=round(time.monotonic() - started, 1))
    else:
        events.write("public-model", reused=True, seconds=0.0)
    write_atomically(folder.public_pointer, str(place.resolve()).encode())
    write_atomically(folder.reference, batch_to_bytes(reference, schema))
    return PublicModel.load(place, schema), trained_on


def plan_and_approve(
    scenario: Scenario,
    schema: Schema,
    model: PublicModel,
    public: PatientBatch,
    sites_dir: Path,
    folder: RunFolder,
    events: EventLog,
) -> None:
    """Enrol every site, make and sign the plan, and have each site's policy decide on it.

    A site whose policy refuses is named with its code and sits out; the plan file is written last, so that an interrupted
    preparation starts again from the beginning.
    """
    key = IdentityKey.load(folder.coordinator / COORDINATOR_KEY)
    sites = [path for path in sorted(sites_dir.iterdir()) if (path / "site.toml").is_file()]
    for site in sites:
        if scenario.study.execution.deterministic:
            _fix_split(site)
        enrolment.make_keys(site)
        pin = site / "keys" / "coordinator.pub"
        pin.unlink(missing_ok=True)  # a simulated hospital meets a new coordinator with every run
        enrolment.pin_coordinator(site, key.public)
    roster = roster_of(enrolment.request(site) for site in sites)
    plan = build_plan(scenario.study, schema, _facts(scenario, schema, model, public, folder), roster, key.public)
    proposal = sign_plan(plan, key)
    for site in sites:
        try:
            policy.propose(site, proposal.plan, proposal.signature)
            policy.approve(site, proposal.plan, proposal.signature, by="simulated data officer")
            events.write("approved", site=site.name)
        except Refused as refusal:
            events.write("not-approved", site=site.name, code=refusal.code)
    write_atomically(folder.plan_signature, proposal.signature.hex().encode())
    write_atomically(folder.plan, proposal.plan)


def _fix_split(site: Path) -> None:
    """Under the test switch, the same patients are held out in every run; a real site's key comes from its system."""
    path = site / "keys" / "split.key"
    if not path.exists():
        SecretKey(hashlib.sha256(b"test split " + site.name.encode()).digest()).save(path)


def _facts(
    scenario: Scenario, schema: Schema, model: PublicModel, public: PatientBatch, folder: RunFolder
) -> PublicFacts:
    """What planning takes from the public model and population."""
    study = scenario.study
    place = [
        Part(name=path.name, digest=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
        for path in sorted((Path(folder.public_pointer.read_text(encoding="utf-8")) / "parts").iterdir())
    ]
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
    )


def site_policy(scenario: Scenario) -> hospitals.SitePolicy:
    """What the simulated hospitals admit: this study once, and the test switch only where the study uses it."""
    epsilon = scenario.study.privacy.epsilon
    return hospitals.SitePolicy(
        plan_epsilon=epsilon,
        lifetime_epsilon=LIFETIME_SHARE * epsilon,
        uncovered_queries=scenario.study.audit.cap,
        deterministic_noise=scenario.study.execution.deterministic,
    )


def _write_site(site: Path, tables: dict[str, dict[str, object]], rules: hospitals.SitePolicy) -> None:
    """A site folder whose data lie elsewhere and are read in place."""
    site.mkdir(parents=True)
    ceiling = {
        "plan_epsilon": rules.plan_epsilon,
        "lifetime_epsilon": rules.lifetime_epsilon,
        "delta": rules.delta,
        "uncovered_queries": rules.uncovered_queries,
    }
    switches = {"min_contributors": rules.min_contributors, "deterministic_noise": rules.deterministic_noise}
    body = tomli_w.dumps({**tables, "ceiling": ceiling, "policy": switches, "speed": {"threads": 1}})
    (site / "site.toml").write_text(body, encoding="utf-8")


def _digest_of(batch: PatientBatch, schema: Schema) -> str:
    return hashlib.sha256(batch_to_bytes(batch, schema)).hexdigest()
