"""Time, memory and operators of a piece of work on a device, and where in a Spotlighter pass the time goes."""

import math
import os
import time
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ...method.selector import Selector

STAGES = ("stem and blocks before s", "scoring", "selection", "blocks from s on", "text and logits")
OUTSIDE = ("scoring", "selection", "text and logits")
"""The stages outside the tower's own blocks."""
MEGABYTE = 2**20
FREE = ("empty", "_unsafe_view", "detach", "alias", "sym_")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")


def clock(device: torch.device) -> float:
    """Seconds, when the device has finished what it was given.

    On a CPU with one thread they are those for which the process itself has run: nothing else there lengthens them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def seconds(work, device: torch.device) -> float:
    """Seconds that work() takes, until the device has finished."""
    started = clock(device)
    work()
    return clock(device) - started


def alternate(legs: dict, runs: int, device: torch.device, tick=lambda: None) -> dict[str, list[float]]:
    """Time pieces of work in turn, A B C A B C …, so that what slows the machine slows all: {name: seconds of runs}.

    The first round warms caches and is not counted. ``tick`` is called after each piece.
    """
    taken = {name: [] for name in legs}
    for _ in range(runs + 1):
        for name, work in legs.items():
            taken[name].append(seconds(work, device))
            tick()
    return {name: times[1:] for name, times in taken.items()}


def peak_memory(work, device: torch.device) -> float:
    """The most, in MB, that PyTorch's allocator held during work() beyond what it held before.

    Weights and kept embeddings are there before and do not count. On CUDA the allocator keeps the mark itself; on a
    CPU the profiler's list of every allocation and release is summed up. What libraries take for themselves past
    PyTorch's allocator is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop are no news
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest / MEGABYTE


def operations(work) -> int:
    """Operations of matrix products and convolutions in work(), 2 for each multiplication.

    PyTorch counts those within fused attention on CUDA alone; on a CPU they are left out, for host and plug-in alike.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Traffic(TorchDispatchMode):
    """Counts what a piece of work asks of a device, fake tensors included: views and allocations are free.

    Attributes:
        operators: calls of operators that read or write numbers; fused attention is one. Each is at least a kernel.
        moved, float32: bytes that they read and write, and those of float32 among them.
        waits: operators whose result has to reach the host before it can go on, by name.
    """

    def __init__(self):
        super().__init__()
        self.operators = self.moved = self.float32 = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.startswith(WAITS) or by_mask:
            self.waits.append(str(func))
        result = func(*args, **(kwargs or {}))
        aliases = [given.alias_info for given in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and func.namespace != "prim" and not name.startswith(FREE):
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
            self.operators += 1
            self.moved += sum(map(_bytes, tensors))
            self.float32 += sum(_bytes(each) for each in tensors if each.dtype == torch.float32)
        return result


def _bytes(tensor):
    """Those that are there: what is expanded is read once."""
    there = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(there) * tensor.element_size()


def stages(wrapper, images, runs: int, device: torch.device) -> dict[str, float]:
    """Seconds of each stage of one inference pass, the median of ``runs`` passes after one that is not counted."""
    marks = {}

    def mark(name):
        marks[name] = clock(device)

    passes = []
    with _marked(wrapper, mark, device) as (cuts, scores):
        for _ in range(runs + 1):
            cuts.clear()
            scores.clear()
            mark("start")
            wrapper(images)
            mark("end")
            scoring = sum(scores)
            passes.append(
                (
                    marks["chosen"] - marks["tower"] - sum(cuts),
                    scoring,
                    sum(cuts) - scoring,
                    marks["tower left"] - marks["chosen"],
                    marks["end"] - marks["tower left"] + marks["tower"] - marks["start"],
                )
            )
    medians = torch.tensor(passes[1:], dtype=torch.float64).median(0).values.tolist()
    return dict(zip(STAGES, medians, strict=True))


@contextmanager
def _marked(wrapper, mark, device):
    """Mark where a pass enters, leaves and has thinned out the tower; lists the seconds of each cut and each score."""
    cuts, scores, vision = [], [], wrapper.adapter.vision

    def timed(work, taken, after=lambda: None):
        def timing(*args):
            result = []
            taken.append(seconds(lambda: result.append(work(*args)), device))
            after()
            return result[0]

        return timing

    own = {name: getattr(Selector, name) for name in ("merge", "cut", "select", "sample_score", "semantic_score")}
    instead = {name: timed(own[name], cuts) for name in ("merge", "cut")}
    instead |= {"select": timed(own["select"], cuts, lambda: mark("chosen"))}
    instead |= {name: timed(own[name], scores) for name in ("sample_score", "semantic_score")}
    hooks = [
        vision.register_forward_pre_hook(lambda *_: mark("tower")),
        vision.register_forward_hook(lambda *_: mark("tower left")),
    ]
    for name, work in instead.items():
        setattr(Selector, name, work)
    try:
        yield cuts, scores
    finally:
        for name, work in own.items():
            setattr(Selector, name, work)
        for hook in hooks:
            hook.remove()
