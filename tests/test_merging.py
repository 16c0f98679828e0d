"""Merging: its pairs and means against loops in float64, what it leaves alone, and that equal tokens cost nothing."""

from dataclasses import asdict
from functools import partial

import pytest
import torch
from dassl.config import get_cfg_default
from hypothesis import given, settings
from hypothesis import strategies as st
from method_kit import CLASS_NAMES, N_TOKENS, WIDTH, coop_host, random_clip, some_images, train_a_little, wrap
from torch.nn.attention import SDPBackend, sdpa_kernel
from towers_kit import LAYOUTS, BatchFirst, Host, WithLoRA

import trainers.maple as maple
from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.method.layout import layout_of
from spotlighter_plugin.method.merging import follow, keys_of, match, merge, whereabouts
from spotlighter_plugin.method.schedule import lengths, near
from spotlighter_plugin.method.schedule import operations as operations_of
from spotlighter_plugin.method.token_stream import Pass, TokenStream
from spotlighter_plugin.towers.prompts import normalize
from spotlighter_plugin.workbench.speed.stopwatch import operations
from spotlighter_plugin.wrapper import SpotlighterWrapper


def literal(x, sizes, keys, r, front, back):
    """One image: x (S, w), sizes and keys as lists of float64; returns x, sizes and the position of each old one."""
    movable = range(front, len(x) - back)
    cosine = lambda i, j: float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm())  # noqa: E731
    mean = sum(sizes[i] * keys[i] / keys[i].norm() for i in movable)
    likeness = {i: float(keys[i] @ mean / keys[i].norm()) for i in movable}
    nearest = sorted(sorted(movable, key=lambda i: -likeness[i])[: near(len(movable), r)])
    best = {i: max(nearest[1::2], key=lambda j, i=i: cosine(i, j)) for i in nearest[::2]}
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
    plan = match(keys, sizes, r, (front, back))
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
    plan = match(keys, torch.ones(5, 24), 7, (2, 3))
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
    together, _ = merge(hidden, torch.ones(6, 20), match(keys, torch.ones(6, 20), 5))
    alone, _ = merge(hidden[:, 4:5], torch.ones(1, 20), match(keys[4:5], torch.ones(1, 20), 5))
    assert torch.equal(together[:, 4:5], alone)


def test_equal_tokens_are_merged_first_and_a_tower_that_knows_their_sizes_does_not_notice():
    vision = random_clip().visual.requires_grad_(False)
    stream, hidden = TokenStream(vision, 1, weighs=True), torch.randn(1 + N_TOKENS, 3, WIDTH)
    hidden[[1, 3, 5, 7, 9, 11, 13]] = hidden[[2, 4, 6, 8, 10, 12, 2]].clone()  # 13 is like 2, too: a token of three
    whole, gone = {}, []

    def choose(knows, tower, _):
        whole["image"] = tower.tail(hidden)[0]
        plan = match(keys_of(hidden, stream.layout.gaze(1)), torch.ones(3, len(hidden)), 7)
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
    assert all(sorted(image) == [1, 3, 5, 7, 9, 11, 13] for image in gone[0].tolist())
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
    first, second = (match(torch.randn(2, n, 4), torch.ones(2, n), r, (1, 2)) for n, r in ((13, 4), (7, 2)))
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
    sizes = torch.rand(2, 9) + 1
    plan = match(torch.randn(2, 9, 4), sizes, 3)
    assert torch.autograd.gradcheck(lambda x: merge(x, sizes.double(), plan)[0], hidden)


def test_more_merges_than_pairs_are_refused_in_one_line():
    with pytest.raises(ValueError, match="r = 5: of 9 tokens at most 4 can be merged at once"):
        match(torch.randn(1, 11, 4), torch.ones(1, 11), 5, (1, 1))


# ------------------------------------------------------------------------------------------------------------- in hosts


MERGED = {"merge": 3, "select_block": 2, "top_k": 5, "fuse_dropped": True}


def host_of(kind):
    if kind == "coop":
        return coop_host()
    cfg = get_cfg_default()
    maple.extend_cfg(cfg)
    return maple.CustomCLIP(cfg, CLASS_NAMES, random_clip().requires_grad_(False)).eval()


def lengths_seen(wrapper, images):
    seen, blocks = [], wrapper.adapter.vision.transformer.resblocks
    hooks = [block.attn.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]))) for block in blocks]
    with torch.no_grad():
        wrapper(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["coop", "maple"])
def test_blocks_see_as_many_positions_as_the_schedule_says_with_the_hosts_prompts_among_them(kind):
    wrapper = wrap(host_of(kind), **MERGED).eval()
    prompts = {"coop": 0, "maple": 2}[kind]
    tower = wrapper.stream.layout.tower(wrapper.adapter.dim)
    assert (
        lengths_seen(wrapper, some_images())
        == [n + prompts for n in lengths(tower, wrapper.steps)]
        == [
            1 + N_TOKENS + prompts,
            1 + N_TOKENS - 3 + prompts,
            1 + 5 + 1 + prompts,
        ]
    )


@pytest.mark.parametrize("kind", ["coop", "maple"])
def test_detached_the_host_is_bit_for_bit_what_it_was(kind):
    host, images = host_of(kind).eval(), some_images()
    state = {name: value.clone() for name, value in host.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in host.modules()]
    with torch.no_grad():
        before = host(images)
        wrapper = wrap(host, **MERGED).eval()
        assert torch.equal(host(images), before) and not torch.equal(wrapper(images), before)
        wrapper.detach()
        assert torch.equal(host(images), before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in host.modules()] == hooks
    assert host.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in host.state_dict().items())


@pytest.mark.parametrize("options", [MERGED, {"stages": ((1, 9),), "top_k": 4}, {"share": 0.8}, {"top_k": N_TOKENS}])
def test_the_towers_operations_are_those_that_the_schedule_counts(options):
    placed = {} if "share" in options else {"select_block": 2}
    options = placed | {"mapping": "none", "prototype_logits": False, "losses": ()} | options
    wrapper = SpotlighterWrapper(coop_host(), SpotlighterConfig(**options), class_names=CLASS_NAMES).eval()
    image, text = some_images(1), normalize(torch.randn(6, 64))
    tower = wrapper.stream.layout.tower(64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on a CPU
        wrapper(image)  # texts are encoded
        logits = 2 * 64 * len(text)
        assert operations(lambda: wrapper(image)) == operations_of(tower, wrapper.steps) + logits


DEAF = (BatchFirst, WithLoRA)  # their attention takes no mask


def test_a_tower_whose_attention_takes_no_mask_is_refused_in_one_line():
    for layout in DEAF:
        with pytest.raises(ValueError, match="Attention takes no mask that .* set MERGE 0 and SHARE 0") as error:
            SpotlighterWrapper(Host(layout()).eval(), SpotlighterConfig(**MERGED), class_names=CLASS_NAMES)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each not in DEAF], ids=lambda layout: layout.__name__)
@torch.no_grad()
def test_every_layout_merges_and_its_attention_is_told_for_how_many_a_token_stands(layout, monkeypatch):
    wrapper = SpotlighterWrapper(Host(layout()).eval(), SpotlighterConfig(**MERGED), class_names=CLASS_NAMES).eval()
    images, merged = some_images(), wrapper(some_images())
    assert merged.isfinite().all() and wrapper.token_of_patch.max() == 4
    monkeypatch.setattr(Pass, "_bias_of", lambda tower, sizes: None)
    assert not torch.allclose(wrapper(images), merged, atol=1e-4)


def test_merging_alone_keeps_whatever_is_left():
    wrapper = wrap(merge=4, select_block=2, top_k=N_TOKENS, fuse_dropped=True).eval()
    assert lengths_seen(wrapper, some_images()) == [17, 13, 13]
    assert wrapper.kept.shape == (5, 12)
    assert torch.equal(wrapper.token_of_patch.sort(1).values.unique(), torch.arange(12))  # no patch is dropped


def test_a_host_learns_through_merged_tokens_with_every_loss():
    host = host_of("maple")
    wrapper = wrap(host, **MERGED)
    before = [parameter.clone() for parameter in host.prompt_learner.parameters()]
    losses = train_a_little(wrapper, lr=0.01)
    assert {"gra", "reg_text", "kl_visual"} <= losses.keys() and losses["loss"].isfinite()
    assert any(not torch.equal(now, was) for now, was in zip(host.prompt_learner.parameters(), before, strict=True))


def test_an_image_gets_its_own_logits_in_whatever_batch_it_comes():
    wrapper, images = wrap(**MERGED).eval(), some_images(6)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(images)[2:4], wrapper(images[2:4]), atol=1e-4, rtol=1e-4)


def test_share_speaks_for_the_options_that_it_places_and_is_saved_with_the_rest():
    config = SpotlighterConfig(share=0.7)
    assert (config.top_k, config.select_block, config.stages, config.merge) == (None,) * 4
    assert SpotlighterConfig(**asdict(config)) == config
    with pytest.raises(ValueError, match="SHARE = 0.7: it places merges and cuts itself; leave out TOP_K, MERGE"):
        SpotlighterConfig(share=0.7, top_k=8, merge=2)
    with pytest.raises(ValueError, match="SHARE = 1.5: expected a number from 0 to 1"):
        SpotlighterConfig(share=1.5)
