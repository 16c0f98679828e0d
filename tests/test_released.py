"""CoOp with the authors' released algorithm: its memory step by step, and what its switch turns off."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_kit import CLASS_NAMES, SIZE, random_clip
from yacs.config import CfgNode

from spotlighter_plugin.workbench.training.settings import import_trainers_and_datasets

import_trainers_and_datasets()
from trainers import coop, coop_released  # noqa: E402


def config(image_branch=True):
    cfg = CfgNode({"TRAINER": CfgNode()})
    coop.extend_cfg(cfg)
    coop_released.extend_cfg(cfg)
    cfg.TRAINER.COOP.CTX_INIT, cfg.TRAINER.RELEASED.IMAGE_BRANCH = "a photo of a", image_branch
    return cfg


@pytest.fixture
def trainer(request):
    """A trainer with a model on a random CLIP, without data."""
    torch.manual_seed(0)
    trainer = object.__new__(coop_released.CoOpReleased)
    trainer.cfg = config(getattr(request, "param", True))
    trainer.model = trainer.make_model(random_clip().requires_grad_(False), CLASS_NAMES)
    return trainer


def images(n=4):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_the_memory_moves_slot_by_slot_as_released():
    torch.manual_seed(0)
    refiner = coop_released.Refiner(16, config().TRAINER.RELEASED)
    before, tokens = refiner.memory.double().numpy(), torch.randn(40, 16)
    refiner.write(tokens)
    unit = F.normalize(tokens.double(), dim=-1).numpy()
    scores = unit @ before.T
    over_tokens = np.exp(scores) / np.exp(scores).sum(0)
    expected = before.copy()
    for slot in range(len(before)):
        mine = [i for i in range(len(unit)) if scores[i].argmax() == slot]
        for i in mine:
            expected[slot] += 0.2 * over_tokens[i, slot] / over_tokens[:, slot].max() * unit[i]
        if mine:
            expected[slot] -= 0.2 * before[slot]
        expected[slot] /= np.linalg.norm(expected[slot])
    assert np.allclose(refiner.memory.numpy(), expected, atol=1e-5) and not np.allclose(expected, before, atol=1e-3)


def test_testing_does_without_the_projection_and_leaves_the_memory_alone(trainer):
    model = trainer.model.eval()
    with torch.no_grad():
        before, memory = model(images()), model.refiner.memory.clone()
        for parameter in model.refiner.project.parameters():
            parameter.zero_()
        assert torch.equal(model(images()), before) and torch.equal(model.refiner.memory, memory)


@pytest.mark.parametrize(("trainer", "has_branch"), [(True, True), (False, False)], indirect=["trainer"])
def test_training_reaches_prompts_projection_and_texts_and_with_the_branch_the_image(trainer, has_branch):
    model = trainer.model.train()
    before = model.refiner.memory.clone()
    loss, _ = trainer.objective(images(), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    reached = {name.split(".")[0] for name, p in model.refiner.named_parameters() if p.grad is not None}
    assert reached == ({"project", "text", "image"} if has_branch else {"project", "text"})
    assert model.prompt_learner.ctx.grad.abs().sum() > 0 and not torch.equal(model.refiner.memory, before)


def test_the_best_patches_are_those_that_cls_attends_to_most_in_the_last_block(trainer):
    vision = trainer.model.image_encoder
    joint, best = trainer.model.tokens(images())
    seen = {}
    last = vision.transformer.resblocks[-1]
    handle = last.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        whole = vision(images())
    handle.remove()
    x = last.ln_1(seen["x"])
    weights = last.attn(x, x, x, need_weights=True)[1][:, 0, 1:]  # (B, N)
    assert torch.equal(best, 1 + weights.topk(5, 1).indices)
    assert torch.allclose(joint[:, 0], whole, atol=1e-4)
