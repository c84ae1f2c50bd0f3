"""The memory of a training step, computed without running it.

What a step holds beyond its weights is found by *simulation*: the real forward and backward pass
run on tensors that have shapes but no data (``FakeTensorMode``), while every allocation and release
is counted. What the engines add (shards, buckets, gathered weights) is arithmetic.

Not counted: the CUDA context, libraries, scratch space inside kernels and fragmentation.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler

Engine = Literal["ddp", "zero2", "fsdp2"]
ENGINES: tuple[Engine, ...] = ("ddp", "zero2", "fsdp2")

FLOAT32 = 4  # bytes
ZERO2_BUCKET = 500_000_000  # elements; DeepSpeed's default reduce_bucket_size
WRAPPED_BLOCKS = ("Block", "DiffusionBlock")  # gathered one at a time by FSDP2


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The shapes of one micro-batch.

    Attributes:
        size: Samples B.
        frames: Latent frames T.
        latent_size: Rows and columns of a latent frame.
    """

    size: int
    frames: int
    latent_size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Most bytes that forward and backward hold at a time.

    Attributes:
        activations: Beyond weights and weight gradients: saved and temporary tensors.
        with_gradients: Beyond weights, if all gradients are kept as backward makes them.
    """

    activations: int
    with_gradients: int


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        total: Parameters of the trained component.
        trainable: Those with a gradient.
        unwrapped: Those outside the blocks that FSDP2 gathers one at a time.
        largest_block: Those of the largest block.
        buffers: Bytes of the buffers.
    """

    total: int
    trainable: int
    unwrapped: int
    largest_block: int
    buffers: int

    @classmethod
    def of(cls, model: nn.Module) -> ParameterCounts:
        """Count a model, on any device."""
        blocks = [m for m in model.modules() if type(m).__name__ in WRAPPED_BLOCKS]
        sizes = [count_parameters(block) for block in blocks]
        total = count_parameters(model)
        return cls(
            total=total,
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            unwrapped=total - sum(sizes),
            largest_block=max(sizes, default=0),
            buffers=sum(buffer.nbytes for buffer in model.buffers()),
        )


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights: Weights of the trained component, as held between steps.
        gradients: All weight gradients.
        optimizer: Optimizer state and, where the engine keeps them, float32 masters.
        buffers: The engine's buffers for communication.
        activations: Saved and temporary tensors of forward and backward.
        frozen: Autoencoder and text encoder.
        ema: The averaged weights, if they are on this device.
        peak: Most bytes at a time. Less than the sum where gradients reuse the memory of
            activations that backward is done with.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    frozen: int
    ema: int
    peak: int


def estimate_memory(
    engine: Engine,
    num_processes: int,
    *,
    counts: ParameterCounts,
    step: StepMemory,
    dtype: torch.dtype,
    optimizer_states: float = 2.0,
    frozen_bytes: int = 0,
    ema_bytes: int = 0,
    is_accumulating: bool = False,
) -> MemoryEstimate:
    """Add up one device.

    Args:
        engine: "ddp" (also one process without any engine), "zero2" or "fsdp2".
        num_processes: Processes N.
        counts: Parameters of the trained component.
        step: Memory of a micro-batch, from :func:`simulate_step` for the same engine.
        dtype: Training dtype.
        optimizer_states: Float32 numbers the optimizer keeps for each parameter; 2 for Adam.
        frozen_bytes: Frozen components.
        ema_bytes: Averaged weights on this device.
        is_accumulating: Whether gradients of earlier micro-batches are in memory during a step.
    """
    shard = -(-counts.trainable // num_processes)
    # Gradients that exist at the step's peak, in the dtype of the weights it computes from.
    made = step.with_gradients - step.activations
    if engine == "ddp":
        # Everything on every device, in float32; buckets hold a second copy of the gradients.
        weights = FLOAT32 * counts.total
        gradients = FLOAT32 * counts.trainable
        optimizer = FLOAT32 * optimizer_states * counts.trainable
        buffers = gradients if num_processes > 1 else 0
        after_step = gradients + buffers
    elif engine == "zero2":
        # Weights everywhere in the training dtype; masters, moments and gradients in shards.
        # Gradients pass through one bucket on their way to their owner. The optimizer takes its
        # shard of them in float32, when activations and bucket are gone.
        weights = dtype.itemsize * counts.total
        gradients = dtype.itemsize * shard
        optimizer = FLOAT32 * (1 + optimizer_states) * shard
        buffers = dtype.itemsize * ZERO2_BUCKET
        made //= num_processes
        after_step = gradients + FLOAT32 * shard
    else:
        # Float32 shards of everything. Gathered in the training dtype: weights outside of blocks,
        # for the whole step and with their gradients, and two blocks, the current one and the next,
        # each as it arrives and as it is used; in backward also their gradients.
        weights = FLOAT32 * -(-counts.total // num_processes)
        gradients = FLOAT32 * shard
        optimizer = FLOAT32 * optimizer_states * shard
        buffers = dtype.itemsize * (2 * counts.unwrapped + 6 * counts.largest_block)
        made = made * FLOAT32 // dtype.itemsize // num_processes
        after_step = gradients + buffers
    during_step = step.activations + buffers + (gradients if is_accumulating else made)
    held = weights + counts.buffers + int(optimizer) + frozen_bytes + ema_bytes
    return MemoryEstimate(
        weights=weights + counts.buffers,
        gradients=gradients,
        optimizer=int(optimizer),
        buffers=buffers,
        activations=step.activations,
        frozen=frozen_bytes,
        ema=ema_bytes,
        peak=held + max(during_step, after_step),
    )


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module, on any device."""
    return sum(parameter.numel() for parameter in module.parameters())


def make_meta_model(
    config: Mapping[str, Any],
    *,
    frozen_modules: Sequence[str] = (),
    gradient_checkpointing: int = 0,
    loss_repeat: int = 4,
) -> NOVATransformer3DModel:
    """The model of a config.json, without memory for its weights, ready for training.

    Args:
        config: Content of a config.json; keys that are not arguments of the model are ignored.
        frozen_modules: Names of the parts that are not trained.
        gradient_checkpointing: Level, 0 to 3.
        loss_repeat: Noise levels of each token.

    Raises:
        KeyError: If the architecture is unknown.
        ValueError: If a size is missing or out of range.
    """
    with torch.device("meta"):
        model = NOVATransformer3DModel.from_config(dict(config))
    for name, module in model.named_modules():
        if name in frozen_modules:
            module.requires_grad_(False)
    model.set_gradient_checkpointing(gradient_checkpointing)
    model.loss_repeat = loss_repeat
    return model.train()


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU, or main memory for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def set_worst_mask(model: NOVATransformer3DModel) -> None:
    """Always hide the smallest share of tokens: memory is largest when most tokens are known."""
    low, _, std = model.mask_embed.mask_ratios
    model.mask_embed.mask_ratios = [low, low, std]


def simulate_step(
    model: NOVATransformer3DModel,
    batch: BatchShape,
    *,
    engine: Engine = "ddp",
    dtype: torch.dtype = torch.float32,
    device_type: str = "cuda",
) -> StepMemory:
    """Count the bytes of a forward and a backward pass.

    Args:
        model: From :func:`make_meta_model`; its weights are useless afterwards.
        batch: Shapes of the micro-batch.
        engine: DDP computes from float32 weights under autocast, FSDP2 from gathered weights in
            the training dtype under autocast, ZeRO-2 in the training dtype throughout.
        dtype: Training dtype.
        device_type: "cuda" or "cpu": where autocast keeps float32 differs.
    """
    # The noise levels are a table that must exist before tensors lose their data.
    model.noise_scheduler = FlowMatchEulerDiscreteScheduler()
    model.noise_scheduler.corrupt(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1).long())
    set_worst_mask(model)
    weight_dtype = torch.float32 if engine == "ddp" else dtype
    uses_autocast = engine != "zero2" and dtype != torch.float32
    # Tensors without data count as tensors of the CPU.
    if uses_autocast and device_type == "cuda":
        _follow_cuda_autocast(model)
    with _shapes_only():
        _fill_weights(model, weight_dtype)
        inputs = _make_inputs(model, batch, weight_dtype)
        with LiveBytes(model) as live:
            with torch.autocast("cpu", dtype=dtype, enabled=uses_autocast):
                loss = sum(model(inputs).values())
            loss.backward()
    return StepMemory(activations=live.most_other, with_gradients=live.most)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors made inside, from allocation to release.

    Args:
        model: Its weights are left out, the gradients of its parameters counted apart.

    Attributes:
        most: Most bytes at a time.
        most_other: Most bytes at a time without gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.most = 0
        self.most_other = 0
        self._live = 0
        self._gradients = 0
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()
        for tensor in [*model.parameters(), *model.buffers()]:
            self._known.add(tensor.untyped_storage()._cdata)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and count the storages it has made."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return outputs

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        self._live += self._sizes[key]
        self._note()

    def _remove(self, key: int) -> None:
        self._live -= self._sizes.pop(key)

    def _add_gradient(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs when it has arrived
        self._gradients += parameter.grad.nbytes
        self._note()

    def _note(self) -> None:
        self.most = max(self.most, self._live)
        self.most_other = max(self.most_other, self._live - self._gradients)


def _follow_cuda_autocast(model: nn.Module) -> None:
    """Compute layer norms in float32, as CUDA's autocast does and the CPU's does not."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))


@contextlib.contextmanager
def _shapes_only() -> Iterator[None]:
    """Tensors made inside have no data."""
    numpy_state = np.random.get_state()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        np.random.set_state(numpy_state)


def _fill_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace weights by new tensors of the current mode, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _make_inputs(
    model: NOVATransformer3DModel, batch: BatchShape, dtype: torch.dtype
) -> dict[str, Any]:
    """The inputs that a training pipeline gives the model."""
    channels = model.image_encoder.image_dim
    frames = (batch.frames,) if batch.frames > 1 else ()
    x = torch.empty(batch.size, channels, *frames, *batch.latent_size, dtype=dtype)
    if model.text_embed is not None:
        shape = (batch.size, model.text_embed.num_tokens, model.text_embed.token_dim)
        return {"x": x, "prompt": torch.empty(shape, dtype=dtype)}
    assert model.label_embed is not None  # a model has one of the two
    return {"x": x, "c": [model.label_embed(torch.zeros(batch.size, dtype=torch.int64))]}
