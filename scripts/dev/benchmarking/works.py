"""Pieces of work that benchmarks time, through the public interface of whichever package is there.

A work is built once from a plain dict, runs again and again, and returns a result, so two packages
can be compared. Every piece can also be done the way the specification words it
(``tests/reference_nova.py``).

Shapes: B batch, C latent channels, T latent frames, h w latent size.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "tests"  # has reference_nova.py
TEXT_LENGTHS = (12, 40, 25, 60)  # tokens of prompts; the empty one has none

Spec = dict[str, Any]


class Work(ABC):
    """Work with a NOVA of random weights.

    Spec: ``transformer`` (arguments of the model), ``scheduler`` ("flow" or "ddpm"), ``batch``,
    ``frames`` (latent frames), ``device``, ``dtype``, ``weights`` (a file that the first process
    writes and others read, if any), ``compile``, ``prepack``.

    Args:
        spec: Settings.
        is_plain: Whether to do it as the specification words it.
    """

    def __init__(self, spec: Spec, is_plain: bool = False) -> None:
        from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

        self.spec = spec
        self.is_plain = is_plain
        self.device = torch.device(spec["device"])
        self.dtype = getattr(torch, spec["dtype"])
        torch.manual_seed(0)
        self.model = NOVATransformer3DModel(**spec["transformer"])
        if spec["weights"]:
            load_or_save(self.model, Path(spec["weights"]))
        self.model.to(self.device, self.dtype)
        if spec.get("compile"):
            self.compile()
        if spec.get("prepack"):
            from diffnext.models.packed_linear import prepack_linears

            prepack_linears(self.model)

    @abstractmethod
    def run(self) -> Tensor:
        """Do it once; returns what both packages should agree on."""

    def compile(self) -> None:
        """Compile the model for this work."""
        self.model.compile_parts()

    def make_scheduler(self) -> Any:
        """A scheduler of the package."""
        if self.spec["scheduler"] == "ddpm":
            from diffnext.schedulers.scheduling_ddpm import DDPMScheduler

            return DDPMScheduler()
        from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()

    def make_prompts(self, count: int, empty: int = 0) -> list[Tensor]:
        """Text states of some lengths, then the null prompt's."""
        width = self.spec["transformer"]["text_token_dim"]
        limit = self.spec["transformer"]["text_token_len"]
        generator = torch.Generator().manual_seed(1)
        lengths = [min(TEXT_LENGTHS[i % len(TEXT_LENGTHS)], limit) for i in range(count)]
        states = [torch.randn(n, width, generator=generator) for n in lengths]
        states += [torch.zeros(0, width)] * empty
        return [state.to(self.device, self.dtype) for state in states]


class GenerateWork(Work):
    """Sampling of latents.

    Spec, besides that of :class:`Work`: ``num_preds``, ``steps``, ``guidance``, and
    ``compile_options`` of a compiled model, if any.
    """

    def __init__(self, spec: Spec, is_plain: bool = False) -> None:
        super().__init__(spec, is_plain)
        self.model.eval()
        self.model.sample_scheduler = self.make_scheduler()

    def compile(self) -> None:
        """Compile the model for drawing, as other packages call it or as this one does."""
        compile_drawing = getattr(self.model, "compile_drawing", self.model.compile_parts)
        compile_drawing(**self.spec.get("compile_options", {}))

    def record(self, recorder: str) -> None:
        """Draw by recorded programs from now on, or no more.

        Args:
            recorder: Name of a function of ``diffnext.models.capture``, or nothing.
        """
        from diffnext.models import capture

        programs = capture.Programs(getattr(capture, recorder)) if recorder else None
        self.model.programs = programs

    def inputs(self) -> dict[str, Any]:
        """Inputs of the model; the same in every run."""
        spec = self.spec
        is_guided = spec["guidance"] > 1
        inputs = {
            "prompt": self.make_prompts(spec["batch"], spec["batch"] if is_guided else 0),
            "batch_size": spec["batch"],
            "num_preds": spec["num_preds"],
            "num_diffusion_steps": spec["steps"],
            "guidance_scale": spec["guidance"],
            "max_latent_length": spec["frames"],
            "generator": torch.Generator(self.device).manual_seed(0),
            "tqdm1": False,
            "tqdm2": False,
        }
        return {**inputs, "motion_flow": [5.0] * spec["batch"]} if spec["frames"] > 1 else inputs

    def run(self) -> Tensor:
        """Sample; returns the latents, (B, C, T, h, w)."""
        if self.is_plain:
            return load_reference().generate(self.model, self.inputs())
        with torch.no_grad():
            return self.model(self.inputs())["x"]


class TrainWork(Work):
    """One training step: losses, gradients, clipping, AdamW.

    Spec, besides that of :class:`Work`: ``checkpointing``, a level.
    """

    def __init__(self, spec: Spec, is_plain: bool = False) -> None:
        super().__init__(spec, is_plain)
        self.model.train()
        if spec.get("checkpointing"):
            self.model.set_gradient_checkpointing(spec["checkpointing"])
        self.model.noise_scheduler = self.make_scheduler()
        if self.model.text_embed is not None:
            self.model.text_embed.dropout = 0
        sizes = spec["transformer"]
        size = [side // sizes["image_stride"] for side in sizes["image_size"]]
        generator = torch.Generator().manual_seed(2)
        shape = (spec["batch"], sizes["image_dim"], spec["frames"], *size)
        x = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        self.x = x if spec["frames"] > 1 else x.squeeze(2)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=not is_plain)

    def run(self) -> Tensor:
        """Take a step of learning rate 0; returns the loss and the gradient norm."""
        torch.manual_seed(3)
        np.random.seed(3)
        inputs = {"x": self.x, "prompt": self.make_prompts(self.spec["batch"])}
        if self.spec["frames"] > 1:
            inputs["motion_flow"] = [5.0] * self.spec["batch"]
        losses = load_reference().train(self.model, inputs) if self.is_plain else self.model(inputs)
        loss = sum(losses.values())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return torch.stack([loss.detach().float(), norm.detach().float()]).cpu()


WORKS: dict[str, Any] = {"generate": GenerateWork, "train": TrainWork}


def load_reference() -> ModuleType:
    """The plain formulation, which is not part of the package."""
    if str(REFERENCE) not in sys.path:
        sys.path.append(str(REFERENCE))
    return importlib.import_module("reference_nova")


def load_or_save(model: nn.Module, path: Path) -> None:
    """Give all processes the weights of the first one."""
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(model.state_dict(), file)
    Path(file.name).rename(path)
