"""The UNet call of a denoising step, recorded once on a GPU and then replayed: one launch for about a thousand kernels.

For a single picture, a step takes as long as the CPU needs to launch its kernels, and experts add kernels. A replay
computes the same from the same memory, without running Python. So the attached mixture must say what a call depends on.

Contents: Replayed, which replaces the UNet; replaying, the context in which it does; cuda_recorder.
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

# input tensors -> (the UNet's output, the tensors stored in the guest); a record overwrites them in each replay
Call = Callable[[Sequence[Tensor]], tuple[Any, Any]]
Recorder = Callable[[Call, Sequence[Tensor]], Call]
# The largest number of records: one for each kind of call (shapes and other things that calls depend on).
_MOST = 32


class Replayed(nn.Module):
    """Replaces a pipeline's UNet; calls of the same kind as an earlier one are recorded and replayed.

    The first call of a kind runs normally, because it creates things that are created only once; the second is
    recorded. Calls run normally with gradients, under autocast, if a guest cannot compare calls, and after a failure.
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
        """Drops all records."""
        self._state, self._known, self._record = None, {}, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        guests = list(self._parts[0].guests.values())
        kind = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        eager = torch.is_grad_enabled() or torch.is_autocast_enabled(kind) or self._failed
        if eager or len(guests) > 1:
            return self.unet(*args, **kwargs)
        if not guests:
            return self._called(None, ("base",), args, kwargs)[0]
        with guests[0].foreseen(args, kwargs) as state:
            return guests[0].done(*self._called(guests[0], state, args, kwargs))

    def _called(self, guest: Guest | None, state: tuple[Hashable, ...] | None, args: Any, kwargs: Any) -> Any:
        """(the UNet's output, the tensors that a replayed call stored in the guest, or None)."""
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
        """Whether there was such a call since the guests last changed; if not, it is noted."""
        changed = state[0] is not self._state
        if changed or (key not in self._known and len(self._known) == _MOST):
            # A new recorder too: the memory that records share is freed with the last of them.
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
        except RuntimeError as error:  # also for lack of memory
            self._failed = True
            self.forget()
            warnings.warn(f"the UNet's steps could not be recorded, so they run normally: {error}", stacklevel=2)
            return None


def _signature(leaves: Sequence[Any]) -> tuple[Hashable, ...]:
    """The inputs without the numbers in the tensors: what decides the kind of call."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)


@contextmanager
def replaying(pipe: Any, stand_in: Replayed) -> Iterator[None]:
    """A context in which the pipeline calls `stand_in` instead of its UNet. An error frees the records."""
    pipe.unet = stand_in
    try:
        yield
    except BaseException:
        stand_in.forget()
        raise
    finally:
        pipe.unet = stand_in.unet


def cuda_recorder() -> Recorder:
    """A recorder of calls as CUDA graphs, which share their memory."""
    return partial(_record_cuda, pool=torch.cuda.graph_pool_handle())


def _record_cuda(call: Call, inputs: Sequence[Tensor], *, pool: Any) -> Call:
    """The recorded call. Raises: RuntimeError for a call that waits for the device, or for lack of memory.

    The outputs of a record are overwritten by the next replay of any record.
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
