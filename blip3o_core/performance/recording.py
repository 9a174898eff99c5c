"""torch.compile and recorded CUDA graphs, where they work. For GPUs: on the CPU neither pays off, see the benchmarks."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..models.nextdit import NextDiT
from .fused_dit import FusedLayer, FusedStep

logger = logging.getLogger(__name__)

# Recordings kept for inputs of different shapes: with guidance and without, of a whole batch and of the rest.
KEPT_RECORDINGS = 4
WARM_UP_CALLS = 3
# inputs -> a function that computes anew from what the inputs hold by then, and writes over what it returned before
Record = Callable[[Callable[..., Tensor], Sequence[Tensor]], Callable[[], Tensor]]
Recorded = TypeVar("Recorded")


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; on a GPU it needs Triton."""
    try:
        torch.compile(_increment)(torch.zeros(4, device=device))
    except Exception as error:  # every missing part has an error class of its own
        reason = str(error).strip().splitlines()
        logger.warning(
            "torch.compile does not work here, going on without it: %s", reason[0] if reason else error
        )
        return False
    return True


def compile_network(network: nn.Module, device: torch.device) -> bool:
    """Compile a network in place; whether that was possible. Its first call takes a minute, each later one is faster.

    Names of weights and numbers stay as they are, the latter up to rounding.
    """
    if not can_compile(device):
        return False
    # One call replays a recorded CUDA graph: no launches of single kernels.
    network.compile(mode="reduce-overhead")
    return True


class Recorder(Generic[Recorded]):
    """Recordings by the shapes they were made for, the latest kept, for as long as a network's weights stay where they are.

    Args:
        record: how a call is recorded, see Record.
        is_compiled: compile what is recorded before that. Where one or both fail, things go on without.
    """

    def __init__(self, record: Record, *, is_compiled: bool) -> None:
        self.record = record
        self.is_compiled = is_compiled
        self.is_broken = False
        self._places: list[int] = []
        self._recordings: OrderedDict[Any, Recorded] = OrderedDict()

    def has_moved(self, network: nn.Module) -> bool:
        """Whether weights lie elsewhere than at the last look."""
        before, self._places = self._places, _places(network)
        return before != self._places

    def forget(self) -> None:
        """Free what is kept from run to run; for weights that leave the device."""
        self._recordings.clear()

    def find(self, shapes: Any, make: Callable[[], Recorded]) -> Recorded | None:
        """The recording for some shapes, made if there is none; None where recording fails."""
        while not self.is_broken and shapes not in self._recordings:
            reason = None
            try:
                # Kept for later calls, which may run in another mode than this one.
                with torch.inference_mode(False), torch.no_grad():
                    self._recordings[shapes] = make()
            except Exception as error:  # what a driver or a compiler cannot do, it reports in ways of its own
                reason = str(error)
            if reason is not None:  # here what failed is freed
                self._do_without(reason)
        if self.is_broken:
            return None
        self._recordings.move_to_end(shapes)
        while len(self._recordings) > KEPT_RECORDINGS:
            self._recordings.popitem(last=False)
        return self._recordings[shapes]

    def _do_without(self, reason: str) -> None:
        what = "compiled" if self.is_compiled else "recorded"
        logger.warning("steps cannot be %s here, going on without that: %s", what, reason)
        if self.is_compiled:
            self.is_compiled = False
        else:
            self.is_broken = True
            self.forget()


class StepRecorder(Recorder["StepRecording"]):
    """Replays a DiT's steps, recorded at the first one of each shape."""

    def __init__(self, record: Record, *, is_compiled: bool) -> None:
        super().__init__(record, is_compiled=is_compiled)
        # Shapes of a run are fixed: a program for each is faster than one for all.
        self._call_layer = torch.compile(FusedLayer.__call__, dynamic=False) if is_compiled else None
        self._step: FusedStep | None = None
        self._grid_size: tuple[int, ...] | None = None

    def step(self, dit: NextDiT, grid_size: Sequence[int]) -> FusedStep:
        """The step to pass to the recorder: that of the last run, unless weights or grid have changed places."""
        if self._step is None or self.has_moved(dit) or self._grid_size != tuple(grid_size):
            self.forget()
            self._step = FusedStep(dit, grid_size, self._call_layer if self.is_compiled else None)
            self._grid_size = tuple(grid_size)
            self.has_moved(dit)  # joined projections have
        return self._step

    def forget(self) -> None:
        super().forget()
        self._step = None

    def __call__(self, step: FusedStep, inputs: Sequence[Tensor]) -> Tensor:
        """The velocity that the step makes of the inputs."""

        def make() -> StepRecording:
            if not self.is_compiled:
                step.call_layer = FusedLayer.__call__
            return StepRecording(self.record, step, inputs)

        recording = self.find(tuple(tensor.shape for tensor in inputs), make)
        return step(*inputs) if recording is None else recording(inputs)


class StepRecording:
    """One recorded step with inputs of its own."""

    def __init__(self, record: Record, step: FusedStep, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._latest = list(inputs)
        self._replay = record(step, self._inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for index, (mine, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if given is not self._latest[index]:  # the context is the same tensors for a whole run
                mine.copy_(given)
                self._latest[index] = given
        # A copy: the next replay writes over it, and samplers look back.
        return self._replay().clone()


def record_cuda_graph(step: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Record a call as a CUDA graph: one launch for all its kernels. See Record."""
    # Streams of the tensors' own GPU, which need not be the current one.
    device = inputs[0].device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):  # compiles, and sets up what libraries make at a first call
            step(*inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads of a program go on allocating meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        output = step(*inputs)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _places(network: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]


def _increment(values: Tensor) -> Tensor:
    return values + 1
