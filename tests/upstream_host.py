"""Run in a process of its own, because a fork has its own `clip` and `trainers`: upstream_host.py FORK HOST FOLDER.

Builds the fork's model for HOST from FOLDER/student.pt and teacher.pt, and writes to FOLDER/HOST.pt its state and its
logits on FOLDER/images.pt, with Spotlighter's logits when every token is kept.
"""

import sys

fork, host, folder = sys.argv[1:]
sys.path.insert(0, fork)

import torch  # noqa: E402

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper  # noqa: E402
from spotlighter_plugin.hosts import adapter_for  # noqa: E402
from spotlighter_plugin.hosts.promptkd import PromptKDAdapter  # noqa: E402

for kind in (torch.Tensor, torch.nn.Module):  # the forks are written for half precision on a GPU
    kind.cuda = kind.half = lambda self, *args, **kwargs: self

from clip.model import build_model  # noqa: E402
from dassl.config import get_cfg_default  # noqa: E402
from upstream_settings import CLASS_NAMES, settings  # noqa: E402
from yacs.config import CfgNode  # noqa: E402

FILES = {"CoOp": "coop", "MaPLe": "maple", "PromptSRC": "promptsrc", "PromptKD": "promptkd", "CLIPFit": "ClipFit"}
trainer = __import__(f"trainers.{FILES[host]}", fromlist=["CustomCLIP"])
states = {name: torch.load(f"{folder}/{name}.pt") for name in ("student", "teacher")}
images = torch.load(f"{folder}/images.pt")

cfg = get_cfg_default()
cfg.INPUT.SIZE, cfg.DATASET.NAME, cfg.TRAINER.NAME, cfg.TRAINER.MODAL = (32, 32), "OxfordPets", host, "base2novel"
for node, values in settings(host).items():
    cfg.TRAINER[node] = CfgNode(values)


def build(which="student", prompts=True):
    """A CLIP of the fork, with the prompts that the fork's towers carry."""
    depth, n = (3, 4) if prompts else (0, 0)
    design = {"vision_depth": depth, "language_depth": depth, "vision_ctx": n, "language_ctx": n}
    design |= {"trainer": "MaPLe" if host == "MaPLe" else "IVLP", "maple_length": 2}
    arguments = () if host in ("CoOp", "CLIPFit") else (design,)
    return build_model(dict(states[which]), *arguments).float()


trainer.load_clip_to_cpu = lambda cfg, plain=False: build(prompts=not plain)
trainer.IMAGENET_TEMPLATES = ["a photo of a {}."]
trainer.convert_weights = lambda module: None
with torch.no_grad():
    torch.manual_seed(0)
    model = trainer.CustomCLIP(cfg, CLASS_NAMES, build()).eval()
    if host == "PromptKD":
        teacher = trainer.CustomCLIP_teacher(cfg, CLASS_NAMES, build("teacher")).eval()
        (features, scale), (_, texts, teacher_logits) = model(images), teacher(images)
        logits, adapter = scale * features @ texts.t(), PromptKDAdapter(model, CLASS_NAMES, teacher)
        result = {"teacher_state": teacher.state_dict(), "teacher_logits": teacher_logits}
    else:
        for name, parameter in model.named_parameters():  # what CLIPFit trains starts at CLIP
            parameter.add_(0.02 * torch.randn_like(parameter) if "bias" in name else 0)
        logits, adapter, result = model(images), adapter_for(model, CLASS_NAMES), {}
    wrapper = SpotlighterWrapper(model, SpotlighterConfig(top_k=4, select_block=1), adapter).eval()
    result |= {"state": model.state_dict(), "logits": logits, "spotlighter": wrapper(images), "adapter": adapter.name}
torch.save(result, f"{folder}/{host}.pt")
