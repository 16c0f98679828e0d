"""MaPLe: prompts where the paper puts them, in both towers, and that training trains them."""

import pytest
import torch
from hosts_kit import batch_of, make_trainer
from method_kit import random_clip

from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.hosts.maple import MaPLeAdapter
from spotlighter_plugin.towers.clip import tokenize
from spotlighter_plugin.towers.deep_prompts import DeepPrompts

FP32 = ("TRAINER.MAPLE.PREC", "fp32")


def maple(folder, *options):
    return make_trainer(folder, "MaPLe", "maple", *FP32, *options)


def vision_by_hand(visual, images, prompts, n):
    """The image tower with prompts, block by block: prompts[i] are block i's."""
    x = visual.conv1(images).flatten(2).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1)).permute(1, 0, 2)
    for i, block in enumerate(visual.transformer.resblocks):
        if 0 < i < len(prompts):
            x[-n:] = prompts[i][:, None]
        y = block.ln_1(x)
        x = x + block.attn(y, y, y)[0]
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[0]) @ visual.proj


def text_by_hand(encoder, x, ids, deeper):
    """The text tower over all 77 positions, block by block: deeper[i] are block i+1's prompts."""
    x = (x + encoder.positional_embedding).permute(1, 0, 2)
    for i, block in enumerate(encoder.transformer.resblocks):
        if 0 < i <= len(deeper):
            n = len(deeper[i - 1])
            x = torch.cat([x[:1], deeper[i - 1][:, None].expand(-1, x.shape[1], -1), x[1 + n :]])
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, attn_mask=block.attn_mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = encoder.ln_final(x.permute(1, 0, 2))
    return x[torch.arange(len(x)), ids.argmax(-1)] @ encoder.text_projection


@pytest.mark.parametrize("depth", [1, 2, 9])
@torch.no_grad()
def test_both_towers_equal_a_block_by_block_reference(tmp_path, depth):
    trainer = maple(tmp_path, "TRAINER.MAPLE.PROMPT_DEPTH", depth)
    model, images = trainer.model, batch_of(trainer)["img"]
    prompts, first, deep_text, deep_vision = model.prompt_learner()
    assert len(deep_text) == len(deep_vision) == min(depth, 3) - 1
    with model.vision_prompts.off():
        expected = vision_by_hand(model.image_encoder, images, [first, *deep_vision], 2)
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=1e-4)
    expected = text_by_hand(model.text_encoder, prompts, model.tokenized_prompts, deep_text)
    torch.testing.assert_close(model.encode_text(), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_with_prompts_off_the_towers_are_clip_again():
    model, images, ids = random_clip(), torch.randn(2, 3, 32, 32), tokenize(["red", "blue sea"])
    image, text = model.encode_image(images), model.encode_text(ids)
    vision = DeepPrompts(lambda i: torch.ones(2, 128) * i, 2).into_vision(model.visual, 3)
    deep_text = DeepPrompts(lambda i: torch.ones(2, 64) * i, 2).into_text(model.transformer, 3)
    assert not torch.equal(model.encode_image(images), image) and not torch.equal(model.encode_text(ids), text)
    with vision.off(), deep_text.off():
        assert torch.equal(model.encode_image(images), image) and torch.equal(model.encode_text(ids), text)


@torch.no_grad()
def test_prompts_do_not_mind_a_shorter_sequence():
    model, lengths = random_clip(), []
    DeepPrompts(lambda i: torch.full((2, 128), float(i)), 2).into_vision(model.visual, 3)
    blocks = model.visual.transformer.resblocks
    blocks[1].register_forward_pre_hook(lambda module, args: (torch.cat([args[0][:4], args[0][-2:]]),))
    blocks[2].register_forward_hook(lambda module, args, output: lengths.append(args[0]))
    model.encode_image(torch.randn(1, 3, 32, 32))
    assert len(lengths[0]) == 6 and (lengths[0][-2:] == 2).all()


def test_checkpoints_have_upstreams_keys_and_load_into_other_class_names(tmp_path):
    trainer = maple(tmp_path, "DATASET.SUBSAMPLE_CLASSES", "base", "OPTIM.MAX_EPOCH", 1)
    trainer.train()
    path = tmp_path / "out" / "MultiModalPromptLearner" / "model.pth.tar-1"
    keys = set(torch.load(path, weights_only=True)["state_dict"])
    assert {
        "prompt_learner.ctx",
        "prompt_learner.proj.weight",
        "prompt_learner.compound_prompts_text.1",
        "prompt_learner.compound_prompt_projections.1.bias",
        "prompt_learner.token_suffix",
        "image_encoder.transformer.resblocks.2.mlp.c_proj.bias",
        "text_encoder.text_projection",
        "logit_scale",
    } <= keys
    other = maple(tmp_path, "OUTPUT_DIR", str(tmp_path / "other"))
    other.load_model(str(tmp_path / "out"), epoch=1)
    assert torch.equal(other.model.prompt_learner.ctx, trainer.model.prompt_learner.ctx)
    assert len(other.model.prompt_learner.token_suffix) == 6


def test_a_depth_beyond_the_tower_is_cut_with_a_note_and_none_is_refused(tmp_path, capsys):
    maple(tmp_path, "TRAINER.MAPLE.PROMPT_DEPTH", 30)
    assert "PROMPT_DEPTH 30 exceeds the tower's 3 blocks" in capsys.readouterr().out
    with pytest.raises(ValueError, match="PROMPT_DEPTH 0 is below 1"):
        maple(tmp_path, "TRAINER.MAPLE.PROMPT_DEPTH", 0)


class ForkedMaPLe(torch.nn.Module):
    """MaPLe as its fork has it: the towers are called with their prompts."""

    def __init__(self, ours):
        super().__init__()
        self.prompt_learner, self.tokenized_prompts = ours.prompt_learner, ours.tokenized_prompts
        self.logit_scale, self.dtype, self.ours = ours.logit_scale, ours.dtype, ours
        self.text_encoder = lambda prompts, ids, deep: ours.text_encoder(prompts, ids) * (len(deep) == 2)
        self.image_encoder = lambda images, first, deep: ours.encode_image(images) * (len(first) == len(deep) == 2)


@torch.no_grad()
def test_the_forks_maple_is_called_its_own_way(tmp_path):
    ours = maple(tmp_path).model
    adapter, images = MaPLeAdapter(ForkedMaPLe(ours)), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapter.encode_text(), ours.encode_text(), atol=1e-5, rtol=1e-4)
    assert torch.equal(adapter.encode_image(images), ours.encode_image(images))
    assert type(adapter_for(ForkedMaPLe(ours))) is MaPLeAdapter
