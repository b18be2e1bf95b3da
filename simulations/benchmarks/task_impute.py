"""Missing images from what a patient has: one model for every mask, beside mean, nearest patient and ridge.

MRI, FDG and AV45 of patients who have all three are withheld in every combination, with and without the table; and at
random, where each other record is missing with chance 0, 50 or 80 %. Errors are in token space, pooled over patients and
numbers, and in the image. A mask is *informative* for a target if a ridge gains half a decibel over the population mean on
public patients left out of its fit: this is known before a test patient is looked at.

Draws are judged by proper scores beside a ridge with Gaussian residuals, and by how often 90 % intervals of regions hold
what was measured in the true image. Shape legend: B patients, K draws, D numbers of a target's tokens, N tokens, W token
width, R regions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.assembly import StudyModel
from medgen_models.heads import Predictor, fit_predictor
from medgen_models.metrics.image import psnr, ssim
from medgen_models.metrics.table import auc
from medgen_models.metrics.uncertainty import coverage, crps, energy_score
from medgen_models.schema import PatientBatch
from medgen_models.tasks import states_for, withheld
from medgen_models.tokens import TokenBatch
from medgen_models.uncertainty import decode_one, draw_many, point_estimate, region_draws
from simulations import phantom_attributes as attributes
from simulations import phantoms
from simulations.benchmarks.impute_baselines import (
    Imputed,
    flat,
    gain_db,
    having,
    impute,
    inputs,
    label,
    of_instance,
    ridge,
)
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place, World

F64 = NDArray[np.float64]
PRIVACIES: tuple[Privacy, ...] = ("inf", "8")
USES_THE_WORLD = True
TARGETS = ("mri.a", "pet.fdg", "pet.av45")
ROW = "ehr"
MASKS: tuple[tuple[str, ...], ...] = tuple(
    (*images, *row) for row in ((), (ROW,)) for n in (2, 1, 0) for images in itertools.combinations(TARGETS, n)
)
"""What is given; the targets among the rest are imputed together."""
RATES = (0.0, 0.5, 0.8)
INFORMATIVE_DB = 0.5
DRAWN_MASKS: tuple[tuple[str, ...], ...] = (("mri.a", "pet.fdg"), ("pet.fdg", "pet.av45", ROW), ("pet.av45",), (ROW,))
"""Masks whose draws are judged: draws cost a thousand times a point estimate."""
DRAWS, MEAN_OF, DRAWN_PATIENTS = 40, 16, 16
LEVEL = 0.9
MEAN_BAR_DB, RIDGE_BAR_DB, COVERAGE_BAR = -0.3, -0.5, 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What every part of this row reads.

    Attributes:
        model: the one set of weights.
        public: public patients in the public codecs, for baselines.
        test, batch: test patients who have all three targets, encoded by the model's codecs, and as they are.
        test_public: the same in the public codecs, whose centres may lie elsewhere: errors of both kinds compare, because a
            shift of the centre leaves a difference of tokens as it is.
        sampler_steps: steps of the sampler.
        seed: of all that is drawn.
    """

    model: StudyModel
    public: TokenBatch
    test: TokenBatch
    test_public: TokenBatch
    batch: PatientBatch
    sampler_steps: int
    seed: int


def figures(place: Place) -> list[Figure]:
    """Every mask, missing rates, downstream, draws and intervals."""
    patients, model = place.world(), place.model()
    setting, rows = setting_of(place, model, patients)
    baselines = all_baselines(setting)
    found = list(mask_figures(setting, baselines))
    found += list(rate_figures(setting))
    found += list(downstream_figures(place, setting, patients, rows))
    found += list(draw_figures(setting, baselines))
    return found


def setting_of(place: Place, model: StudyModel, patients: World) -> tuple[Setting, Tensor]:
    """The patients of this row, and their rows among the test patients."""
    everyone = place.test()
    places = [patients.schema.keys().index(key) for key in (*TARGETS, ROW)]
    rows = everyone.present_BVI[:, 0, places].all(1).nonzero().flatten()
    batch, public = everyone.select(rows), model.public.bank
    setting = Setting(
        model=model,
        public=public.encode(patients.public),
        test=model.bank.encode(batch),
        test_public=public.encode(batch),
        batch=batch,
        sampler_steps=place.sizes.sampler_steps,
        seed=place.seed,
    )
    return setting, rows


def all_baselines(setting: Setting) -> dict[tuple[tuple[str, ...], str], Imputed]:
    """Baselines of every mask and target."""
    layout = setting.model.layout
    return {
        (given, target): impute(layout, setting.public, setting.test_public, given, target)
        for given in MASKS
        for target in TARGETS
        if target not in given
    }


def only(setting: Setting, tokens: TokenBatch, known_BVI: Tensor) -> tuple[TokenBatch, Tensor]:
    """What is known of ``tokens``, and the states that draw the targets that are not."""
    layout = setting.model.layout
    drawn = torch.zeros(layout.instances, dtype=torch.bool)
    drawn[[layout.place(key) for key in TARGETS]] = True
    states = states_for("impute", layout, tokens.present_BVI & (known_BVI | drawn), known_BVI=known_BVI)
    return withheld(tokens, layout, known_BVI), states


def known_of(setting: Setting, tokens: TokenBatch, given: tuple[str, ...]) -> Tensor:
    """The instances ``given`` as a mask (B, V, I)."""
    known = torch.zeros_like(tokens.present_BVI)
    known[..., [setting.model.layout.place(key) for key in given]] = True
    return known


def estimate(setting: Setting, tokens: TokenBatch, known_BVI: Tensor) -> Tensor:
    """One-step estimate of every unknown target (B, V, N, W)."""
    given, states = only(setting, tokens, known_BVI)
    generator = torch.Generator().manual_seed(setting.seed)
    return point_estimate(setting.model.core, setting.model.layout, given, states, generator=generator)


def mask_figures(setting: Setting, baselines: Mapping[tuple[tuple[str, ...], str], Imputed]) -> Iterator[Figure]:
    """Token-space errors of every mask and target: worst cases against the bars, then each mask by itself."""
    layout, test = setting.model.layout, setting.test
    gains: dict[tuple[tuple[str, ...], str], dict[str, float]] = {}
    for given in MASKS:
        guess = estimate(setting, test, known_of(setting, test, given))[:, 0].double().numpy()
        for target in TARGETS:
            if (given, target) not in baselines:
                continue
            base, truth_BD = baselines[given, target], flat(layout, setting.test_public, target)
            own = flat(layout, test, target) - of_instance(layout, guess, target)
            mean = truth_BD - base.mean_BD
            gains[given, target] = {
                "model": gain_db(own, mean),
                "ridge": gain_db(truth_BD - base.ridge_BD, mean),
                "nearest patient": gain_db(truth_BD - base.nearest_BD, mean),
            }
    told = [cell for cell in gains if baselines[cell].expected_gain_db >= INFORMATIVE_DB]
    least = min(gains, key=lambda cell: gains[cell]["model"])
    yield Figure(
        "gain of the one-step estimate over the population mean, worst of all masks",
        gains[least]["model"],
        unit="dB",
        bar=MEAN_BAR_DB,
        at="least",
    )
    if told:
        for peer, bar in (("population mean", 0.0), ("nearest patient", 0.0), ("ridge", RIDGE_BAR_DB)):
            over = [gains[cell]["model"] - gains[cell].get(peer, 0.0) for cell in told]
            yield Figure(
                f"gain of the one-step estimate over the {peer}, worst of the informative masks",
                min(over),
                unit="dB",
                peers={"mean over these masks": float(np.mean(over)), "masks": float(len(over))},
                bar=bar,
                at="least",
            )
    for (given, target), found in gains.items():
        name = f"gain over the population mean, {target} from {' + '.join(given) or 'nothing'}"
        peers = {who: value for who, value in found.items() if who != "model"}
        yield Figure(name, found["model"], unit="dB", peers=peers)


def rate_figures(setting: Setting) -> Iterator[Figure]:
    """PSNR and SSIM of each target where every other record is missing at a rate.

    The ridge of the peers is one for all patterns of a target: absent tokens are 0 and presence is an input, and it is fitted
    on public patients whose records were withheld at the same rate.
    """
    layout, bank, test = setting.model.layout, setting.model.bank, setting.test
    rng = np.random.default_rng(setting.seed)
    others = tuple(key for key in layout.keys if key != "note")
    for target in TARGETS:
        truth = setting.batch.values[target][:, 0].double().numpy()
        own = having(layout, setting.public, (target,))
        for rate in RATES:
            given = tuple(key for key in others if key != target)
            known, public_known = (draw_known(setting, each, given, rate, rng) for each in (test, own))
            model_z = estimate(setting, test, known)
            x_PF = masked_inputs(setting, own, given, public_known, target)
            x_BF = masked_inputs(setting, setting.test_public, given, known, target)
            y_PD = flat(layout, own, target)
            guesses = {"ridge": ridge(x_PF, y_PD, x_BF), "population mean": _mean_of(setting, own, target)}
            images = {"model": decode_one(bank, model_z, target)[:, 0].double().numpy()}
            images |= {who: _decoded(setting, guess, target) for who, guess in guesses.items()}
            images["codec alone"] = decode_one(bank, test.z_BVNW, target)[:, 0].double().numpy()
            scores: tuple[tuple[str, Callable[[F64, F64], F64], str], ...] = (("PSNR", psnr, "dB"), ("SSIM", ssim, ""))
            for measure, function, unit in scores:
                found = {who: float(function(truth, image).mean()) for who, image in images.items()}
                name = f"{measure} of imputed {target}, other records {100 * rate:.0f} % missing"
                yield Figure(name, found.pop("model"), unit=unit, peers=found)


def draw_known(
    setting: Setting, tokens: TokenBatch, given: tuple[str, ...], rate: float, rng: np.random.Generator
) -> Tensor:
    """Which of ``given`` stays known (B, V, I) where each is lost with chance ``rate``."""
    kept = torch.from_numpy(rng.random(tokens.present_BVI.shape) >= rate)
    return known_of(setting, tokens, given) & tokens.present_BVI & kept


def masked_inputs(setting: Setting, tokens: TokenBatch, given: tuple[str, ...], known_BVI: Tensor, target: str) -> F64:
    """What a ridge for all patterns reads (B, F): known tokens, 0 elsewhere, presence, and the labels of the known."""
    layout = setting.model.layout
    shown = withheld(tokens, layout, known_BVI)
    free = torch.tensor([not factor.column for factor in layout.factors])
    labels = torch.where(known_BVI[..., None] & free, shown.factor_BVIF, 0)
    i = layout.place(target)
    labels[:, :, i] = torch.where(free, tokens.factor_BVIF[:, :, i], 0)
    here = known_BVI[:, 0, [layout.place(key) for key in given]].double().numpy()
    read = inputs(layout, dataclasses.replace(shown, factor_BVIF=labels), given, target)
    return np.concatenate([read, here], axis=1)


def downstream_figures(place: Place, setting: Setting, patients: World, rows: Tensor) -> Iterator[Figure]:
    """A classifier of amyloid and one of dementia, trained on complete real patients, read on imputed ones.

    Only the three targets are read and only they are given: a row would tell the answer.
    """
    layout = setting.model.layout
    whole = having(layout, setting.public, TARGETS)
    at = setting.public.present_BVI[:, 0, [layout.place(key) for key in TARGETS]].all(1).numpy()
    truths = (
        (patients.public_test_truth,) if place.privacy == "public" else patients.hospital_test_truth
    )  # in the order of the test patients
    dementia = phantoms.PATHOLOGIES.index("dementia")
    for name in ("amyloid", "dementia"):

        def labels(truth: phantoms.Phantoms, name: str = name) -> F64:
            found = truth.latents.amyloid if name == "amyloid" else truth.latents.pathology == dementia
            return np.asarray(found, np.float64)

        head = fit_predictor(_three(setting, whole, whole.z_BVNW), labels(patients.public_truth)[at], 2, 0, "linear")
        answer_B = np.concatenate([labels(truth) for truth in truths])[rows.numpy()] > 0
        complete = _auc(head, _three(setting, setting.test_public, setting.test_public.z_BVNW), answer_B)
        rng = np.random.default_rng(setting.seed)
        for rate in RATES[1:]:
            known = draw_known(setting, setting.test, TARGETS, rate, rng)
            shift = setting.test_public.z_BVNW - setting.test.z_BVNW  # between the centres of both codecs
            guess = _spread(setting, known, setting.test_public.z_BVNW, estimate(setting, setting.test, known) + shift)
            means, ridges = torch.zeros_like(guess), torch.zeros_like(guess)
            for target in TARGETS:
                given = tuple(key for key in TARGETS if key != target)
                own = having(layout, setting.public, (target,))
                public_known = draw_known(setting, own, given, rate, rng)
                x_PF = masked_inputs(setting, own, given, public_known, target)
                x_BF = masked_inputs(
                    setting, setting.test_public, given, known & known_of(setting, setting.test, given), target
                )
                _put(setting, means, target, _mean_of(setting, own, target))
                _put(setting, ridges, target, ridge(x_PF, flat(layout, own, target), x_BF))
            filled = {
                "mean-imputed": _spread(setting, known, setting.test_public.z_BVNW, means),
                "ridge-imputed": _spread(setting, known, setting.test_public.z_BVNW, ridges),
            }
            peers = {"complete": complete} | {
                who: _auc(head, _three(setting, setting.test_public, z), answer_B) for who, z in filled.items()
            }
            score = _auc(head, _three(setting, setting.test_public, guess), answer_B)
            yield Figure(f"AUC of {name} on imputed images, each {100 * rate:.0f} % missing", score, peers=peers)


def draw_figures(setting: Setting, baselines: Mapping[tuple[tuple[str, ...], str], Imputed]) -> Iterator[Figure]:
    """Scores of the draws, what the mean of sixteen adds to one step, and coverage of regions."""
    layout, some = setting.model.layout, list(range(min(DRAWN_PATIENTS, len(setting.test))))
    test, rng = setting.test.select(some), np.random.default_rng(setting.seed)
    truth_R = {key: region_measures(key)(setting.batch.values[key][some, 0]) for key in TARGETS}
    ratios: dict[str, list[float]] = {"CRPS": [], "energy score": []}
    over_one_step: list[float] = []
    covered: dict[str, list[float]] = {key: [] for key in TARGETS}
    gaussian: dict[str, list[float]] = {key: [] for key in TARGETS}
    for given in DRAWN_MASKS:
        shown, states = only(setting, test, known_of(setting, test, given))
        generator = torch.Generator().manual_seed(setting.seed)
        z_KBVNW = draw_many(
            setting.model.core,
            layout,
            shown,
            states,
            draws=DRAWS,
            generator=generator,
            steps=setting.sampler_steps,
        )
        one = estimate(setting, test, known_of(setting, test, given))[:, 0].double().numpy()
        for target in TARGETS:
            if (given, target) not in baselines:
                continue
            base = baselines[given, target]
            own = dataclasses.replace(base, ridge_BD=base.ridge_BD[some])
            draws_KBD = of_instance(layout, z_KBVNW[:, :, 0].double().numpy(), target)
            truth_BD = flat(layout, test, target)
            gauss_KBD, gauss_truth_BD = (
                own.gaussian_draws(DRAWS, rng),
                flat(layout, setting.test_public.select(some), target),
            )
            ratios["CRPS"].append(float(crps(draws_KBD, truth_BD).mean() / crps(gauss_KBD, gauss_truth_BD).mean()))
            ratios["energy score"].append(
                float(energy_score(draws_KBD, truth_BD).mean() / energy_score(gauss_KBD, gauss_truth_BD).mean())
            )
            error = truth_BD - of_instance(layout, one, target)
            over_one_step.append(gain_db(truth_BD - draws_KBD[:MEAN_OF].mean(axis=0), error))
            measure = region_measures(target)
            regions_KBR = region_draws(setting.model.bank, z_KBVNW, target, measure)[:, :, 0]
            covered[target].append(coverage(regions_KBR, truth_R[target].double().numpy(), LEVEL))
            gauss_z = torch.zeros(DRAWS, *test.z_BVNW.shape)
            for k in range(DRAWS):
                _put(setting, gauss_z[k], target, gauss_KBD[k])
            gauss_KBR = region_draws(setting.model.public.bank, gauss_z, target, measure)[:, :, 0]
            gaussian[target].append(coverage(gauss_KBR, truth_R[target].double().numpy(), LEVEL))
    for name, values in ratios.items():
        yield Figure(
            f"{name} of draws over that of a ridge with Gaussian residuals",
            float(np.mean(values)),
            peers={"worst mask": max(values), "best mask": min(values)},
            bar=1.0,
            at="most",
        )
    yield Figure(
        f"gain of the mean of {MEAN_OF} draws over the one-step estimate", float(np.mean(over_one_step)), unit="dB"
    )
    everything = float(np.mean([value for values in covered.values() for value in values]))
    yield Figure(
        "distance of the coverage of 90 % intervals of regions from 90 %",
        abs(everything - LEVEL),
        peers={
            "coverage": everything,
            "coverage of a ridge with Gaussian residuals": float(np.mean([v for vs in gaussian.values() for v in vs])),
        },
        bar=COVERAGE_BAR,
        at="most",
    )
    for target, values in covered.items():
        yield Figure(
            f"coverage of 90 % intervals of regions of {target}",
            float(np.mean(values)),
            peers={"ridge with Gaussian residuals": float(np.mean(gaussian[target]))},
        )


def region_measures(key: str) -> Callable[[Tensor], Tensor]:
    """Means of an image (G, X, Y, Z) in public anatomical regions, linear in it (G, R)."""
    area = attributes.regions()
    names = ("ventricle", "hippocampus", "white", "deep") if key.startswith("mri") else (
        "temporoparietal", "association", "cerebellum", "white", "deep"
    )  # fmt: skip
    weights_RX = torch.from_numpy(np.stack([getattr(area, name).ravel() for name in names])).float()

    def measure(images: Tensor) -> Tensor:
        return images.flatten(1) @ weights_RX.mT

    return measure


def _three(setting: Setting, tokens: TokenBatch, z_BVNW: Tensor) -> F64:
    """Tokens of the three targets and the sequence of the MRI: what the downstream classifier reads (B, F)."""
    layout, z = setting.model.layout, z_BVNW[:, 0].double().numpy()
    sequence = np.eye(len(phantoms.SEQUENCES) + 1)[label(layout, tokens, TARGETS[0]) // (len(phantoms.TRACERS) + 1)]
    return np.concatenate([*(of_instance(layout, z, key) for key in TARGETS), sequence], axis=1)


def _auc(head: Predictor, x_BF: F64, answer_B: NDArray[np.bool_]) -> float:
    return auc(answer_B, head.predict(x_BF)[:, 1])


def _mean_of(setting: Setting, own: TokenBatch, target: str) -> F64:
    """The population mean for every test patient (B, D), of records with the same label."""
    return impute(setting.model.layout, own, setting.test_public, (), target).mean_BD


def _put(setting: Setting, z_BVNW: Tensor, target: str, values_BD: F64) -> None:
    """Write a target's numbers into a token array."""
    i = setting.model.layout.place(target)
    shape = (setting.model.layout.tokens_I[i], setting.model.layout.width_I[i])
    z_BVNW[:, 0, setting.model.layout.span(i), : shape[1]] = torch.from_numpy(values_BD).float().reshape(-1, *shape)


def _decoded(setting: Setting, values_BD: F64, target: str) -> F64:
    """Images (B, X, Y, Z) of a baseline's tokens, by the public codecs."""
    z = torch.zeros_like(setting.test.z_BVNW)
    _put(setting, z, target, values_BD)
    return np.asarray(decode_one(setting.model.public.bank, z, target)[:, 0].double().numpy())


def _spread(setting: Setting, known_BVI: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """``own`` where an instance is known, ``other`` elsewhere."""
    here = (known_BVI.float() @ setting.model.layout.onehot_NI().mT)[..., None]
    return own * here + other * (1.0 - here)
