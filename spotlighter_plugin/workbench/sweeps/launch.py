"""Running chains of runs here, on Slurm, on Ray or on cached states. A run is skipped where complete, else resumed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue

from ...files import alone_in, lock_of
from .plan import HERE, train_py


def run_chain(chain, home, environment=None, call=None, processes=1) -> str:
    """Run what is not complete of a chain, in order. Returns the first failure as one line, "" if there is none.

    call: makes a run, given it, a file for its errors and the lock's open files; returns an exit code. By default
        train.py is called, in as many processes.
    """
    for run in chain:
        failure = _execute(run, call or partial(_call_train_py, home, environment, processes))
        if failure:
            return f"{run.name}: {failure} ({run.folder})"
    return ""


def _execute(run, call):
    """Make a run unless it is complete; returns its failure as one line, "" if there is none."""
    run.folder.mkdir(parents=True, exist_ok=True)
    errors = run.folder / "stderr.txt"
    with alone_in(run.folder, wait=True) as lock:
        if run.complete:
            return ""
        with open(errors, "w") as file:
            code = call(run, file, lock)
        if code:
            return _last_line(errors) or f"train.py ended with exit code {code}"
        return "" if run.complete else "train.py ended without a result"


def _call_train_py(home, environment, processes, run, errors, lock):
    """train.py's exit code, in a process of its own, or several, that keeps the open files of `lock`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else ()), *train_py(home), *run.arguments],
        cwd=home,
        env=os.environ | (environment or {}) | (lock_of(run.folder) if lock else {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=lock,
    ).returncode


def _last_line(path):
    """The last line that train.py wrote there, apart from progress bars and what torchrun adds."""
    lines = [line.rsplit("\r", 1)[-1].strip() for line in path.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and "it/s]" not in line and "s/it]" not in line]
    said = [line for line in lines if line.startswith("error: ")] or lines
    return said[-1].removeprefix("error: ") if said else ""


# -- launchers: each takes (chains, home, jobs, GPUs of a run: as many processes if above 1) and yields (a chain's
# -- index, its failure) as chains end, None in between


def launch_here(chains, home, jobs, gpus_per_run=1) -> Iterator[tuple[int, str] | None]:
    """On this machine, `jobs` at once; each takes its number of GPUs in turn and its share of the cores."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if 0 < len(gpus) < gpus_per_run:
        raise ValueError(f"--gpus-per-run is {gpus_per_run}, CUDA_VISIBLE_DEVICES names {len(gpus)}")
    share = (
        {}
        if jobs == 1 or "OMP_NUM_THREADS" in os.environ
        else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    )
    slots = Queue()
    for slot in range(jobs):
        own = [gpus[(slot * gpus_per_run + i) % len(gpus)] for i in range(gpus_per_run if gpus else 0)]
        slots.put(share | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}))

    def work(chain):
        environment = slots.get()
        try:
            return run_chain(chain, home, environment, processes=gpus_per_run)
        finally:
            slots.put(environment)

    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(work, chain) for chain in chains]
        try:
            yield from _as_they_end(chains, tasks, lambda task: task.done(), lambda task: task.result())
        finally:
            for task in tasks:
                task.cancel()


def launch_slurm(chains, home, jobs, gpus_per_run=1) -> Iterator[tuple[int, str] | None]:
    """As a Slurm job array, at most `jobs` at once, through submitit. SBATCH_PARTITION and its kin say where."""
    try:
        import submitit
    except ImportError:
        raise ValueError("--launcher slurm needs submitit: pip install submitit") from None
    folder = Path(os.path.commonpath([chain[0].folder for chain in chains])) / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=os.environ.get("SPOTLIGHTER_SUBMITIT", "slurm"))
    except RuntimeError as error:  # this is no Slurm cluster
        raise ValueError(f"--launcher slurm: {error}") from None
    size = {"cpus_per_task": 8 * max(gpus_per_run, 1), "gpus_per_node": gpus_per_run}
    executor.update_parameters(name="spotlighter", timeout_min=24 * 60, slurm_array_parallelism=jobs, **size)
    tasks = executor.map_array(partial(run_chain, processes=gpus_per_run), chains, [home] * len(chains))
    yield from _as_they_end(chains, tasks, lambda task: task.done(), lambda task: task.result())


def launch_ray(chains, home, jobs, gpus_per_run=1) -> Iterator[tuple[int, str] | None]:
    """On the cluster that RAY_ADDRESS names or on this machine, at most `jobs` at once, with GPUs where there are; runs
    of one GPU each share it where jobs are more."""
    try:
        import ray
    except ImportError:
        raise ValueError("--launcher ray needs Ray: pip install ray") from None
    try:
        ray.init(ignore_reinit_error=True, include_dashboard=False)
    except Exception as error:  # Ray raises that class itself where it does not start
        raise ValueError(f"--launcher ray: {' '.join(str(error).split())}") from None
    have = ray.cluster_resources()
    gpus = have.get("GPU", 0)
    if 0 < gpus < gpus_per_run:
        raise ValueError(f"--gpus-per-run is {gpus_per_run}, Ray's cluster has {gpus:g} GPUs")
    share = {"num_gpus": min(1, gpus / jobs) if gpus_per_run == 1 else gpus_per_run} if gpus else {}
    remote = ray.remote(num_cpus=max(1, have.get("CPU", 1) // jobs), **share)(run_chain)
    tasks = [remote.remote(chain, home, processes=gpus_per_run) for chain in chains]
    yield from _as_they_end(chains, tasks, lambda task: bool(ray.wait([task], timeout=0)[0]), ray.get)


def launch_cached(chains, home, jobs, gpus_per_run=1) -> Iterator[tuple[int, str] | None]:
    """In this process, one after the other, a data set's runs on the same hidden states: see `CachedRuns`."""
    from ..training.cached import CachedRuns

    if jobs > 1 or gpus_per_run > 1 or Path(home).resolve() != HERE:
        raise ValueError("--launcher cached runs this repository's train.py, one run at a time on one GPU")
    runs = CachedRuns()
    for index in sorted(range(len(chains)), key=lambda index: chains[index][0].dataset):
        yield index, run_chain(chains[index], home, call=runs.call)


LAUNCHERS = {"here": launch_here, "cached": launch_cached, "slurm": launch_slurm, "ray": launch_ray}


def _as_they_end(chains, tasks, ended, result):
    waiting = dict(enumerate(tasks))
    while waiting:
        for index in [index for index, task in waiting.items() if ended(task)]:
            try:
                failure = result(waiting.pop(index))
            except Exception as error:  # the launcher lost the task: the others go on
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                failure = f"{chains[index][0].name}: {reason} ({chains[index][0].folder})"
            yield index, failure
        if waiting:
            yield None
            time.sleep(0.5)
