"""Merging before the cuts: where, in which hosts, at which cost, and that detaching undoes it."""

from dataclasses import asdict

import pytest
import torch
from dassl.config import get_cfg_default
from method_kit import CLASS_NAMES, N_TOKENS, coop_host, some_images, train_a_little, wrap
from random_clips import random_clip
from torch.nn.attention import SDPBackend, sdpa_kernel
from towers_kit import LAYOUTS, BatchFirst, Host, WithLoRA

import trainers.maple as maple
from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.method.schedule import lengths
from spotlighter_plugin.method.schedule import operations as operations_of
from spotlighter_plugin.method.token_stream import Pass
from spotlighter_plugin.towers.prompts import normalize
from spotlighter_plugin.workbench.speed.stopwatch import operations
from spotlighter_plugin.wrapper import SpotlighterWrapper

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
