"""What is trained: how many parameters, that each path starts at the host; and the losses at their edges, whose values
against a reference are in test_equations.py."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_kit import DIM, HEADS, MAPPINGS, WIDTH, random_clip

from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.method import losses
from spotlighter_plugin.method.layout import layout_of
from spotlighter_plugin.method.mapping import DenseText, FactoredText, Mapping


def mapping(name, width=WIDTH, dim=DIM, heads=HEADS, prototypes_in="sequence", **options):
    torch.manual_seed(0)
    return Mapping(SpotlighterConfig(mapping=name, prototypes_in=prototypes_in, **options), width, dim, heads)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_full_adds_about_two_and_a_half_million_parameters_on_vit_b_16():
    assert 2.5e6 < count(mapping("full", 768, 512, 12)) < 2.7e6


def test_selection_and_memory_alone_add_no_parameter():
    assert count(mapping("none")) == 0


@pytest.mark.parametrize("name", MAPPINGS)
def test_texts_start_at_the_hosts(name):
    text, tokens = F.normalize(torch.randn(5, DIM), dim=-1), F.normalize(torch.randn(3, 4, DIM), dim=-1)
    image = F.normalize(torch.randn(3, DIM), dim=-1)
    made = mapping(name)
    rep = made.text(text, tokens, 10.0)
    torch.testing.assert_close(rep.cosine(image), image @ text.T, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rep.mean(), text, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MAPPINGS if name != "none"])
def test_refined_prototypes_are_read_out_with_weight_zero_at_first(name):
    made = mapping(name)
    assert made.readout_weight == 0
    refined = made.irm(torch.randn(3, 2, WIDTH), torch.randn(4, 2, WIDTH), layout_of(random_clip().visual), 0)
    assert refined.shape == (3, 2, WIDTH)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 999))
def test_factored_texts_are_the_same_as_texts_written_out(batch, classes, k, seed):
    generator = torch.Generator().manual_seed(seed)
    base, mix = torch.randn(classes, 7, generator=generator), torch.randn(batch, k, 7, generator=generator)
    weights = torch.rand(batch, classes, k, generator=generator)
    image = torch.randn(batch, 7, generator=generator)
    factored, dense = FactoredText(base, mix, weights), DenseText(base + weights @ mix)
    torch.testing.assert_close(factored.cosine(image), dense.cosine(image), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(factored.mean(), dense.mean(), atol=1e-4, rtol=1e-3)


def test_nothing_as_large_as_images_times_classes_times_width_is_formed():
    batch, classes, k = 8, 300, 4
    made = mapping("full", prototypes_in="none")
    text, tokens = F.normalize(torch.randn(classes, DIM), dim=-1), F.normalize(torch.randn(batch, k, DIM), dim=-1)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        rep = made.text(text, tokens, 10.0)
        (rep.cosine(tokens[:, 0]).sum() + rep.mean().sum()).backward()
    assert max(sizes) < batch * classes * DIM / 3


# --------------------------------------------------------------------------------------------------------------- losses


def units(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_images_of_classes_that_the_bank_does_not_know_do_not_count():
    affinity, rows = torch.randn(4, 3), torch.tensor([1, -1, 2, -1])
    kept = losses.local_loss(affinity[[0, 2]], rows[[0, 2]], 5.0)
    torch.testing.assert_close(losses.local_loss(affinity, rows, 5.0), kept)
    assert losses.local_loss(affinity, torch.full((4,), -1), 5.0) == 0


def test_classes_without_prototypes_neither_gain_nor_spoil_the_gradient():
    affinity = torch.randn(2, 3, requires_grad=True)
    with_empty = torch.cat([affinity, torch.full((2, 1), -torch.inf)], 1)
    losses.local_loss(with_empty, torch.tensor([0, 2]), 5.0).backward()
    assert torch.isfinite(affinity.grad).all() and affinity.grad.abs().sum() > 0


def test_divergence_and_regularisation_vanish_where_nothing_has_moved():
    image, text = units(3, 8), units(5, 8)
    assert losses.visual_divergence(image, image, text, 20.0).abs() < 1e-6
    assert losses.text_regularisation(text, text) == 0


def test_the_divergence_sends_gradient_to_the_kept_tokens_alone():
    image, full, text = (units(*shape).requires_grad_() for shape in ((3, 8), (3, 8), (5, 8)))
    losses.visual_divergence(image, full, text, 20.0).backward()
    assert image.grad.abs().sum() > 0 and full.grad is None and text.grad is None
