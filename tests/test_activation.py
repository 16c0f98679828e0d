"""Selection: the k best tokens, ties, standardised scores, levels, and random tokens that repeat."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from method_kit import N_TOKENS, WIDTH, random_clip

from spotlighter_plugin.method.activation import (
    attention_score,
    image_keys,
    match_category,
    random_score,
    split_levels,
    standardise,
    top_tokens,
)
from spotlighter_plugin.method.layout import layout_of

score_tables = st.integers(1, 4).flatmap(
    lambda batch: st.integers(2, 12).flatmap(
        lambda tokens: st.lists(
            st.lists(st.integers(-2, 2).map(float), min_size=tokens, max_size=tokens), min_size=batch, max_size=batch
        )
    )
)


@settings(deadline=None, max_examples=60)
@given(score_tables, st.data())
def test_the_k_highest_scores_are_kept_and_of_equal_ones_the_lower_index(table, data):
    scores = torch.tensor(table)
    k = data.draw(st.integers(2, scores.shape[1]))
    for row, kept in zip(table, top_tokens(scores, k).tolist(), strict=True):
        assert kept == sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@settings(deadline=None, max_examples=60)
@given(score_tables)
def test_keeping_every_token_keeps_each_exactly_once(table):
    scores = torch.tensor(table)
    kept = top_tokens(scores, scores.shape[1])
    assert torch.equal(kept.sort(-1).values, torch.arange(scores.shape[1]).expand_as(kept))


@settings(deadline=None, max_examples=60)
@example([[1.0, 1.0, 1.0]], 1.0, 1.9239154578105775)  # their mean is not quite their value
@given(score_tables, st.floats(0.5, 3), st.floats(-5, 5))
def test_standardised_scores_do_not_depend_on_offset_and_unit_and_equal_scores_give_zeros(table, unit, offset):
    scores = torch.tensor(table)
    result = standardise(scores)
    torch.testing.assert_close(standardise(scores * unit + offset), result, atol=2e-3, rtol=2e-3)
    spread = result.square().mean(-1)
    for row, value in zip(table, spread.tolist(), strict=True):
        assert value == pytest.approx(0 if len(set(row)) == 1 else 1, abs=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 11), st.integers(1, 3))
def test_the_two_levels_are_all_tokens_in_order_and_neither_is_empty(k, batch):
    kept = torch.stack([torch.randperm(20)[:k] for _ in range(batch)])
    upper, lower = split_levels(kept, "1"), split_levels(kept, "2")
    assert torch.equal(torch.cat([upper, lower], 1), split_levels(kept, "1+2"))
    assert upper.shape[1] - lower.shape[1] in (0, 1) and lower.shape[1] >= 1


def test_random_tokens_of_an_image_are_the_same_in_every_batch_and_differ_between_images_and_seeds():
    images = torch.randn(4, 3, 8, 8)
    scores = random_score(image_keys(images), 50, seed=3)
    alone = torch.cat([random_score(image_keys(image[None]), 50, seed=3) for image in images])
    assert torch.equal(scores, alone)
    assert len({tuple(top_tokens(scores, 5)[i].tolist()) for i in range(4)}) == 4
    assert not torch.equal(scores, random_score(image_keys(images), 50, seed=4))


def test_random_tokens_are_spread_evenly_over_the_positions():
    scores = random_score(torch.arange(4000) * 7919, 16)
    counts = top_tokens(scores, 4).flatten().bincount(minlength=16)
    assert counts.float().std() / counts.float().mean() < 0.06  # binomial: 0.03
    assert scores.min() >= 0 and scores.max() < 1 and abs(scores.mean() - 0.5) < 0.01


def test_with_one_class_that_class_is_matched_and_classes_without_prototypes_never_are():
    prototypes = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=-1)
    cls = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    assert match_category(cls, prototypes[:1], torch.ones(1, 2, dtype=torch.bool)).tolist() == [0] * 5
    filled = torch.tensor([[False, False], [True, False], [False, False], [False, True]])
    assert set(match_category(cls, prototypes, filled).tolist()) <= {1, 3}


def test_host_prompts_behind_the_tokens_take_attention_but_are_never_candidates():
    layout, hidden = layout_of(random_clip().visual), torch.randn(1 + N_TOKENS + 4, 2, WIDTH)

    def of_patches(hidden):
        return attention_score(hidden, layout.gaze(0))[:, 1 : 1 + N_TOKENS].sum(-1)

    assert (of_patches(hidden) < of_patches(hidden[: 1 + N_TOKENS])).all()
