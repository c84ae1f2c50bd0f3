"""Drawing without Python: the operations for a shape are recorded once, and replayed.

On a GPU as CUDA graphs, which read and write at fixed places in memory: inputs are copied there,
and the result is copied out before the next replay can touch it. On a CPU by TorchScript's tracer.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffnext.models.compilation import FEWEST_TOKENS
from diffnext.models.quantization import is_quantized

__all__ = ["Programs", "Recorded", "TracedPrograms", "record_calls", "record_cuda_graph"]

# Rows of tokens above which the products take longer than the launches; an estimate (48 launches of
# 5 us against the products of a head of 6 blocks, 1024 wide, at 500 TFLOP/s), not a measurement.
MOST_ROWS = 4096
MOST_TRACED_ROWS = 64  # here a core's matrix products take as long as Python
WARM_UPS = 2


class Recorded(NamedTuple):
    """What a function launches.

    Attributes:
        replay: Launches it again.
        output: Where the result then lies.
        pool: Memory of everything between, for other programs to share.
    """

    replay: Callable[[], Any]
    output: Tensor
    pool: Any = None


Recorder = Callable[[Callable[[], Tensor], Any], Recorded]


def record_cuda_graph(function: Callable[[], Tensor], pool: Any) -> Recorded:
    """Record what a function launches.

    Args:
        function: Takes no arguments; the tensors that it uses stay where they are.
        pool: Memory that all graphs share, as only one is replayed at a time; None for the first.
    """
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # libraries set themselves up at first calls, compilers compile
        for _ in range(WARM_UPS):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = function()
    return Recorded(graph.replay, output, graph.pool())


def record_calls(function: Callable[[], Tensor], pool: Any) -> Recorded:
    """Replace a graph where there are none: the function is called again, on the same memory."""
    output = function()
    return Recorded(lambda: output.copy_(function()), output)


class StaticProgram:
    """A function of tensors, whose inputs and result have fixed places.

    Args:
        function: Is called with tensors like ``inputs``, on other memory, and returns one.
        inputs: Examples.
        record: As :func:`record_cuda_graph`.
        pool: As there.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        record: Recorder,
        pool: Any,
    ) -> None:
        self._buffers = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        self.recorded = record(lambda: function(*self._buffers), pool)

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs' and the result's places."""
        return sum(x.nbytes for x in [*self._buffers, self.recorded.output])

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The function's result for these inputs."""
        for dtype in {x.dtype for x in inputs}:
            pairs = [(b, x) for b, x in zip(self._buffers, inputs, strict=True) if x.dtype == dtype]
            torch._foreach_copy_([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        self.recorded.replay()
        return self.recorded.output.clone()


class _Traceable(nn.Module):
    """A function with the model whose weights it uses, which stay parameters when it is traced."""

    def __init__(self, function: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.model, *inputs)


def trace(
    function: Callable[..., Tensor], model: nn.Module, inputs: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function of tensors as the list of its operations, which runs without Python in between.

    Args:
        function: Is called with the model and tensors like ``inputs``, and returns one.
        model: The model whose weights it uses.
        inputs: Examples.
    """
    with warnings.catch_warnings():
        # The tracer warns that sizes become constants, which they are here, and that
        # `torch.compile` replaces it, which needs a minute for what takes the tracer a second.
        warnings.simplefilter("ignore")
        traceable = _Traceable(function, model).eval()
        traced = torch.jit.trace(traceable, tuple(inputs), check_trace=False)
    return lambda inputs: traced(*inputs)


class Programs:
    """The recorded programs of one model.

    Threads take turns, on one stream: a replay on another could overtake it. Programs are
    forgotten when a weight has moved to another place in memory.

    Args:
        record: How a program is recorded.

    Attributes:
        fewest_tokens: The tokens of a set are padded at least to this number.
        most_rows: Rows of tokens up to which a part of a drawing is recorded.
        nbytes: Bytes that all programs keep, not counting what graphs need while they run.
    """

    fewest_tokens = FEWEST_TOKENS
    most_rows = {"encoder": math.inf, "head": MOST_ROWS}

    def __init__(self, record: Recorder = record_cuda_graph) -> None:
        self._record = record
        self._lock = threading.Lock()
        self._programs: dict[tuple[Hashable, Hashable], Callable[[Sequence[Tensor]], Tensor]] = {}
        self._weights: tuple[Hashable, ...] = ()
        self._pool: Any = None
        self.nbytes = 0

    def __reduce__(self) -> tuple[type[Programs], tuple[Any, ...]]:
        return type(self), (self._record,)  # a copy of the model has its weights elsewhere

    @property
    def keys(self) -> list[Hashable]:
        """What the programs were recorded for, without their shapes."""
        return [key for key, _ in self._programs]

    def __len__(self) -> int:
        return len(self._programs)

    def fit(self, model: nn.Module, device: torch.device) -> bool:
        """Whether a model's weights stay where they are and are read as they are.

        Not on another kind of device, nor with hooks of offloading, nor with adapters, whose
        strength is not a tensor, nor under autocast, which keeps converted weights for a while.
        """
        is_hooked = any(hasattr(part, "_hf_hook") for part in model.modules())
        has_adapters = bool(getattr(model, "peft_config", None))
        is_cast = torch.is_autocast_enabled(device.type)
        return self._runs_on(device) and not (is_hooked or has_adapters or is_cast)

    def prepare(self, model: nn.Module) -> None:
        """Forget all programs if they read other weights than those of the model."""
        places = tuple((one.data_ptr(), one.shape, one.dtype) for one in model.parameters())
        with self._lock:
            if places != self._weights:
                self._programs.clear()
                self._pool = None
                self._weights = places
                self.nbytes = 0

    def run(
        self,
        key: Hashable,
        function: Callable[..., Tensor],
        model: nn.Module,
        inputs: Sequence[Tensor],
    ) -> Tensor:
        """The function's result, by a program that is recorded at the first call.

        Args:
            key: Everything the function depends on except shapes and contents of the inputs.
            function: Called with the model and tensors like ``inputs``; draws no random numbers.
            model: The model whose weights it uses.
            inputs: Tensors.
        """
        shapes = tuple((x.shape, x.dtype, x.device) for x in inputs)
        with self._lock:
            program = self._programs.get((key, shapes))
            if program is None:
                program = self._make(function, model, inputs)
                self._programs[key, shapes] = program
            return program(inputs)

    def _runs_on(self, device: torch.device) -> bool:
        return self._record is not record_cuda_graph or device.type == "cuda"

    def _make(
        self, function: Callable[..., Tensor], model: nn.Module, inputs: Sequence[Tensor]
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        program = StaticProgram(partial(function, model), inputs, self._record, self._pool)
        self._pool = program.recorded.pool
        self.nbytes += program.nbytes
        return program


class TracedPrograms(Programs):
    """The same for a CPU, where few rows of tokens spend most of their time in Python."""

    fewest_tokens = 1
    most_rows = {"encoder": MOST_TRACED_ROWS, "head": MOST_TRACED_ROWS}

    def fit(self, model: nn.Module, device: torch.device) -> bool:
        """The same; quantised weights cannot be traced."""
        return super().fit(model, device) and not is_quantized(model)

    def _runs_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def _make(
        self, function: Callable[..., Tensor], model: nn.Module, inputs: Sequence[Tensor]
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        return trace(function, model, inputs)
