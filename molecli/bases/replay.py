"""A denoising step's UNet call, recorded once on a GPU and replayed: one launch for its thousand kernels.

A step of one picture is bound by what the processor takes to launch kernels, and experts add kernels. What is replayed
computes the same from the same memory; nothing of Python runs. So whoever is attached says what decides a call.

Contents: Replayed, the UNet's stand-in; replaying, which puts it there; cuda_recorder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from molecli.bases.pipeline import Guest, PipelineModules

# (the UNet's output, what the guest left) of input tensors; a record gives them in memory that it writes anew each time
Call = Callable[[Sequence[Tensor]], tuple[Any, Any]]
Recorder = Callable[[Call, Sequence[Tensor]], Call]
# Calls that differ in shapes or in what decides them: one each, and no more than so many.
_MOST = 32


class Replayed(nn.Module):
    """Stands for a pipeline's UNet; a call that came before in all that decides it is recorded, then replayed.

    The first such call runs as ever, so that what is made once is made; the second is recorded. With gradients, under
    autocast, where guests say that calls differ, and once a record failed, every call runs as ever.
    """

    def __init__(self, parts: PipelineModules, recorder: Callable[[], Recorder] | None = None) -> None:
        super().__init__()
        self.unet = parts.get_submodule("unet")
        self._parts = (parts,)  # hidden from named_modules
        self._recorder = recorder or cuda_recorder
        self._record: Recorder | None = None
        self._state: Hashable = None
        self._known: dict[Hashable, Call | None] = {}
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forget(self) -> None:
        """Drop what is recorded."""
        self._state, self._known, self._record = None, {}, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        guests = list(self._parts[0].guests.values())
        kind = next(self.unet.parameters()).device.type
        eager = torch.is_grad_enabled() or torch.is_autocast_enabled(kind) or self._failed
        if eager or len(guests) > 1:
            return self.unet(*args, **kwargs)
        if not guests:
            return self._called(None, ("base",), args, kwargs)[0]
        with guests[0].foreseen(args, kwargs) as state:
            return guests[0].done(*self._called(guests[0], state, args, kwargs))

    def _called(self, guest: Guest | None, state: tuple[Hashable, ...] | None, args: Any, kwargs: Any) -> Any:
        """(the UNet's output, what a replayed call left with the guest, else None)."""
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = None if state is None else (*state[1:], _signature(leaves), str(spec))
        if key is None or not self._seen(key, state):
            return self.unet(*args, **kwargs), None
        replay = self._known[key] or self._recorded(guest, leaves, spec, inputs)
        if replay is None:
            return self.unet(*args, **kwargs), None
        self._known[key] = replay
        output, left = replay(inputs)
        return tree_map_only(Tensor, Tensor.clone, output), left

    def _seen(self, key: Hashable, state: Any) -> bool:
        """Whether such a call was made since the guests are what they are; notes it if not."""
        changed = state[0] is not self._state
        if changed or (key not in self._known and len(self._known) == _MOST):
            # A new recorder too: the memory that records share goes with the last of them.
            self._state, self._known, self._record = state[0], {}, self._recorder()
        if key in self._known:
            return True
        self._known[key] = None
        return False

    def _recorded(self, guest: Guest | None, leaves: Sequence[Any], spec: Any, inputs: Sequence[Tensor]) -> Call | None:
        def call(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
            own = iter(tensors)
            args, kwargs = tree_unflatten([next(own) if isinstance(x, Tensor) else x for x in leaves], spec)
            return self.unet(*args, **kwargs), None if guest is None else guest.left()

        assert self._record is not None
        try:
            return self._record(call, inputs)
        except RuntimeError as error:  # of memory too
            self._failed = True
            self.forget()
            warnings.warn(f"the UNet's steps could not be recorded, and run one by one: {error}", stacklevel=2)
            return None


def _signature(leaves: Sequence[Any]) -> tuple[Hashable, ...]:
    """What of the inputs decides a call: all but the numbers in the tensors."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)


@contextmanager
def replaying(pipe: Any, stand_in: Replayed) -> Iterator[None]:
    """Inside, the pipeline calls the stand-in in its UNet's place. An error frees what the records hold."""
    pipe.unet = stand_in
    try:
        yield
    except BaseException:
        stand_in.forget()
        raise
    finally:
        pipe.unet = stand_in.unet


def cuda_recorder() -> Recorder:
    """Records calls as CUDA graphs, which share the memory that they compute in."""
    return partial(_record_cuda, pool=torch.cuda.graph_pool_handle())


def _record_cuda(call: Call, inputs: Sequence[Tensor], *, pool: Any) -> Call:
    """The kernels of `call`; raises RuntimeError for a call that waits for the device, or where memory is short.

    What one record gives is overwritten by the next replay of any.
    """
    device = next(x.device for x in inputs if x.is_cuda)
    own = [x.to(device, copy=True) for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = call(own)

    def replay(inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return outputs

    return replay
