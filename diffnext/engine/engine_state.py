"""The state of a run in memory: random numbers, masters, optimizer state.

The engines (one process, DDP, FSDP2, DeepSpeed ZeRO-2) keep them in different shapes and places.
Here they are whole tensors by name, so every engine loads the state that another has saved, on any
number of processes:

    model.<name>              float32 masters of the parameters; buffers
    optimizer.<name>.<key>    the optimizer's state of a parameter, such as exp_avg and step
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Random numbers


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of all generators that a run draws from, as tensors and plain values.

    Args:
        device: Device of this process, whose generator is included.
    """
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every generator back into the state that :func:`capture_random_state` found."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Keep the random states of a run as they are, whatever happens inside."""
    state = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


# Engines


class EngineState:
    """Masters and optimizer state of a prepared model: in one process, under DDP and FSDP2.

    Args:
        accelerator: The engine.
        model: Prepared model.
        optimizer: Prepared optimizer.
        trained_only: Leave out weights that are not trained and come from the base folder.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, trained_only: bool
    ) -> None:
        self.accelerator = accelerator
        self.model: nn.Module = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.trained_only = trained_only
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}

    def masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter with its whole float32 value; collective, one at a time."""
        for parameter in self.model.parameters():
            yield parameter, self._master(parameter)

    def tensors(self, copy: bool = False) -> dict[str, Tensor]:
        """All of it in main memory, on the main process; empty elsewhere; collective.

        Args:
            copy: Whether training may continue while the tensors are in use.
        """
        kept = {}
        is_main = self.accelerator.is_main_process
        for name, value in self._named_tensors():  # on every process: reading is collective
            if is_main:
                kept[name] = value.detach().to("cpu", copy=copy).contiguous()
        return kept

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take the state back; learning rate, weight decay and such stay as configured.

        Raises:
            ValueError: If it lacks a parameter, or one has another shape.
        """
        for name, value in self._own_values():
            found = _find(saved, f"model.{name}", value)
            if isinstance(value, nn.Parameter):
                self._set_master(value, found)
            else:
                value.copy_(found)
        self._load_optimizer(_by_parameter(saved))

    def scaler_state(self) -> dict[str, Any] | None:
        """State of the scaler for float16 gradients; None if there is none."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Continue with a scaler's state; None, or no scaler here, changes nothing."""
        if state is not None and "scale" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _own_values(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and saved buffers by name, in the order of the model."""
        parameters = dict(self.model.named_parameters())
        for name, value in self.model.state_dict(keep_vars=True).items():
            if not self.trained_only or (name in parameters and value.requires_grad):
                yield name, parameters.get(name, value)

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._own_values():
            whole = self._master(value) if isinstance(value, nn.Parameter) else value
            yield f"model.{name}", whole
        for parameter, state in self._optimizer_state():
            for key, value in state.items():
                yield f"optimizer.{self.names[parameter]}.{key}", torch.as_tensor(value)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        return _whole(parameter)

    def _set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(_like(value, parameter))

    def _optimizer_state(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Each trained parameter with the optimizer's state for it, whole; collective."""
        state = self.optimizer.optimizer.state
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                values = state.get(parameter, {})
                yield parameter, {k: _whole(v) for k, v in values.items() if v is not None}

    def _load_optimizer(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # A parameter that never had a gradient has no state.
        state = {
            index: {key: _like(value, p) for key, value in saved[self.names[p]].items()}
            for index, p in enumerate(parameters)
            if self.names[p] in saved
        }
        _load_into(self.optimizer.optimizer, state)


class ZeroState(EngineState):
    """Masters and optimizer state under DeepSpeed ZeRO-2, which keeps both in flat shards."""

    @property
    def _zero(self) -> Any:
        return self.optimizer.optimizer

    def scaler_state(self) -> dict[str, Any] | None:
        """See :meth:`EngineState.scaler_state`."""
        state = vars(self._zero.loss_scaler)
        return {name: value for name, value in state.items() if isinstance(value, int | float)}

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """See :meth:`EngineState.load_scaler_state`."""
        known = vars(self._zero.loss_scaler)
        known.update({name: value for name, value in (state or {}).items() if name in known})

    def _master(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        return parameter if master is None else master

    def _set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameter.copy_(value)
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))

    def _groups(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """The flat shard of each group with the parameters in it."""
        yield from zip(
            self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True
        )

    def _link(self) -> None:
        """Tell parameters where the optimizer's state for them is.

        DeepSpeed does this only once, after the step of the first group, before the others have
        any.
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _optimizer_state(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        for flat, parameters in self._groups():
            state = self._zero.optimizer.state.get(flat, {})
            for parameter in parameters:
                yield (
                    parameter,
                    {
                        key: safe_get_full_optimizer_state(parameter, key)
                        if torch.is_tensor(value) and value.shape == flat.shape
                        else torch.as_tensor(value).clone()  # one for all of the group
                        for key, value in state.items()
                    },
                )

    def _load_optimizer(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        state = {}
        for index, (flat, parameters) in enumerate(self._groups()):
            # All of a group have taken the same steps.
            first = next((saved[self.names[p]] for p in parameters if self.names[p] in saved), {})
            state[index] = {
                key: torch.zeros_like(flat) if value.ndim else value for key, value in first.items()
            }
        if not any(state.values()):
            return  # saved before the first step
        _load_into(self._zero.optimizer, state)
        self._link()
        for _, parameters in self._groups():
            for parameter in parameters:
                for key, value in saved.get(self.names[parameter], {}).items():
                    if value.ndim:
                        whole = value.to(parameter.device, torch.float32)
                        safe_set_full_optimizer_state(parameter, whole, key)


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value, sharded like a parameter if they have the same shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    # Every process has the whole value, so none needs to send it.
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _find(saved: Mapping[str, Tensor], name: str, expected: Tensor) -> Tensor:
    if name not in saved or saved[name].shape != expected.shape:
        found = tuple(saved[name].shape) if name in saved else "missing"
        raise ValueError(f"{name} must have the shape {tuple(expected.shape)}, it is {found}")
    return saved[name]


def _by_parameter(saved: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by parameter and key."""
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in saved.items():
        kind, _, rest = full_name.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "optimizer":
            states.setdefault(name, {})[key] = value
    return states


def _load_into(optimizer: torch.optim.Optimizer, state: Mapping[int, Any]) -> None:
    """Give an optimizer the state of its parameters, by their number; its options stay."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
