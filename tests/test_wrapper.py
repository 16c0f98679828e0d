"""SpotlighterWrapper around a CoOp: starts at the host, leaves the host alone, learns, remembers, repeats."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP
from method_kit import BLOCKS, CLASS_NAMES, DIM, MAPPINGS, N_TOKENS, coop_host, some_images, train_a_little, wrap

from spotlighter_plugin.config import ACTIVATIONS, LOSSES, PRESETS, SpotlighterConfig
from spotlighter_plugin.hosts import adapter_for
from spotlighter_plugin.method.token_stream import Pass
from spotlighter_plugin.wrapper import SpotlighterWrapper

ENTRIES = ("sequence", "readout", "none")


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------- the host's peace


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_training_leaves_everything_frozen_bit_for_bit(mapping):
    wrapper = wrap(mapping=mapping, prototypes_in="sequence")
    before = {name: p.detach().clone() for name, p in wrapper.host.named_parameters()}
    train_a_little(wrapper)
    changed = {name for name, p in wrapper.host.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"prompt_learner.ctx"}


# ---------------------------------------------------------------------------------------------- starting at the host


@pytest.mark.parametrize("block", range(-BLOCKS, 0))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_every_token_kept_the_logits_are_the_hosts(activation, block):
    wrapper = wrap(top_k=N_TOKENS, mapping="none", activation=activation, select_block=block, prototype_logits=False)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(some_images()), wrapper.host(some_images()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prototype_logits", [True, False])
@pytest.mark.parametrize("prototypes_in", ENTRIES)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_before_the_first_step_any_mapping_gives_the_hosts_logits(mapping, prototypes_in, prototype_logits):
    options = {"mapping": mapping, "prototypes_in": prototypes_in, "prototype_logits": prototype_logits}
    wrapper = wrap(top_k=N_TOKENS, semantic_activation=True, **options)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(some_images()), wrapper.host(some_images()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_with_a_full_bank_and_untrained_weights_the_logits_are_still_the_hosts(mapping):
    wrapper = wrap(top_k=N_TOKENS, mapping=mapping, prototypes_in="readout", semantic_activation=True)
    train_a_little(wrapper, lr=0)
    assert wrapper.plugin.bank.filled.all() and wrapper.plugin.bank.filled.numel() == 18
    with torch.no_grad():
        torch.testing.assert_close(wrapper(some_images()), wrapper.host(some_images()), atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- what losses reach


@pytest.mark.parametrize(
    ("mapping", "prototypes_in", "unreached"),
    [
        ("none", "none", {"kl_visual", "local"}),
        ("full", "none", {"kl_visual", "local"}),
        ("full", "readout", set()),
        ("full", "sequence", set()),
        ("linear+linear", "sequence", set()),
        ("transformer+transformer", "readout", set()),
        ("transformer+linear", "sequence", set()),
    ],
)
def test_every_loss_reaches_a_trained_parameter_or_is_left_out_by_name(mapping, prototypes_in, unreached):
    wrapper = wrap(mapping=mapping, prototypes_in=prototypes_in, prototype_logits=False)
    output = train_a_little(wrapper, steps=1)
    assert wrapper.unreached == unreached
    assert output.keys() == {"loss", "logits", "cls", "gra", "reg_text", "kl_visual", "local"} - unreached
    wrapper.train()
    trained = [p for p in wrapper.parameters() if p.requires_grad]
    for name in output.keys() - {"logits"}:
        loss = wrapper(some_images(6, seed=9), torch.arange(6))[name]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name


def test_the_two_parts_of_the_level_loss_add_up_to_it():
    parts = {}
    for loss in ("gra", "gra_low", "gra_high"):
        wrapper = wrap(mapping="full", losses=(loss,)).train()
        output = wrapper(some_images(4), torch.arange(4))
        assert output.keys() == {"loss", "logits", "cls", loss} and not wrapper.unreached
        torch.testing.assert_close(output["loss"], output["cls"] + wrapper.config.lambda1 * output[loss])
        parts[loss] = output[loss]
    torch.testing.assert_close(parts["gra"], parts["gra_low"] + parts["gra_high"])
    assert parts["gra_low"] != parts["gra_high"]


@pytest.mark.parametrize("prototype_logits", [True, False])
@pytest.mark.parametrize("prototypes_in", ENTRIES)
@pytest.mark.parametrize("mapping", [m for m in MAPPINGS if m != "none"])
def test_every_parameter_of_every_mapping_is_trained(mapping, prototypes_in, prototype_logits):
    wrapper = wrap(mapping=mapping, prototypes_in=prototypes_in, prototype_logits=prototype_logits)
    before = state_of(wrapper.plugin.mapping)
    train_a_little(wrapper, steps=3, lr=0.5)
    after = wrapper.plugin.mapping.state_dict()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert not unchanged


def test_losses_that_are_switched_off_are_not_computed():
    output = train_a_little(wrap(mapping="full", losses=("reg_text",)), steps=1)
    assert output.keys() == {"loss", "logits", "cls", "reg_text"}
    output = train_a_little(wrap(mapping="full", lambda1=0.0, lambda3=0.0), steps=1)
    assert output.keys() == {"loss", "logits", "cls", "reg_text"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_where_the_tower_is_trained_the_gradient_passes_through_selection_into_early_blocks(activation):
    wrapper = wrap(mapping="none", activation=activation, select_block=-1)
    early = wrapper.stream.vision.transformer.resblocks[0].ln_1.weight.requires_grad_()
    wrapper.train()
    wrapper(some_images(6), torch.arange(6))["loss"].backward()
    assert early.grad.abs().sum() > 0 and torch.isfinite(early.grad).all()


# ------------------------------------------------------------------------------------------------------------ the bank


def test_the_bank_changes_in_training_and_never_in_evaluation():
    wrapper = wrap(preset="paper")
    train_a_little(wrapper, steps=1)
    bank = state_of(wrapper.plugin.bank)
    assert bank["filled"].all()
    with torch.no_grad():
        wrapper(some_images())
        wrapper(some_images(6), torch.arange(6))  # a loss on validation data
    assert same(state_of(wrapper.plugin.bank), bank)
    train_a_little(wrapper, steps=1, seed=7)
    assert not same(state_of(wrapper.plugin.bank), bank)


@pytest.mark.parametrize("labels", [[2] * 6, [0, 0, 1, 1, 1, 5], [3, 4, 3, 4, 3, 4]])
def test_batches_of_repeated_classes_train_under_the_papers_preset(labels):
    output = train_a_little(wrap(preset="paper"), labels=torch.tensor(labels))
    assert torch.isfinite(output["loss"])


def test_a_single_class_trains_and_predicts():
    wrapper = wrap(class_names=["red"], preset="paper")
    train_a_little(wrapper, labels=torch.zeros(6, dtype=torch.long))
    with torch.no_grad():
        assert wrapper(some_images()).argmax(-1).tolist() == [0] * 5


def held_out(n=3):
    return [(some_images(6, seed=70 + i), torch.arange(6)) for i in range(n)]


REMEMBERS = {"prototype_logits": True}


@pytest.mark.parametrize("options", [{"mapping": "full"}, {"stages": ((0, 12),), "select_block": 1}], ids=str)
def test_evidence_moves_the_logits_of_remembered_classes_alone(options):
    wrapper = wrap(**REMEMBERS, **options)
    assert wrapper.remember(held_out()) == 18
    names = ["sea shell", "someone new", "red"]
    other = wrap(coop_host(names), class_names=names, **REMEMBERS, **options)
    other.load_state_dict(wrapper.state_dict())
    other.eval()
    with torch.no_grad():
        other.plugin.memory.weight.zero_()
        before = other(some_images())
        other.plugin.memory.weight.fill_(5.0)
        other.refresh()
        changed = (other(some_images()) - before).abs().amax(0)
    assert changed[1] == 0 and changed[0] > 1e-3 and changed[2] > 1e-3


def test_a_class_without_shots_keeps_the_logits_of_its_text_and_all_are_finite():
    wrapper = wrap(**REMEMBERS).eval()
    with torch.no_grad():
        before = wrapper(some_images(6))
        wrapper.remember([(images[labels < 4], labels[labels < 4]) for images, labels in held_out()])
        memory = wrapper.plugin.memory
        memory.weight.fill_(1.0)
        memory.ensemble.zero_()
        memory.view, memory.image_offset, memory.text_offset = torch.eye(DIM), torch.zeros(DIM), torch.zeros(DIM)
        wrapper.refresh()
        after = wrapper(some_images(6))
    assert after.isfinite().all()
    torch.testing.assert_close(after[:, 4:], before[:, 4:])
    assert ((after - before)[:, :4].abs() > 1e-3).any()


@pytest.mark.parametrize("mapping", ["none", "full"])
def test_what_is_remembered_travels_with_the_state_and_leaves_the_modes_as_they_were(mapping):
    wrapper = wrap(mapping=mapping, **REMEMBERS)
    train_a_little(wrapper, steps=6, lr=0.01)
    wrapper.train()
    modes = [module.training for module in wrapper.modules()]
    wrapper.remember(held_out())
    assert [module.training for module in wrapper.modules()] == modes and wrapper.plugin.memory.choice is not None
    again = wrap(mapping=mapping, **REMEMBERS)
    again.load_state_dict(wrapper.state_dict())
    again.host.load_state_dict(wrapper.host.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(some_images()), wrapper.eval()(some_images()))


def test_shots_that_look_alike_within_a_class_are_told_apart():
    """Texts are random here: what is right is right by the memory."""
    labels = torch.arange(48) % 6
    looks = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    images = looks[labels] + 0.3 * some_images(48, seed=6)
    wrapper = wrap(**REMEMBERS).eval()
    assert wrapper.remember([(images, labels)]) == 48
    choice = wrapper.plugin.memory.choice
    assert choice.weight > 0 and choice.accuracy >= choice.host
    with torch.no_grad():
        assert torch.equal(wrapper(looks).argmax(1), torch.arange(6))


def test_no_class_is_learned_from_more_than_its_shots_and_a_second_memory_replaces_the_first():
    wrapper = wrap(match_shots=2, **REMEMBERS)
    assert wrapper.remember(held_out()) == 12 and wrapper.plugin.memory.counts.tolist() == [2] * 6
    assert wrapper.remember(held_out(1)) == 6 and wrapper.plugin.memory.counts.tolist() == [1] * 6


def test_nothing_is_learned_from_no_images_or_without_a_memory():
    wrapper = wrap(**REMEMBERS)
    assert wrapper.remember([]) == 0 and not wrapper.plugin.memory.is_ready
    assert wrap(prototype_logits=False).remember(held_out()) == 0


def test_training_does_not_see_the_evidence_of_its_own_images():
    wrapper = wrap(**REMEMBERS)
    train_a_little(wrapper, lr=0)
    wrapper.train()
    first = wrapper(some_images(6), torch.arange(6))["logits"]
    wrapper.remember(held_out())
    wrapper.plugin.memory.weight.fill_(3.0)
    assert torch.equal(wrapper(some_images(6), torch.arange(6))["logits"], first)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_templates_count_as_the_memory_weighed_them_and_their_absence_is_said(share):
    wrapper = wrap(**REMEMBERS).eval()
    texts = F.normalize(torch.randn(6, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
    wrapper.remember(held_out())
    wrapper.plugin.memory.ensemble.fill_(share)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrapper.refresh()
        without = wrapper(some_images())
        wrapper.adapter.set_templates(lambda: texts)
        wrapper.refresh()
        found = wrapper(some_images())
    assert torch.equal(found, without) == (share == 0)
    assert sum("set_templates" in str(each.message) for each in said) == (share > 0)


def test_a_state_holds_the_plugin_alone_and_loads_into_a_model_of_other_classes():
    wrapper = wrap(preset="paper")
    train_a_little(wrapper)
    file = io.BytesIO()
    torch.save(wrapper.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(name.startswith(("bank.", "mapping.")) for name in state)
    names = ["yellow", "sea shell", "nothing"]
    novel = wrap(coop_host(names), class_names=names, preset="paper")
    novel.load_state_dict(state)
    assert novel.plugin.bank.class_names == CLASS_NAMES and same(state_of(novel), state)
    with torch.no_grad():
        assert novel(some_images()).shape == (5, 3)


def test_a_state_of_another_mapping_or_width_is_one_clear_line():
    wrapper = wrap(mapping="full", prototypes_in="readout")
    for state in (wrap(mapping="linear+linear").state_dict(), {"mapping.trm.linear.weight": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="TRAINER.SPOTLIGHTER and MODEL.BACKBONE.NAME") as error:
            wrapper.load_state_dict(state)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("gone", ["mapping.heads", "mapping.groups", "mapping.blend", "mapping.match_weight"])
def test_a_checkpoint_of_version_0_1_is_one_clear_line(gone):
    wrapper = wrap(preset="default")
    with pytest.raises(ValueError, match=rf"Spotlighter 0.1 \(it has {gone}, see CHANGELOG.md\)") as error:
        wrapper.load_state_dict(wrapper.state_dict() | {gone: torch.zeros(2)})
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_gives_the_same_result_twice(preset):
    results = []
    for _ in range(2):
        wrapper = wrap(preset=preset)
        train_a_little(wrapper)
        with torch.no_grad():
            results.append((wrapper(some_images()), state_of(wrapper)))
    assert torch.equal(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("semantic", [True, False])
def test_an_images_logits_do_not_depend_on_the_batch_that_it_comes_in(activation, semantic):
    wrapper = wrap(activation=activation, semantic_activation=semantic)
    train_a_little(wrapper)
    images = some_images()
    with torch.no_grad():
        alone = torch.cat([wrapper(image[None]) for image in images])
        torch.testing.assert_close(wrapper(images), alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("levels", "kept"), [("1+2", 6), ("1", 3), ("2", 3)])
def test_a_level_alone_runs_on_its_half_of_the_tokens_in_one_pass(levels, kept):
    wrapper = wrap(levels=levels, semantic_activation=True, recalculate=True, fuse_dropped=False)
    train_a_little(wrapper)
    lengths = []
    wrapper.stream.block.attn.register_forward_pre_hook(lambda m, args: lengths.append(len(args[0])))
    with torch.no_grad():
        wrapper(some_images())
    assert lengths == [1 + kept] and wrapper.kept.shape == (5, kept)


@pytest.mark.parametrize("fuse", [False, True])
def test_blocks_run_on_what_the_cuts_before_them_left(fuse):
    wrapper, lengths = wrap(stages=((1, 9),), top_k=6, fuse_dropped=fuse), []
    for block in wrapper.stream.vision.transformer.resblocks:
        block.attn.register_forward_pre_hook(lambda m, args: lengths.append(len(args[0])))
    with torch.no_grad():
        wrapper(some_images())
    assert lengths == [1 + N_TOKENS, 1 + 9 + fuse, 1 + 6 + fuse]
    assert all(len(set(image.tolist())) == 6 and image.max() < N_TOKENS for image in wrapper.kept)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_with_several_cuts_every_loss_is_there_and_the_full_pass_sees_all_tokens(monkeypatch, preset):
    options = {"mapping": "full", "prototypes_in": "readout", "losses": LOSSES, "fuse_dropped": True}
    wrapper = wrap(preset=preset, stages=((0, 12), (1, 9)), **options)
    seen, project, whole = [], wrapper.adapter.project, Pass.whole
    monkeypatch.setattr(Pass, "whole", lambda tower: seen.append(whole(tower)) or seen[-1])
    losses = train_a_little(wrapper, steps=1)
    assert {"cls", "gra", "reg_text", "kl_visual"} <= losses.keys() and torch.isfinite(losses["loss"])
    with torch.no_grad():
        torch.testing.assert_close(project(seen[0]), wrapper.adapter.encode_image(some_images(6)))


def test_recalculation_with_the_updated_prototypes_changes_the_order_of_tokens():
    orders = []
    for recalculate in (True, False):
        wrapper = wrap(mapping="full", semantic_activation=True, recalculate=recalculate)
        train_a_little(wrapper, lr=0)
        orders.append(wrapper.kept)
    assert not torch.equal(*orders) and torch.equal(orders[0].sort(-1).values, orders[1].sort(-1).values)


def test_texts_are_encoded_once_per_evaluation_and_again_after_training():
    wrapper, calls = wrap(), []
    wrapper.host.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    wrapper.eval()
    with torch.no_grad():
        first = [wrapper(some_images()) for _ in range(3)][-1]
    assert len(calls) == 1
    train_a_little(wrapper, steps=2)
    calls.clear()
    with torch.no_grad():
        assert not torch.allclose([wrapper(some_images()) for _ in range(3)][-1], first)
        assert len(calls) == 1
        wrapper.host.prompt_learner.ctx.add_(1.0)
        wrapper.refresh()
        wrapper(some_images())
    assert len(calls) == 2


def test_projected_prototypes_are_those_of_the_present_bank_after_a_validation_loss():
    wrapper = wrap(mapping="full", semantic_activation=True)
    train_a_little(wrapper, steps=2)
    with torch.no_grad():
        first = wrapper(some_images())
        wrapper(some_images(6), torch.arange(6))
        assert torch.equal(wrapper(some_images()), first)


def test_blocks_before_s_run_once_and_a_frozen_tower_keeps_no_graph_before_the_first_trained_parameter():
    wrapper, runs = wrap(mapping="none", select_block=-1), []
    for index, block in enumerate(wrapper.stream.vision.transformer.resblocks):
        block.register_forward_hook(lambda m, a, out, i=index: runs.append((i, out.requires_grad)))
    train_a_little(wrapper, steps=1)
    assert [index for index, _ in runs if index < BLOCKS - 1] == list(range(BLOCKS - 1))
    assert not any(graph for _, graph in runs)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_host_in_half_precision_trains_and_predicts_nearly_as_in_single(preset, dtype):
    single = wrap(preset=preset)
    train_a_little(single, lr=0)
    half = wrap(preset=preset)
    half.load_state_dict(single.state_dict())
    half.host.to(dtype)
    for module in half.host.modules():  # as OpenAI does: LayerNorm stays float32
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    with torch.no_grad():
        logits, expected = half.eval()(some_images()), single(some_images())
    assert logits.dtype == torch.float32 and F.cosine_similarity(logits, expected).min() > 0.9
    half.train()
    loss = half(some_images(6), torch.arange(6))["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_trains_and_predicts_nearly_as_without(preset):
    wrapper = wrap(preset=preset)
    train_a_little(wrapper)
    with torch.no_grad():
        expected = wrapper(some_images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wrapper.refresh()
            logits = wrapper(some_images())
    assert logits.dtype == torch.float32 and F.cosine_similarity(logits, expected).min() > 0.9
    wrapper.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = wrapper(some_images(6), torch.arange(6))["loss"]
    loss.backward()
    assert torch.isfinite(loss)


def test_the_whole_pass_compiles_without_a_break_to_the_same_logits():
    wrapper = wrap(stages=((1, 9),), fuse_dropped=True)
    train_a_little(wrapper, lr=0)
    with torch.no_grad():
        expected = wrapper(some_images())
        compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")(some_images())
    torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_host_that_no_adapter_knows_is_told_what_was_looked_for():
    with pytest.raises(ValueError, match="no adapter recognises a Linear.*CoOp: prompt_learner.ctx") as error:
        adapter_for(torch.nn.Linear(2, 2))
    assert "\n" not in str(error.value)


def test_options_that_do_not_suit_the_tower_are_refused_before_anything_is_hooked():
    host = coop_host()
    for options in ({"top_k": N_TOKENS + 1}, {"select_block": BLOCKS}):
        with pytest.raises(ValueError, match="TRAINER.SPOTLIGHTER"):
            wrap(host, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


def test_a_resnet_host_is_refused_in_one_line():
    host = copy.copy(coop_host())
    host._modules = {**host._modules, "image_encoder": CLIP(32, 64, (1, 1, 1, 1), 16, None, 77, 9, 64, 1, 1).visual}
    with pytest.raises(ValueError, match="not a vision transformer"):
        SpotlighterWrapper(host, SpotlighterConfig())


def test_the_count_of_extra_parameters_is_that_of_what_is_trained():
    wrapper = wrap(mapping="linear+linear", prototypes_in="none")
    assert wrapper.extra_parameter_count() == sum(p.numel() for p in wrapper.trainable_parameters()) == 128 * 64 + 64
    assert wrap(preset="default").extra_parameter_count() == 0
