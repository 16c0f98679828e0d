"""Long and rough work: kills, and memory that must not grow. Prints what docs/reliability.md says of it.

    python tools/soak.py kill --kills 100
    python tools/soak.py length
    python tools/soak.py classes

`kill`: training, checkpointing, the first drawing of the bundled scenes, a sweep and `spotlighter predict` are killed
with SIGKILL at random moments, gone on with until they are done, and compared with work that nobody disturbed. Exit
code 0 if nothing is lost, different or left over. `length`: resident memory over a thousand batches of inference and
twenty epochs of training. `classes`: memory and time of ten thousand classes, learned, weighed and evaluated.
"""

import contextlib
import hashlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from spotlighter_plugin import SpotlighterWrapper, cli  # noqa: E402
from spotlighter_plugin.files import alone_in  # noqa: E402
from spotlighter_plugin.runtime.dassl.evaluation import Classification  # noqa: E402
from spotlighter_plugin.runtime.dassl.utils import load_checkpoint  # noqa: E402
from spotlighter_plugin.workbench.speed.bench_hosts import Shape, build_host  # noqa: E402
from spotlighter_plugin.workbench.training import train  # noqa: E402
from spotlighter_plugin.workbench.training.settings import import_trainers_and_datasets  # noqa: E402

PATIENCE = 600  # seconds in which a piece of work must end
SHORT = (
    *("OPTIM.MAX_EPOCH", "3", "DATALOADER.NUM_WORKERS", "0", "DATALOADER.TRAIN_X.BATCH_SIZE", "8"),
    *("DATALOADER.TEST.BATCH_SIZE", "16", "DATASET.NUM_SHOTS", "4", "TRAIN.PRINT_FREQ", "1"),
    *("INPUT.SIZE", "(112, 112)"),
)

import_trainers_and_datasets()  # once: processes are forked from this one
torch.set_num_threads(1)


@dataclass
class Count:
    """What a kind of work went through."""

    kills: int = 0
    half_written: int = 0
    continued: int = 0
    finished: int = 0
    epochs_lost: int = 0
    differ: int = 0
    left: int = 0


@dataclass
class Work:
    """Something to be killed.

    Attributes:
        name: for readers.
        command: its command line for a folder, train.py's or spotlighter's, and the one that goes on with it (True).
        results: {name: digest} of what it leaves in a folder.
        writing: share of the kills that wait until it writes a file; the others come at any moment.
        alone: whether half of the kills leave the processes alone that it has started itself.
    """

    name: str
    command: Callable[[Path, bool], list[str]]
    results: Callable[[Path], dict[str, str]]
    writing: float = 0.0
    alone: bool = False
    count: Count = field(default_factory=Count)


# -- processes -------------------------------------------------------------------------------------------------


class Process:
    """A command in a process that is forked from this one, where everything is imported; it says all to `log`."""

    def __init__(self, arguments: list[str], log: Path):
        self.exitcode: int | None = None
        """None while it runs; minus the signal's number if it was killed."""
        self.pid = os.fork()
        if not self.pid:
            os._exit(_call(arguments, log))

    def ended(self, seconds: float = 0.0, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for its end at most so many seconds, or `until` something; whether it has ended."""
        end = time.monotonic() + seconds
        while self.exitcode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exitcode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end or until():
                return False
            else:
                time.sleep(0.001)
        return True

    def kill(self, alone: bool) -> None:
        """Kill it, and the processes that it has started, unless `alone`."""
        with contextlib.suppress(ProcessLookupError):
            (os.kill if alone else os.killpg)(self.pid, signal.SIGKILL)
        self.ended(PATIENCE)


def _call(arguments, log):
    """Exit code of a command, in a group of processes of its own."""
    os.setsid()
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        try:
            if arguments[0] == "train.py":
                return train.main(arguments[1:])
            return cli.main(arguments) or 0
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            return 99


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".part"))]


def refusing(folder: Path) -> list[Path]:
    """Folders whose lock is still held when every process has had time to end."""
    held, end = {lock.parent for lock in folder.rglob(".lock")}, time.monotonic() + PATIENCE / 10
    while held and time.monotonic() < end:
        for each in list(held):
            with contextlib.suppress(BlockingIOError), alone_in(each):
                held.remove(each)
        time.sleep(0.1 if held else 0)
    return sorted(held)


# -- rounds ----------------------------------------------------------------------------------------------------


def undisturbed(work: Work, folder: Path) -> tuple[float, dict[str, str]]:
    """Seconds that the work takes, and its results."""
    began = time.monotonic()
    finish(Process(work.command(folder, False), folder.with_suffix(".log")), folder)
    return time.monotonic() - began, work.results(folder)


def finish(process: Process, folder: Path) -> None:
    """Wait for the end. Raises SystemExit, one line, if it is none or no good one."""
    if not process.ended(PATIENCE) or process.exitcode:
        process.kill(alone=False)
        said = folder.with_suffix(".log").read_text(errors="replace").splitlines()[-1:]
        raise SystemExit(f"error: work in {folder} ended with {process.exitcode}: {' '.join(said)}")


def killed(work: Work, folder: Path, seconds: float, most: int, expected: dict[str, str], rng: random.Random) -> None:
    """A round: the work in a new folder, killed up to `most` times, then left to end, and compared."""
    count, done, log = work.count, 0, folder.with_suffix(".log")
    for attempt in range(most + 1):
        before = log.stat().st_size if log.exists() else 0
        process = Process(work.command(folder, attempt > 0), log)
        if attempt < most and not process.ended(rng.uniform(0, seconds)):
            if rng.random() < work.writing:
                process.ended(PATIENCE, lambda: bool(half_written(folder)))
            process.kill(alone=work.alone and rng.random() < 0.5)
        else:
            finish(process, folder)
        said = log.read_text(errors="replace")[before:]
        if attempt:
            count.continued += 1
            count.epochs_lost += lost(done, said)
        done = max(done, reached(said))
        if process.exitcode != -signal.SIGKILL:
            finish(process, folder)
            break
        count.kills += 1
        count.half_written += bool(half_written(folder))
    count.finished += 1
    found = work.results(folder)
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    left = [*half_written(folder), *refusing(folder)]
    for each in (*names[:5], *left[:5]):
        print(f"{work.name}: {each} in {folder}", file=sys.stderr)
    count.differ += len(names)
    count.left += len(left)


def reached(said: str) -> int:
    """How many epochs had ended when a process said this for the last time."""
    epochs = re.findall(r"epoch \[(\d+)/(\d+)\]", said)
    if not epochs:
        return 0
    running, of = map(int, epochs[-1])
    return of if "Finish training" in said else running - 1


def lost(done: int, said: str) -> int:
    """Of so many epochs that had ended, how many a process that goes on begins again; 0 if it was killed before."""
    if "from scratch" in said or "starts over" in said:
        return done
    resumed = re.search(r"Resumed from .* \(epoch (\d+)\)", said)
    return max(0, done - int(resumed[1])) if resumed else 0


# -- what is killed --------------------------------------------------------------------------------------------


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_of(folder: Path, *patterns: str) -> dict[str, str]:
    """Digests of files, which must be the same byte for byte."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in found}


def of_a_run(folder: Path) -> dict[str, str]:
    """Metrics, the plug-in's files, and each tensor and number of the checkpoints that a run keeps."""
    found = files_of(folder, "run.json", "pretrained/*")
    for path in sorted(folder.glob("*/model*.tar*")):
        for name, value in leaves(load_checkpoint(path)):
            if "OUTPUT_DIR" not in name and "RESUME" not in name:
                found[f"{path.relative_to(folder)} {name}"] = value
    return found


def leaves(value, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and digests of whatever lies in dictionaries and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, torch.Tensor) for inner in value):
        for place, inner in enumerate(value):
            yield from leaves(inner, f"{name}.{place}")
    elif isinstance(value, torch.Tensor):
        yield name, digest(value.contiguous().numpy().tobytes())
    else:
        yield name, digest(repr(value).encode())


def draw_pictures(folder: Path, of_a_class: int = 6) -> Path:
    """Noise in three colours, a class each."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        for number in range(of_a_class):
            pixels = noise.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., label] += 80
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def works(home: Path) -> list[Work]:
    """All kinds of work, on pictures that are drawn in `home`."""
    photos, run = draw_pictures(home / "photos"), home / "run"
    data = ["--root", str(photos), "--backbone", "micro", "--dataset-config-file", "configs/datasets/pictures.yaml"]
    scenes = ["--dataset-config-file", "configs/datasets/icon_scenes.yaml", "--backbone", "micro", "--no-train"]

    def training(folder, again):
        resume = ["--resume", str(folder)] if again and folder.is_dir() else []  # else killed before it was made
        return ["train.py", "--trainer", "CoOpSpotlighter", *data, "--output-dir", str(folder), *resume, *SHORT]

    def drawing(folder, again):
        few = ["DATASET.NUM_SHOTS", "1", "DATASET.SUBSAMPLE_CLASSES", "inner-new"]
        return ["train.py", "--trainer", "CoOp", *scenes, "--root", str(folder), "--output-dir", str(folder), *few]

    def sweeping(folder, again):
        which = ["--hosts", "CoOp", "CLIPFitSpotlighter", "--datasets", "pictures", "--seeds", "1", "--shots", "4"]
        where = ["--root", str(photos), "--output", str(folder)]
        return ["sweep", "fewshot", *which, *where, "--", "MODEL.BACKBONE.NAME", "micro", *SHORT]

    def predicting(folder, again):
        folder.mkdir(parents=True, exist_ok=True)
        return ["predict", str(run), str(photos), "--csv", str(folder / "answers.csv")]

    def of_a_sweep(folder):
        runs = [path.parent for path in sorted(folder.rglob("run.json"))]
        return {f"{each.relative_to(folder)} {name}": one for each in runs for name, one in of_a_run(each).items()}

    finish(Process(training(run, False), run.with_suffix(".log")), run)
    return [
        Work("training", training, of_a_run),
        Work("checkpointing", training, of_a_run, writing=1.0),
        Work("drawing", drawing, lambda folder: files_of(folder, "icon_scenes/**/*.png"), writing=0.5),
        Work("sweep", sweeping, of_a_sweep, alone=True),
        Work("predict", predicting, lambda folder: files_of(folder, "answers.csv"), writing=0.5),
    ]


SHARES = {"training": 0.25, "checkpointing": 0.25, "drawing": 0.2, "sweep": 0.05, "predict": 0.25}

app = typer.Typer(add_completion=False)
Folder = Annotated[Path | None, typer.Option(help="where to work and leave everything (default: a temporary one)")]


@app.command("kill")
def kill_all(
    kills: Annotated[int, typer.Option(min=1, help="how often something is killed")] = 100,
    only: Annotated[str, typer.Option(help=f"some of {', '.join(SHARES)}, with commas between them")] = "",
    most: Annotated[int, typer.Option(min=1, help="kills on the way to one result")] = 4,
    seed: Annotated[int, typer.Option(help="of the moments")] = 1,
    folder: Folder = None,
) -> None:
    """Kill, go on, compare; print the table."""
    chosen = only.split(",") if only else list(SHARES)
    if unknown := set(chosen) - SHARES.keys():
        raise typer.BadParameter(f"--only {min(unknown)}: take some of {', '.join(SHARES)}")
    rng, share = random.Random(seed), sum(SHARES[name] for name in chosen)
    with working_in(folder) as home:
        doing = [work for work in works(home) if work.name in chosen]
        for work in doing:
            seconds, expected = undisturbed(work, home / f"{work.name}-whole")
            wanted = max(1, round(kills * SHARES[work.name] / share))
            while work.count.kills < wanted:
                place = home / f"{work.name}-{work.count.finished}"
                killed(work, place, seconds, min(most, wanted - work.count.kills), expected, rng)
                print(f"{work.name}: {work.count.kills} of {wanted} kills", file=sys.stderr)
    table = Table("work", *(each.name.replace("_", " ") for each in fields(Count)))
    for work in doing:
        table.add_row(work.name, *(str(getattr(work.count, each.name)) for each in fields(Count)))
    total = Count(*(sum(getattr(work.count, each.name) for work in doing) for each in fields(Count)))
    table.add_row("all", *(str(getattr(total, each.name)) for each in fields(Count)))
    Console(width=110).print(table)
    raise typer.Exit(int(total.epochs_lost + total.differ + total.left > 0))


@contextlib.contextmanager
def working_in(folder: Path | None) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        home = (folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        home.mkdir(parents=True, exist_ok=True)
        yield home


# -- memory ----------------------------------------------------------------------------------------------------


def megabytes(peak: bool = False) -> float:
    """This process's resident memory, or the most that it was since ``forget_peak``."""
    said = Path("/proc/self/status").read_text()
    return int(re.search(rf"Vm{'HWM' if peak else 'RSS'}:\s+(\d+) kB", said)[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@app.command()
def length(
    batches: Annotated[int, typer.Option(min=200, help="of inference")] = 1000,
    epochs: Annotated[int, typer.Option(min=4, help="of training")] = 20,
    folder: Folder = None,
) -> None:
    """Resident memory after a tenth of the work and at its end: it must not grow."""
    seen = []

    def build(cfg):
        from dassl.engine import build_trainer

        trainer = build_trainer(cfg)
        trainer.before_epoch = lambda: seen.append(megabytes())
        return trainer

    with working_in(folder) as home, open(home / "length.log", "w") as log, contextlib.redirect_stdout(log):
        photos = draw_pictures(home / "photos")
        options = [*SHORT, "OPTIM.MAX_EPOCH", str(epochs + 1)]
        data = ["--dataset-config-file", "configs/datasets/pictures.yaml", "--root", str(photos), "--backbone", "micro"]
        train_it = ["--trainer", "CoOpSpotlighter", *data, "--output-dir", str(home / "run"), *options]
        wrapper = train.run(train_it, build).trainer.spotlighter.eval()
        images, answered = torch.randn(4, 3, 112, 112), []
        for _ in range(batches):
            wrapper.predict(images)
            answered.append(megabytes())
    grown = seen[-1] - seen[epochs // 10 + 1], answered[-1] - answered[batches // 10]
    print(f"{epochs} epochs of training: {seen[-1]:.0f} MB at the end, {grown[0]:+.1f} since the first tenth")
    print(f"{batches} batches of inference: {answered[-1]:.0f} MB at the end, {grown[1]:+.1f} since the first tenth")


@app.command()
def classes(
    count: Annotated[int, typer.Option(min=4, help="C")] = 10_000,
    shots: Annotated[int, typer.Option(min=3, help="images of each to learn from")] = 16,
    tests: Annotated[int, typer.Option(min=1, help="images to evaluate")] = 20_000,
    text_layers: Annotated[int, typer.Option(min=1, help="of the text tower; OpenAI's has 12")] = 2,
) -> None:
    """Learn, weigh and evaluate so many classes in the joint space and with the prompts of ViT-B/16.

    The vision tower is small: what an image costs there does not depend on the number of classes.
    """
    from dassl.config import get_cfg_default

    torch.manual_seed(0)
    shape = Shape(image=16, patch=4, width=64, layers=3, dim=512, text_width=512, text_layers=text_layers)
    wrapper = SpotlighterWrapper(build_host("coop", shape, count)).eval()
    looks = torch.randn(count, 3, 16, 16)
    model = megabytes()
    table = Table(f"C = {count:,}", "processor seconds", "MB beyond the model", "at most")

    def images_of(labels):
        return looks[labels] + 0.5 * torch.randn(len(labels), 3, 16, 16)

    def measured(name, work):
        forget_peak()
        began = time.process_time()
        result = work()
        row = time.process_time() - began, megabytes() - model, megabytes(peak=True) - model
        table.add_row(name, *(f"{value:,.0f}" for value in row))
        return result

    def evaluate():
        evaluator = Classification(get_cfg_default())
        for labels in torch.randint(count, (tests,)).split(100):
            evaluator.process(wrapper(images_of(labels)), labels)
        with contextlib.redirect_stdout(None):
            return evaluator.evaluate()["accuracy"]

    order = torch.randperm(count * shots) % count
    with torch.no_grad():
        measured("texts", wrapper.prepare)
        learned = measured(
            f"{count * shots:,} shots", lambda: wrapper.remember((images_of(part), part) for part in order.split(500))
        )
        accuracy = measured(f"{tests:,} images", evaluate)
    Console(width=110).print(table)
    print(f"{learned:,} shots: {wrapper.plugin.memory.choice.describe()}; evaluated: {accuracy:.1f} %")
    print(f"the model itself: {model:,.0f} MB")


if __name__ == "__main__":
    app()
