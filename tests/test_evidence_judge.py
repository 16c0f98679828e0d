"""Answers in their own halves and in one label space, and intervals that resample classes."""

import numpy as np
import pytest
import torch

from spotlighter_plugin.workbench.evidence.judge import (
    Answers,
    Exam,
    answers_of,
    figures,
    interval,
    resampled,
)


def exam(classes=20, scenes=10):
    return Exam(np.repeat(np.arange(classes), scenes), classes // 2)


def answers(right):
    return Answers(np.asarray(right, bool), np.asarray(right, bool))


def test_a_picture_is_judged_among_its_own_half_and_among_all():
    logits = torch.tensor([[1.0, 2.0, 9.0, 0.0], [9.0, 0.0, 1.0, 3.0], [0.0, 1.0, 2.0, 8.0]])
    result = answers_of(logits, torch.tensor([1, 3, 3]), known=2)
    assert result.own.tolist() == [True, True, True]
    assert result.one.tolist() == [False, False, True]


def test_figures_are_shares_of_each_half_and_their_harmonic_means():
    test = Exam(np.array([0, 0, 1, 1, 2, 2, 3, 3]), 2)
    own, one = np.array([1, 1, 1, 0, 1, 0, 0, 1], bool), np.array([1, 0, 0, 0, 0, 0, 0, 1], bool)
    result = figures(Answers(own, one), test)
    assert result["base"] == 75 and result["new"] == 50 and result["hm"] == pytest.approx(60)
    assert result["one_space_base"] == result["one_space_new"] == result["one_space_hm"] == 25


def test_resampling_is_around_the_figures_and_repeats_itself():
    rng, test = np.random.default_rng(0), exam()
    cell = answers(rng.random(len(test.labels)) < 0.6)
    drawn, again = (resampled([cell], [test], draws=400) for _ in range(2))
    for name, value in figures(cell, test).items():
        assert abs(drawn[name].mean() - value) < 2 and np.array_equal(drawn[name], again[name])


def test_intervals_are_wide_where_whole_classes_are_right_or_wrong():
    rng, test = np.random.default_rng(1), exam()
    scattered = answers(rng.random(len(test.labels)) < 0.5)
    by_class = answers((rng.random(20) < 0.5)[test.labels])
    spread = [resampled([cell], [test], draws=400)["base"].std() for cell in (scattered, by_class)]
    assert spread[1] > 2 * spread[0]
    independent = 100 * np.sqrt(0.25 / 100)  # of 100 scenes as if they had nothing in common
    assert spread[1] > 2 * independent


def test_seeds_and_domains_see_the_same_classes_in_a_draw():
    test, other = exam(), exam(scenes=6)
    easy = np.arange(20) % 2 == 0
    cells = [answers(easy[test.labels]), answers(easy[test.labels]), answers(easy[other.labels])]
    drawn = resampled(cells, [test, test, other], draws=300)["base"][:, :, None]
    assert np.array_equal(drawn[:, 0], drawn[:, 1]) and np.allclose(drawn[:, 0], drawn[:, 2])


def test_the_interval_of_a_difference_is_tight_where_methods_agree_picture_by_picture():
    rng, test = np.random.default_rng(2), exam()
    right = rng.random(len(test.labels)) < 0.5
    better = right.copy()
    better[rng.choice(len(right), 10, replace=False)] = True
    unpaired = answers(rng.permutation(right))
    drawn = resampled([answers(better), answers(right), unpaired], [test] * 3, draws=500)["hm"].T
    assert interval(drawn[1], drawn[1], 0.0) == (0.0, 0.0, 0.0)
    _, low, high = interval(drawn[0], drawn[1], 1.0)
    _, wide_low, wide_high = interval(drawn[0], drawn[2], 1.0)
    assert 0 <= low < high and wide_high - wide_low > 3 * (high - low)


def test_exams_of_other_classes_are_refused_in_one_line():
    with pytest.raises(ValueError, match="different classes") as error:
        resampled([answers(np.ones(200)), answers(np.ones(160))], [exam(20), exam(16)], draws=2)
    assert "\n" not in str(error.value)
