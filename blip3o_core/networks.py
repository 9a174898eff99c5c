"""Who holds the networks of a checkpoint: reads them, changes them by LoRAs, places and lends them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoints.keys import COMPONENTS
from .checkpoints.layout import CheckpointFiles
from .checkpoints.load import load_backbone, load_decoder, load_dit, load_image_encoder
from .checkpoints.match import needed_tensors
from .checkpoints.safetensor_files import read_tensors
from .drawing.sampling import PrepareRun
from .errors import check_range
from .lora.changes import Change, apply_changes
from .lora.files import LoraFile, check_fit, dit_fingerprint, other_base, read_lora
from .performance.fused_dit import PreparedRuns
from .performance.linear import use_onednn
from .performance.offload import stream_layers, visit
from .performance.quantize import quantize_network
from .performance.recording import Recorder, StepRecorder, can_compile, compile_network, record_cuda_graph

if TYPE_CHECKING:  # transformers is imported only when the backbone is loaded
    from .language.answers import MakeSteps

logger = logging.getLogger(__name__)

LARGE_NETWORKS = ("backbone", "image_encoder")


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA that changes the networks.

    Attributes:
        source: relative path it was loaded from, or its name alone: pictures remember it, and tell no one's folders.
        strength: 1 = as trained.
        changes: by network and key of its state_dict.
    """

    file: LoraFile
    source: str
    strength: float
    changes: dict[str, dict[str, Change]]


class NetworkLender(ABC):
    """What the pipeline asks of whoever holds the networks: Networks, a host such as ComfyUI, a benchmark.

    Args:
        files: the opened checkpoint.
        dtype: the networks compute in.
        device: where they compute.

    Attributes:
        leave_device: networks are on the device only while they are lent: what belongs to them waits in main memory too.
        loras: what changes the networks, in the order it was loaded.
        changes: grows whenever numbers of a network change, so that what was computed with them before is known to be old.
    """

    leave_device = False
    loras: tuple[LoadedLora, ...] = ()
    changes = 0

    def __init__(self, files: CheckpointFiles, dtype: torch.dtype, device: torch.device) -> None:
        self.files = files
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def get(self, name: str) -> Any:
        """A network of keys.COMPONENTS, wherever it lies."""

    @abstractmethod
    def use(self, name: str) -> AbstractContextManager[Any]:
        """Lend a network to compute with, on the device; it comes back unchanged."""

    @abstractmethod
    def unload(self, *names: str) -> None:
        """Forget networks (all when none is named) where that is the lender's to decide; they are read again when next used."""

    @property
    def prepare_run(self) -> PrepareRun:
        """How a DiT is prepared for a sampling run."""
        return PreparedRuns()

    @property
    def answer_steps(self) -> MakeSteps | None:
        """How the steps of answers are made; None = one by one."""
        return None

    @property
    def before_step(self) -> Callable[[], None] | None:
        """To be called before each call of the decoder's UNet."""
        return None


class Networks(NetworkLender):
    """The networks of a checkpoint folder, read when first used.

    Args:
        files, dtype, device: see NetworkLender. The dtype is that of the weights, too.
        offload: keep networks in host memory; copies visit the device while they work.
        quantize: format of the linear layers of backbone and image encoder, a name in quantize.FORMATS; None = dtype.
        stream: keep backbone and image encoder in host memory for good, see stream_layers.
        compile: on a CUDA GPU, record the steps of the DiT and, unless the backbone moves, of answers as CUDA graphs; and
            torch.compile them and the UNet where that works.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        dtype: torch.dtype,
        device: torch.device,
        *,
        offload: bool = False,
        quantize: str | None = None,
        stream: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(files, dtype, device)
        self.leave_device = offload
        self.quantize = quantize
        self.compile = compile and device.type == "cuda"
        if compile and not self.compile:
            logger.warning("compile has nothing to gain without a CUDA GPU; going on without it")
        self._networks: dict[str, nn.Module] = {}
        self._recorders: dict[str, Recorder[Any]] = {}
        self._streamed: set[str] = set(LARGE_NETWORKS if stream else ())
        self._is_unet_compiled = False

    @property
    def loaded(self) -> frozenset[str]:
        """Names of the networks that have been read."""
        return frozenset(self._networks)

    def get(self, name: str) -> Any:
        if name not in self._networks:
            self._networks[name] = self._place(name)
        return self._networks[name]

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        network = self.get(name)
        if not self._moves(name) or name in self._streamed:
            yield network
            return
        with visit(network, self.device):
            try:
                yield network
            finally:
                if name in self._recorders:
                    self._recorders[name].forget()

    def take(self, name: str) -> Any:
        """Hand a network over, on the device, to someone who changes it; it is read again when next used."""
        network = self.get(name).to(self.device)
        self.unload(name)
        return network

    def unload(self, *names: str) -> None:
        for name in names or COMPONENTS:
            self._networks.pop(name, None)
            if name in self._recorders:
                # It refers to the network, which would keep its memory until the cycle collector runs.
                self._recorders.pop(name).forget()

    def record(self, name: str, recorder: Recorder[Any]) -> None:
        """Record the steps of the DiT or of answers, for as long as the network stays.

        Args:
            name: dit, with a StepRecorder; or backbone, with an AnswerRecorder.
        """
        self._recorders[name] = recorder

    def stream(self, name: str) -> None:
        """Keep a network in host memory from now on; each layer is on the device only while it computes.

        For encoding on a device that is too small for the whole network: every call moves all weights once. Answers,
        with a call for each word, are written faster on the CPU.

        Args:
            name: backbone or image_encoder.
        """
        assert name in LARGE_NETWORKS, name
        self.unload(name)
        self._streamed.add(name)

    def load_lora(self, lora: str | Path | LoraFile, strength: float = 1.0) -> LoadedLora:
        """Change the networks by a LoRA, besides those already loaded. Sums are float32; a network keeps its dtype.

        Args:
            lora: a .safetensors file, a PEFT folder, or what read_lora gave.
            strength: 1 = as trained, 0 = off; negative values push the other way.

        Raises:
            MissingFilesError, WrongAdapterError: see read_lora and check_fit.
        """
        check_range("strength of a LoRA", strength, -100, 100)
        file = lora if isinstance(lora, LoraFile) else read_lora(lora)
        tensors = {
            name: needed_tensors(self.files, name)
            for name in ("dit", "backbone")
            if self.files.has_component(name)
        }
        shapes = {name: {key: info.shape for key, info in infos.items()} for name, infos in tensors.items()}
        source = file.name
        if not isinstance(lora, LoraFile) and not Path(lora).is_absolute():
            source = Path(lora).as_posix()
        loaded = LoadedLora(file, source, strength, check_fit(file, shapes))
        note = other_base(file, lambda: dit_fingerprint(dict(read_tensors(tensors["dit"]))))
        if note:
            logger.warning(note)
        self._change_loras((*self.loras, loaded))
        return loaded

    def unload_loras(self) -> None:
        """Use the networks as the checkpoint holds them."""
        self._change_loras(())

    @property
    def prepare_run(self) -> PrepareRun:
        recorder = self._recorders.get("dit")
        return PreparedRuns(recorder if isinstance(recorder, StepRecorder) else None)

    @property
    def answer_steps(self) -> MakeSteps | None:
        recorder = self._recorders.get("backbone")
        if recorder is None:
            return None
        from .performance.recorded_answers import AnswerRecorder

        assert isinstance(recorder, AnswerRecorder)
        return recorder.steps

    @property
    def before_step(self) -> Callable[[], None] | None:
        # Says that results of earlier calls may be written over.
        return torch.compiler.cudagraph_mark_step_begin if self._is_unet_compiled else None

    def _change_loras(self, loras: tuple[LoadedLora, ...]) -> None:
        # Networks are read again with all their LoRAs when next used: no second copy of the weights is kept.
        self.unload(*{name for each in (*self.loras, *loras) for name in each.changes} or ("dit",))
        self.loras = loras
        self.changes += 1

    def _moves(self, name: str) -> bool:
        return self.leave_device or name in self._streamed

    def _place(self, name: str) -> nn.Module:
        """A network where it stays between calls, in the form in which it computes fastest there."""
        weight_format = self.quantize if name in LARGE_NETWORKS else None
        home = torch.device("cpu") if self._moves(name) else self.device
        # Shrunk on the way from the files to their place.
        network = self.read(name, home if weight_format is None else torch.device("cpu"))
        if weight_format is not None:
            quantize_network(network, weight_format, home)
        if self.device.type == "cpu":
            use_onednn(network)
        if name in self._streamed:
            stream_layers(network, self.device)
        if name == "decoder" and self.device.type in ("cpu", "cuda"):
            # The order of a tensor's values that its convolutions compute in; otherwise each one reorders twice.
            network.to(memory_format=torch.channels_last)
        if self.compile:
            self._compile(name, network)
        return network

    def _compile(self, name: str, network: Any) -> None:
        if name == "dit":
            self.record(name, StepRecorder(record_cuda_graph, is_compiled=can_compile(self.device)))
        elif name == "backbone" and not self._moves(name):
            from .performance.recorded_answers import AnswerRecorder

            self.record(name, AnswerRecorder(record_cuda_graph, is_compiled=can_compile(self.device)))
        elif name == "decoder":
            self._is_unet_compiled = compile_network(network.unet, self.device)

    def read(self, name: str, device: torch.device) -> Any:
        """A network from its files, with its LoRAs."""
        options: dict[str, Any] = {"dtype": self.dtype, "device": device}
        if name == "decoder":
            return load_decoder(self.files, **options)
        if name == "image_encoder":
            return load_image_encoder(self.files, **options)
        network = (load_backbone if name == "backbone" else load_dit)(self.files, **options)
        loras = [(each.changes[name], each.strength) for each in self.loras if name in each.changes]
        apply_changes(network, loras)
        return network
