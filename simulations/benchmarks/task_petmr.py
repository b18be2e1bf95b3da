"""MRI to PET on real patients, the patients of one scanner vendor after the other left out.

A public model is trained on stand-ins (:func:`simulations.public_populations.limb_population`); the patients of two
vendors go on with it as two sites, and PET of the third vendor's patients is estimated from their MRI alone. Every
patient is tested once, by a model that saw nobody of the same vendor. The table is left out: it holds the uptake.

With 8 to 18 patients to train on, epsilon 8 is noise many times larger than what the patients say: a noised mean token
vector would be noise alone and is not asked for, and steps wander. The figures show what is left. Intervals are over
patients. Shape legend: B patients, X voxels, N tokens, W token width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from medgen_models.assembly import StudyModel, assemble
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig
from medgen_models.flow import FlowConfig, Shares
from medgen_models.layout import DCT_BLOCK
from medgen_models.metrics.image import mae, psnr, ssim
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.public_model import PublicModel
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch
from medgen_models.tasks import states_for
from medgen_models.tokens import TokenBatch
from privacy.noise import system_noise
from privacy.plan import DPPlan
from privacy.stages import QueryStage, TrainingStage
from server.planning import CORE, RECENTRE
from simulations.benchmarks import petmr_images
from simulations.benchmarks.frontier_cell import DELTA, QUERY_SIGMA, RANK, Cell, Site, recentre, train
from simulations.benchmarks.petmr_images import FOLDER, Patients
from simulations.benchmarks.runner import bootstrap_interval
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place, Sizes
from simulations.public_populations import limb_population

PRIVACIES: tuple[Privacy, ...] = ("inf", "8")
USES_THE_WORLD = False
F64 = NDArray[np.float64]
SHARES = Shares(row=0.1, joint=0.1, subset=0.7, update=0.0, dropped=0.1, conditional=0.0)
"""Subsets are commonest: this model is asked for nothing but a missing image."""
SAMPLING_RATE = 0.5
DRAWS = 8
"""Samples of each patient's PET."""
_STANDINS = 5_000_000
_ALPHAS = np.logspace(0, 7, 15)
MARGIN_DB = 0.3
"""How far an estimate may lie under the training patients' mean PET."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """One way to estimate PET, over all patients (B,).

    Attributes:
        psnr, ssim: inside the body; PSNR in dB of the public range.
        mae: mean absolute error inside the body, SUV.
        lesion: absolute error of the mean inside the tumour, SUV; NaN without a contour in the grid.
    """

    psnr: F64
    ssim: F64
    mae: F64
    lesion: F64


def figures(place: Place) -> list[Figure]:
    """Errors of PET from MRI beside the mean of the training patients, ridge and the nearest patient.

    Nothing where the data set is not there.
    """
    if place.data is None or not (place.data / FOLDER).is_dir():
        return []
    vendors = petmr_images.read(place.data)
    public = public_model(place)
    everyone = _together([vendors[name] for name in vendors])
    estimates: dict[str, list[F64]] = {}
    spent: list[tuple[float, float]] = []
    for left in vendors:
        sites = [vendors[name].batch for name in vendors if name != left]
        model, epsilon, sigma = trained(public, sites, place)
        spent.append((epsilon, sigma))
        found = _estimates(public, model, PatientBatch.concat(sites), vendors[left].batch, place)
        for name, images in found.items():
            estimates.setdefault(name, []).append(images)
    scored = {name: score(np.concatenate(parts), everyone) for name, parts in estimates.items()}
    truth = everyone.batch.values["pet"][:, 0].double().numpy()
    return [*_compared(scored, place), *_realism(estimates, truth), *_price(spent, place)]


def public_model(place: Place) -> PublicModel:
    """The model of the stand-ins, from the place's folder or made now."""
    folder, study = place.folder / f"petmr-{place.seed}", petmr_images.schema()
    if not (folder / "card.json").is_file():
        people = limb_population(study, max(place.sizes.public // 2, 24), _STANDINS + place.seed)
        pretrain(study, people, pretrain_config(place.sizes), place.seed).save(folder)
    return PublicModel.load(folder, study)


def pretrain_config(sizes: Sizes) -> PretrainConfig:
    """Training on stand-ins: the usual size of core, fewer steps."""
    return PretrainConfig(
        steps=max(sizes.pretrain_steps * 3 // 5, 1),
        batch=sizes.batch,
        hinge=0.0,
        core=CoreConfig(width=sizes.width, layers=sizes.layers, heads=4),
        flow=FlowConfig(shares=SHARES),
    )


def trained(public: PublicModel, sites: Sequence[PatientBatch], place: Place) -> tuple[StudyModel, float, float]:
    """(model, epsilon, noise multiplier of the core) after recentring and private steps at the sites."""
    if place.privacy == "public":
        return assemble(public, {}, "all", RANK), 0.0, math.nan
    people = [len(batch) for batch in sites]
    plan, noise = plan_of(public, place, people), system_noise()
    asked = any(stage.name == RECENTRE for stage in plan.stages)
    cell = Cell(name=place.privacy, epsilon=plan.target_epsilon, recentred=asked)
    held = [
        Site(public.bank.encode(batch), np.zeros((len(batch), 0), np.int64), torch.zeros(len(batch), dtype=torch.int64))
        for batch in sites
    ]
    state = recentre(plan, cell, held, public, noise)
    state = train(plan, cell, held, public, state, noise, place.sizes.learning_rate)
    return assemble(public, state, "all", RANK), plan.epsilon, plan.training(CORE).sigma


def plan_of(public: PublicModel, place: Place, people: Sequence[int]) -> DPPlan:
    """The core's steps, and recentring before them where its noise leaves anything of it; calibrated together.

    Args:
        public: where training starts.
        place: sizes and epsilon.
        people: declared patients of each site.
    """
    sizes, epsilon = place.sizes, math.inf if place.privacy == "inf" else float(place.privacy)
    query = QueryStage(name=RECENTRE, sigma=QUERY_SIGMA[RECENTRE], sensitivity=public.recentre_norm)
    training = TrainingStage(
        name=CORE,
        sampling_rate=SAMPLING_RATE,
        steps=sizes.steps,
        rounds=sizes.rounds,
        spare_rounds=0,
        clip=public.clip_norms["all"],
        draws=sizes.draws,
    )
    worth = math.isinf(epsilon) or recentring_noise(public, people) < 1.0
    return DPPlan(stages=(query, training) if worth else (training,), delta=DELTA).calibrate(epsilon)


def recentring_noise(public: PublicModel, people: Sequence[int]) -> float:
    """Expected length of the noise in a mean token vector, over the median length of a public patient's vector."""
    layout = public.layout
    numbers = sum(layout.tokens_I[i] * layout.width_I[i] + 1 for i in (layout.place("mri"), layout.place("pet")))
    return QUERY_SIGMA[RECENTRE] * math.sqrt(len(people) * numbers) / sum(people)


def from_mri(model: StudyModel, batch: PatientBatch, steps: int, seed: int) -> F64:
    """PET in [-1, 1] from MRI alone (B, X): the estimate with one step, a sample with more."""
    tokens = model.bank.encode(batch)
    mri, pet = (model.layout.place(key) for key in ("mri", "pet"))
    present_BVI = torch.zeros_like(tokens.present_BVI)
    present_BVI[:, :, [mri, pet]] = tokens.present_BVI[:, :, [mri, pet]]
    known_BVI = torch.zeros_like(present_BVI)
    known_BVI[:, :, mri] = True
    state_BVI = states_for("impute", model.layout, present_BVI, known_BVI=known_BVI)
    generator = torch.Generator().manual_seed(seed)
    z_BVNW = sample(model.core, model.layout, tokens, state_BVI, generator=generator, steps=steps)
    return model.bank.decode(z_BVNW)["pet"][:, 0].double().numpy()


def ridge(bank: CodecBank, known: PatientBatch, asked: PatientBatch) -> F64:
    """PET in [-1, 1] by ridge regression of PET tokens on MRI tokens, the penalty by leave-one-out on ``known``."""
    layout, (train_set, test_set) = bank.layout, (bank.encode(known), bank.encode(asked))
    mri, pet = layout.place("mri"), layout.place("pet")

    def flat(tokens: TokenBatch, i: int) -> F64:
        return tokens.z_BVNW[:, 0, layout.span(i), : layout.width_I[i]].flatten(1).double().numpy()

    with threadpool_limits(1):
        fitted = RidgeCV(_ALPHAS).fit(flat(train_set, mri), flat(train_set, pet))
    z_BVNW = torch.zeros_like(test_set.z_BVNW)
    found = torch.from_numpy(fitted.predict(flat(test_set, mri))).float()
    z_BVNW[:, 0, layout.span(pet), : layout.width_I[pet]] = found.reshape(len(asked), layout.tokens_I[pet], -1)
    return bank.decode(z_BVNW)["pet"][:, 0].double().numpy()


def nearest(known: PatientBatch, asked: PatientBatch) -> F64:
    """PET in [-1, 1] of the patient whose MRI is nearest in mean square."""
    away_BK = torch.cdist(asked.values["mri"][:, 0].flatten(1), known.values["mri"][:, 0].flatten(1))
    return known.values["pet"][away_BK.argmin(dim=1), 0].double().numpy()


def score(estimate_BX: F64, patients: Patients) -> Scores:
    """Errors of estimates in [-1, 1] against the patients' own PET."""
    slot, truth_BX = petmr_images.schema().slot("pet"), patients.batch.values["pet"][:, 0].double().numpy()
    suv = (slot.high - slot.low) / 2.0
    inside = patients.lesion_BX.reshape(len(truth_BX), -1)
    count_B = inside.sum(axis=1)
    off_B = np.where(inside, (estimate_BX - truth_BX).reshape(len(truth_BX), -1), 0.0).sum(axis=1)
    return Scores(
        psnr=psnr(truth_BX, estimate_BX, mask_BX=patients.body_BX),
        ssim=ssim(truth_BX, estimate_BX, mask_BX=patients.body_BX),
        mae=suv * mae(truth_BX, estimate_BX, patients.body_BX),
        lesion=np.where(count_B > 0, suv * np.abs(off_B) / np.maximum(count_B, 1), np.nan),
    )


def blockiness(images_BX: F64, block: int = DCT_BLOCK[3]) -> float:
    """Mean step between neighbouring voxels across block borders over that inside blocks; about 1 without blocks.

    Raises:
        ValueError: images without any step inside a block.
    """
    across, within = [], []
    for axis in range(1, images_BX.ndim):
        steps = np.abs(np.diff(images_BX, axis=axis))
        border = (np.arange(steps.shape[axis]) + 1) % block == 0
        across.append(np.compress(border, steps, axis=axis).ravel())
        within.append(np.compress(~border, steps, axis=axis).ravel())
    inside = float(np.concatenate(within).mean())
    if inside == 0:
        raise ValueError("blockiness: nothing changes inside the blocks; it is not defined for constant blocks")
    return float(np.concatenate(across).mean()) / inside


def _estimates(
    public: PublicModel, model: StudyModel, known: PatientBatch, asked: PatientBatch, place: Place
) -> Mapping[str, F64]:
    pet = known.values["pet"][:, 0].double().numpy()
    steps = place.sizes.sampler_steps
    samples = [from_mri(model, asked, steps, 1000 * place.seed + k) for k in range(DRAWS)]
    through = public.bank.decode(public.bank.encode(asked).z_BVNW)["pet"][:, 0].double().numpy()
    return {
        "model": from_mri(model, asked, 1, place.seed),
        "mean of samples": np.mean(samples, axis=0),
        "one sample": samples[0],
        "mean of training patients": np.broadcast_to(pet.mean(axis=0), (len(asked), *pet.shape[1:])).copy(),
        "ridge on tokens": ridge(public.bank, known, asked),
        "nearest patient": nearest(known, asked),
        "codec alone": through,
    }


def _compared(scored: Mapping[str, Scores], place: Place) -> list[Figure]:
    """One figure a measure, the model's one-step estimate first; 95 % intervals over patients among the peers."""
    out = []
    labels = {
        "psnr": ("PSNR of PET from MRI inside the body, leaving a vendor out", "dB"),
        "ssim": ("SSIM of PET from MRI inside the body, leaving a vendor out", ""),
        "mae": ("mean absolute error of PET from MRI inside the body, leaving a vendor out", "g/ml"),
        "lesion": ("error of mean SUV in the tumour, PET from MRI, leaving a vendor out", "g/ml"),
    }
    for measure, (name, unit) in labels.items():
        values = {way: np.asarray(getattr(found, measure)) for way, found in scored.items()}
        means = {way: float(np.nanmean(value_B)) for way, value_B in values.items()}
        low, high = _interval(values["model"], place.seed)
        peers = {way: value for way, value in means.items() if way != "model"}
        peers |= {"95 % interval from": low, "95 % interval to": high}
        bar = means["mean of training patients"] - MARGIN_DB if measure == "psnr" and place.privacy != "8" else None
        out.append(Figure(name, means["model"], unit, peers, bar, None if bar is None else "least"))
    gain_B = scored["model"].psnr - scored["mean of training patients"].psnr
    low, high = _interval(gain_B, place.seed)
    peers = {"95 % interval from": low, "95 % interval to": high, "patients who gain": float((gain_B > 0).mean())}
    return [
        *out,
        Figure("PSNR of PET from MRI over the training patients' mean PET", float(gain_B.mean()), "dB", peers),
    ]


def _realism(estimates: Mapping[str, Sequence[F64]], truth_BX: F64) -> list[Figure]:
    """How much the codec's blocks show in what is sampled."""
    sampled = np.concatenate(estimates["one sample"])
    through = np.concatenate(estimates["codec alone"])
    return [
        Figure(
            name="steps across block borders over steps inside blocks, sampled PET",
            value=blockiness(sampled),
            peers={"real": blockiness(truth_BX), "real through the codec": blockiness(through)},
        )
    ]


def _price(spent: Sequence[tuple[float, float]], place: Place) -> list[Figure]:
    """What the private steps cost, and how loud their noise is."""
    if place.privacy != "8":
        return []
    epsilon, sigma = spent[0]
    return [
        Figure("epsilon spent on the real patients", epsilon, bar=float(place.privacy), at="most"),
        Figure("noise multiplier of a step on 3 to 13 patients a site", sigma),
    ]


def _interval(values_B: F64, seed: int) -> tuple[float, float]:
    return bootstrap_interval(lambda rows: float(np.nanmean(values_B[rows])), len(values_B), seed)


def _together(parts: Sequence[Patients]) -> Patients:
    return Patients(
        PatientBatch.concat([part.batch for part in parts]),
        np.concatenate([part.body_BX for part in parts]),
        np.concatenate([part.lesion_BX for part in parts]),
    )
