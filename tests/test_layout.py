"""Towers in the manner of public hosts: every layout is understood, checked, or refused in one line."""

import pytest
import torch
import towers_kit
from method_kit import CLASS_NAMES, N_TOKENS, some_images
from towers_kit import LAYOUTS, BetweenLikeMMRL, Host, MaskedByPlace, Miniature, SeveralLikePLOT, WithLoRA

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
from spotlighter_plugin.hosts.generic import GenericAdapter
from spotlighter_plugin.method.layout import affine, layout_of
from spotlighter_plugin.method.token_stream import TokenStream

ALL = {"top_k": N_TOKENS, "fuse_dropped": False}


def wrap(tower, **options):
    options = {"top_k": 6, "select_block": 1, **options}
    torch.manual_seed(3)
    return SpotlighterWrapper(Host(tower).eval(), SpotlighterConfig(**options), class_names=CLASS_NAMES).eval()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("block", (0, 1, 2))
@torch.no_grad()
def test_with_every_token_kept_the_hosts_logits_stay(layout, block):
    wrapper = wrap(layout(), select_block=block, **ALL)
    assert wrapper.invariance < 1e-5
    images = some_images()
    torch.testing.assert_close(wrapper(images), wrapper.host(images)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@torch.no_grad()
def test_with_few_tokens_kept_in_two_cuts_every_layout_classifies_and_remembers(layout):
    wrapper = wrap(layout(), stages=((0, 9),), top_k=5)
    images = some_images(6)
    few = wrapper(images)
    assert not torch.allclose(few, wrapper.host(images)[0], atol=1e-4)
    assert wrapper.kept.shape == (6, 5) and wrapper.kept.max() < N_TOKENS
    wrapper.remember([(images, torch.arange(6))])
    wrapper.plugin.memory.weight.fill_(1e3)  # texts are random
    wrapper.refresh()
    assert wrapper(images).argmax(1).tolist() == list(range(6))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@torch.no_grad()
def test_patches_are_what_is_dropped_whichever_side_the_prompts_stand_on(layout):
    """The tokens that go on are literally the chosen patches: a tower that is run on them alone says the same."""
    wrapper, images, seen = wrap(layout(), select_block=1), some_images(3), {}
    with wrapper.stream.selecting(lambda tower, hidden: seen.setdefault("hidden", hidden)):
        wrapper.host(images)
    patches = seen["hidden"][wrapper.stream.layout.n_lead :][:N_TOKENS]
    same = (patches[:, :1] == patches).flatten(1).all(1)
    assert not same.any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@torch.no_grad()
def test_the_tail_and_the_whole_tower_run_again_give_what_the_tower_gives(layout):
    tower, images, seen = layout().eval(), some_images(3), {}
    stream = TokenStream(layout_of(tower, prompts_first="Between" in layout.__name__), 0, 1)
    before = tower(images)

    def choose(tower, hidden):
        few = tower.sequence(hidden, tower.tokens(hidden, torch.arange(4).expand(3, -1)))
        seen.update(whole=tower.whole(), few=tower.tail(few)[0])
        return few

    with stream.selecting(lambda tower, hidden: hidden, choose):
        few = tower(images)
    torch.testing.assert_close(seen["whole"], before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen["few"], few, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_detached_tower_answers_bit_for_bit_as_before():
    for layout in LAYOUTS:
        tower, images = layout().eval(), some_images()
        before, keys = tower(images), {key: value.clone() for key, value in tower.state_dict().items()}
        wrapper = wrap(tower)
        wrapper(images)
        wrapper.detach()
        assert torch.equal(tower(images), before)
        assert all(torch.equal(value, keys[key]) for key, value in tower.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tower.modules())


@torch.no_grad()
def test_a_tower_that_sees_each_image_several_times_keeps_tokens_for_each_and_remembers_their_mean():
    class Averages(Host):
        def forward(self, images):
            image = torch.nn.functional.normalize(self.image_encoder(images).mean(0), dim=-1)
            return self.logit_scale.exp() * image @ torch.nn.functional.normalize(self.text_encoder(self.classes)).T

    config = SpotlighterConfig(top_k=6, select_block=1)
    wrapper = SpotlighterWrapper(Averages(SeveralLikePLOT()).eval(), config, class_names=CLASS_NAMES).eval()
    images = some_images(6)
    assert wrapper.invariance < 1e-5 and wrapper(images).shape == (6, 6) and wrapper.kept.shape == (12, 6)
    wrapper.remember([(images, torch.arange(6))])
    wrapper.plugin.memory.weight.fill_(1e3)
    wrapper.refresh()
    assert wrapper(images).argmax(1).tolist() == list(range(6))


def test_a_mask_that_tells_patches_apart_is_refused_in_one_line():
    with pytest.raises(ValueError, match="a mask that tells patch tokens apart") as error:
        wrap(MaskedByPlace())
    assert "\n" not in str(error.value)


def test_a_tower_that_does_something_of_its_own_is_refused_by_how_much_and_passes_unchecked():
    class Positions(Miniature):
        def run(self, x):
            for block in self.transformer.resblocks:
                x = block(x)
                x = x + torch.outer(torch.arange(len(x)), torch.eye(128)[0]).unsqueeze(1)
            return x

    with pytest.raises(
        ValueError, match=r"generic \(Host\): with every token kept, .* differ by \d\.\de-0\d of .*check=False"
    ):
        wrap(Positions())
    host = Host(Positions()).eval()
    config = SpotlighterConfig(top_k=6, select_block=1)
    assert SpotlighterWrapper(host, config, class_names=CLASS_NAMES, check=False).invariance is None


def test_a_tower_of_a_fixed_length_is_refused_in_one_line():
    class Fixed(Miniature):
        def run(self, x):
            return super().run(x).view(1 + N_TOKENS, x.shape[1], -1)

    with pytest.raises(ValueError, match="does not take fewer tokens"):
        wrap(Fixed())


def test_the_check_leaves_no_trace_in_a_host_that_keeps_things():
    class Keeps(Host):
        def __init__(self, tower):
            super().__init__(tower)
            self.text = None

        def forward(self, images):
            if not self.training and self.text is None:
                self.text = self.text_encoder(self.classes)
            return self.image_encoder(images) @ self.text.T

    host = Keeps(BetweenLikeMMRL())
    modes = [module.training for module in host.modules()]
    SpotlighterWrapper(host, SpotlighterConfig(top_k=6), class_names=CLASS_NAMES)
    assert host.text is None and [module.training for module in host.modules()] == modes


@torch.no_grad()
def test_low_rank_layers_count_in_the_scores():
    plain, adapted = towers_kit.BatchFirst(), WithLoRA()
    layer = adapted.transformer.resblocks[1].self_attn.q_proj
    weight, bias = affine(layer)
    torch.testing.assert_close(weight, layer.base_layer.weight + layer.up @ layer.down, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias, layer.base_layer.bias)
    seen = [layout_of(tower).gaze(1).asking[0] for tower in (plain, adapted)]
    assert not torch.allclose(*seen)


def test_layers_that_change_their_weights_on_eval_are_not_made_to_while_shots_are_remembered():
    class Merges(torch.nn.LayerNorm):
        def train(self, mode=True):
            with torch.no_grad():
                self.weight += 0.1
            return super().train(mode)

    tower = Miniature().eval()
    tower.ln_post = Merges(tower.ln_post.normalized_shape)
    wrapper = SpotlighterWrapper(Host(tower), SpotlighterConfig(top_k=6), class_names=CLASS_NAMES)
    assert wrapper.remember([(some_images(6), torch.arange(6))]) == 6
    assert torch.equal(tower.ln_post.weight, torch.ones_like(tower.ln_post.weight)) and tower.ln_post.training


def test_a_host_that_keeps_its_own_logits_is_not_trained_through_the_wrapper():
    wrapper = wrap(Miniature())
    with pytest.raises(ValueError, match="Host is trained by its own step"):
        wrapper.train()(some_images(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="MAPPING = 'full': Host keeps its own logits"):
        wrap(Miniature(), preset="paper")


def test_a_host_without_class_names_or_logits_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"Host is known by its image_encoder alone: pass class_names=\[...\]"):
        SpotlighterWrapper(Host(Miniature()), SpotlighterConfig(top_k=6))
    host = Host(Miniature()).eval()
    adapter = GenericAdapter(host, CLASS_NAMES, forward=lambda images: host(images)[1])
    with pytest.raises(ValueError, match="gives no logits of 6 classes"):
        SpotlighterWrapper(host, SpotlighterConfig(top_k=6), adapter)
