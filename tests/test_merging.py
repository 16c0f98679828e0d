"""Merging: its pairs and means against loops in float64, what it leaves alone, and that equal tokens cost nothing."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_kit import N_TOKENS, WIDTH, some_images
from random_clips import random_clip

from spotlighter_plugin.method.layout import layout_of
from spotlighter_plugin.method.merging import follow, keys_of, match, merge, whereabouts
from spotlighter_plugin.method.token_stream import TokenStream


def literal(x, sizes, keys, r, front, back):
    """One image: x (S, w), sizes and keys as lists of float64; returns x, sizes and the position of each old one."""
    movable = range(front, len(x) - back)
    cosine = lambda i, j: float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm())  # noqa: E731
    best = {i: max(movable[1::2], key=lambda j, i=i: cosine(i, j)) for i in movable[::2]}
    merged = sorted(best, key=lambda i: -cosine(i, best[i]))[:r]
    groups = [[i] + [j for j in merged if best[j] == i] for i in range(len(x)) if i not in merged]
    weight = lambda group: sum(sizes[i] for i in group)  # noqa: E731
    means = [sum(sizes[i] * x[i] for i in group) / weight(group) for group in groups]
    position = [next(p for p, group in enumerate(groups) if i in group) for i in range(len(x))]
    return torch.stack(means), torch.tensor([weight(group) for group in groups]), position


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(3, 14), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**31), st.data())
def test_merging_is_what_loops_over_pairs_in_float64_say(batch, movable, front, back, seed, data):
    r = data.draw(st.integers(0, movable // 2))
    random, length = torch.Generator().manual_seed(seed), front + movable + back
    hidden, keys = (torch.randn(*shape, generator=random) for shape in ((length, batch, 6), (batch, length, 4)))
    sizes = torch.randint(1, 5, (batch, length), generator=random).float()
    plan = match(keys, r, (front, back))
    merged, new = merge(hidden, sizes, plan)
    where = follow(torch.arange(length).expand(batch, -1), plan)
    for image in range(batch):
        expected = literal(hidden[:, image].double(), sizes[image].tolist(), keys[image].double(), r, front, back)
        torch.testing.assert_close(merged[:, image].double(), expected[0], atol=1e-5, rtol=1e-5)
        assert new[image].tolist() == expected[1].tolist()
        assert where[image].tolist() == expected[2]


def test_what_is_protected_or_has_no_partner_goes_on_bit_for_bit_and_in_its_order():
    torch.manual_seed(0)
    hidden, keys = torch.randn(24, 5, 8).half(), torch.randn(5, 24, 4)
    plan = match(keys, 7, (2, 3))
    merged, sizes = merge(hidden, torch.ones(5, 24), plan)
    assert (plan.kept.diff(dim=1) > 0).all()
    assert ((plan.gone >= 2) & (plan.gone < 21)).all()
    for image in range(5):
        alone = sizes[image] == 1
        assert torch.equal(merged[alone, image], hidden[plan.kept[image, alone], image])
    assert torch.equal(merged[:2], hidden[:2]) and torch.equal(merged[-3:], hidden[-3:])
    assert torch.equal(sizes.sum(1), torch.full((5,), 24.0)) and merged.dtype == torch.half


def test_an_image_is_merged_alike_in_whatever_batch_it_comes():
    torch.manual_seed(0)
    hidden, keys = torch.randn(20, 6, 8), torch.randn(6, 20, 4)
    together, _ = merge(hidden, torch.ones(6, 20), match(keys, 5))
    alone, _ = merge(hidden[:, 4:5], torch.ones(1, 20), match(keys[4:5], 5))
    assert torch.equal(together[:, 4:5], alone)


def test_equal_tokens_are_merged_first_and_a_tower_that_knows_their_sizes_does_not_notice():
    vision = random_clip().visual.requires_grad_(False)
    stream, hidden = TokenStream(vision, 1, weighs=True), torch.randn(1 + N_TOKENS, 3, WIDTH)
    hidden[[5, 7, 11]] = hidden[[6, 8, 6]].clone()  # 11 is like 6, too: a token of three
    whole, gone = {}, []

    def choose(knows, tower, _):
        whole["image"] = tower.tail(hidden)[0]
        plan = match(keys_of(hidden, stream.layout.gaze(1)), 3)
        gone.append(plan.gone)
        merged, sizes = merge(hidden, torch.ones(3, len(hidden)), plan)
        whole["merged"] = tower.tail(merged, sizes)[0]
        tower.sizes = sizes if knows else None
        return merged

    for knows in (True, False):
        with stream.selecting(partial(choose, knows)):
            image = vision(some_images(3))
        torch.testing.assert_close(whole["merged"], whole["image"], atol=1e-5, rtol=1e-5)
        assert torch.allclose(image, whole["image"], atol=1e-4) == knows
    assert torch.equal(gone[0].sort(1).values, torch.tensor([[5, 7, 11]]).expand(3, -1))
    stream.detach()
    assert not any(module._forward_pre_hooks for module in vision.modules())


def test_mean_keys_are_the_mean_over_heads_of_the_blocks_own_keys():
    torch.manual_seed(0)
    vision, hidden = random_clip().visual, torch.randn(9, 2, WIDTH)
    block, attention = vision.transformer.resblocks[0], vision.transformer.resblocks[0].attn
    torch.nn.init.normal_(block.ln_1.weight)
    torch.nn.init.normal_(block.ln_1.bias)
    torch.nn.init.normal_(attention.in_proj_bias)
    own = block.ln_1(hidden) @ attention.in_proj_weight[WIDTH : 2 * WIDTH].T + attention.in_proj_bias[WIDTH : 2 * WIDTH]
    expected = own.unflatten(-1, (attention.num_heads, -1)).mean(-2).transpose(0, 1)
    torch.testing.assert_close(keys_of(hidden, layout_of(vision).gaze(0)), expected, atol=1e-5, rtol=1e-5)


def test_a_picture_knows_which_token_each_of_its_patches_has_become_part_of():
    torch.manual_seed(0)
    first, second = match(torch.randn(2, 13, 4), 4, (1, 2)), match(torch.randn(2, 7, 4), 2, (1, 2))
    kept = torch.tensor([[2, 0, 1, 5], [5, 3, 2, 1]])  # of 6 tokens
    place, token = whereabouts([first, kept, second], 10, 1)
    for image in range(2):
        groups = [[patch] for patch in range(10)]
        for plan, lead in ((first, 1), (kept[image].tolist(), 0), (second, 1)):
            if isinstance(plan, list):
                groups = [groups[i] for i in plan]
                continue
            joined = {int(i) - lead: int(j) - lead for i, j in zip(plan.gone[image], plan.into[image], strict=True)}
            left = [group for i, group in enumerate(groups) if i not in joined]
            for i, j in joined.items():
                left[j] = left[j] + groups[i]
            groups = left
        expected = [next((i for i, group in enumerate(groups) if patch in group), -1) for patch in range(10)]
        assert token[image].tolist() == expected
        assert place[image].tolist() == [group[0] for group in groups]


def test_gradients_flow_through_merged_and_single_tokens():
    torch.manual_seed(0)
    hidden = torch.randn(9, 2, 4, dtype=torch.double, requires_grad=True)
    plan, sizes = match(torch.randn(2, 9, 4), 3), torch.rand(2, 9) + 1
    assert torch.autograd.gradcheck(lambda x: merge(x, sizes.double(), plan)[0], hidden)


def test_more_merges_than_pairs_are_refused_in_one_line():
    with pytest.raises(ValueError, match="r = 5: of 9 tokens at most 4 can be merged at once"):
        match(torch.randn(1, 11, 4), 5, (1, 1))
