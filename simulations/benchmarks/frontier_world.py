"""The world of the frontier benchmark: hospitals whose images differ from the public ones in one controlled way.

A *world* is made of phantoms alone, for one seed and one shift. Every hospital has its own population (age, severity,
pathology); on top of it all hospitals share a scanner, and the shift says which part of what that scanner does is seen.
Write A(p) for the image of patient p by the public scanner, ``Profile()``, and B(p) for the image of the same patient by
the scanner of :data:`SCANNER` (other gain and contrast exponent, a tilted field, more noise). Let D be the mean of
B(p) - A(p) over public patients, one fixed pattern for each image instance. Then the hospitals record

    ``mean``    A(p) + D      a constant pattern is added to every image; how images vary about their mean is as in public
    ``shape``   B(p) - D      images vary about their mean as the other scanner makes them; the mean stays where it was

so A, the two, and B are the corners of a square. Values are not clipped to the public range: a constant must stay one.

Records are encoded once, with the public codecs, and stored as tokens; that recentring a codec afterwards equals taking
the shift from its tokens is a property of the codec bank that a test holds. Shape legend: B patients, F features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig
from medgen_models.metrics.coherence import correlations
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.prototypes import levels_of
from medgen_models.public_model import PublicModel
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema
from medgen_models.table_prior import choose_pairs, default_queries, encode_rows, public_positions
from medgen_models.tokens import TokenBatch
from server.checkpoints import write_atomically
from simulations import phantoms
from simulations.benchmarks.correlations import PAIRS
from simulations.phantom_population import Profile

Shift = Literal["mean", "shape"]
Floats = NDArray[np.float64]

SCANNER = Profile(contrast=0.85, mri_gain=0.95, bias_field=0.15, pet_gain=0.8, cxr_contrast=1.35, noise=1.5)
"""The other scanner; only its imaging fields are read."""
POPULATIONS: tuple[Profile, ...] = (
    Profile(age_years=64.0, severity_shift=0.3, pathology_mix=(0.24, 0.30, 0.22, 0.24)),
    Profile(age_years=72.0, severity_shift=0.2, pathology_mix=(0.36, 0.06, 0.06, 0.52)),
    Profile(age_years=52.0, severity_shift=-0.1, pathology_mix=(0.20, 0.36, 0.38, 0.06)),
)
"""Who comes to each hospital; the public population is ``Profile()``."""
FACTOR = "pathology"
"""The factor whose levels have prototypes."""
AT_ONCE = 400
"""Patients whose images are in memory at once."""
PUBLIC_SEED, PATTERN_SEED, SITE_SEED = 100_000, 200_000, 300_000
"""Offsets that keep public patients, patients behind the pattern and hospital patients apart at every seed."""


def settings() -> tuple[object, ...]:
    """Every constant that a world depends on."""
    return (SCANNER, POPULATIONS, FACTOR, AT_ONCE, PUBLIC_SEED, PATTERN_SEED, SITE_SEED)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is; a change of any field is another benchmark.

    Attributes:
        public, pattern: public patients, and those whose images tell the pattern D.
        members, held_out: patients of each hospital who train, and who never do.
        pretrain_steps: public training steps of 32 patients.
        rounds, steps, spare_rounds, sampling_rate: of the private training, as in a study.
        synthetic, sampler_steps: patients drawn from the final model, and steps of the sampler.
        width, layers: of the core.
        bins, pairs: of the table's marginals.
    """

    public: int = 400
    pattern: int = 300
    members: int = 2000
    held_out: int = 130
    pretrain_steps: int = 300
    rounds: int = 4
    steps: int = 8
    spare_rounds: int = 1
    sampling_rate: float = 0.08
    synthetic: int = 500
    sampler_steps: int = 10
    width: int = 32
    layers: int = 2
    bins: int = 8
    pairs: int = 20

    @property
    def core(self) -> CoreConfig:
        """Size of the core."""
        return CoreConfig(width=self.width, layers=self.layers, heads=4)


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What a cell reads.

    Attributes:
        sites: tokens of the members of each hospital, by the public codecs.
        codes: the members' table codes (B, C), for the marginals.
        levels: the members' levels of :data:`FACTOR` (B,), for prototypes.
        public, public_levels: tokens and levels of the public patients.
        held_out: tokens of all hospitals' held-out patients.
        correlations: of image attributes with columns among the held-out patients, one for each of :data:`PAIRS`.
        public_codes, positions: public table codes and where values lie in their bins, for the table prior.
        domain, queries: levels of each variable, and the marginals that are counted.
    """

    sites: tuple[TokenBatch, ...]
    codes: tuple[NDArray[np.int64], ...]
    levels: tuple[Tensor, ...]
    public: TokenBatch
    public_levels: Tensor
    held_out: TokenBatch
    correlations: Floats
    public_codes: NDArray[np.int64]
    positions: Floats
    domain: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]


def frontier_schema() -> Schema:
    """The demo's schema with one MRI, FDG PET and the current film beside the table: 38 tokens a patient."""
    keep = {"mri": "a", "pet": "fdg", "cxr": "current"}
    slots = []
    for slot in phantoms.demo_schema().slots:
        if slot.name in keep:
            own = tuple(instance for instance in slot.instances if instance.name == keep[slot.name])
            slots.append(slot.model_copy(update={"instances": own}))
        elif slot.kind == "table":
            slots.append(slot)
    return Schema(name="frontier", slots=tuple(slots))


def public_model(folder: Path, sizes: Sizes, seed: int, pretrained: bool) -> PublicModel:
    """The public model of a seed, from ``folder`` or made now.

    Without pre-training the codecs are the same and the core keeps its random start; its clips are measured there.
    """
    schema = frontier_schema()
    place = folder / f"public-{seed}-{'trained' if pretrained else 'random'}"
    if not (place / "card.json").is_file():
        config = PretrainConfig(steps=sizes.pretrain_steps if pretrained else 0, core=sizes.core)
        people = _public(schema, sizes, seed)
        pretrain(schema, people, config, seed, biomarkers=phantoms.biomarkers(schema, people)).save(place)
    return PublicModel.load(place, schema)


def world(folder: Path, sizes: Sizes, seed: int, shift: Shift) -> World:
    """The world of a seed and shift, from ``folder`` or made now."""
    path = folder / f"world-{seed}-{shift}.safetensors"
    if not path.is_file():
        made = _make_world(public_model(folder, sizes, seed, True).bank, sizes, seed, shift)
        write_atomically(path, _to_bytes(made))
    return _from_bytes(path.read_bytes())


def shift_tokens(tokens: TokenBatch, bank: CodecBank, shift: Mapping[str, Tensor]) -> TokenBatch:
    """What ``bank.recentre(shift)`` would have encoded: the shift of each slot taken from its present instances.

    Raises:
        ValueError: a slot that the layout does not have.
    """
    layout, z = bank.layout, tokens.z_BVNW.clone()
    for name, value in shift.items():
        if name not in layout.slots:
            raise ValueError(f"recentre: {name!r} is no slot; known are {', '.join(layout.slots)}")
        for i in layout.members(name):
            width = layout.width_I[i]
            here = tokens.present_BVI[:, :, i, None, None]
            z[:, :, layout.span(i), :width] -= value.reshape(-1, width) * here
    return dataclasses.replace(tokens, z_BVNW=z)


def measured(schema: Schema, batch: PatientBatch) -> Floats:
    """Correlation of an attribute measured in images with a column of the row, (1, pairs), over :data:`PAIRS`."""
    table = schema.table()
    assert table is not None
    seen = phantoms.attributes(schema, batch)
    columns = batch.values[table.name][:, 0].double().numpy()
    names = [column.name for column in table.columns]
    found = [correlations(seen[a][:, None], columns[:, [names.index(c)]])[0, 0] for a, c in PAIRS]
    return np.asarray([found], np.float64)


def _public(schema: Schema, sizes: Sizes, seed: int) -> PatientBatch:
    return phantoms.to_batch(schema, phantoms.make_patients(sizes.public, PUBLIC_SEED + seed))


def _pattern(schema: Schema, sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """D of each image instance: the mean difference between the two scanners over the same public patients."""
    first, second = (
        phantoms.to_batch(schema, phantoms.make_patients(sizes.pattern, PATTERN_SEED + seed, profile))
        for profile in (Profile(), _by_scanner(Profile()))
    )
    out = {}
    for i, (slot, instance) in enumerate(schema.instances()):
        if slot.kind in IMAGE_KINDS:
            here, key = first.present_BVI[:, 0, i], slot.key(instance)
            out[key] = (second.values[key][here, 0] - first.values[key][here, 0]).mean(dim=0)
    return out


def _by_scanner(profile: Profile) -> Profile:
    """The same population before the other scanner."""
    return dataclasses.replace(
        profile,
        contrast=SCANNER.contrast,
        mri_gain=SCANNER.mri_gain,
        bias_field=SCANNER.bias_field,
        pet_gain=SCANNER.pet_gain,
        cxr_contrast=SCANNER.cxr_contrast,
        noise=SCANNER.noise,
    )


def _recorded(
    schema: Schema, people: int, seed: int, profile: Profile, shift: Shift, pattern: Mapping[str, Tensor]
) -> PatientBatch:
    """Patients of one hospital with the shift applied."""
    scanner = _by_scanner(profile) if shift == "shape" else profile
    batch = phantoms.to_batch(schema, phantoms.make_patients(people, seed, scanner))
    values = dict(batch.values)
    for i, (slot, instance) in enumerate(schema.instances()):
        key = slot.key(instance)
        if key in pattern:
            here = batch.present_BVI[:, :, i].reshape(people, 1, *([1] * len(slot.raw_shape())))
            values[key] = values[key] + (pattern[key] if shift == "mean" else -pattern[key]) * here
    return dataclasses.replace(batch, values=values)


def _make_world(bank: CodecBank, sizes: Sizes, seed: int, shift: Shift) -> World:
    schema = bank.schema
    pattern = _pattern(schema, sizes, seed)
    public = _public(schema, sizes, seed)
    rows = encode_rows(schema, public, sizes.bins)
    sites, codes, levels, left = [], [], [], []
    for k, profile in enumerate(POPULATIONS):
        start = SITE_SEED + 1_000 * seed + 100 * k
        left.append(_recorded(schema, sizes.held_out, start, profile, shift, pattern))
        parts = []
        for number, people in enumerate(_split(sizes.members)):  # images of all members at once would fill the memory
            members = _recorded(schema, people, start + 1 + number, profile, shift, pattern)
            rows_of = encode_rows(schema, members, sizes.bins).codes_BC
            parts.append((bank.encode(members).as_dict(), rows_of, levels_of(schema, members, FACTOR)))
        tokens = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
        sites.append(TokenBatch.from_dict(tokens))
        codes.append(np.concatenate([part[1] for part in parts]))
        levels.append(torch.cat([part[2] for part in parts]))
    held_out = PatientBatch.concat(left)
    return World(
        sites=tuple(sites),
        codes=tuple(codes),
        levels=tuple(levels),
        public=bank.encode(public),
        public_levels=levels_of(schema, public, FACTOR),
        held_out=bank.encode(held_out),
        correlations=measured(schema, held_out),
        public_codes=rows.codes_BC,
        positions=public_positions(schema, public, sizes.bins),
        domain=tuple(rows.domain),
        queries=default_queries(schema, rows.domain, choose_pairs(rows.codes_BC, rows.domain, sizes.pairs)),
    )


def _split(people: int) -> list[int]:
    """``people`` in parts of at most :data:`AT_ONCE`."""
    return [min(AT_ONCE, people - start) for start in range(0, people, AT_ONCE)]


def _to_bytes(made: World) -> bytes:
    arrays = {f"held_out/{name}": value for name, value in made.held_out.as_dict().items()}
    arrays |= {f"public/{name}": value for name, value in made.public.as_dict().items()}
    arrays["public_levels"] = made.public_levels
    for k, (tokens, codes, levels) in enumerate(zip(made.sites, made.codes, made.levels, strict=True)):
        arrays |= {f"site/{k}/{name}": value for name, value in tokens.as_dict().items()}
        arrays |= {f"codes/{k}": torch.from_numpy(codes), f"levels/{k}": levels}
    for name in ("correlations", "public_codes", "positions"):
        arrays[name] = torch.from_numpy(np.ascontiguousarray(getattr(made, name)))
    tables = json.dumps({"domain": made.domain, "queries": made.queries, "sites": len(made.sites)})
    arrays["tables"] = torch.frombuffer(bytearray(tables.encode()), dtype=torch.uint8)
    return bytes(save_tensors({name: value.contiguous() for name, value in arrays.items()}))


def _from_bytes(body: bytes) -> World:
    arrays = load_tensors(body)
    tables = json.loads(bytes(arrays["tables"].numpy().tobytes()))

    def tokens(prefix: str) -> TokenBatch:
        return TokenBatch.from_dict({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})

    return World(
        sites=tuple(tokens(f"site/{k}/") for k in range(tables["sites"])),
        codes=tuple(arrays[f"codes/{k}"].numpy() for k in range(tables["sites"])),
        levels=tuple(arrays[f"levels/{k}"] for k in range(tables["sites"])),
        public=tokens("public/"),
        public_levels=arrays["public_levels"],
        held_out=tokens("held_out/"),
        correlations=arrays["correlations"].numpy(),
        public_codes=arrays["public_codes"].numpy(),
        positions=arrays["positions"].numpy(),
        domain=tuple(tables["domain"]),
        queries=tuple(tuple(query) for query in tables["queries"]),
    )
