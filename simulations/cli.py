"""``medgen simulate``, ``medgen bench`` and ``medgen pretrain``: a federation on one machine, figures, public models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def simulate(
    scenario: Annotated[
        str, typer.Argument(help="A scenario by name (demo, autoencoders, petmr, icu) or a .toml file.")
    ],
    backend: Annotated[
        Literal["inprocess", "ray"], typer.Option(help="Who carries the messages; the apps are the same.")
    ] = "inprocess",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the latest unfinished run of this scenario; nothing is spent twice."),
    ] = False,
    keep_hospitals: Annotated[
        bool,
        typer.Option("--keep-hospitals", help="Keep the generated records after the run; ledgers are always kept."),
    ] = False,
    hospitals: Annotated[
        Path | None, typer.Option(help="Run on these site folders (of an earlier run) instead of fresh ones.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value, e.g. --set study.privacy.epsilon=inf (repeatable)."),
    ] = None,
) -> None:
    """Run a whole study on this machine, hospitals included: train, release, attack, report.

    Exit code 0 when the study ended with a report (whatever its verdict), 1 when it did not.
    """
    from simulations.simulate import Request, run_scenario

    request = Request(
        scenario=scenario,
        backend=backend,
        resume=resume,
        keep_hospitals=keep_hospitals,
        hospitals=hospitals,
        runs=runs,
        overrides=tuple(set_ or ()),
    )
    raise typer.Exit(run_scenario(request))


def bench(
    name: Annotated[str, typer.Argument(help="Benchmark name; `medgen bench list` lists them.")],
    run: Annotated[Path | None, typer.Option(help="A finished run folder, where the benchmark reads one.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result to this JSON file.")] = None,
    rows: Annotated[
        str, typer.Option(help="Rows of `tasks`, parts of `federation`, separated by commas; all by default.")
    ] = "",
    data: Annotated[
        Path, typer.Option(help="Folder of the real data sets, for rows of `tasks` that read them.")
    ] = Path("../shared/data"),
) -> None:
    """Measure one headline figure and print it with its unit, interval, peers and bar."""
    from simulations.benchmarks.index import run_benchmark

    raise typer.Exit(run_benchmark(name, run, json, rows, data))


def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the model and its card; created.")],
    data: Annotated[
        str, typer.Option(help="phantoms, or a folder of public records laid out as a hospital's.")
    ] = "phantoms",
    schema: Annotated[str, typer.Option(help="demo, autoencoders, petmr, icu, or a JSON file.")] = "demo",
    preset: Annotated[
        Literal["smoke", "small", "base"] | None,
        typer.Option(help="Size of core and images; without it, images as in the schema and the smallest core."),
    ] = None,
    dial: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="Size of the core alone: 0 smoke, 1 small, 2 base.")
    ] = None,
    patients: Annotated[int, typer.Option(min=8, help="Phantoms to generate.")] = 600,
    reference: Annotated[
        int, typer.Option(min=0, help="Of the public patients, how many are set aside, for `medgen study plan`.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the core.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Patients in a step.")] = 32,
    codec_steps: Annotated[int, typer.Option(min=1, help="Training steps of each autoencoder.")] = 300,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    source: Annotated[str, typer.Option(help="Where the records come from; goes onto the card.")] = "",
    licence: Annotated[str, typer.Option(help="Under which terms; goes onto the card.")] = "",
    overlap_check: Annotated[
        Path | None,
        typer.Option(help="Report of a check that no patient of a study is among them.", exists=True, dir_okay=False),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="Weights of an aekl codec, slot=folder (repeatable).")
    ] = None,
    contrastive: Annotated[float, typer.Option(min=0.0, help="Weight of InfoNCE between images and the rest.")] = 0.0,
    adversarial: Annotated[float, typer.Option(min=0.0, help="Weight of a discriminator, autoencoders only.")] = 0.0,
    perceptual: Annotated[float, typer.Option(min=0.0, help="Weight of a feature distance, autoencoders only.")] = 0.0,
    perceptual_weights: Annotated[str, typer.Option(help="Features from this file instead of from the seed.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training in --out.")] = False,
) -> None:
    """Train codecs and core on public data, and write a card that says what they saw."""
    from medgen_models.public_terms import PublicTerms
    from simulations.pretraining import Request, run_pretraining

    pairs = [text.partition("=") for text in weights or ()]
    if wrong := [slot for slot, sign, folder in pairs if not (slot and sign and folder)]:
        raise typer.BadParameter(f"expected slot=folder, got {wrong[0]!r}", param_hint="--weights")
    request = Request(
        data=data,
        schema=schema,
        preset=preset,
        dial=dial,
        out=out,
        source=source,
        licence=licence,
        overlap=overlap_check,
        patients=patients,
        reference=reference,
        steps=steps,
        batch=batch,
        codec_steps=codec_steps,
        seed=seed,
        resume=resume,
        weights={slot: Path(folder) for slot, _, folder in pairs},
        terms=PublicTerms(contrastive, adversarial, perceptual, perceptual_weights),
    )
    raise typer.Exit(run_pretraining(request))
