"""What codecs keep: image error, distribution and lesion contrast of MRI, PET and X-ray, and errors of table and series.

The free codecs (cosine blocks, atlas) and the autoencoders are fitted on the same public patients. The autoencoders are
then trained further at three hospitals together, with clipped and noised steps of a real plan, and measured on held-out
patients of these hospitals, whose scanners and patients differ from the public ones. No core takes part.

A lesion's contrast is the mean of the image within the lesion less the mean at its mirror image in the midplane, where
phantoms are alike; what a codec keeps of it is the slope of the least-squares line of the restored on the recorded
contrast over all records with such a lesion: 1 keeps all, 0 shows the same with and without it.

Shape legend: N records, X, Y, Z voxels, F features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor

from client.rounds import anneal, changes
from medgen_models.adapters import group_of
from medgen_models.assembly import to_arrays
from medgen_models.codecs.bank import CodecBank
from medgen_models.codecs.base import pieces
from medgen_models.metrics.features import pooled, radiomics
from medgen_models.metrics.image import psnr
from medgen_models.metrics.sets import frechet_distance, standardise
from medgen_models.schema import PatientBatch, Schema, Slot
from privacy.gradients import Speed, per_patient_gradients
from privacy.noise import NoiseSource, system_noise
from privacy.plan import DPPlan, TrainingStage
from privacy.training import Prepare, train_round
from server.aggregation import GroupSum
from server.checkpoints import write_atomically
from server.planning import CODEC
from server.stages import State, apply_change
from simulations import phantom_brain as brain
from simulations import phantoms
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import HELD_CELLS, HOSPITALS, Place, Sizes

PRIVACIES: tuple[Privacy, ...] = ("public", "inf", "8")
USES_THE_WORLD = False  # trains codecs of its own
Family = Literal["dct", "atlas", "vae"]
F64 = NDArray[np.float64]
Images = NDArray[np.float32]
Mask = NDArray[np.bool_]
IMAGES: Mapping[str, str] = {"mri": "MRI", "pet": "PET", "cxr": "X-ray"}
EARLIER: Mapping[str, Mapping[str, float]] = {
    "mri": {"dct on earlier phantoms": 32.5, "atlas on earlier phantoms": 37.0},
    "pet": {"dct on earlier phantoms": 34.5, "atlas on earlier phantoms": 35.9},
    "cxr": {},
}
"""PSNR of the prototype's codecs on the prototype's phantoms, whose cortex had no folds: rankings compare, decibels do not."""
LATENT: Mapping[str, tuple[int, int]] = {"mri": (8, 8), "pet": (8, 8), "cxr": (8, 8), "ehr": (2, 8), "vitals": (4, 8)}
"""Tokens and width of each autoencoder; images have as many numbers as the atlas has components."""
_SITES = 4_000_000
_MEMBERS = 600
"""Members of a hospital here; more would spend the time of a call on drawing them."""
DELTA = 1e-5
STEPS = 300
LEARNING_RATE = 2e-4
CHUNK = 32
FEWEST = 8
"""Records with a lesion below which no slope is given."""
_AT_ONCE = 100
_STILL = 5e-3
"""Deviation below which a feature is of the air around a patient; a codec that leaves out noise would be judged by it."""
_DISTANCES = 200
"""Records whose features are compared."""


def figures(place: Place) -> list[Figure]:
    """One call: free codecs and public autoencoders at ``public``, federated autoencoders otherwise.

    About a minute at ``public`` and two at the other privacies on one core, at the full sizes.
    """
    world = place.world()
    steps = min(STEPS, place.sizes.pretrain_steps)
    banks = {family: fit_bank(family, world.public, place.seed, steps) for family in ("dct", "atlas", "vae")}
    here = Shown(world.hospital_test, Lesioned.of(world.hospital_test_truth), "held-out hospital patients")
    if place.privacy == "public":
        tests = (Shown(world.public_test, Lesioned.of((world.public_test_truth,)), "public test patients"), here)
        return [figure for shown in tests for figure in measured(shown, banks["vae"], banks, "public autoencoder")]
    trained, epsilon = federated(place, banks["vae"], world.public)
    peers = {"dct": banks["dct"], "atlas": banks["atlas"], "public autoencoder": banks["vae"]}
    name = "autoencoder trained at the hospitals" + (" at epsilon 8" if place.privacy == "8" else " without noise")
    spent = Figure(f"{name}: epsilon that its training spends", epsilon)
    return [spent, *measured(here, trained, peers, name)]


def schema_of(family: Family) -> Schema:
    """The demo's records with images in one family of codecs; table and series are autoencoders beside those of images."""
    slots = []
    for slot in phantoms.demo_schema().slots:
        if family == "vae" and slot.name in LATENT:
            tokens, width = LATENT[slot.name]
            slot = slot.model_copy(update={"codec": "vae", "tokens": tokens, "width": width})
        elif slot.name in IMAGES:
            slot = slot.model_copy(update={"codec": family})
        slots.append(slot)
    return Schema(name=f"codecs-{family}", slots=tuple(slots))


def fit_bank(family: Family, public: PatientBatch, seed: int, steps: int) -> CodecBank:
    """Codecs of one family, fitted on public patients; autoencoders in ``steps`` steps."""
    return CodecBank.fit_public(schema_of(family), public, seed, steps)


# Lesions --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lesioned:
    """Where the lesions of B patients lie.

    Attributes:
        lesions: of the brain.
        head_B: linear head size, with which positions scale.
        pneumonia_B: bool.
    """

    lesions: brain.Lesions
    head_B: F64
    pneumonia_B: Mask

    @staticmethod
    def of(populations: Sequence[phantoms.Phantoms]) -> Lesioned:
        """Of all populations, one after another."""
        fields = [f.name for f in dataclasses.fields(brain.Lesions)]
        together = {name: np.concatenate([getattr(p.lesions, name) for p in populations]) for name in fields}
        return Lesioned(
            lesions=brain.Lesions(**together),
            head_B=np.concatenate([p.latents.head_scale for p in populations]),
            pneumonia_B=np.concatenate([p.latents.pneumonia for p in populations]) == 1,
        )

    def masks(self, kind: Literal["tumour", "plaques"], rows_N: NDArray[np.int64]) -> Mask:
        """Voxels within a lesion (N, X, Y, Z) of the patients at ``rows_N``; none where a patient has no such lesion."""
        mm, found = brain.axis_mm().astype(np.float64), np.zeros((len(rows_N), *(brain.VOXELS,) * 3), bool)
        lesions = self.lesions
        for n, row in enumerate(rows_N):
            spots = [(lesions.centre_B3[row], lesions.radius_mm[row])] if lesions.site[row] >= 0 else []
            if kind == "plaques":
                at = np.flatnonzero(lesions.plaque_B6[row])
                spots = [(lesions.plaque_B63[row, k], lesions.plaque_mm_B6[row, k]) for k in at]
            for centre_3, radius_mm in spots:
                x, y, z = ((mm - centre_3[axis] * self.head_B[row]) ** 2 for axis in range(3))
                found[n] |= x[:, None, None] + y[:, None] + z < radius_mm**2
        return found


def contrast(images_NXYZ: Images, masks_NXYZ: Mask) -> F64:
    """Mean within each mask less the mean at its mirror image (N,), voxels in both left out; NaN where none is left."""
    mirror = masks_NXYZ[:, ::-1]
    own, other = masks_NXYZ & ~mirror, mirror & ~masks_NXYZ
    count_N = own.sum(axis=(1, 2, 3))
    apart_N = (images_NXYZ * own).sum(axis=(1, 2, 3)) - (images_NXYZ * other).sum(axis=(1, 2, 3))
    return np.asarray(np.where(count_N > 0, apart_N / np.maximum(count_N, 1), np.nan), dtype=np.float64)


def consolidation(films_NYX: Images) -> F64:
    """Mean of the right upper field less that of the left one (N,): the side of a consolidation decides its sign."""
    apart_N = films_NYX[:, 15:24, 11:20].mean(axis=(1, 2)) - films_NYX[:, 15:24, 44:53].mean(axis=(1, 2))
    return np.asarray(apart_N, dtype=np.float64)


def contrast_kept(recorded_N: F64, restored_N: F64) -> float:
    """Slope of the least-squares line of restored on recorded contrasts; NaN for fewer than :data:`FEWEST` of them."""
    known = np.isfinite(recorded_N)
    if known.sum() < FEWEST:
        return math.nan
    apart_N = recorded_N[known] - recorded_N[known].mean()
    return float(apart_N @ restored_N[known] / (apart_N @ apart_N))


# Figures --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shown:
    """Patients that codecs are measured on.

    Attributes:
        patients: as records.
        truth: their lesions.
        name: who they are, in words.
    """

    patients: PatientBatch
    truth: Lesioned
    name: str

    def records(self, schema: Schema, slot: str) -> tuple[Tensor, NDArray[np.int64]]:
        """Records of a slot (N, *raw), instance after instance, and the patient of each."""
        parts, rows = [], []
        for place, (own, instance) in enumerate(schema.instances()):
            if own.name == slot:
                here_B = self.patients.present_BVI[:, 0, place]
                parts.append(self.patients.values[own.key(instance)][here_B, 0])
                rows.append(here_B.nonzero().flatten().numpy())
        return torch.cat(parts), np.concatenate(rows)


def measured(shown: Shown, bank: CodecBank, others: Mapping[str, CodecBank], name: str) -> list[Figure]:
    """All figures of one bank on some patients; every other bank of another name is a peer."""
    peers = {other: each for other, each in others.items() if each is not bank}
    out = []
    for slot in IMAGES:
        out += _image_figures(shown, slot, bank, peers, name)
    for slot in ("ehr", "vitals"):
        out += _row_figures(shown, slot, bank, peers, name)
    return out


def restored(bank: CodecBank, slot: str, records: Tensor) -> Images:
    """Images after encoding and decoding, within the public range."""
    codec = bank.codecs[slot]
    parts = [codec.decode(codec.encode(part)) for part in pieces(records, _AT_ONCE)]
    return np.asarray(torch.cat(parts).clamp(-1.0, 1.0).numpy(), dtype=np.float32)


def mean_psnr_db(recorded: Images, shown: Images) -> float:
    """Mean over records; some at a time, since double precision of all would fill the memory."""
    parts = []
    for start in range(0, len(recorded), _AT_ONCE):
        truth, image = (x[start : start + _AT_ONCE].astype(np.float64) for x in (recorded, shown))
        parts.append(psnr(truth, image))
    return float(np.concatenate(parts).mean())


def _image_figures(shown: Shown, slot: str, bank: CodecBank, peers: Mapping[str, CodecBank], name: str) -> list[Figure]:
    records, rows_N = shown.records(bank.schema, slot)
    recorded = np.asarray(records.numpy(), dtype=np.float32)
    sides = {"own": restored(bank, slot, records)} | {k: restored(b, slot, records) for k, b in peers.items()}
    title = f"{IMAGES[slot]} of {shown.name}, {name}"

    def figure(what: str, unit: str, value_of: Callable[[Images], float], more: Mapping[str, float]) -> Figure:
        found = {side: value_of(images) for side, images in sides.items()}
        return Figure(f"{title}: {what}", found.pop("own"), unit, found | dict(more))

    out = [figure("error of restored images, PSNR", "dB", lambda x: mean_psnr_db(recorded, x), EARLIER[slot])]
    few = min(_DISTANCES, len(recorded))
    spaces: Mapping[str, Callable[[Images], F64]] = {
        "radiomics": lambda x: radiomics(x).values_BF,
        "block means": lambda x: pooled(x, 4),
    }
    for space, features in spaces.items():
        known_NF = features(recorded[:few])
        halves = _distance(known_NF[::2], known_NF[1::2]) if few >= 2 * FEWEST else math.nan
        apart = {"real half against real half": halves}
        out.append(
            figure(
                f"Fréchet distance of restored from recorded images, {space}",
                "",
                lambda x, f=features, k=known_NF: _distance(k, f(x[:few])),  # type: ignore[misc]
                apart,
            )
        )
    for lesion, contrast_of in _contrasts(shown, slot, rows_N).items():
        truth_N = contrast_of(recorded)
        out.append(
            figure(
                f"contrast of {lesion} kept, slope over {int(np.isfinite(truth_N).sum())} records",
                "",
                lambda x, t=truth_N, c=contrast_of: contrast_kept(t, c(x)),  # type: ignore[misc]
                {},
            )
        )
    return out


def _distance(known_NF: F64, other_MF: F64) -> float:
    """Fréchet distance in units of the known side's deviations, without features that vary less than :data:`_STILL` there."""
    kept = known_NF.std(axis=0) > _STILL
    return frechet_distance(*standardise(known_NF[:, kept], other_MF[:, kept]))


def _contrasts(shown: Shown, slot: str, rows_N: NDArray[np.int64]) -> dict[str, Callable[[Images], F64]]:
    """Lesion -> its contrast in images of the patients at ``rows_N``, NaN where a patient does not have it."""
    if slot == "cxr":
        sick_N = shown.truth.pneumonia_B[rows_N]
        return {"consolidations": lambda x: np.where(sick_N, consolidation(x), np.nan)}
    tumour, plaques = shown.truth.masks("tumour", rows_N), shown.truth.masks("plaques", rows_N)
    return {"tumours": lambda x: contrast(x, tumour), "plaques": lambda x: contrast(x, plaques)}


def _row_figures(shown: Shown, slot: str, bank: CodecBank, peers: Mapping[str, CodecBank], name: str) -> list[Figure]:
    own = bank.schema.slot(slot)
    records, _ = shown.records(bank.schema, slot)
    sides = {"own": column_errors(own, records, _decoded(bank, slot, records))}
    sides |= {other: column_errors(own, records, _decoded(each, slot, records)) for other, each in peers.items()}
    title = f"{'EHR row' if slot == 'ehr' else 'vitals'} of {shown.name}, {name}"
    told = {"dct": "a token a column" if slot == "ehr" else "a token a bin"}
    out = []
    for what in sides["own"]:
        found = {told.get(side, side): errors[what] for side, errors in sides.items() if side != "atlas"}
        out.append(Figure(f"{title}: {what}", found.pop("own"), "", found))
    return out


def _decoded(bank: CodecBank, slot: str, records: Tensor) -> Tensor:
    return bank.codecs[slot].decode(bank.codecs[slot].encode(records))


def column_errors(slot: Slot, recorded: Tensor, shown: Tensor) -> dict[str, float]:
    """Errors of a restored table or series.

    Numeric: mean absolute error as a share of the public range, where both have a value. Categories: share of wrong ones,
    likewise. Missing: share of values that come back where none was, or the other way round.
    """
    both = torch.isfinite(recorded) & torch.isfinite(shown)
    numeric = torch.tensor([column.kind == "numeric" for column in slot.columns])
    apart, wrong = (recorded - shown).abs() / 2.0, (recorded != shown).float()
    out = {"mean error of numeric values, share of the range": float(apart[both & numeric].mean())}
    if not bool(numeric.all()):
        out["share of wrong categories"] = float(wrong[both & ~numeric].mean())
    odd = torch.isfinite(recorded) != torch.isfinite(shown)
    return out | {"share of values missing in one and not in the other": float(odd.float().mean())}


# Training at the hospitals --------------------------------------------------------------------------------------------


def federated(place: Place, bank: CodecBank, public: PatientBatch) -> tuple[CodecBank, float]:
    """The bank after training at the hospitals, and the epsilon that it spends; kept in the folder of ``place``."""
    path = place.folder / f"codecs-{place.privacy}-{place.seed}.safetensors"
    plan = plan_of(place.sizes, math.inf if place.privacy == "inf" else float(place.privacy), clip_of(bank, public))
    if not path.is_file():
        sites = [hospital(place.sizes, place.seed, k) for k in range(len(HOSPITALS))]
        write_atomically(path, save_arrays(dict(train(plan, sites, bank, system_noise(), LEARNING_RATE))))
    state = load_arrays(path.read_bytes())
    return bank.with_vae({name: torch.from_numpy(value.copy()) for name, value in state.items()}), plan.epsilon


def hospital(sizes: Sizes, seed: int, k: int) -> PatientBatch:
    """Members of one hospital."""
    profile = dataclasses.replace(HOSPITALS[k], withheld_cells=HELD_CELLS)
    drawn = phantoms.make_patients(min(sizes.members, _MEMBERS), _SITES + 1000 * seed + 100 * k, profile)
    return phantoms.to_batch(phantoms.demo_schema(), drawn)


def plan_of(sizes: Sizes, epsilon: float, clip: float) -> DPPlan:
    """Training of the autoencoders alone, as a study that spends all of ``epsilon`` on them."""
    stage = TrainingStage(
        name=CODEC,
        sampling_rate=sizes.sampling_rate,
        steps=sizes.steps,
        rounds=sizes.rounds,
        spare_rounds=sizes.spare_rounds,
        clip=clip,
    )
    return DPPlan(stages=(stage,), delta=DELTA).calibrate(epsilon)


def clip_of(bank: CodecBank, public: PatientBatch, patients: int = 64) -> float:
    """Median gradient norm of public patients."""
    slots, rows = bank.vae_slots(), list(range(min(patients, len(public))))
    units = bank.vae_units(public.select(rows), slots, torch.Generator().manual_seed(0))
    loss, params = bank.make_vae_loss(slots), bank.vae_parameters(slots)
    gradients = per_patient_gradients(loss, params, units, Speed(chunk=CHUNK))
    norms_B = sum(value.flatten(1).square().sum(dim=1) for value in gradients.values())
    return float(torch.as_tensor(norms_B).sqrt().median())


def train(
    plan: DPPlan, sites: Sequence[PatientBatch], bank: CodecBank, noise: NoiseSource, learning_rate: float
) -> State:
    """All rounds: private steps at each site on its own optimizer state, then the weighted mean of the changes."""
    stage, slots = plan.training(CODEC), bank.vae_slots()
    current: State = to_arrays(bank.vae_parameters(slots))
    names: dict[str, list[str]] = {}
    for name in sorted(current):
        names.setdefault(group_of(name), []).append(name)
    largest = max(len(site) for site in sites)
    unit_loss = bank.make_vae_loss(slots)
    optimizers: list[dict[str, Tensor] | None] = [None] * len(sites)
    for number in range(stage.rounds):
        before = {name: torch.from_numpy(value.copy()) for name, value in current.items()}
        sums: dict[str, list[F64]] = {group: [] for group in names}
        for k, site in enumerate(sites):
            outcome = train_round(
                params=before,
                unit_loss=unit_loss,
                patients=len(site),
                prepare=_prepare(bank, site, slots),
                stage=stage,
                n_decl=len(site),
                learning_rate=learning_rate * anneal(number, stage.rounds),
                speed=Speed(chunk=CHUNK),
                noise=noise,
                optimizer_state=optimizers[k],
            )
            optimizers[k] = outcome.optimizer_state
            for group, values in changes(before, outcome.params, len(site) / largest, tuple(names)).items():
                sums[group].append(values)
        weight = sum(len(site) for site in sites) / largest
        current = apply_change(
            current, {g: GroupSum(np.sum(parts, axis=0), (), weight) for g, parts in sums.items()}, names
        )
    return current


def _prepare(bank: CodecBank, site: PatientBatch, slots: tuple[str, ...]) -> Prepare:
    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return bank.vae_units(site.select(rows), slots, generator)

    return prepare
