"""What privacy costs: time and peak memory of one private step over one plain step on the same records, in one run.

A plain step is one batch of all records, one backward pass and AdamW. A private step is the whole of
:func:`privacy.training.train_round`'s step: per-patient gradients, norms, clip, sum, noise from the cryptographic stream, grid,
AdamW. Engine and chunk are those that the measured trial picks, as in a run. Opacus's own steps stand beside it; they clip each
noise draw by itself, so with four draws they answer an easier question.

Time is processor time of one thread; every repetition runs all methods one after the other, and a row is the median of the
ratios within a repetition. Memory is the rise of the peak resident set over what is resident before a step that is not the
first, each method in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from privacy.gradients import FREE_ENGINES, Engine, Speed, chunks, measure_speed, raw_gradients
from privacy.noise import system_noise
from privacy.peers import MODES, opacus_step
from privacy.training import StreamDPOptimizer
from simulations.benchmarks.dp_networks import CASES, Case, Network, Units, network
from simulations.benchmarks.runner import BenchResult, Row, collect

Step = Callable[[], None]
UNSUPPORTED = (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError, KeyError)
PATIENTS: Mapping[Case, int] = {"aekl-3d": 4, "unet-2d-wide": 4}
USUAL_PATIENTS = 16
REPEATS = 5
DRAWS = (4, 1)
TIME_BARS: dict[int, float] = {4: 1.3, 1: 1.6}
MEMORY_BARS: dict[int, float] = {4: 1.0, 1: 2.0}
CORE_BAR = 1.2


def run(plot: Path | None = None) -> BenchResult:
    """Measure every network; with ``plot``, also the scaling curves, drawn into that file."""
    return collect("dp-step", "medgen bench dp-step", lambda: rows(plot))


def rows(
    plot: Path | None, cases: Sequence[Case] = CASES, patients: int | None = None, repeats: int = REPEATS
) -> list[Row]:
    """Time and memory rows of every case at four draws and at one, then the scaling of our step; progress is printed.

    ``patients`` replaces the number of patients that each case has for itself.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: list[Row] = []
        for case in cases:
            for draws in DRAWS:
                Console(stderr=True).print(f"{case}, {draws} draws", style="dim")
                found += _case(case, patients or PATIENTS.get(case, USUAL_PATIENTS), draws, repeats)
        if plot is not None:
            from simulations.benchmarks.dp_scaling import scaling

            found += scaling(plot)
        return found
    finally:
        torch.set_num_threads(before)


def plain_step(net: Network, units: Units) -> Step:
    """One ordinary step over all records: one backward pass, AdamW."""
    leaves = {name: value.requires_grad_() for name, value in net.params.items()}
    adam = torch.optim.AdamW(list(leaves.values()), lr=1e-3, fused=True)

    class _Replaced(nn.Module):
        def forward(self, *args: object) -> torch.Tensor:
            out: torch.Tensor = torch.func.functional_call(net.module, leaves, args)
            return out

    replaced = _Replaced()

    def step() -> None:
        adam.zero_grad()
        net.batch_losses(replaced, units).mean().backward()  # type: ignore[no-untyped-call]
        adam.step()

    return step


def private_step(net: Network, units: Units, speed: Speed) -> Step:
    """One step as :func:`privacy.training.train_round` takes it."""
    named = {name: nn.Parameter(value) for name, value in net.params.items()}
    adam = torch.optim.AdamW(list(named.values()), lr=1e-3, fused=True)
    patients = len(next(iter(units.values())))
    optimizer = StreamDPOptimizer(
        adam, sigma=1.0, clip=1.0, divisor=float(patients), noise=system_noise(), chunk=speed.chunk
    )

    def step() -> None:
        current = {name: value.detach() for name, value in named.items()}
        for part in chunks(units, speed.chunk):
            gradients, losses = raw_gradients(net.unit_loss, current, part, speed.engine)
            optimizer.accumulate(gradients, named, losses)
        optimizer.step()
        optimizer.clear()

    return step


def _case(case: Case, patients: int, draws: int, repeats: int) -> list[Row]:
    net = network(case)
    units = net.make_units(patients, draws)
    _, speed = measure_speed(net.unit_loss, net.params, units, repeats=1)
    methods: dict[str, Callable[[], Step]] = {
        "plain": lambda: plain_step(net, units),
        "ours": lambda: private_step(net, units, speed),
        **{engine: _engine(net, units, engine, speed) for engine in FREE_ENGINES},
        **{f"Opacus {mode}": _opacus(net, units, mode, patients * draws) for mode in MODES},
    }
    memory = {name: peak_bytes(make) for name, make in methods.items()}
    seconds = paired_seconds(methods, repeats)
    ratios = {
        name: statistics.median(own / plain for own, plain in zip(times, seconds["plain"], strict=False))
        for name, times in seconds.items()
    }
    what = f"{net.about}, {net.weights / 1e6:.2g} M weights, {patients} patients x {draws} draws"
    chosen = f"{speed.engine}, chunk {speed.chunk}"
    time_bar = CORE_BAR if case == "core" else TIME_BARS[draws]
    peers = {name: ratios.get(name) for name in methods if name not in ("plain", "ours")}
    bytes_of = {name: None if memory[name] is None else memory[name] / 2**20 for name in methods}  # type: ignore[operator]
    plain_mib = bytes_of["plain"] or float("nan")
    low, high = _spread(seconds["ours"], seconds["plain"])
    return [
        Row.at_most(f"time: {what} ({chosen})", ratios["ours"], time_bar, unit="x plain", peers=peers, interval=(low, high)),
        Row.at_most(
            f"memory: {what} ({chosen}; plain {plain_mib:.0f} MiB)",
            (bytes_of["ours"] or float("nan")) / plain_mib,
            MEMORY_BARS[draws],
            unit="x plain",
            peers={name: None if bytes_of[name] is None else bytes_of[name] / plain_mib for name in peers},  # type: ignore[operator]
        ),
    ]  # fmt: skip


def _engine(net: Network, units: Units, engine: Engine, speed: Speed) -> Callable[[], Step]:
    return lambda: private_step(net, units, Speed(engine, speed.chunk, speed.threads))


def _opacus(net: Network, units: Units, mode: str, examples: int) -> Callable[[], Step]:
    def losses(module: nn.Module) -> torch.Tensor:
        patients = len(next(iter(units.values())))
        draws = examples // patients
        single = {
            name: value.flatten(0, 1)[:, None] for name, value in units.items() if value.shape[:2] == (patients, draws)
        }
        return net.batch_losses(module, single)

    return lambda: opacus_step(net.module, losses, examples, mode)  # type: ignore[arg-type]  # one of MODES


def _spread(own: Sequence[float], plain: Sequence[float]) -> tuple[float, float]:
    ratios = sorted(a / b for a, b in zip(own, plain, strict=True))
    return ratios[0], ratios[-1]


def paired_seconds(methods: dict[str, Callable[[], Step]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each method's step, all methods in turn in every repetition; a method that fails is left out.

    Opacus's steps take several times as long and are peers, not figures: they run cold and in the first repetition only.
    """
    steps = {name: make() for name, make in methods.items() if not _peer(name)}
    for name, step in list(steps.items()):
        try:
            step()  # warm: allocator, kernels, optimizer state
        except UNSUPPORTED:
            if name not in FREE_ENGINES:
                raise
            del steps[name]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
        if repetition == 0:
            seconds |= _peers({name: make for name, make in methods.items() if _peer(name)})
    return seconds


def _peer(name: str) -> bool:
    return name.startswith("Opacus")


def _peers(methods: dict[str, Callable[[], Step]]) -> dict[str, list[float]]:
    """Processor seconds of one step of each peer that supports the network."""
    seconds: dict[str, list[float]] = {}
    for name, make in methods.items():
        try:
            step = make()
            started = time.process_time()
            step()
            seconds[name] = [time.process_time() - started]
        except UNSUPPORTED:
            continue
    return seconds


def peak_bytes(make: Callable[[], Step]) -> int | None:
    """Rise of the peak resident set during a second step, in a forked process of its own; None if the step cannot run.

    Reads and resets the high-water mark of Linux (``/proc/self/clear_refs``).

    Raises:
        ValueError: this system has no such mark.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("peak memory is read from /proc; run this benchmark on Linux")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        answer = b""
        try:
            torch.set_num_threads(1)  # a forked process has lost its pool of threads: waiting for them would never end
            step = make()
            step()  # maps the code and makes the optimizer's state, for every method alike
            _give_back_free_memory()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = _status_bytes("VmHWM")
            step()
            answer = str(max(1, _status_bytes("VmHWM") - before)).encode()
        except BaseException:
            answer = b""
        finally:
            os.write(write, answer)
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text) if text else None


def _give_back_free_memory() -> None:
    """Return what the allocator holds and nobody uses, or a step would grow into it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc; elsewhere the figure is a lower bound
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024
