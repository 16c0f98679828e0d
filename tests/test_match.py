"""The match with the bank: literal values, absent classes, chunks, and what calibration chooses."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlighter_plugin import match

B, K, C, P, D = 3, 4, 5, 2, 6
FILLED = torch.tensor([[True, True], [True, False], [False, False], [True, True], [False, True]])


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def literal(values):
    """Around its mean over the classes that exist; 0 for the others."""
    mean = sum(v for v in values if v is not None) / sum(v is not None for v in values)
    return [0.0 if v is None else v - mean for v in values]


def test_the_images_match_is_the_mean_vote_of_the_prototypes_that_exist():
    image, prototypes = units(B, D), units(C, P, D, seed=1)
    for b, row in enumerate(match.image_match(image, prototypes, FILLED, 4.0)):
        values = []
        for c in range(C):
            votes = [
                math.exp(-4.0 * (1 - float(image[b].double() @ prototypes[c, p].double())))
                for p in range(P)
                if FILLED[c, p]
            ]
            values.append(sum(votes) / len(votes) if votes else None)
        torch.testing.assert_close(row, torch.tensor(literal(values)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_the_tokens_match_is_the_mean_of_each_tokens_best_prototype_in_chunks_or_not(monkeypatch, chunk):
    monkeypatch.setattr(match, "CHUNK", chunk)
    tokens, prototypes = units(B, K, D), units(C, P, D, seed=1)
    for b, row in enumerate(match.token_match(tokens, prototypes, FILLED, 4.0)):
        values = []
        for c in range(C):
            best = [
                max(
                    math.exp(-4.0 * (1 - float(tokens[b, i].double() @ prototypes[c, p].double())))
                    for p in range(P)
                    if FILLED[c, p]
                )
                for i in range(K)
                if FILLED[c].any()
            ]
            values.append(sum(best) / K if best else None)
        torch.testing.assert_close(row, torch.tensor(literal(values)), atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_the_chosen_match_is_never_worse_than_none_and_its_accuracy_is_the_one_claimed(seed, with_image, with_tokens):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(20, 4, generator=generator), torch.randint(4, (20,), generator=generator)
    part = lambda used: [torch.randn(20, 4, generator=generator) for _ in match.SHARPNESSES] if used else []  # noqa: E731
    image, tokens = part(with_image), part(with_tokens)
    weight, shape, accuracy = match.choose(logits, labels, image, tokens)
    total = logits.clone()
    for at, parts in ((0, image), (2, tokens)):
        if shape[at]:
            total += weight * shape[at + 1] * parts[match.SHARPNESSES.index(shape[at].item())]
    assert total.argmax(1).eq(labels).float().mean().item() == pytest.approx(accuracy)
    assert accuracy >= logits.argmax(1).eq(labels).float().mean().item()
    assert with_image or with_tokens or weight == 0


def test_of_equally_good_matches_the_lightest_is_taken():
    logits, labels = torch.eye(3), torch.arange(3)
    good = [torch.eye(3)] * len(match.SHARPNESSES)
    assert match.choose(logits, labels, good, [])[0] == 0.0  # nothing to win
    assert match.choose(torch.zeros(3, 3), labels, good, [])[0] == match.WEIGHTS[1]
