"""The private stages of a study, one function each: statistics, codecs, recentring, the core.

Each stage continues after its last finished round, so a resumed study repeats nothing. The state that travels is a flat
dict of public names: ``mean/<slot>`` (codec centres moved), ``codec.<slot>.<weight>``, and core weights under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.adapters import group_of
from medgen_models.assembly import StudyModel, to_arrays
from medgen_models.codecs.bank import PRESENCE, CodecBank
from medgen_models.prototypes import factor_of
from medgen_models.public_model import PublicModel
from server.aggregation import Ask, GroupSum, RoundSums, StudyError
from server.planning import CODEC, CORE, MARGINALS, PROTOTYPES, RECENTRE
from server.session import Session, attend
from server.study import TrainingConfig
from server.warmup import PublicPatients, level_shifts, shrink, warm_up

WARM_UP = "warm-up"
State = dict[str, NDArray[np.float32]]
Query = tuple[int, ...]


def marginals(session: Session, sites: Sequence[str], domain: Sequence[int]) -> dict[Query, NDArray[np.float64]] | None:
    """Noised counts of the plan's marginals summed over the sites, or None where the plan asks for none."""
    table = session.plan.table
    if table is None:
        return None
    shapes = {query: tuple(domain[column] for column in query) for query in table.marginals}
    group = f"table/{table.slot}"
    stored = query_round(session, sites, MARGINALS, {}, {group: sum(int(np.prod(s)) for s in shapes.values())})
    flat = stored.get(group)
    if flat is None:
        raise StudyError("the marginals of the table could not be opened; resume when more sites are there")
    counts, start = {}, 0
    for query, shape in shapes.items():
        size = int(np.prod(shape))
        counts[query] = flat[start : start + size].reshape(shape)
        start += size
    return counts


def recentre(session: Session, sites: Sequence[str], model: StudyModel, state: State) -> State:
    """The state with ``mean/<slot>`` added for every slot whose noised mean token vector could be opened."""
    if session.plan.recentre is None:
        return state
    groups = session.plan.groups(RECENTRE)
    lengths = {name: model.mean_length(name.removeprefix("mean/")) for name in groups}
    stored = query_round(session, sites, RECENTRE, state, lengths)
    found: State = {}
    for name, total in stored.items():
        slot = name.removeprefix("mean/")
        patients = float(sum(session.plan.roster[site].n_decl for site in session.plan.owners(name) if site in sites))
        contributors = sum(site in sites for site in session.plan.owners(name))
        noise_std = session.dp.query(RECENTRE).noise_std * contributors**0.5
        found[name] = shift_of(model.bank, slot, total, patients, noise_std)
    return {**state, **found}


def shift_of(
    bank: CodecBank, slot: str, total: NDArray[np.float64], patients: float, noise_std: float
) -> NDArray[np.float32]:
    """How far the centre of a slot moves, from the noised sum of its mean token vectors over all sites.

    Args:
        bank: codecs.
        slot: an image slot.
        total: the sum, the slot's part alone.
        patients: declared capacity of the summed sites together.
        noise_std: of the noise on each entry of ``total``.
    """
    shift = bank.shift_from_sum(torch.from_numpy(total).float(), (slot,), patients)[slot].double().numpy()
    count = float(np.clip(total[-1] / PRESENCE, max(0.05 * patients, 1.0), max(patients, 1.0)))
    return shrink(shift, noise_std / count).astype(np.float32)


def prototypes(session: Session, sites: Sequence[str], public: PublicModel, model: StudyModel, state: State) -> State:
    """The state with a core that was warmed up on public patients who look like the hospitals' noised level means.

    The warmed weights are stored, so a resumed study starts its private rounds from the same ones.
    """
    asked = session.plan.prototypes
    if asked is None:
        return state
    warmed = session.checkpoints.last(WARM_UP)
    if warmed is not None:
        return {**state, **warmed.arrays}
    levels = len(factor_of(session.schema, asked.factor).levels)
    names = session.plan.groups(PROTOTYPES)
    lengths = {name: levels * model.mean_length(name.removeprefix("prototype/")) for name in names}
    stored = query_round(session, sites, PROTOTYPES, state, lengths)
    patients = PublicPatients.from_bytes(session.folder.public_patients.read_bytes())
    shift = {}
    for name, total in stored.items():
        contributors = sum(site in sites for site in session.plan.owners(name))
        noise_std = session.dp.query(PROTOTYPES).noise_std * contributors**0.5
        slot = name.removeprefix("prototype/")
        shift[slot] = level_shifts(total.reshape(levels, -1), public.bank, patients, slot, asked.bound, noise_std)
    settings = session.config.prototypes
    weights = warm_up(
        public,
        patients,
        shift,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        seed=session.config.seed,
    )
    session.checkpoints.save(WARM_UP, 0, weights, {})
    return {**state, **weights}


def codecs(session: Session, sites: Sequence[str], model: StudyModel, state: State) -> State:
    """The state after the federated DP training of the autoencoders; they are frozen from here on."""
    if session.plan.codec is None:
        return state
    start = to_arrays(model.codec_weights(session.plan.codec.slots))
    return _train(session, sites, CODEC, session.config.codec, start, state)


def core(session: Session, sites: Sequence[str], model: StudyModel, state: State) -> State:
    """The state after all DP rounds of the core."""
    return _train(session, sites, CORE, session.config.core, to_arrays(model.core_weights()), state)


def _train(
    session: Session,
    sites: Sequence[str],
    stage: str,
    config: TrainingConfig,
    start: Mapping[str, NDArray[np.float32]],
    state: State,
) -> State:
    """Federated averaging of one parameter set: each group over the sites that own it, with public weights."""
    allowed = session.plan.groups(stage)
    names = {g: sorted(n for n in start if group_of(n) == g) for g in allowed}
    names = {g: members for g, members in names.items() if members}
    lengths = {g: sum(start[n].size for n in members) for g, members in names.items()}
    last = session.checkpoints.last(stage)
    current = dict(last.arrays) if last else {**state, **{n: start[n] for m in names.values() for n in m}}
    mean = {key.removeprefix("average:"): current.pop(key) for key in list(current) if key.startswith("average:")}
    rounds = session.dp.training(stage).rounds
    _announce(session, stage, rounds)
    for number in range(last.round + 1 if last else 0, rounds):
        ask = Ask(
            stage=stage,
            round=number,
            arrays=current,
            parts=session.public_parts,
            groups=lengths,
            step=session.plan.quantisation.update,
            max_attempts=1 + session.dp.training(stage).spare_rounds,
        )
        sites = attend(session, sites)
        sums = session.aggregator.run(ask, sites)
        current = apply_change(current, sums.groups, names)
        mean = running_mean(mean, current, [n for m in names.values() for n in m], config.average)
        kept = {**current, **{f"average:{key}": value for key, value in mean.items()}}
        session.checkpoints.save(stage, number, kept, _facts(sums))
        _report_round(session, stage, number, rounds, sums)
    return {**current, **mean}


def apply_change(current: State, sums: Mapping[str, GroupSum], names: Mapping[str, Sequence[str]]) -> State:
    """Weights plus the weighted mean change of each opened group; a group that was not opened stays as it is."""
    out = dict(current)
    for group, total in sums.items():
        change = total.values / total.weight
        start = 0
        for name in names[group]:
            size = current[name].size
            piece = change[start : start + size].reshape(current[name].shape)
            out[name] = (current[name].astype(np.float64) + piece).astype(np.float32)
            start += size
    return out


def running_mean(mean: State, current: State, names: Sequence[str], decay: float) -> State:
    """Exponential mean of the aggregated weights over rounds: post-processing, free. ``decay`` 0 keeps none."""
    if decay == 0:
        return {}
    return {
        name: (decay * mean[name] + (1 - decay) * current[name]).astype(np.float32) if name in mean else current[name]
        for name in names
    }


def query_round(
    session: Session, sites: Sequence[str], stage: str, state: State, lengths: Mapping[str, int]
) -> dict[str, NDArray[np.float64]]:
    """One noised statistic, asked once; its opened sums by group."""
    last = session.checkpoints.last(stage)
    if last is not None:
        return {name: np.asarray(value, np.float64) for name, value in last.arrays.items()}
    _announce(session, stage, 1)
    ask = Ask(
        stage=stage,
        round=0,
        arrays=state,
        parts=session.public_parts,
        groups={name: length for name, length in lengths.items() if name in session.plan.groups(stage)},
        step=session.plan.quantisation.statistic,
        max_attempts=1 + session.dp.query(stage).spare_rounds,
    )
    sums = session.aggregator.run(ask, attend(session, sites))
    found = {name: entry.values for name, entry in sums.groups.items()}
    session.checkpoints.save(stage, 0, found, _facts(sums))
    _report_round(session, stage, 0, 1, sums)
    return found


def _announce(session: Session, stage: str, rounds: int) -> None:
    session.events.write("stage", stage=stage, rounds=rounds)


def _facts(sums: RoundSums) -> dict[str, object]:
    return {
        "groups": {name: list(entry.sites) for name, entry in sums.groups.items()},
        "refused": sums.refused,
        "attempts": sums.attempts,
        "heads": {site: list(head) for site, head in sums.heads.items()},
    }


def _report_round(session: Session, stage: str, number: int, rounds: int, sums: RoundSums) -> None:
    done = {entry.name: session.checkpoints.attempts(entry.name) for entry in session.dp.stages}
    epsilon = session.dp.epsilon_after(done)
    session.events.write(
        "round",
        stage=stage,
        round=number,
        rounds=rounds,
        groups={name: list(entry.sites) for name, entry in sums.groups.items()},
        refused=sums.refused,
        attempts=sums.attempts,
        epsilon=None if epsilon == float("inf") else round(epsilon, 4),
        note=f"{len(sums.answered)} sites · epsilon so far {epsilon:.2f}",
    )
