"""Prints how fast a ViT-B/16 classifies on a GPU with and without Spotlighter: eager, as a CUDA graph, compiled.

    python tools/gpu_speed.py --json gpu.json                 # at most 150 seconds
    python tools/gpu_speed.py --tiny --json tiny.json         # the same on small shapes, on a CPU: a test of itself
    python tools/gpu_speed.py --count --json count.json       # on no device: operators, bytes and waits of a batch

The host is a CLIP tower of OpenAI's architecture with random weights and kept texts. It is run the same way as each of
the others: Spotlighter at a share of its operations, the same schedule on random tokens, merging alone and EViT's
schedule at the same share. A speed-up is over the host in the same mode. Needs torch and this package alone.

--count runs on fake tensors, so that no GPU is needed: operators that read or write numbers (each at least a kernel),
bytes that they move, and operators that wait for the device, of a batch of the host, of preset `paper`, and of each of
the others in its first batch, where weights are folded, and in every later one.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from spotlighter_plugin.config import SpotlighterConfig  # noqa: E402
from spotlighter_plugin.files import write_aside  # noqa: E402
from spotlighter_plugin.hosts.base import HostAdapter  # noqa: E402
from spotlighter_plugin.method.schedule import Tower, describe, operations, rivals  # noqa: E402
from spotlighter_plugin.workbench.speed.stopwatch import Traffic  # noqa: E402
from spotlighter_plugin.wrapper import SpotlighterWrapper  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
B16 = Tower(tokens=196, blocks=12, width=768, heads=12, dim=512, patch=16)
TINY = Tower(tokens=36, blocks=4, width=128, heads=2, dim=64, patch=8)
ROUNDS = 5


class LayerNorm(nn.LayerNorm):
    """In float32 whatever comes, as OpenAI's."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.c_fc(self.ln_2(x))
        return x + self.c_proj(y * torch.sigmoid(1.702 * y))


class Vision(nn.Module):
    """OpenAI's vision transformer, by its names."""

    def __init__(self, tower):
        super().__init__()
        width, scale = tower.width, tower.width**-0.5
        self.input_resolution = round(tower.tokens**0.5) * tower.patch
        self.conv1 = nn.Conv2d(3, width, tower.patch, tower.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + tower.tokens, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block(width, tower.heads) for _ in range(tower.blocks)))
        self.proj = nn.Parameter(scale * torch.randn(width, tower.dim))

    def forward(self, images):
        x = self.conv1(images).flatten(2).permute(0, 2, 1)  # (B, N, w)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype))
        x = self.transformer.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj


class Host(nn.Module):
    """A classifier whose texts are kept; matrices in ``dtype``, LayerNorms and embeddings in float32, as OpenAI has."""

    def __init__(self, tower, classes, dtype):
        super().__init__()
        self.image_encoder, self.dtype = Vision(tower), dtype
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.text = nn.Parameter(F.normalize(torch.randn(classes, tower.dim), dim=-1).to(dtype))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.image_encoder.proj.data = self.image_encoder.proj.data.to(dtype)

    def forward(self, images):
        image = self.image_encoder(images.type(self.dtype))
        return self.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ self.text.t()


class Adapter(HostAdapter):
    train_text = False

    @property
    def n_classes(self):
        return len(self.model.text)

    def encode_text(self):
        return self.model.text


def legs(tower, classes, dtype, device, share, options):
    """Name → (callable on images, share of operations). All stand on one host; the first is the host itself."""
    torch.manual_seed(0)
    with torch.device(device):
        host = Host(tower, classes, dtype).eval().requires_grad_(False)
    made = {"host": (host, 1.0)}
    ours = dict(options) or {"share": share}
    bare = {"prototype_logits": False, "mapping": "none", "losses": ()}
    kinds = {"spotlighter": ours | bare, "random": ours | bare | {"activation": "random"}}
    kinds |= {name: bare | other for name, other in rivals(share, tower).items()}
    for name, given in kinds.items():
        wrapper = SpotlighterWrapper(host, SpotlighterConfig(**given), Adapter(host), check=False)
        way = wrapper.steps
        made[name] = wrapper.eval().requires_grad_(False), operations(tower, way) / operations(tower)
        print(f"{name}: {describe(tower, way)}", flush=True)
    return made


def eager(model, images):
    return lambda: model(images)


def graphed(model, images):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(images)

    def replay():
        graph.replay()
        return logits

    return replay


def compiled(model, images):
    torch._dynamo.reset()
    on_gpu = images.device.type == "cuda"
    made = torch.compile(model, fullgraph=True, **({"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}))
    return lambda: made(images)


MODES = {"eager": eager, "graph": graphed, "compiled": compiled}


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(works, device, budget):
    """Name → median of ``ROUNDS`` rounds in turn, so that all see the same clock; ms a call."""
    calls, taken = {}, {name: [] for name in works}
    for name, work in works.items():
        work()
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        calls[name] = max(1, min(30, int(budget / ROUNDS / (time.perf_counter() - started))))
    for _ in range(ROUNDS):
        for name, work in works.items():
            synchronise(device)
            started = time.perf_counter()
            for _ in range(calls[name]):
                work()
            synchronise(device)
            taken[name].append((time.perf_counter() - started) / calls[name] * 1e3)
    return taken


def looked_into(work, device):
    """Kernels, their busy time, synchronisations and peak memory of one call; None on a CPU."""
    if device != "cuda":
        return {"kernels": None, "busy_ms": None, "synchronisations": None, "peak_memory_mb": None}
    synchronise(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronise(device)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
    events = profile.key_averages()
    kernels = [event for event in events if "CUDA" in str(event.device_type) and event.self_device_time_total > 0]
    waits = ("cudaStreamSynchronize", "cudaMemcpy", "aten::_local_scalar_dense", "aten::nonzero")
    return {
        "kernels": sum(event.count for event in kernels),
        "busy_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "synchronisations": sum(event.count for event in events if event.key in waits),
        "peak_memory_mb": peak,
    }


@torch.no_grad()
def measure(args):
    """Records of every leg; modes in turn, batch 128 first, until the time is up."""
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    tower, classes = (TINY, 20) if args.tiny else (B16, args.classes)
    batches, dtypes = ((2,), ("fp32", "bf16")) if args.tiny else ((128, 32, 1, 512), ("fp16", "bf16"))
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    modes = [mode for mode in MODES if mode != "graph" or device == "cuda"]
    plan = [(mode, dtype, batch) for mode in modes[:-1] for dtype in dtypes for batch in batches]
    plan += [("compiled", dtype, batch) for batch in batches[:3] for dtype in dtypes]
    began, records, made = time.time(), [], {}
    for mode, dtype, batch in plan:
        if dtype not in made:
            made[dtype] = legs(tower, classes, DTYPES[dtype], device, args.share, args.options)
        side = made[dtype]["host"][0].image_encoder.input_resolution
        images = torch.randn(batch, 3, side, side, device=device)
        works, errors, inside = {}, {}, {}
        for name, (model, _) in made[dtype].items():
            slow = mode == "compiled" and name not in ("host", "spotlighter")
            if slow or time.time() - began > args.seconds:
                continue
            plain = model(images).float()
            try:
                work = MODES[mode](model, images)
                errors[name] = (work().float() - plain).abs().max().item()
                work()
            except Exception as error:
                print(f"FAILED {dtype} batch {batch} {mode} {name}: {' '.join(str(error).split())[:300]}", flush=True)
                continue
            works[name] = work
            if mode == "eager":
                inside[name] = looked_into(work, device)
        if "host" not in works:
            continue
        taken = milliseconds(works, device, 0.05 if args.tiny else 0.3)
        for name, times in taken.items():
            ratio = median(host / own for host, own in zip(taken["host"], times, strict=True))
            records.append(
                {
                    "method": name, "device": card, "torch": torch.__version__, "dtype": dtype, "batch_size": batch,
                    "mode": mode, "classes": classes, "operations_ratio": made[dtype][name][1], "ms": median(times),
                    "images_per_second": batch / median(times) * 1e3, "speedup_over_host_in_this_mode": ratio,
                    "difference_from_eager": errors[name], **inside.get(name, {}),
                }
            )  # fmt: skip
        line = "  ".join(
            f"{r['method']} {r['ms']:.2f} ms ×{r['speedup_over_host_in_this_mode']:.2f}" for r in records[-len(taken) :]
        )
        print(f"{dtype} batch {batch} {mode}: {line}", flush=True)
        write(records, args.json)
    print(f"{card}, torch {torch.__version__}: {len(records)} records in {time.time() - began:.0f} s")
    return records


@torch.no_grad()
def count(args):
    """Records of every leg on fake tensors: the first batch and a later one."""
    tower, classes, records = (TINY, 20, []) if args.tiny else (B16, args.classes, [])
    for dtype in ("fp16", "fp32"):  # bf16 is as fp16
        made = legs(tower, classes, DTYPES[dtype], "cpu", args.share, args.options)
        made["paper"] = as_the_paper(made["host"][0], classes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            images = torch.empty(args.batch_size, 3, *[made["host"][0].image_encoder.input_resolution] * 2)
            for name, (model, share) in made.items():
                for which in ("first", "later"):
                    with Traffic() as traffic:
                        model(images)
                    numbers = {"operators": traffic.operators, "moved_mb": traffic.moved / 2**20}
                    numbers |= {"float32_mb": traffic.float32 / 2**20, "waits": len(traffic.waits)}
                    records.append(
                        {
                            "method": name, "batch": which, "dtype": dtype, "batch_size": args.batch_size,
                            "classes": classes, "operations_ratio": share, **numbers,
                        }
                    )  # fmt: skip
                    said = "{operators} operators, {moved_mb:.0f} MB ({float32_mb:.0f} in float32), {waits} waits"
                    print(f"{dtype} {name}, {which} batch: {said.format(**numbers)}", flush=True)
    write(records, args.json)
    return records


def as_the_paper(host, classes):
    """Preset ``paper`` with a prototype in every place, and its share of the operations."""
    config = SpotlighterConfig(preset="paper", top_k=min(32, len(host.image_encoder.positional_embedding) - 1))
    wrapper = SpotlighterWrapper(host, config, Adapter(host), check=False).eval().requires_grad_(False)
    bank, tower = wrapper.plugin.bank, wrapper.adapter.layout.tower(wrapper.adapter.dim)
    bank.prototypes, bank.is_empty = torch.randn(classes, config.prototypes, tower.width), False
    bank.filled = torch.ones(classes, config.prototypes, dtype=torch.bool)
    return wrapper, operations(tower, wrapper.steps) / operations(tower)


def write(records, path):
    if path:
        write_aside(path, lambda file: file.write(f"{json.dumps(records, indent=1)}\n".encode()), "--json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the records go, if anywhere")
    parser.add_argument("--seconds", type=float, default=150, help="nothing new is begun afterwards")
    parser.add_argument("--share", type=float, default=0.5, help="of the host's operations, for every row")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--options", type=json.loads, default={}, help='Spotlighter\'s own, as JSON: {"top_k": 32, …}')
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--count", action="store_true", help="count on fake tensors, time nothing")
    parser.add_argument("--batch-size", type=int, default=32, help="of --count")
    args = parser.parse_args()
    (count if args.count else measure)(args)


if __name__ == "__main__":
    main()
