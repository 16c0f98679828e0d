"""On a GPU: what a CPU computes in float32, and half precision as well. Skipped where there is none."""

import copy

import pytest
import torch
from hosts_kit import batch_of, make_trainer, train_teacher
from method_kit import CLASS_NAMES, SIZE, random_clip

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
from spotlighter_plugin.method.memory import ClassMemory
from spotlighter_plugin.towers.clip import apply_precision
from spotlighter_plugin.workbench.speed import bench
from spotlighter_plugin.workbench.training.cached import CachedTower, HiddenStates

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
MODULES = {"CoOp": "coop", "MaPLe": "maple", "CLIPFit": "clipfit", "PromptKD": "promptkd"}
MORE = {"KgCoOp": "kgcoop", "CoCoOp": "cocoop", "MMRL": "mmrl"}  # registered beside their hosts
RATES = {"CoOp": 0.05, "MaPLe": 0.005, "CLIPFit": 0.002, "PromptKD": 0.002, **dict.fromkeys(MORE, 0.002)}
hosts = pytest.mark.parametrize("host", list(MODULES))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Options that name a PromptSRC teacher of another width, tuned on the GPU."""
    return train_teacher(tmp_path_factory.mktemp("teacher"), "USE_CUDA", True)


def make(folder, host, teacher, *options, precision="fp32", on_gpu=True, preset="default"):
    """A trainer of the host with Spotlighter."""
    selection = ["TRAINER.SPOTLIGHTER.PRESET", preset, "TRAINER.SPOTLIGHTER.TOP_K", 6]
    needed = [*teacher, "TRAINER.MODAL", "cross"] if host == "PromptKD" else []
    node, module = "COOP" if host == "KgCoOp" else host.upper(), {**MODULES, **MORE}[host]
    options = [f"TRAINER.{node}.PREC", precision, "OPTIM.LR", RATES[host], "USE_CUDA", on_gpu, *options]
    module += "_spotlighter" if host in MODULES else ""
    return make_trainer(folder, f"{host}Spotlighter", module, *needed, *selection, *options)


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Convolutions in float32, as on a CPU; PyTorch's default on a GPU is TF32, of ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@torch.no_grad()
def logits_of(trainer):
    trainer.set_model_mode("eval")
    return trainer.model_inference(batch_of(trainer)["img"].to(trainer.device)).float().cpu()


@hosts
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_trained_model_gives_on_a_gpu_the_logits_that_it_gives_on_a_cpu(tmp_path, teacher, host, preset):
    """A checkpoint of a GPU loads on a CPU, memory and bank included, and answers alike."""
    trained = make(tmp_path, host, teacher, preset=preset)
    assert trained.device.type == DEVICE
    trained.train()
    loaded = make(tmp_path, host, teacher, preset=preset, on_gpu=False)
    loaded.load_model(str(tmp_path / "out"), epoch=2)
    assert loaded.model.plugin.bank.prototypes.device.type == "cpu"
    torch.testing.assert_close(logits_of(loaded), logits_of(trained), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("host", [*MODULES, *MORE])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "amp"])
def test_every_precision_trains_remembers_and_loads_on_a_gpu(tmp_path, teacher, host, precision):
    trainer = make(tmp_path, host, teacher, precision=precision)
    trainer.train()
    again = make(tmp_path, host, teacher, precision=precision)
    again.load_model(str(tmp_path / "out"), epoch=2)
    logits = logits_of(again)
    assert logits.isfinite().all()
    assert again.spotlighter.plugin.memory.is_ready
    torch.testing.assert_close(logits, logits_of(trainer), atol=2e-2, rtol=2e-2)
    trained = [p for group in trainer._optims[trainer.checkpoint].param_groups for p in group["params"]]
    assert all(p.device.type == DEVICE and p.isfinite().all() for p in trained)


@pytest.mark.parametrize("mapping", ["none", "full", "transformer+transformer"])
def test_half_precision_classifies_nearly_as_float32_does(mapping):
    model, images = random_clip(), torch.randn(8, 3, SIZE, SIZE, device=DEVICE)
    config = SpotlighterConfig(top_k=6, select_block=-1, mapping=mapping, fuse_dropped=True)
    logits = []
    for precision in ("fp32", "fp16"):
        host = apply_precision(copy.deepcopy(model), precision).to(DEVICE)
        torch.manual_seed(0)
        wrapper = SpotlighterWrapper(host, config, class_names=CLASS_NAMES).eval()
        with torch.no_grad():
            wrapper.remember([(images[:6], torch.arange(6))])  # labels may lie elsewhere
            logits.append(wrapper(images))
    torch.testing.assert_close(logits[1], logits[0], atol=0.3, rtol=0.03)


def test_classes_are_learned_and_weighed_on_a_gpu_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(80) % 5  # nothing of the sixth class
    looks, texts = (torch.nn.functional.normalize(torch.randn(6, 16, generator=generator), dim=-1) for _ in range(2))
    images = torch.nn.functional.normalize(looks[rows] + 0.3 * torch.randn(80, 16, generator=generator), dim=-1)
    found = []
    for device in ("cpu", DEVICE):
        memory = ClassMemory(list("abcdef"), 16).to(device)
        memory.remember(images.to(device), rows.to(device), texts.to(device), None, 10.0)
        evidence = memory.add_to(torch.zeros(80, 6, device=device), images.to(device), memory.evidence())
        found.append((memory.choice.weight, evidence.cpu()))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-2, rtol=1e-2)


def test_states_kept_of_frozen_blocks_give_what_whole_images_give(tmp_path):
    plain = make(tmp_path, "CoOp", ())
    plain.train()
    kind = type("CoOpSpotlighter", (CachedTower, type(plain)), {"states": HiddenStates(plain.cfg, -2)})
    cached = kind(plain.cfg)
    cached.load_model(str(tmp_path / "out"), epoch=2)
    cached.set_model_mode("eval")
    with torch.no_grad():
        batch = next(iter(cached.test_loader))
        whole = torch.stack([plain.test_loader.dataset[i]["img"] for i in range(len(batch["img"]))]).to(DEVICE)
        logits = cached.model_inference(batch["img"].to(DEVICE))
        torch.testing.assert_close(logits, plain.model_inference(whole), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("host", [host.lower() for host in MODULES])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_benchmark_times_both_passes_on_a_gpu(host, dtype):
    backbone = "width=64,layers=3,patch=8,image=32,text_width=64,dim=64"
    given = {"host": host, "dtype": dtype, "device": DEVICE, "backbone": backbone}
    made = bench.Bench(bench.swept({**given, "batch_size": 2, "classes": 5, "top_k": 4, "runs": 1}, ""))
    (record,) = made.inference()
    assert record["images_per_second_spotlighter"] > 0 and record["peak_memory_mb_spotlighter"] > 0
    if dtype == "fp32":
        (record,) = made.training()
        assert record["peak_memory_mb_spotlighter"] > 0
