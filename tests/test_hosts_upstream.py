"""Our hosts against the forks' own code, where checkouts are at hand: same keys, logits, losses, with and without us.

SPOTLIGHTER_UPSTREAM names a folder with the checkouts CoOp, multimodal-prompt-learning, PromptKD, CLIPFit, KgCoOp and
MMRL.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clip.model import CLIP
from dassl.config import get_cfg_default
from upstream_host import CLASS_NAMES, LABELS, settings
from yacs.config import CfgNode

from spotlighter_plugin.towers.clip import load_clip
from trainers import clipfit, cocoop, coop, kgcoop, maple, mmrl, promptkd, promptsrc
from trainers.host import load_weights

UPSTREAM = Path(os.environ.get("SPOTLIGHTER_UPSTREAM", "absent"))
ROOT = Path(__file__).parent.parent
FORKS = {
    "CoOp": "CoOp",
    "MaPLe": "multimodal-prompt-learning",
    "PromptSRC": "PromptKD",
    "PromptKD": "PromptKD",
    "CLIPFit": "CLIPFit/CLIPFit",
    "CoCoOp": "CoOp",
    "KgCoOp": "KgCoOp/KgCoOp",
    "MMRL": "MMRL",
}
UNUSED = (  # copies that the forks save once more, and what KgCoOp's does not use; MMRL's temperature is always 100
    *("prompt_learner.ZS_image_encoder.", "freeze_image_encoder."),
    *("prompt_learner.bias_vectors", "prompt_learner.meta_net.linear1", "meta_net.", "adapter.fc."),
    "logit_scale",
)


def clip_state(seed, embed, vision, text):
    """A state dict of random weights that OpenAI's passage through half precision leaves as they are."""
    torch.manual_seed(seed)
    model = CLIP(embed, 32, 4, vision, 16, 77, 49408, text, text // 64, 4)
    return {key: value.half().float() for key, value in model.state_dict().items()}


def ours(host, folder, theirs):
    """Our model of the host with the fork's weights, and the part that the fork saves."""
    cfg, student = get_cfg_default(), load_clip(f"{folder / 'student.pt'}:quickgelu")
    cfg.DATASET.NAME = "OxfordPets"
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
            taught_by = load_clip(f"{folder / 'teacher.pt'}:quickgelu")
            teacher = promptsrc.CustomCLIP(CLASS_NAMES, taught_by, **prompts).eval()
            load_weights(teacher, theirs["teacher_state"], "the fork's teacher")
            return promptkd.CustomCLIP(student, teacher, 4, 3)
        case "CLIPFit":
            texts = [f"a photo of a {name.replace('_', ' ')}, a type of pet." for name in CLASS_NAMES]
            return clipfit.CustomCLIP(texts, student)
        case _:
            module = {"CoCoOp": cocoop, "KgCoOp": kgcoop, "MMRL": mmrl}[host]
            model = module.CustomCLIP(cfg, CLASS_NAMES, student)
            model.module, model.cfg = module, cfg
            return model


@pytest.mark.parametrize("host", list(FORKS))
def test_our_host_has_the_forks_keys_and_logits_and_the_adapter_reads_the_forks_model(host, tmp_path):
    fork = UPSTREAM / FORKS[host]
    if not fork.is_dir():
        pytest.skip("SPOTLIGHTER_UPSTREAM names no folder with a checkout of " + FORKS[host])
    vision, text = (768, 512) if host == "MaPLe" else (128, 128)  # MaPLe's fork knows one width only
    student = clip_state(0, 512, vision, text)
    if host == "MMRL":  # whose fork takes OpenAI's temperature for granted
        student["logit_scale"].fill_(math.log(100))
    torch.save(student, tmp_path / "student.pt")
    torch.save(clip_state(1, 768, 192, 192), tmp_path / "teacher.pt")
    torch.save(torch.randn(3, 3, 32, 32), tmp_path / "images.pt")
    command = [sys.executable, str(ROOT / "tests/upstream_host.py"), str(fork), host, str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    theirs = torch.load(tmp_path / f"{host}.pt")

    model, images = ours(host, tmp_path, theirs).eval(), torch.load(tmp_path / "images.pt")
    different = model.state_dict().keys() ^ theirs["state"].keys()
    assert not [key for key in different if not key.startswith(UNUSED)]
    load_weights(model, theirs["state"], "the fork's model")
    with torch.no_grad():
        logits = model.both(images)[0] if host == "MMRL" else model(images)
        torch.testing.assert_close(logits, theirs["logits"], atol=1e-5, rtol=1e-5)
        if host == "MMRL":  # of the classes that were trained
            torch.testing.assert_close(model(images), theirs["fused"], atol=1e-5, rtol=1e-5)
        if host == "PromptKD":
            torch.testing.assert_close(model.teacher(images), theirs["teacher_logits"], atol=1e-5, rtol=1e-5)
    if "loss" in theirs:
        trainer = object.__new__(getattr(model.module, host))  # one that trains nothing
        trainer.model, trainer.cfg = model.train(), model.cfg
        assert trainer.objective(images, torch.tensor(LABELS))[0].item() == pytest.approx(theirs["loss"], rel=1e-5)
    own_step = host == "PromptSRC" or "loss" in theirs  # whose forks' models have no adapter of their own
    assert theirs["adapter"] == ("generic" if own_step else host)
    torch.testing.assert_close(theirs["spotlighter"], theirs["logits"], atol=1e-5, rtol=1e-5)
