"""Hospitals and coordinator build the same model from the same bytes; what the state does not name stays public."""

import numpy as np
import pytest
import torch

from medgen_models.assembly import assemble, to_arrays
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.public_model import PublicModel
from simulations.public_populations import icu_population
from simulations.real_schemas import icu_schema


@pytest.fixture(scope="module")
def public() -> PublicModel:
    config = PretrainConfig(steps=2, batch=4, core=CoreConfig(width=16, layers=1, heads=2))
    return pretrain(icu_schema(), icu_population(icu_schema(), 40, 1), config, seed=1)


def test_an_empty_state_is_the_public_model(public: PublicModel) -> None:
    model = assemble(public, {}, "all", 0)
    assert model.core is public.core
    assert isinstance(model.bank, CodecBank)


def test_a_state_survives_the_wire_and_changes_only_what_it_names(public: PublicModel) -> None:
    start = to_arrays(assemble(public, {}, "all", 0).core_weights())
    name = sorted(start)[0]
    moved = assemble(public, {name: start[name] + 1.0}, "all", 0).core_weights()
    np.testing.assert_array_equal(moved[name].numpy(), start[name] + 1.0)
    for other in sorted(start)[1:]:
        np.testing.assert_array_equal(moved[other].numpy(), start[other])


def test_all_sides_draw_the_same_adapters_and_start_at_the_public_function(public: PublicModel) -> None:
    one, two = assemble(public, {}, "lora", 2), assemble(public, {}, "lora", 2)
    for (name, a), (_, b) in zip(one.core.named_parameters(), two.core.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert set(one.core_weights()) == {n for n, _ in one.core.named_parameters() if n.endswith("lora_B")}
    assert all(float(value.abs().max()) == 0.0 for value in one.core_weights().values())


def test_a_weight_of_another_study_is_refused(public: PublicModel) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        assemble(public, {"trunk.nothing": np.zeros(3, np.float32)}, "all", 0)


def test_made_up_patients_are_nobody_and_one_lacks_a_slot(public: PublicModel) -> None:
    model = assemble(public, {}, "all", 0)
    people = model.made_up_patients(3, torch.Generator().manual_seed(0))
    first = model.layout.slots[0]
    members = list(model.layout.members(first))
    assert not bool(people.present_BVI[0, :, members].any())
    assert bool(people.present_BVI[1:].all())
    assert float((people.weight_BVNW.sum(-1) > 0)[0, 0, : model.layout.tokens_I[members[0]]].sum()) == 0.0
