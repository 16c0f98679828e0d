"""Several processes give what one gives: two with gloo on the CPU, started here as torchrun starts them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spotlighter_plugin import ranks
from spotlighter_plugin.method.memory import ClassMemory
from spotlighter_plugin.runtime.dassl.data.data_manager import Batches

HERE = Path(__file__).resolve()
TESTED = 13  # no multiple of 2 processes nor of batches of 5
S = "TRAINER.SPOTLIGHTER."
PAPER = (S + "PRESET", "paper", S + "TOP_K", "6", S + "SELECT_BLOCK", "-1")
# What is a mean over a batch, written from a batch, normalized by a batch. PromptKD without reg_text: its texts start
# where |t⁰ - t^rep| has its kink, and there rounding chooses the gradient's sign.
RUNS = {
    "CoOpSpotlighter": ("TRAINER.COOP.PREC", "fp32", "TRAINER.COOP.N_CTX", "4", "TEST.FINAL_MODEL", "best_val"),
    "MaPLeSpotlighter": ("TRAINER.MAPLE.PREC", "fp32", *PAPER),
    "PromptKDSpotlighter": ("TRAINER.PROMPTKD.PREC", "fp32", "TRAINER.PROMPTKD.KD_WEIGHT", "10.", *PAPER)
    + ("TRAINER.MODAL", "cross", S + "PROTOTYPE_LOGITS", "True", S + "LOSSES", "('gra', 'kl_visual', 'local')"),
}


def prepare(folder):
    """The files of a data set of six colours, 24 pictures to train on, and a tower."""
    from method_kit import save_random_clip

    (folder / "data").mkdir()
    (folder / "squares.yaml").write_text("DATASET:\n  NAME: DamagedSquares\nINPUT:\n  SIZE: (32, 32)\n")
    save_random_clip(folder / "clip.safetensors")


def arguments(folder, trainer, *options, teacher=()):
    """Of `train.py`; batches of 7. Registers the data set, in which a training picture is damaged."""
    from dassl.data.datasets import DATASET_REGISTRY
    from hosts_kit import ColouredSquares

    class DamagedSquares(ColouredSquares):
        def __init__(self, cfg):
            train, val, test = self.draw(cfg, 4, "train"), self.draw(cfg, 1, "val"), self.draw(cfg, 3, "test")[:TESTED]
            Path(train[5].impath).write_bytes(b"no picture")
            super(ColouredSquares, self).__init__(train_x=train, val=val, test=test)

    DATASET_REGISTRY.register(DamagedSquares, force=True)
    clip, output = folder / "clip.safetensors", folder / f"{trainer}-{os.environ.get('WORLD_SIZE', 1)}"
    flags = ["--trainer", trainer, "--dataset-config-file", str(folder / "squares.yaml"), "--backbone", str(clip)]
    flags += ["--root", str(folder / "data"), "--output-dir", str(output)]
    sizes = ["DATALOADER.TRAIN_X.BATCH_SIZE", "7", "DATALOADER.TEST.BATCH_SIZE", "5", "DATALOADER.NUM_WORKERS", "0"]
    steps = ["OPTIM.MAX_EPOCH", "2", "OPTIM.LR", "0.02", "TRAIN.PRINT_FREQ", "1", "USE_CUDA", "False"]
    return [*flags, *sizes, *steps, *options, *(teacher if "KD" in trainer else ())]


def main(folder, what, *teacher):
    """What each of the processes does."""
    import dassl.engine

    from spotlighter_plugin.workbench.training import train

    if what == "die":
        dassl.engine.build_trainer = deadly(dassl.engine.build_trainer)
        sys.exit(train.main(arguments(folder, "CoOpSpotlighter", *RUNS["CoOpSpotlighter"])))
    with ranks.joined():
        for trainer, options in RUNS.items():
            train.run(arguments(folder, trainer, *options, teacher=teacher))


def deadly(build):
    """Makes trainers that kill their process in the second epoch, if that is not the first process."""

    def built(cfg):
        trainer = build(cfg)
        trainer.before_epoch = lambda: trainer.epoch and not ranks.is_first() and os.kill(os.getpid(), signal.SIGKILL)
        return trainer

    return built


def started(folder, what, number, port, world=2):
    known = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**os.environ, **{name: str(value) for name, value in known.items()}, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), str(folder), what]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each trainer's folders, of one process and of two."""
    from hosts_kit import train_teacher

    folder = tmp_path_factory.mktemp("several")
    prepare(folder)
    teacher = tuple(map(str, train_teacher(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE)]
    two = subprocess.run([*command, str(folder), "train", *teacher], env={**os.environ, "OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True, timeout=600)  # fmt: skip
    assert two.returncode == 0, two.stderr
    from spotlighter_plugin.workbench.training.train import run

    for trainer, options in RUNS.items():
        run(arguments(folder, trainer, *options, teacher=teacher))
    return folder


def losses(log):
    return re.findall(r"(\w+) (\d\S+) \(", log.replace("time", "").replace("data", ""))


def states(folder):
    """The tensors of the last epoch, by file and name; the memory apart."""
    found = {}
    for path in sorted(folder.glob("*/model.pth.tar-2")):
        for name, value in torch.load(path, weights_only=True)["state_dict"].items():
            found[path.parent.name, name] = value
    return found


def remembered(state):
    """What a memory says of some images: it may turn its coordinates."""
    from method_kit import CLASS_NAMES

    state = {name.removeprefix("memory."): value for (_, name), value in state.items() if name.startswith("memory.")}
    dim = len(state["centre"])
    memory = ClassMemory([name.replace(" ", "_") for name in CLASS_NAMES], dim, int(state["tower"]))
    memory.load_state_dict(state)
    assert memory.counts.sum() == 23
    images = torch.nn.functional.normalize(torch.randn(50, dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    return memory.add_to(memory.cosine(images, images[:6]), images, memory.evidence())


@pytest.mark.parametrize("trainer", RUNS)
def test_two_processes_end_with_the_weights_and_the_memory_of_one(folder, trainer):
    one, two = (states(folder / f"{trainer}-{n}") for n in (1, 2))
    assert one.keys() == two.keys() and len(one) > 2
    for key, value in one.items():
        if not key[1].startswith("memory."):
            torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-5, msg=str(key))
    if trainer != "MaPLeSpotlighter":
        torch.testing.assert_close(remembered(two), remembered(one), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trainer", RUNS)
def test_every_picture_of_a_test_set_of_any_size_counts_once(folder, trainer):
    one, two = ((folder / f"{trainer}-{n}/log.txt").read_text() for n in (1, 2))
    block = r"=> result\n(?:\* .*\n)+"
    assert re.findall(block, two) == re.findall(block, one) and f"* total: {TESTED}\n" in two


def test_one_process_writes_and_speaks(folder):
    for trainer in RUNS:
        two = folder / f"{trainer}-2"
        assert [path.name for path in two.glob("log.txt*")] == ["log.txt"] and not list(two.rglob("*.tmp"))
        assert (two / "run.json").is_file() and (two / "config.yaml").is_file()
        log = (two / "log.txt").read_text()
        assert log.count("Finish training") == 1 and "Skipped 1 of 24 images" in log
        assert losses(log) == losses((folder / f"{trainer}-1/log.txt").read_text())


def test_a_killed_process_ends_the_others_with_one_line(tmp_path):
    prepare(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (started(tmp_path, "die", number, port) for number in range(2))
    second.communicate(timeout=600)
    said = first.communicate(timeout=60)[1]
    assert second.returncode == -signal.SIGKILL and first.returncode == 1, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "another process of this run has ended" in lines[0] and "Traceback" not in said
    assert list(tmp_path.glob("*/*/model.pth.tar-1"))  # the epoch that was done is kept


def test_a_process_that_waits_for_the_others_signs_as_it_ends_keeps_its_exit_code(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(ranks, "BEAT", 0.01)
    kept = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    watch = ranks._Watch(0, 2)
    waiting, done = threading.Event(), []

    class Slow:  # the thread is within the store when the process leaves
        def set(self, *_):
            if threading.current_thread() is watch.thread:
                waiting.set()
                time.sleep(0.5)
                done.append(True)

        def multi_get(self, keys):
            return [b"0"] * len(keys)

    watch.store = Slow()
    assert waiting.wait(10)
    watch.leave(ranks.FAILED)
    assert done and not watch.thread.is_alive() and kept is not None


# -- without a second process ----------------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    """Lets this process take itself for one of several; nothing is sent."""

    def become(rank, world):
        monkeypatch.setattr(ranks, "_rank", rank)
        monkeypatch.setattr(ranks, "_world", world)
        monkeypatch.setattr(ranks, "from_first", lambda make: make())

    return become


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("n", [3, 17, 24])
def test_the_parts_of_any_number_of_processes_are_the_batches_of_one_in_order_and_draw_alike(as_rank, n, is_train):
    def visited(rank, world):
        as_rank(rank, world)
        batches = Batches(torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist(), 7, is_train)
        torch.manual_seed(5)
        found = [[(int(place), getattr(place, "seed", None)) for place in batch] for batch in batches]
        assert len(found) == len(batches)
        return found

    whole = visited(0, 1)
    assert len({seed for batch in whole for _, seed in batch}) == (sum(map(len, whole)) if is_train else 1)
    for world in (2, 3):
        parts = [visited(rank, world) for rank in range(world)]
        if is_train:
            assert [sum(batch, []) for batch in zip(*parts, strict=True)] == whole
        else:
            assert sum((sum(part, []) for part in parts), []) == sum(whole, [])


@pytest.mark.parametrize(
    ("seed", "batch", "images", "says"),
    [
        (-1, 8, 8, "SEED is -1"),
        (1, 2, 8, "BATCH_SIZE is 2, must be at least 1 for each of 3 processes"),
        (1, 8, 2, "2 training images for 3 processes"),
    ],
)
def test_settings_that_do_not_belong_together_are_one_line(as_rank, seed, batch, images, says):
    as_rank(0, 3)
    loader = SimpleNamespace(TRAIN_X=SimpleNamespace(BATCH_SIZE=batch))
    dataset = SimpleNamespace(train_x=[None] * images)
    cfg = SimpleNamespace(SEED=seed, DATALOADER=loader)
    with pytest.raises(ValueError, match=says) as error:
        ranks.unite(SimpleNamespace(cfg=cfg, dm=SimpleNamespace(dataset=dataset)))
    assert "\n" not in str(error.value)


def test_a_forks_train_py_under_torchrun_is_one_line(monkeypatch):
    from spotlighter_plugin.trainer import SpotlighterTrainerMixin

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun starts Spotlighter's own train.py"):
        SpotlighterTrainerMixin().check_cfg(None)


def test_more_processes_than_gpus_are_one_line(as_rank, monkeypatch):
    as_rank(2, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks.take_device(use_cuda=False)
    with pytest.raises(ValueError, match="3 processes on a machine with 2 GPUs: set --nproc_per_node 2"):
        ranks.take_device(use_cuda=True)


if __name__ == "__main__":
    import spotlighter_plugin  # noqa: F401  (gives `dassl` before the kits import it)

    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
