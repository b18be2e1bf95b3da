"""Everything before the first round, through the functions that a real consortium uses: sites, public model, plan, approvals."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import tomli_w
import torch

from client import enrolment, policy
from medgen_models.batches import batch_to_bytes
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.public_model import CARD_FILE, PublicModel
from medgen_models.schema import PatientBatch, Schema
from privacy.boundary.refusals import Refused
from privacy.identity import IdentityKey, SecretKey
from server import preparation
from server.checkpoints import write_atomically
from server.enrolment import roster_of
from server.events import EventLog
from server.preparation import write_public
from server.runfolder import RunFolder
from simulations import hospitals, phantoms, real_schemas
from simulations.scenario import Scenario

STEP_EVERY = 10
LIFETIME_SHARE = 1.5  # a second study like the first does not fit


def write_study(folder: RunFolder, scenario: Scenario, schema: Schema) -> None:
    """Write study, schema and a fresh coordinator key into the run folder."""
    write_atomically(folder.path / "scenario.json", scenario.model_dump_json(indent=2, by_alias=True).encode())
    preparation.write_study(folder, scenario.study, schema, IdentityKey.generate())


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
        write_public(model, place)
        events.write("public-model", reused=False, seconds=round(time.monotonic() - started, 1))
    else:
        events.write("public-model", reused=True, seconds=0.0)
    preparation.use_public_model(folder, place, reference, schema)
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
    public_key = folder.signing_key().public
    sites = [path for path in sorted(sites_dir.iterdir()) if (path / "site.toml").is_file()]
    for site in sites:
        if scenario.study.execution.deterministic:
            _fix_split(site)
        enrolment.make_keys(site)
        pin = site / "keys" / "coordinator.pub"
        pin.unlink(missing_ok=True)  # a simulated hospital meets a new coordinator with every run
        enrolment.pin_coordinator(site, public_key)
    roster = roster_of(enrolment.request(site) for site in sites)
    draft = preparation.make_plan(scenario.study, schema, model, public, roster, folder)
    proposal = preparation.sign(folder, draft)
    for site in sites:
        try:
            policy.propose(site, proposal.plan, proposal.signature)
            policy.approve(site, proposal.plan, proposal.signature, by="simulated data officer")
            events.write("approved", site=site.name)
        except Refused as refusal:
            events.write("not-approved", site=site.name, code=refusal.code)
    preparation.write_plan(folder, proposal)


def _fix_split(site: Path) -> None:
    """Under the test switch, the same patients are held out in every run; a real site's key comes from its system."""
    path = site / "keys" / "split.key"
    if not path.exists():
        SecretKey(hashlib.sha256(b"test split " + site.name.encode()).digest()).save(path)


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
