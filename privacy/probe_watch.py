"""What the gradient probe watches while a loss runs: modules behind it, their state, checkpointing, weights used astray.

Stage: below :mod:`privacy.probe`, which refuses. These functions only look.

Covered
    * Modules are found in closures, bound objects, partials, defaults, containers and the globals that a function names.
    * A call of ``torch.utils.checkpoint``, however it was imported, is seen by the file that its code lies in.
    * A weight used in another module's forward pass, or outside of any, is seen where torch dispatches the operation.

Not covered
    * Checkpointing written anew outside torch, and code that hides its modules in C extensions.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

MOST_OBJECTS = 10_000  # looked at in the search for modules
CODEBOOK = re.compile(r"quanti[sz]|codebook|codes\b|ema_|cluster_size|embed_avg", re.IGNORECASE)


def modules_behind(function: object) -> list[nn.Module]:
    """Modules that a function holds: bound object, partial, closure, globals, defaults, containers, attributes of those."""
    found: list[nn.Module] = []
    seen: dict[int, object] = {}
    queue: list[Any] = [function]
    while queue and len(seen) < MOST_OBJECTS:
        item = queue.pop()
        if id(item) in seen or isinstance(item, str | bytes | int | float | Tensor | type | ModuleType):
            continue
        seen[id(item)] = item
        if isinstance(item, nn.Module):
            found.append(item)
            continue
        if isinstance(item, functools.partial):
            queue += [item.func, *item.args, *item.keywords.values()]
        if isinstance(item, Mapping):
            queue += list(item.values())
        elif isinstance(item, Sequence):
            queue += list(item)
        queue += [getattr(item, name, None) for name in ("__self__", "__func__", "__wrapped__")]
        queue += [_content(cell) for cell in getattr(item, "__closure__", None) or ()]
        if isinstance(item, FunctionType):
            queue += [item.__globals__.get(name) for name in _names(item.__code__)]
        queue += [*(getattr(item, "__defaults__", None) or ()), *getattr(item, "__dict__", {}).values()]
    return found


def _names(code: CodeType) -> set[str]:
    """Names that a function reads from its module, those of the functions inside it included."""
    inside = (inner for inner in code.co_consts if isinstance(inner, CodeType))
    return set(code.co_names).union(*(_names(inner) for inner in inside))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


# --- state ------------------------------------------------------------------------------------------------------------


def snapshot(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by the class of the root module and the name in it."""
    return {
        f"{type(module).__name__}.{name}": value.detach().clone()
        for module in modules
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that is gone or differs, or None."""
    for name, value in before.items():
        if name not in after or not torch.equal(torch.nan_to_num(value), torch.nan_to_num(after[name])):
            return name
    return None


def is_codebook(name: str, modules: Iterable[nn.Module]) -> bool:
    """Whether a changed tensor belongs to a vector quantiser: by its own name or by the class of a module that holds it."""
    path = name.partition(".")[2]
    holders = [
        type(inner).__name__
        for module in modules
        for prefix, inner in module.named_modules()
        if path == prefix or path.startswith(f"{prefix}." if prefix else "")
    ]
    return any(CODEBOOK.search(text) for text in (path, *holders))


# --- checkpointing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint_calls() -> Iterator[list[str]]:
    """Collect the functions of ``torch.utils.checkpoint`` that are entered inside; this thread only."""
    calls: list[str] = []
    file, before = torch.utils.checkpoint.__file__, sys.getprofile()

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == file:
            calls.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        yield calls
    finally:
        sys.setprofile(before)


# --- weights astray ---------------------------------------------------------------------------------------------------


class WeightsAstray(TorchFunctionMode):
    """Collect the weights of ``module`` that an operation reads outside the forward pass of the layer that owns them.

    Opacus's hooks sit on a layer's forward pass; what reads its weight elsewhere adds no per-patient gradient.

    Attributes:
        names: weights seen astray, in order.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self._module = module
        self._running: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._of: dict[int, str] = {}
        self._owners: dict[int, set[int]] = {}
        for prefix, owner in module.named_modules():
            for name, value in owner.named_parameters(recurse=False):
                self._of.setdefault(id(value), f"{prefix}.{name}".lstrip("."))
                self._owners.setdefault(id(value), set()).add(id(owner))

    def __enter__(self) -> WeightsAstray:
        for inner in self._module.modules():
            self._handles.append(inner.register_forward_pre_hook(lambda one, args: self._running.append(one)))
            self._handles.append(inner.register_forward_hook(lambda *rest: self._leave(), always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def _leave(self) -> None:
        self._running.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note trained tensors among its arguments whose owner is not the running layer."""
        out = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors(out)):  # shapes and types are read by anybody
            for value in _tensors((args, kwargs or {})):
                owners = self._owners.get(id(value))
                if owners is not None and not (self._running and id(self._running[-1]) in owners):
                    self.names.append(self._of[id(value)])
        return out


class StaleWeights(TorchFunctionMode):
    """Collect trained weights that an operation reads from the module itself instead of from ``params``.

    Attributes:
        names: such weights, in order.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.names: list[str] = []
        wanted = set(names)
        self._of = {id(value): name for name, value in module.named_parameters() if name in wanted}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note the module's own trained tensors among its arguments."""
        out = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors(out)):
            self.names += [self._of[id(value)] for value in _tensors((args, kwargs or {})) if id(value) in self._of]
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
