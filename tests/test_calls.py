"""What belongs to one call stays with it: threads, replicas, the host beside the wrapper, what is kept between; and
what a steady batch is made of."""

import os
import threading

import pytest
import torch
from method_kit import CLASS_NAMES, DIM, coop_host, random_clip, some_images, train_a_little, wrap
from torch.nn.parallel import replicate

from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.hosts.promptkd import PromptKDAdapter
from spotlighter_plugin.workbench.speed.stopwatch import Traffic
from spotlighter_plugin.wrapper import SpotlighterWrapper

SHOTS = [(some_images(6, seed=30), torch.arange(6))]


CALLS = int(os.environ.get("SPOTLIGHTER_CALLS", 192))


def in_threads(works, times=CALLS // 16):
    """What each of the works answers, every one in a thread of its own, all at once and again and again."""
    answers, start = [[] for _ in works], threading.Barrier(len(works))

    def run(work, found):
        start.wait()
        for _ in range(times):
            with torch.no_grad():
                found.append(work())

    threads = [threading.Thread(target=run, args=pair) for pair in zip(works, answers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("options", [{"preset": "default"}, {"preset": "paper"}, {"stages": ((0, 12), (1, 9))}])
def test_sixteen_threads_on_one_wrapper_with_the_host_beside_it_get_what_one_alone_gets_bit_for_bit(options):
    wrapper = wrap(**options)
    train_a_little(wrapper)
    wrapper.remember(SHOTS)
    batches = [some_images(1 + i % 4, seed=i) for i in range(14)]
    works = [lambda images=images: wrapper(images) for images in batches]
    works += [lambda images=images: wrapper.host(images) for images in batches[:2]]
    with torch.no_grad():
        alone = [work() for work in works]
    for expected, found in zip(alone, in_threads(works), strict=True):
        assert all(torch.equal(each, expected) for each in found)


def test_threads_that_take_the_losses_of_batches_of_their_own_get_them():
    wrapper = wrap(preset="paper")
    train_a_little(wrapper)
    batches = [(some_images(3, seed=i), torch.arange(3) + i % 3) for i in range(6)]
    works = [lambda images=x, labels=y: wrapper(images, labels)["loss"] for x, y in batches]
    with torch.no_grad():
        alone = [work() for work in works]
    for expected, found in zip(alone, in_threads(works, times=5), strict=True):
        torch.testing.assert_close(torch.stack(found), expected.expand(5))


def test_threads_get_the_labels_that_promptkds_teacher_gives_their_own_images():
    teacher = lambda images: images.mean((2, 3)) @ torch.eye(3)  # noqa: E731
    teacher.tokenized_prompts = torch.zeros(3, 77)
    adapter = PromptKDAdapter(torch.nn.Identity(), teacher=teacher)
    batches = [some_images(4, seed=i) for i in range(8)]
    works = [lambda images=images: adapter.assignment_labels(images, None) for images in batches]
    for images, found in zip(batches, in_threads(works, times=200), strict=True):
        assert all(torch.equal(each, teacher(images).argmax(1)) for each in found)


def test_two_wrappers_around_one_host_select_each_for_itself():
    host = coop_host()
    few, many = wrap(host, top_k=3), wrap(host, top_k=9, select_block=1)
    with torch.no_grad():
        answers = few(some_images()), many(some_images())
        assert few.kept.shape == (5, 3) and many.kept.shape == (5, 9)
        few.detach()
        assert torch.equal(many(some_images()), answers[1])


def test_a_pass_that_failed_leaves_nothing_behind_for_the_next():
    wrapper = wrap(preset="paper")
    with torch.no_grad():
        expected, host = wrapper(some_images()), wrapper.host(some_images())
        with pytest.raises(RuntimeError):
            wrapper(torch.zeros(2, 3, 8, 8))
        assert torch.equal(wrapper(some_images()), expected) and torch.equal(wrapper.host(some_images()), host)


def replicas_of(model, monkeypatch, number=2):
    """What DataParallel makes of a model on several GPUs, here all on the CPU."""
    module = __import__("sys").modules["torch.nn.parallel.replicate"]
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return replicate(model, list(range(number)), detach=True)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_replicas_of_data_parallel_run_their_own_towers_and_do_not_meet(monkeypatch, preset):
    wrapper = wrap(preset=preset)
    train_a_little(wrapper)
    wrapper.remember(SHOTS)
    images = some_images()
    with torch.no_grad():
        expected = wrapper(images)
        first, second = replicas_of(wrapper, monkeypatch)
        block = second.host.image_encoder.transformer.resblocks[2]
        block.mlp.c_proj.bias[::2] += 3.0  # of the copy alone
        changed = second(images)
        assert not torch.allclose(changed, expected)
        works = [lambda: first(images), lambda: wrapper(images), lambda: second(images)]
        for answer, found in zip([expected, expected, changed], in_threads(works), strict=True):
            torch.testing.assert_close(torch.stack(found), answer.expand(len(found), -1, -1))


# ---------------------------------------------------------------------------------------------- kept between the calls


def counted(wrapper):
    calls = []
    wrapper.host.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_texts_are_encoded_once_in_evaluation_with_and_without_gradients():
    wrapper = wrap().eval()
    calls = counted(wrapper)
    for _ in range(3):
        wrapper(some_images())
        with torch.no_grad():
            wrapper(some_images())
        with torch.inference_mode():
            wrapper(some_images())
    assert len(calls) == 1


def test_a_first_call_under_autocast_leaves_nothing_for_calls_in_single_precision():
    plain, mixed = wrap(preset="paper").eval(), wrap(preset="paper").eval()
    with torch.no_grad():
        expected = plain(some_images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = mixed(some_images())
        assert not torch.equal(low, expected) and torch.equal(mixed(some_images()), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(mixed(some_images()), low)


def test_a_first_call_in_inference_mode_leaves_nothing_that_gradients_cannot_pass():
    wrapper = wrap(preset="paper", losses=()).eval()
    with torch.inference_mode():
        wrapper(some_images())
    images = some_images().requires_grad_()
    wrapper(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_texts_follow_the_hosts_parameters_without_a_word_to_the_wrapper():
    wrapper, other = wrap().eval(), coop_host()
    torch.nn.init.normal_(other.prompt_learner.ctx)
    with torch.no_grad():
        first = wrapper(some_images())
        wrapper.host.load_state_dict(other.state_dict())
        second = wrapper(some_images())
        assert not torch.allclose(first, second)
        torch.testing.assert_close(second, wrap(other).eval()(some_images()))
        wrapper.host.prompt_learner.ctx.data = torch.zeros_like(other.prompt_learner.ctx)
        assert not torch.allclose(wrapper(some_images()), second)


def test_a_loss_in_evaluation_mode_still_reaches_the_prompts():
    wrapper = wrap().eval()
    wrapper(some_images())  # keeps texts without a graph
    wrapper(some_images(6), torch.arange(6))["loss"].backward()
    assert wrapper.host.prompt_learner.ctx.grad.abs().sum() > 0


def test_what_is_remembered_in_inference_mode_can_be_trained_with():
    wrapper = wrap(prototype_logits=True, losses=())
    with torch.inference_mode():
        images, labels = some_images(6, seed=30), torch.arange(6)
        assert wrapper.remember([(images, labels)]) == 6
    images = some_images().requires_grad_()
    wrapper.plugin.memory.weight.fill_(3.0)
    wrapper.eval()(images).sum().backward()
    assert images.grad.abs().sum() > 0
    train_a_little(wrapper)
    assert not any(buffer.is_inference() for buffer in wrapper.plugin.buffers())


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_a_detached_wrapper_says_so_in_one_line():
    wrapper = wrap()
    wrapper.detach()
    for call in (lambda: wrapper(some_images()), lambda: wrapper.predict(some_images())):
        with pytest.raises(RuntimeError, match="detached from its host: make a new SpotlighterWrapper") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_where_nothing_is_trained_the_loss_is_still_a_tensor(preset):
    wrapper = wrap(preset=preset, mapping="none")
    wrapper.host.requires_grad_(False)
    output = wrapper.train()(some_images(6), torch.arange(6))
    assert torch.equal(output["loss"], output["cls"]) and output["loss"] > 0 and "cls" in wrapper.unreached
    with torch.no_grad():
        assert wrapper(some_images(6), torch.arange(6))["loss"] > 0


@pytest.mark.parametrize("names", ["tree frog", b"tree frog", ["red", None], ["red", 3]])
def test_what_is_no_list_of_names_is_one_line(names):
    with pytest.raises(ValueError, match="class_names.*one per class") as error:
        SpotlighterWrapper(random_clip(), SpotlighterConfig(top_k=4), class_names=names)
    assert "\n" not in str(error.value)


def test_any_iterable_of_names_is_taken_once():
    wrapper = SpotlighterWrapper(random_clip(), SpotlighterConfig(top_k=4), class_names=(n for n in CLASS_NAMES))
    assert wrapper.class_names == wrapper.adapter.class_names == CLASS_NAMES
    assert wrapper.plugin.memory.class_names == CLASS_NAMES and wrapper.adapter.encode_text().shape == (6, DIM)


def test_names_that_are_not_as_many_as_the_hosts_classes_are_one_line():
    with pytest.raises(ValueError, match="class_names has 2 names and the host 6 classes"):
        SpotlighterWrapper(coop_host(), SpotlighterConfig(top_k=4), class_names=["red", "green"])


def test_options_that_do_nothing_are_named_once_where_the_host_is_wrapped():
    with pytest.warns(UserWarning, match=r"SPOTLIGHTER.ALPHA, .*LAMBDA1: nothing reads it") as said:
        wrap(preset="default", alpha=0.5, lambda1=0.1, prototypes=None)
    assert len(said) == 1 and "\n" not in str(said[0].message)


# ------------------------------------------------------------------------------------------------------- a steady batch


PLACED = {"top_k": None, "select_block": None, "prototypes": None}
WAYS = {
    "default": {"preset": "default", **PLACED},
    "three quarters of the operations": {"preset": "default", "share": 0.75, **PLACED},
    "two cuts": {"stages": ((1, 9),), "fuse_dropped": True},
    "merged, then cut": {"merge": 3, "select_block": 2, "top_k": 5, "fuse_dropped": True},
    "merged alone": {"merge": 3, "select_block": 2, "top_k": 16},
    "random tokens": {"activation": "random"},
    "paper": {"preset": "paper", "top_k": 6},
}


def steady(options, precision="fp32"):
    wrapper = wrap(coop_host(precision=precision), **options)
    train_a_little(wrapper, lr=0)
    wrapper.remember([(some_images(6), torch.arange(6))])
    with torch.no_grad():
        return wrapper, wrapper(some_images())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_no_operator_of_a_steady_batch_waits_for_the_device(options, precision):
    wrapper, expected = steady(options, precision)
    with torch.no_grad(), Traffic() as traffic:
        logits = wrapper(some_images())
    assert traffic.waits == [] and torch.equal(logits, expected)
    with Traffic() as traffic:
        torch.ones(3)[torch.ones(3, dtype=torch.bool)].sum().item()
    assert len(traffic.waits) == 2  # they would be noticed


def test_operators_are_counted_with_what_they_move_and_views_are_free():
    a, b = torch.ones(3, 5), torch.ones(4, 5, dtype=torch.bfloat16)
    with Traffic() as traffic:
        (a @ b.t().float()).view(2, 6)[0].add_(1)
        torch.empty(10)
        a[:1].expand(7, 5) * 2
    assert traffic.operators == 4
    assert traffic.float32 == 4 * (20 + (15 + 20 + 12) + (6 + 6) + (5 + 35))
    assert traffic.moved == traffic.float32 + 2 * 20


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_after_prepare_the_first_batch_asks_for_what_every_batch_does_in_half_precision(precision):
    wrapper, _ = steady(WAYS["default"], precision)
    asked = []
    for prepare in (False, True):
        wrapper.refresh()
        if prepare:
            wrapper.prepare()
        for _ in range(2):
            with torch.no_grad(), Traffic() as traffic:
                wrapper(some_images())
            asked.append((traffic.operators, traffic.moved))
    first, later, prepared, last = asked
    assert first > later == prepared == last
    with torch.no_grad(), Traffic() as host:
        wrapper.host(some_images())
    assert traffic.float32 / traffic.moved < 1.5 * host.float32 / host.moved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["default", "merged, then cut"])
def test_a_prepared_wrapper_is_one_graph_from_the_first_call_on(name, precision):
    wrapper = wrap(coop_host(precision=precision), **{"prototype_logits": True, **WAYS[name]}).eval()
    wrapper.remember([(some_images(18), torch.arange(18) % 6)])
    wrapper.prepare()
    compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(some_images()), wrapper(some_images()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["two cuts", "merged, then cut"])
def test_a_steady_batch_is_one_graph_with_gradients_enabled_around(name):
    wrapper, expected = steady(WAYS[name])
    compiled = torch.compile(wrapper.requires_grad_(False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(some_images()), expected, atol=1e-4, rtol=1e-4)
