"""One model for every task against one system for each: what the published forms give for the same patients and steps.

Four forms, re-implemented in small for the same public patients, steps and batch as the public core: a fused autoencoder
with latent diffusion (:mod:`simulations.benchmarks.peer_fused`) against joint sampling, one generator per target
(:mod:`simulations.benchmarks.peer_per_target`) against imputation, a conditional latent U-Net
(:mod:`simulations.benchmarks.peer_latent_unet`) against cells of pathology and sequence, and the table prior alone against
the joint table. What is compared are forms of generators, at about the core's size: not the published systems, their data
or their scale. Where a form has several stages or generators, "same total steps" divides the core's steps among them and
"same steps each" gives each as many as the core took for everything.

Rates were tried on development seed 10, which is not among those that are reported; each form says what was tried.
"""

from __future__ import annotations

import dataclasses
import time

from medgen_models.assembly import StudyModel
from medgen_models.pretrain import train_core
from medgen_models.tokens import TokenBatch
from simulations.benchmarks.peers_cells import against_unet
from simulations.benchmarks.peers_imputed import against_per_target
from simulations.benchmarks.peers_joint import against_fused
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place, pretrain_config

PRIVACIES: tuple[Privacy, ...] = ("public",)
USES_THE_WORLD = True
TIMED_STEPS = 10


def figures(place: Place) -> list[Figure]:
    """Every form against the core: its own task, its size, its training time."""
    model = place.model()
    tokens = model.bank.encode(place.world().public)
    core_seconds = _seconds_of_core(place, model, tokens)
    parts = (
        against_fused(place, model, tokens),
        against_per_target(place, model, tokens),
        against_unet(place, model),
    )
    return [
        *(figure for part in parts for figure in part.figures),
        Figure(
            "parameters of the one core, for all tasks",
            sum(p.numel() for p in model.core.parameters()),
            peers={name: count for part in parts for name, count in part.parameters.items()},
        ),
        Figure(
            f"processor seconds of training, the core's extrapolated from {TIMED_STEPS} steps",
            core_seconds,
            "s",
            peers={name: spent for part in parts for name, spent in part.seconds.items()},
        ),
    ]


def _seconds_of_core(place: Place, model: StudyModel, tokens: TokenBatch) -> float:
    """Processor seconds of the core's training, from a few steps of it: its model may have been made long ago."""
    config = dataclasses.replace(pretrain_config(place.sizes), steps=TIMED_STEPS)
    started = time.process_time()
    train_core(model.layout, tokens, config, place.seed, readouts=model.public.readouts)
    return (time.process_time() - started) / TIMED_STEPS * place.sizes.pretrain_steps
