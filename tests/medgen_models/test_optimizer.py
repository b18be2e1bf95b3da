from __future__ import annotations

import torch

from medgen_models.core import CoreConfig, TokenCore
from medgen_models.layout import Layout
from medgen_models.optimizer import PublicOptimizer, orthogonalise


def test_orthogonalise_keeps_directions_and_levels_singular_values() -> None:
    x = torch.randn(3, 24, 12, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(x)
    assert out.shape == x.shape
    values = torch.linalg.svdvals(out)
    assert 0.6 < float(values.min())
    assert float(values.max()) < 1.3
    torch.testing.assert_close(orthogonalise(x * 100.0), out, atol=1e-3, rtol=1e-3)
    assert float(orthogonalise(torch.zeros(1, 4, 4)).abs().max()) == 0.0


def test_every_parameter_is_stepped_once_and_downhill(models_core: TokenCore) -> None:
    optimizer = PublicOptimizer(models_core, matrix_rate=1e-2, rate=1e-2, weight_decay=0.0)
    adam = [p for group in optimizer.adam.param_groups for p in group["params"]]
    assert {id(p) for p in adam} | {id(p) for p in optimizer.matrices} == {id(p) for p in models_core.parameters()}
    assert len(adam) + len(optimizer.matrices) == len(list(models_core.parameters()))
    before = [p.detach().clone() for p in models_core.parameters()]
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in models_core.parameters()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0)
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, models_core.parameters(), strict=True))


def test_share_zero_changes_nothing(models_core: TokenCore) -> None:
    optimizer = PublicOptimizer(models_core, matrix_rate=1e-2, rate=1e-2, weight_decay=0.0)
    before = [p.detach().clone() for p in models_core.parameters()]
    torch.stack([p.square().sum() for p in models_core.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, models_core.parameters(), strict=True))


def test_an_optimizer_that_is_restored_goes_on_as_if_it_had_never_stopped(models_layout: Layout) -> None:
    def fresh() -> tuple[TokenCore, PublicOptimizer]:
        core = TokenCore(models_layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(0))
        return core, PublicOptimizer(core, 1e-2, 1e-3, 1e-2)

    def step(core: TokenCore, optimizer: PublicOptimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for p in core.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(1.0)

    core, optimizer = fresh()
    for number in range(4):
        step(core, optimizer, number)
    other, stopped = fresh()
    for number in range(2):
        step(other, stopped, number)
    later, restored = fresh()
    later.load_state_dict(other.state_dict())
    restored.restore({name: value.clone() for name, value in stopped.tensors().items()})
    for number in range(2, 4):
        step(later, restored, number)
    assert all(torch.equal(a, b) for a, b in zip(core.parameters(), later.parameters(), strict=True))
