"""Losses at their edges; their values against a reference are in test_equations.py."""

import torch
import torch.nn.functional as F

from spotlighter_plugin.method import losses


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
