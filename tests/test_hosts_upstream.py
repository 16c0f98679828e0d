"""Our hosts against the forks' own code, where checkouts are at hand: same keys, same logits, with and without us.

SPOTLIGHTER_UPSTREAM names a folder with the checkouts CoOp, multimodal-prompt-learning, PromptKD and CLIPFit.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clip.model import CLIP
from dassl.config import get_cfg_default
from upstream_settings import CLASS_NAMES, settings
from yacs.config import CfgNode

from spotlighter_plugin.towers.clip import load_clip
from trainers import clipfit, coop, maple, promptkd, promptsrc
from trainers.host import load_weights

UPSTREAM = Path(os.environ.get("SPOTLIGHTER_UPSTREAM", "absent"))
ROOT = Path(__file__).parent.parent
FORKS = {
    "CoOp": "CoOp",
    "MaPLe": "multimodal-prompt-learning",
    "PromptSRC": "PromptKD",
    "PromptKD": "PromptKD",
    "CLIPFit": "CLIPFit/CLIPFit",
}


def clip_state(seed, embed, vision, text):
    """A state dict of random weights that OpenAI's passage through half precision leaves as they are."""
    torch.manual_seed(seed)
    model = CLIP(embed, 32, 4, vision, 16, 77, 49408, text, text // 64, 4)
    return {key: value.half().float() for key, value in model.state_dict().items()}


def ours(host, folder, theirs):
    """Our model of the host with the fork's weights, and the part that the fork saves."""
    cfg, student = get_cfg_default(), load_clip(str(folder / "student.pt"))
    for node, values in settings(host).items():
        cfg.TRAINER[node] = CfgNode(values)
    prompts = {"n_text": 4, "n_vision": 4, "text_depth": 3, "vision_depth": 3, "ctx_init": "a photo of a"}
    match host:
        case "CoOp":
            return coop.CustomCLIP(cfg, CLASS_NAMES, student)
        case "MaPLe":
            return maple.CustomCLIP(cfg, CLASS_NAMES, student)
        case "PromptSRC":
            return promptsrc.CustomCLIP(CLASS_NAMES, student, **prompts)
        case "PromptKD":
            teacher = promptsrc.CustomCLIP(CLASS_NAMES, load_clip(str(folder / "teacher.pt")), **prompts).eval()
            load_weights(teacher, theirs["teacher_state"], "the fork's teacher")
            return promptkd.CustomCLIP(student, teacher, 4, 3)
        case "CLIPFit":
            texts = [f"a photo of a {name.replace('_', ' ')}, a type of pet." for name in CLASS_NAMES]
            return clipfit.CustomCLIP(texts, student)


@pytest.mark.parametrize("host", list(FORKS))
def test_our_host_has_the_forks_keys_and_logits_and_the_adapter_reads_the_forks_model(host, tmp_path):
    fork = UPSTREAM / FORKS[host]
    if not fork.is_dir():
        pytest.skip("SPOTLIGHTER_UPSTREAM names no folder with a checkout of " + FORKS[host])
    vision, text = (768, 512) if host == "MaPLe" else (128, 128)  # MaPLe's fork knows one width only
    torch.save(clip_state(0, 512, vision, text), tmp_path / "student.pt")
    torch.save(clip_state(1, 768, 192, 192), tmp_path / "teacher.pt")
    torch.save(torch.randn(3, 3, 32, 32), tmp_path / "images.pt")
    command = [sys.executable, str(ROOT / "tests/upstream_host.py"), str(fork), host, str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    theirs = torch.load(tmp_path / f"{host}.pt")

    model, images = ours(host, tmp_path, theirs).eval(), torch.load(tmp_path / "images.pt")
    different = model.state_dict().keys() ^ theirs["state"].keys()
    unused = ("prompt_learner.ZS_image_encoder.", "freeze_image_encoder.")  # copies that the forks save once more
    assert not [key for key in different if not key.startswith(unused)]
    load_weights(model, theirs["state"], "the fork's model")
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs["logits"], atol=1e-5, rtol=1e-5)
        if host == "PromptKD":
            torch.testing.assert_close(model.teacher(images), theirs["teacher_logits"], atol=1e-5, rtol=1e-5)
    assert theirs["adapter"] == ("CoOp" if host == "PromptSRC" else host)
    torch.testing.assert_close(theirs["spotlighter"], theirs["logits"], atol=1e-5, rtol=1e-5)
