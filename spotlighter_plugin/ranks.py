"""Several processes as one: torchrun starts them, each takes its part of every batch, and one writes and speaks.

A batch's parts are B_1 … B_W, w_r = |B_r| / |B|. Whatever is a mean over the batch is Σ_r w_r of the parts' means, and
so is its gradient: ``mean`` is this sum in both directions. In one process nothing here does anything.
"""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import errors, files

BEAT = 2  # seconds between two signs of life
MISSED = 20  # signs after which a process is gone; own looks are counted, so that nothing ends where all are stopped
LEFT, FAILED = b"left", b"failed"
GONE = "another process of this run has ended"
_rank, _world, _share = 0, 1, 1.0  # _share: w_r of the present batch


def rank() -> int:
    """This process's number, 0 … ``world()`` - 1."""
    return _rank


def world() -> int:
    """How many processes make this run."""
    return _world


def is_first() -> bool:
    """Whether this is the process that writes."""
    return _rank == 0


def part(n: int) -> slice:
    """This process's part of n places: equal parts in the processes' order, the first ones larger by one."""
    return slice(*(n // _world * r + min(r, n % _world) for r in (_rank, _rank + 1)))


# -- joining ---------------------------------------------------------------------------------------------------


@contextmanager
def joined() -> Iterator[None]:
    """One run with the processes that torchrun started beside this one; nothing happens where it started none.

    A process that fails, dies or gives no sign of life for 40 seconds ends the others; one of all says why.
    """
    if _world > 1 or not errors.started_together():
        yield
        return
    errors.speaks = None
    store, number, count = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    _count_as(number, count)
    before = _end_when_told()
    watch = _Watch(number, count)
    try:
        yield
        barrier()  # all is written
        watch.leave(LEFT)
    except BaseException:
        errors.speaks = watch.says_why()
        watch.leave(FAILED)
        raise
    else:
        dist.destroy_process_group()
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        _count_as(0, 1)


def _count_as(number, count):
    global _rank, _world, _share
    _rank, _world, _share = number, count, 1 / count
    files.writes = number == 0


def _end_when_told():
    """What torchrun sends to the processes that are left ends them as a mistake does."""

    def end(*_):
        raise InterruptedError(f"{GONE}, or the run was told to end: the same command goes on")

    on_main_thread = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, end) if on_main_thread else None


class _Watch:
    """Gives signs of life and looks for the others', in a thread and over a connection of its own."""

    def __init__(self, number, count):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=BEAT * MISSED)
        self.store = dist.PrefixStore(f"signs/{attempt}", dist.TCPStore(host, port, is_master=False, timeout=patience))
        self.own, self.others = str(number), [str(other) for other in range(count) if other != number]
        self.left = threading.Event()
        self.store.set(self.own, "0")
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def says_why(self) -> bool:
        """Whether this process is the first to ask."""
        try:
            return self.store.add("asked", 1) == 1
        except RuntimeError:  # the store is gone with the process that kept it
            return True

    def leave(self, how) -> None:
        """Say so and end the thread: Python's end while it waits for the store would abort the process."""
        self.left.set()
        with suppress(RuntimeError):
            self.store.set(self.own, how)
        self.thread.join()

    def _look(self):
        heard, missed, beats = dict.fromkeys(self.others), dict.fromkeys(self.others, 0), 0
        while not self.left.wait(BEAT):
            beats += 1
            try:
                self.store.set(self.own, str(beats))
                signs = self.store.multi_get(list(heard)) if heard else []
            except RuntimeError:
                signs = [FAILED] * len(heard)
            for other, sign in zip(list(heard), signs, strict=True):
                missed[other] = missed[other] + 1 if sign == heard[other] else 0
                heard[other] = sign
                if sign == LEFT:
                    del heard[other]
                elif sign == FAILED or missed[other] >= MISSED:
                    self._end(f"{GONE} or hangs: the same command goes on from the newest checkpoint")

    def _end(self, line):
        """End although the main thread may wait for ever; if it is about to end by itself, let it."""
        if self.left.wait(BEAT):
            return
        errors.speaks = self.says_why()
        errors.tell(line)
        os._exit(1)


@contextmanager
def _together():
    """A process that has gone is one line here."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"{GONE}: the same command goes on from the newest checkpoint") from error


def take_device(use_cuda: bool) -> None:
    """Take this process's GPU. Raises ValueError: there are fewer GPUs than processes on this machine."""
    if _world == 1 or not use_cuda or not torch.cuda.is_available():
        return
    local, count = int(os.environ.get("LOCAL_RANK", _rank)), torch.cuda.device_count()
    if local >= count:
        started = os.environ.get("LOCAL_WORLD_SIZE", _world)
        raise ValueError(
            f"{started} processes on a machine with {count} GPUs: set --nproc_per_node {count}, or USE_CUDA False"
        )
    torch.cuda.set_device(local)


# -- waiting and telling ---------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait until all are here."""
    if _world > 1:
        gather_objects(None)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes ahead, fetches, draws and writes what all need; then the others."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def gather_objects(value: Any) -> list:
    """Everybody's value in order; values are pickled."""
    if _world == 1:
        return [value]
    found = [None] * _world
    with _together():
        dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], Any]) -> Any:
    """What ``make`` gives in the first process. The others call it, too, so that they draw the same random numbers."""
    made = [make()]
    if _world > 1:
        with _together():
            dist.broadcast_object_list(made, src=0)
    return made[0]


# -- tensors ---------------------------------------------------------------------------------------------------


def gather(rows: Tensor) -> Tensor:
    """Everybody's rows (n_r, …) one below the other, in the processes' order: (Σ n_r, …), without gradient."""
    if _world == 1:
        return rows
    counts = gather_objects(len(rows))
    padded = rows.detach().new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts]
    with _together():
        dist.all_gather(found, padded)
    return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)])


def share(n: int) -> bool:
    """Say how many images of the coming batch are here, on which ``mean`` weighs. Returns whether all have some."""
    global _share
    if _world == 1:
        return n > 0
    counts = gather_objects(n)
    _share = n / max(sum(counts), 1)
    return min(counts) > 0


def total(n: int) -> int:
    """How many images of the present batch all have together, if n are here."""
    return round(n / _share)


def mean(value: Tensor) -> Tensor:
    """Σ_r w_r value_r of means over the parts of a batch. Its gradient is the same sum over the gradients."""
    return value if _world == 1 else _Mean.apply(value)


def mean_of(values: dict[str, float]) -> dict[str, float]:
    """``mean`` of numbers by name."""
    if _world == 1 or not values:
        return values
    found = mean(torch.tensor([float(value) for value in values.values()], dtype=torch.float64))
    return dict(zip(values, found.tolist(), strict=True))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.share = _share
        return _weighed(value, _share)

    @staticmethod
    def backward(ctx, gradient):
        return _weighed(gradient, ctx.share)


def _weighed(value, weight):
    summed = value.detach().contiguous() * weight
    with _together():
        dist.all_reduce(summed)
    return summed


# -- training --------------------------------------------------------------------------------------------------


def unite(trainer) -> None:
    """Make a trainer with Dassl's tables of models and optimizers one with the other processes': all start from the
    first one's parameters, gradients are averaged as they arise, and BatchNorm normalizes over all parts of a batch.

    Raises: ValueError, one line: a batch or the training images are fewer than the processes, or nothing is seeded.
    """
    if _world == 1:
        return
    cfg, images = trainer.cfg, len(trainer.dm.dataset.train_x)
    if cfg.SEED < 0:
        raise ValueError(f"SEED is {cfg.SEED}: {_world} processes that draw alike need one of at least 0")
    size = cfg.DATALOADER.TRAIN_X.BATCH_SIZE
    if size < _world:
        raise ValueError(f"DATALOADER.TRAIN_X.BATCH_SIZE is {size}, must be at least 1 for each of {_world} processes")
    if images < _world:
        raise ValueError(f"there are {images} training images for {_world} processes: start fewer")
    for name in trainer.get_model_names():
        for module in trainer._models[name].modules():
            if isinstance(module, _BatchNorm):
                module.forward = MethodType(_batch_norm, module)
        for group in trainer._optims[name].param_groups if trainer._optims[name] is not None else ():
            for parameter in group["params"]:
                with _together():
                    dist.broadcast(parameter.data, src=0)
                parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter):
    parameter.grad = _weighed(parameter.grad, _share)


def _batch_norm(self, x):
    """``self`` on features (n, d, …) that are one part of a batch."""
    if not self.training:
        return type(self).forward(self, x)
    dims, shape = [dim for dim in range(x.dim()) if dim != 1], [-1] + [1] * (x.dim() - 2)
    wide = x.float()
    centre = mean(wide.mean(dims))  # (d,)
    wide = wide - centre.view(shape)
    variance = mean(wide.square().mean(dims))  # (d,)
    if self.track_running_stats:
        count, self.num_batches_tracked = total(x.numel() // x.shape[1]), self.num_batches_tracked + 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(centre.detach(), momentum)
        self.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
    normal = wide * (variance + self.eps).rsqrt().view(shape)
    if self.affine:
        normal = normal * self.weight.view(shape) + self.bias.view(shape)
    return normal.type(x.dtype)


# -- random numbers of one picture -----------------------------------------------------------------------------


def coming_seed() -> int:
    """A number that says how this process's random numbers go on; they go on as if nobody had asked."""
    with torch.random.fork_rng(devices=()):
        return int(torch.empty((), dtype=torch.int64).random_())


@contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
    """Random numbers of the CPU from this seed for a while, afterwards as before; None: as ever."""
    if seed is None:
        yield
        return
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
