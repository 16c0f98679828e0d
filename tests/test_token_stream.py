"""The hooks on the vision tower: what they replace, what they leave alone, and the second run of the last blocks."""

from functools import partial

import pytest
import torch
from clip.model import CLIP
from method_kit import BLOCKS, N_TOKENS, WIDTH, random_clip, some_images
from torch import nn

from spotlighter_plugin.method.layout import layout_of
from spotlighter_plugin.method.token_stream import TokenStream


class ListBlock(nn.Module):
    """A block in MaPLe's manner: passes [x, deep prompts, counter] and replaces the last positions by its prompts."""

    def __init__(self, block, first):
        super().__init__()
        self.block, self.first = block, first
        self.attn, self.ln_1 = block.attn, block.ln_1

    def forward(self, stream):
        x, prompts, counter = stream
        if not self.first and counter < len(prompts):
            deep = prompts[counter].unsqueeze(1).expand(-1, x.shape[1], -1)
            x, counter = torch.cat([x[: -len(deep)], deep]), counter + 1
        return [self.block(x), prompts, counter]


class PromptedTower(nn.Module):
    """A vision transformer with prompts behind the patch tokens and deep prompts in later blocks."""

    def __init__(self, vision, prompts):
        super().__init__()
        for name in ("ln_pre", "ln_post", "proj", "conv1", "class_embedding", "positional_embedding"):
            setattr(self, name, getattr(vision, name))
        blocks = [ListBlock(block, i == 0) for i, block in enumerate(vision.transformer.resblocks)]
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*blocks)
        self.transformer.forward = self.transformer.resblocks.forward
        self.prompts = prompts

    def forward(self, images):
        x = self.conv1(images).flatten(2).permute(2, 0, 1)  # (N, B, w)
        x = torch.cat([self.class_embedding.expand(1, x.shape[1], -1), x]) + self.positional_embedding.unsqueeze(1)
        x = torch.cat([x, self.prompts[0].unsqueeze(1).expand(-1, x.shape[1], -1)])
        output = self.transformer([self.ln_pre(x), self.prompts[1:], 0])[0]
        return self.ln_post(output[0]) @ self.proj


@pytest.fixture
def vision():
    return random_clip().visual.requires_grad_(False)


@pytest.fixture
def prompted(vision):
    torch.manual_seed(0)
    return PromptedTower(vision, [torch.randn(2, WIDTH) for _ in range(BLOCKS)])


def every(stream, batch):
    return torch.arange(stream.n_tokens).expand(batch, -1)


def test_outside_selecting_and_after_detach_the_tower_is_untouched_bit_for_bit(vision):
    images, modules = some_images(), list(vision.modules())
    before, keys = vision(images), list(vision.state_dict())
    stream = TokenStream(vision, 1)
    assert torch.equal(vision(images), before)
    with stream.selecting(lambda tower, hidden: tower.sequence(hidden, tower.tokens(hidden, every(stream, 5)[:, :3]))):
        assert not torch.equal(vision(images), before)
    stream.detach()
    assert torch.equal(vision(images), before) and list(vision.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert list(vision.modules()) == modules


@pytest.mark.parametrize("block", range(BLOCKS))
def test_keeping_every_token_in_whatever_order_gives_the_towers_own_output(vision, block):
    images, stream = some_images(), TokenStream(vision, block)
    before = vision(images)
    order = torch.stack([torch.randperm(N_TOKENS) for _ in range(5)])
    with stream.selecting(lambda tower, hidden: tower.sequence(hidden, tower.tokens(hidden, order))):
        torch.testing.assert_close(vision(images), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_the_tail_gives_the_towers_output_without_running_earlier_blocks_again(vision, block):
    images, stream = some_images(), TokenStream(vision, block)
    before, runs, seen = vision(images), [], {}
    for index, each in enumerate(vision.transformer.resblocks):
        each.register_forward_hook(lambda *_, index=index: runs.append(index))

    def choose(tower, hidden):
        seen["all"], seen["output"] = tower.tail(hidden)
        return hidden

    with stream.selecting(choose):
        image = vision(images)
    assert torch.equal(seen["all"], before) and torch.equal(image, before)
    assert all(runs.count(index) == (1 if index < block else 2) for index in range(BLOCKS))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_prompts_of_the_host_stay_at_the_end_and_act_in_later_blocks_and_in_the_tail(prompted, block):
    images, stream = some_images(), TokenStream(prompted, block)
    before, seen = prompted(images), {}

    def choose(tower, hidden):
        assert len(hidden) == 1 + N_TOKENS + 2
        sequence = tower.sequence(hidden, tower.tokens(hidden, every(stream, 5)[:, :4]))
        assert torch.equal(sequence[-2:], hidden[-2:])
        seen["all"], seen["few"] = tower.tail(hidden)[0], tower.tail(sequence)[0]
        return sequence

    with stream.selecting(choose) as tower:
        few = prompted(images)
        assert tower.output.shape == (1 + 4 + 2, 5, WIDTH)
    torch.testing.assert_close(seen["all"], before)
    torch.testing.assert_close(seen["few"], few)
    assert not torch.allclose(few, before)


@pytest.mark.parametrize("tower", ["vision", "prompted"])
def test_choices_before_several_blocks_follow_each_other_and_the_whole_tower_can_still_be_run(tower, request):
    vision = request.getfixturevalue(tower)
    images, stream = some_images(), TokenStream(vision, 0, 1, 2)
    before, seen, prompts = vision(images), {}, 2 if tower == "prompted" else 0

    def keep(number, tower, hidden):
        seen[number] = tower.n_now, len(hidden)
        return tower.sequence(hidden, tower.tokens(hidden, every(stream, 5)[:, :number]))

    def choose(tower, hidden):
        sequence = keep(4, tower, hidden)
        seen["whole"], seen["few"] = tower.whole(), tower.tail(sequence)[0]
        return sequence

    for _ in range(2):  # the second pass starts afresh
        with stream.selecting(partial(keep, 9), partial(keep, 6), choose) as tower:
            few = vision(images)
            assert len(tower.output) == 1 + 4 + prompts
        assert [seen[number] for number in (9, 6, 4)] == [(n, 1 + n + prompts) for n in (N_TOKENS, 9, 6)]
        torch.testing.assert_close(seen["whole"], before)
        torch.testing.assert_close(seen["few"], few)
        assert not torch.allclose(few, before) and torch.equal(vision(images), before)


def test_an_error_while_choosing_leaves_the_tower_as_it_was(vision):
    images, stream = some_images(), TokenStream(vision, 1)
    before = vision(images)

    def choose(tower, hidden):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), stream.selecting(choose):
        vision(images)
    assert torch.equal(vision(images), before)


def test_a_resnet_is_refused_in_one_line():
    resnet = CLIP(32, 64, (1, 1, 1, 1), 16, None, 77, 100, 64, 1, 1).visual
    with pytest.raises(ValueError, match="ModifiedResNet, not a vision transformer.*ViT-B/16") as error:
        layout_of(resnet)
    assert "\n" not in str(error.value)
