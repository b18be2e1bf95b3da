"""The world of ``medgen bench tasks``: phantoms, three hospitals, and one set of weights that every row is measured on.

The public model is trained on public phantoms. Three hospitals whose patients, scanners and shares of records differ go
on with it together: noised marginals, recentring and private steps, by the functions of a real study (see
:mod:`simulations.benchmarks.frontier_cell`), once without noise and once at epsilon 8. Two cells of pathology and MRI
sequence occur in no training set, public or private, and in all test sets.

Everything is made once and kept in a folder; the same seed and sizes give the same patients, and the same public model.
Seeds 0 to 2 are what the benchmark reports; settings were chosen on seeds from 10 on. Shape legend: B patients.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from medgen_models.assembly import StudyModel, assemble
from medgen_models.core import CoreConfig
from medgen_models.flow import FlowConfig
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.public_model import PublicModel
from medgen_models.schema import PatientBatch, Schema
from medgen_models.table_prior import (
    all_queries,
    choose_pairs,
    count_tables,
    default_queries,
    encode_rows,
    fit_pairs,
    public_positions,
)
from medgen_models.tokens import TokenBatch
from privacy.noise import system_noise
from server.checkpoints import write_atomically
from server.release.cohort import rows_from_tree
from simulations import phantoms
from simulations.benchmarks import frontier_world
from simulations.benchmarks.frontier_cell import RANK, Cell, Site, marginals, plan_of, recentre, train
from simulations.benchmarks.task_figures import Privacy
from simulations.phantom_population import Profile

VariantName = Literal["full", "no hinge", "no label", "no biomarker", "no ehr", "no reference", "no text", "no fusion"]
VARIANTS: tuple[VariantName, ...] = get_args(VariantName)
HELD_CELLS: tuple[tuple[str, str], ...] = (("dementia", "T1ce"), ("sclerosis", "PD"))
"""(pathology, sequence) that nobody trains on."""
HOSPITALS: tuple[Profile, ...] = (
    Profile(age_years=64.0, severity_shift=0.3, pathology_mix=(0.24, 0.30, 0.22, 0.24), contrast=0.9, mri_gain=0.97),
    Profile(age_years=70.0, severity_shift=0.2, pathology_mix=(0.32, 0.10, 0.12, 0.46), pet_gain=0.85, bias_field=0.1),
    Profile(age_years=54.0, severity_shift=-0.1, pathology_mix=(0.22, 0.34, 0.34, 0.10), cxr_contrast=1.2),
)
"""Who comes to each hospital, and its scanners; the public population is ``Profile()``."""
_PUBLIC, _TEST, _MEMBERS = 1_000_000, 2_000_000, 3_000_000
_AT_ONCE = 400


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is; a change of any field is another benchmark.

    Attributes:
        public, test: public patients who are trained on, and others who are not.
        members, held_out: patients of each hospital who train, and who never do.
        pretrain_steps, batch: public training steps and patients in each.
        rounds, steps, spare_rounds, sampling_rate, draws, learning_rate: of the federated training.
        width, layers: of the core.
        bins, pairs: of the table's marginals.
        synthetic, sampler_steps: patients drawn where a row draws a cohort, and steps of the sampler.
    """

    public: int = 800
    test: int = 400
    members: int = 1000
    held_out: int = 140
    pretrain_steps: int = 700
    batch: int = 32
    rounds: int = 4
    steps: int = 8
    spare_rounds: int = 1
    sampling_rate: float = 0.1
    draws: int = 2
    learning_rate: float = 1e-3
    width: int = 96
    layers: int = 4
    bins: int = 8
    pairs: int = 22
    synthetic: int = 400
    sampler_steps: int = 20

    @staticmethod
    def tiny() -> Sizes:
        """For tests: seconds, and figures that mean nothing."""
        return Sizes(
            public=48,
            test=40,
            members=40,
            held_out=16,
            pretrain_steps=6,
            batch=8,
            rounds=1,
            steps=2,
            spare_rounds=0,
            sampling_rate=0.2,
            draws=1,
            width=16,
            layers=1,
            pairs=6,
            synthetic=24,
            sampler_steps=3,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Patients of one seed, with what lies behind them.

    Attributes:
        schema: of the demo study.
        public, public_truth: what the public model and every baseline is trained on.
        public_test, public_test_truth: the same population, never trained on, every cell among them.
        hospital_test, hospital_test_truth: held-out patients of all hospitals, in the hospitals' order.
    """

    schema: Schema
    public: PatientBatch
    public_truth: phantoms.Phantoms
    public_test: PatientBatch
    public_test_truth: phantoms.Phantoms
    hospital_test: PatientBatch
    hospital_test_truth: tuple[phantoms.Phantoms, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one call of a row works, and what it is called for.

    Attributes:
        folder: everything that is made is kept here, and rows may keep more.
        sizes, seed, privacy: of the call.
        data: folder of the real data sets, None where there is none.
    """

    folder: Path
    sizes: Sizes
    seed: int
    privacy: Privacy
    data: Path | None = None

    def world(self) -> World:
        """The patients of the seed."""
        return world(self.sizes, self.seed)

    def model(self) -> StudyModel:
        """The one set of weights at this privacy."""
        return model(self.folder, self.sizes, self.seed, self.privacy)

    def variant(self, name: VariantName) -> PublicModel:
        """The public model trained with one thing left out."""
        return variant(self.folder, self.sizes, self.seed, name)

    def rows(self, patients: int, seed: int) -> PatientBatch:
        """Synthetic rows as a release draws them, from the table prior at this privacy; images are yet to be drawn."""
        return rows(self.folder, self.sizes, self.seed, self.privacy, patients, seed)

    def test(self) -> PatientBatch:
        """Patients whom the model at this privacy never saw: public ones for the public model, else the hospitals'."""
        patients = self.world()
        return patients.public_test if self.privacy == "public" else patients.hospital_test


def world(sizes: Sizes, seed: int) -> World:
    """The patients of ``seed``; deterministic, and quick enough to be made anew by every call."""
    schema = phantoms.demo_schema()
    public = phantoms.make_patients(sizes.public, _PUBLIC + seed, _without_held(Profile()))
    test = phantoms.make_patients(sizes.test, _TEST + 10 * seed)
    left = tuple(
        phantoms.make_patients(sizes.held_out, _TEST + 10 * seed + 1 + k, profile)
        for k, profile in enumerate(HOSPITALS)
    )
    return World(
        schema=schema,
        public=phantoms.to_batch(schema, public),
        public_truth=public,
        public_test=phantoms.to_batch(schema, test),
        public_test_truth=test,
        hospital_test=PatientBatch.concat([phantoms.to_batch(schema, each) for each in left]),
        hospital_test_truth=left,
    )


def variant(folder: Path, sizes: Sizes, seed: int, name: VariantName) -> PublicModel:
    """The public model of a seed with one thing left out, from ``folder`` or made now.

    ``full`` is what the hospitals start from. The others are trained on the same patients for the same steps: without a
    term of the objective, without the instances of a kind, or with a mean over tokens in the place of attention.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r}: unknown; known are {', '.join(VARIANTS)}")
    schema = phantoms.demo_schema()
    place = folder / f"{name.replace(' ', '-')}-{seed}"
    if not (place / "card.json").is_file():
        public = phantoms.make_patients(sizes.public, _PUBLIC + seed, _without_held(Profile()))
        batch = without(schema, phantoms.to_batch(schema, public), name)
        known = phantoms.biomarkers(schema, batch)
        pretrain(schema, batch, pretrain_config(sizes, name), seed, biomarkers=known).save(place)
    return PublicModel.load(place, schema)


def pretrain_config(sizes: Sizes, name: VariantName = "full") -> PretrainConfig:
    """How a variant is trained."""
    fusion: Literal["attention", "mean"] = "mean" if name == "no fusion" else "attention"
    core = CoreConfig(width=sizes.width, layers=sizes.layers, heads=4, fusion=fusion)
    usual, flow = PretrainConfig(), FlowConfig()
    return PretrainConfig(
        steps=sizes.pretrain_steps,
        batch=sizes.batch,
        core=core,
        hinge=0.0 if name == "no hinge" else usual.hinge,
        flow=dataclasses.replace(
            flow,
            label=0.0 if name == "no label" else flow.label,
            biomarker=0.0 if name == "no biomarker" else flow.biomarker,
        ),
    )


def without(schema: Schema, batch: PatientBatch, name: VariantName) -> PatientBatch:
    """``batch`` with the instances absent that a variant is trained, and has to work, without."""
    gone = {"no ehr": ("table", "series", "text"), "no text": ("text",)}.get(name, ())
    absent = [slot.kind in gone for slot, _ in schema.instances()]
    if name == "no reference":
        absent = [instance.role == "reference" for _, instance in schema.instances()]
    return dataclasses.replace(batch, present_BVI=batch.present_BVI & ~torch.tensor(absent))


def model(folder: Path, sizes: Sizes, seed: int, privacy: Privacy) -> StudyModel:
    """The one set of weights of a seed at one privacy, from ``folder`` or made now.

    Private noise is drawn from the system, so a model that is made again is another model.
    """
    public = variant(folder, sizes, seed, "full")
    if privacy == "public":
        return assemble(public, {}, "all", RANK)
    state, _ = _study(folder, sizes, seed, privacy, public)
    return assemble(public, state, "all", RANK)


def rows(folder: Path, sizes: Sizes, seed: int, privacy: Privacy, patients: int, draw_seed: int) -> PatientBatch:
    """Rows from the table prior: public counts alone, or the hospitals' noised ones on top of them."""
    public = variant(folder, sizes, seed, "full")
    schema, known = public.schema, world_rows(sizes, seed)
    tables = count_tables(known.codes, known.domain, known.queries)
    if privacy != "public":
        tables = _study(folder, sizes, seed, privacy, public)[1]
    every = count_tables(known.codes, known.domain, all_queries(known.domain))
    return rows_from_tree(
        schema, fit_pairs(tables, known.domain, public=every), sizes.bins, patients, draw_seed, known.positions
    )


@dataclasses.dataclass(frozen=True, eq=False)
class KnownRows:
    """Public rows as codes, and what the table prior is made of."""

    codes: NDArray[np.int64]
    domain: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]
    positions: NDArray[np.float64]


def world_rows(sizes: Sizes, seed: int) -> KnownRows:
    """Codes of the public patients, and the marginals that are counted."""
    schema = phantoms.demo_schema()
    public = phantoms.to_batch(schema, phantoms.make_patients(sizes.public, _PUBLIC + seed, _without_held(Profile())))
    found = encode_rows(schema, public, sizes.bins)
    pairs = choose_pairs(found.codes_BC, found.domain, sizes.pairs)
    return KnownRows(
        codes=found.codes_BC,
        domain=tuple(found.domain),
        queries=default_queries(schema, found.domain, pairs),
        positions=public_positions(schema, public, sizes.bins),
    )


def _study(
    folder: Path, sizes: Sizes, seed: int, privacy: Privacy, public: PublicModel
) -> tuple[Mapping[str, Any], dict[tuple[int, ...], NDArray[np.float64]]]:
    """State and noised tables of the hospitals' study, from ``folder`` or made now."""
    path = folder / f"study-{privacy}-{seed}.safetensors"
    known = world_rows(sizes, seed)
    if not path.is_file():
        cell = Cell(name=privacy, epsilon=math.inf if privacy == "inf" else float(privacy), draws=sizes.draws)
        own = frontier_world.Sizes(
            sampling_rate=sizes.sampling_rate, steps=sizes.steps, rounds=sizes.rounds, spare_rounds=sizes.spare_rounds
        )
        plan, noise = plan_of(cell, own, public, known.queries), system_noise()
        sites = [_site(public, sizes, seed, k) for k in range(len(HOSPITALS))]
        tables = marginals(plan, sites, known.domain, known.queries, noise)
        state = recentre(plan, cell, sites, public, noise)
        state = train(plan, cell, sites, public, state, noise, sizes.learning_rate)
        arrays: dict[str, NDArray[Any]] = {
            f"state:{name}": np.ascontiguousarray(value) for name, value in state.items()
        }
        arrays |= {f"table:{json.dumps(query)}": np.ascontiguousarray(value) for query, value in tables.items()}
        facts = json.dumps({"epsilon": repr(plan.epsilon), "sigma": repr(plan.training("core").sigma)}).encode()
        arrays["facts"] = np.frombuffer(facts, np.uint8).copy()
        write_atomically(path, save_arrays(arrays))
    stored: dict[str, NDArray[Any]] = load_arrays(path.read_bytes())
    state = {name.removeprefix("state:"): value for name, value in stored.items() if name.startswith("state:")}
    tables = {
        tuple(json.loads(name.removeprefix("table:"))): value
        for name, value in stored.items()
        if name.startswith("table:")
    }
    return state, tables


def spent(folder: Path, seed: int, privacy: Privacy) -> tuple[float, float]:
    """(epsilon, noise multiplier of the core's steps) of a study that was made."""
    arrays = load_arrays((folder / f"study-{privacy}-{seed}.safetensors").read_bytes())
    facts = cast(dict[str, str], json.loads(arrays["facts"].tobytes()))
    return float(facts["epsilon"]), float(facts["sigma"])


def _site(public: PublicModel, sizes: Sizes, seed: int, k: int) -> Site:
    """One hospital's members, encoded some at a time: all their images at once would fill the memory."""
    schema, parts, codes = public.schema, [], []
    for number, start in enumerate(range(0, sizes.members, _AT_ONCE)):
        people = min(_AT_ONCE, sizes.members - start)
        drawn = phantoms.make_patients(people, _MEMBERS + 1000 * seed + 100 * k + number, _without_held(HOSPITALS[k]))
        batch = phantoms.to_batch(schema, drawn)
        parts.append(public.bank.encode(batch).as_dict())
        codes.append(encode_rows(schema, batch, sizes.bins).codes_BC)
    tokens = TokenBatch.from_dict({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return Site(tokens, np.concatenate(codes), torch.zeros(len(tokens), dtype=torch.int64))


def _without_held(profile: Profile) -> Profile:
    return dataclasses.replace(profile, withheld_cells=HELD_CELLS)
