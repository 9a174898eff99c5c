"""torch.compile and recorded CUDA graphs, where they work. For GPUs: on the CPU neither pays, see the benchmarks."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .models.fused_dit import FusedLayer, FusedStep
from .models.nextdit import NextDiT

logger = logging.getLogger(__name__)

# Recordings kept for inputs of different shapes: with guidance and without.
KEPT_RECORDINGS = 2
WARM_UP_CALLS = 3
# inputs -> a function that computes anew from what the inputs hold by then, and writes over what it returned before
Record = Callable[[Callable[..., Tensor], Sequence[Tensor]], Callable[[], Tensor]]


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; it needs Triton on a GPU and a C++ compiler on the CPU."""
    try:
        torch.compile(_increment)(torch.zeros(4, device=device))
    except Exception as error:  # every missing part has an error class of its own
        reason = str(error).strip().splitlines()
        logger.warning("torch.compile does not work here, going on without it: %s", *reason[:1] or [error])
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


def begin_step(network: nn.Module) -> None:
    """Call before each call of a network that may be compiled: results of earlier calls may then be written over."""
    # Asked of compiled networks alone, because this imports the whole compiler.
    if getattr(network, "_compiled_call_impl", None) is not None:
        torch.compiler.cudagraph_mark_step_begin()


def compile_dit(dit: NextDiT, device: torch.device) -> None:
    """Record the steps of sampling runs; their layers are compiled where that works, one program for all layers."""
    dit.recorder = StepRecorder(record_cuda_graph, is_compiled=can_compile(device))


class StepRecorder:
    """Replays a DiT's steps, recorded at the first one of each shape, for as long as its weights stay where they are.

    Args:
        record: how a call is recorded, see Record.
        is_compiled: compile the layers before recording.
    """

    def __init__(self, record: Record, *, is_compiled: bool) -> None:
        self._record = record
        # Shapes of a run are fixed: a program for each is faster than one for all.
        self._call_layer = torch.compile(FusedLayer.__call__, dynamic=False) if is_compiled else None
        self._step: FusedStep | None = None
        self._made_for: tuple[tuple[int, ...], list[int]] | None = None
        self._recordings: OrderedDict[tuple[torch.Size, ...], _Recording] = OrderedDict()
        self._is_broken = False

    def step(self, dit: NextDiT, grid_size: Sequence[int]) -> FusedStep:
        """The step to pass to the recorder: that of the last run, unless weights or grid have changed places."""
        if self._made_for != (tuple(grid_size), _places(dit)):
            self.forget()
            self._step = FusedStep(dit, grid_size, self._call_layer)
            self._made_for = tuple(grid_size), _places(dit)  # joining has moved weights
        return self._step

    def forget(self) -> None:
        """Free what is kept from run to run; for weights that leave the device."""
        self._recordings.clear()
        self._step = self._made_for = None

    def __call__(self, step: FusedStep, inputs: Sequence[Tensor]) -> Tensor:
        """The velocity that the step makes of the inputs. Where recording fails, steps are called as they are from then on."""
        if self._is_broken:
            return step(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recordings:
            try:
                recording = _Recording(self._record, step, inputs)
            except Exception as error:  # what a driver cannot record, it reports in ways of its own
                logger.warning("steps cannot be compiled and recorded here, going on without that: %s", error)
                self._is_broken, self._call_layer = True, None
                step.call_layer = FusedLayer.__call__
                return step(*inputs)
            self._recordings[shapes] = recording
            while len(self._recordings) > KEPT_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(shapes)
        return self._recordings[shapes](inputs)


class _Recording:
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):  # compiles, and sets up what libraries make at a first call
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads of a program go on allocating meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = step(*inputs)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _places(dit: NextDiT) -> list[int]:
    return [parameter.data_ptr() for parameter in dit.parameters()]


def _increment(values: Tensor) -> Tensor:
    return values + 1
