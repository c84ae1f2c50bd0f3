"""A process that does one piece of work on demand.

Reads a JSON object from its command line, then orders from standard input, one per line, of which
each is answered by a JSON object on a line; see :class:`Worker`.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# By way of the scripts, and not of ``diffnext``, which may be the baseline's.
from benchmarking.works import WORKS, Work

aten = torch.ops.aten
FLOPS = dict(flop_registry)
FLOPS[aten._scaled_dot_product_flash_attention_for_cpu] = FLOPS[
    aten._scaled_dot_product_flash_attention
]
if torch.backends.mkldnn.is_available():  # products of packed weights
    FLOPS[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *args, **options: (
        2 * x.numel() * weight.shape[0]
    )
HOST_CALLS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


class WorkCounter(TorchDispatchMode):
    """Counts operations that do something (views do not), and what products of matrices take.

    Args:
        rate: Floating-point operations per second that the machine reaches.
        bandwidth: Bytes per second.

    Attributes:
        operations: Number of operations.
        flops: Of products and attention.
        floor: Seconds of only these: each as long as its arithmetic takes, or as its tensors take
            to be read and written once, whichever is longer.
    """

    def __init__(self, rate: float = math.inf, bandwidth: float = math.inf) -> None:
        super().__init__()
        self.rate = rate
        self.bandwidth = bandwidth
        self.operations = 0
        self.flops = 0
        self.floor = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, then count."""
        options = kwargs or {}
        result = func(*args, **options)
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.operations += not is_view
        if func.overloadpacket in FLOPS:
            flops = FLOPS[func.overloadpacket](*args, **options, out_val=result)
            leaves = tree_leaves((args, options, result))
            moved = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            self.flops += flops
            self.floor += max(flops / self.rate, moved / self.bandwidth)
        return result


class Worker:
    """A piece of work, and the orders that it follows.

    Args:
        settings: ``work``, a key of ``WORKS``, its ``spec``, ``is_plain`` and ``threads``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.work: Any = WORKS[settings["work"]](settings["spec"], settings["is_plain"])
        self._result: Any = None

    def ask(self, line: str) -> dict[str, Any]:
        """Follow an order.

        Args:
            line: ``run`` answers with the seconds it took; ``count``, if need be with the machine's
                matrix rate and bandwidth, with the operations and matrix work of one run, and
                ``launches`` with what the host gave to the device; ``change JSON`` changes the
                spec for later runs, ``record RECORDER`` how they are drawn (by none: eagerly);
                ``save PATH`` writes the result of the last run.
        """
        word, _, argument = line.strip().partition(" ")
        if word == "run":
            self._result, report = timed(self.work)
            return report
        if word == "count":
            return counted(self.work, WorkCounter(*map(float, argument.split())))
        if word == "launches":
            return launched(self.work)
        if word == "change":
            self.work.spec.update(json.loads(argument))
            return self.work.spec
        if word == "record":
            self.work.record(argument)
            return {"recorder": argument}
        if word == "save":
            torch.save(self._result.float().cpu(), argument)
            return {"saved": argument}
        raise ValueError(f"there is no order {word!r}")


def main(argv: Sequence[str]) -> None:
    """Build the work, then answer until the input ends."""
    worker = Worker(json.loads(argv[0]))
    answer({"ready": True})
    for line in sys.stdin:
        answer(worker.ask(line))


def timed(work: Work) -> tuple[Any, dict[str, float]]:
    """Run once."""
    synchronize(work)
    if is_on_gpu(work):
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    result = work.run()
    synchronize(work)
    seconds = time.perf_counter() - begin
    return result, {"seconds": seconds, "rate": work.spec["batch"] / seconds, "peak_mb": peak(work)}


def counted(work: Work, counter: WorkCounter) -> dict[str, float]:
    """Operations and floating-point operations of matrix products of one run."""
    with counter:
        work.run()
    return {"operations": counter.operations, "flops": counter.flops, "floor": counter.floor}


def launched(work: Work) -> dict[str, float]:
    """Calls by which the host gives work to the device in one timed run; operations on a CPU."""
    if not is_on_gpu(work):
        with WorkCounter() as counter:
            _, report = timed(work)
        return report | {"launches": counter.operations}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        _, report = timed(work)
    events = profiler.profiler.kineto_results.events()  # tables of so many take minutes
    names = Counter(event.name() for event in events)
    return report | {"launches": sum(names[name] for name in names if name.startswith(HOST_CALLS))}


def is_on_gpu(work: Work) -> bool:
    """Whether the clock must wait for a GPU."""
    return str(work.spec.get("device", "cpu")).startswith("cuda")


def synchronize(work: Work) -> None:
    """Wait for what was launched."""
    if is_on_gpu(work):
        torch.cuda.synchronize()


def peak(work: Work) -> float:
    """Largest memory in MB: of the GPU in the last run, or of the process so far."""
    if is_on_gpu(work):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def answer(report: dict[str, Any]) -> None:
    """Write one line."""
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
