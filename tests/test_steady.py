"""A steady batch: nothing in it waits for the device, and all of it is one graph."""

import pytest
import torch
from method_kit import some_images, train_a_little, wrap
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")
WAYS = {
    "two cuts": {"stages": ((1, 9),), "fuse_dropped": True},
    "merged, then cut": {"merge": 3, "select_block": 2, "top_k": 5, "fuse_dropped": True},
    "merged alone": {"merge": 3, "select_block": 2, "top_k": 16},
    "random tokens": {"activation": "random"},
    "paper": {"preset": "paper", "top_k": 6},
}


class Waits(TorchDispatchMode):
    """Notes operators whose result has to reach the host before it can go on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.startswith(WAITS) or by_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def steady(options):
    wrapper = wrap(**options)
    train_a_little(wrapper, lr=0)
    wrapper.remember([(some_images(6), torch.arange(6))])
    with torch.no_grad():
        return wrapper, wrapper(some_images())


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_no_operator_of_a_steady_batch_waits_for_the_device(options):
    wrapper, expected = steady(options)
    with torch.no_grad(), Waits() as waits:
        logits = wrapper(some_images())
    assert waits.seen == [] and torch.equal(logits, expected)
    with Waits() as waits:
        torch.ones(3)[torch.ones(3, dtype=torch.bool)].sum().item()
    assert len(waits.seen) >= 2  # they would be noticed


def test_a_prepared_wrapper_is_one_graph_from_the_first_call_on():
    wrapper = wrap(prototype_logits=True, **WAYS["merged, then cut"]).eval()
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
