"""Few-shot heads against slow, literal float64 references, the bounds of their grids, and how answers are judged."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spotlighter_plugin.workbench.evidence.heads import HEADS, POINTS, RIDGE, Texts, class_statistics, megabytes
from spotlighter_plugin.workbench.evidence.judge import (
    Answers,
    Exam,
    answers_of,
    figures,
    interval,
    resampled,
)

CLASSES, KNOWN, WIDTH, SCALE = 5, 3, 6, 12.0


@pytest.fixture(scope="module")
def scene():
    g = torch.Generator().manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g), dim=-1)  # noqa: E731
    texts = Texts(unit(CLASSES, WIDTH), unit(CLASSES, WIDTH), unit(CLASSES, WIDTH), SCALE)
    labels = torch.arange(KNOWN).repeat_interleave(7)
    shots = F.normalize(texts.host[labels] + 0.8 * unit(len(labels), WIDTH), dim=-1)
    queries = F.normalize(texts.host[torch.arange(10) % CLASSES] + 0.8 * unit(10, WIDTH), dim=-1)
    return texts, shots, labels, queries


def numbers(*tensors):
    return [tensor.double().numpy() for tensor in tensors]


def run(name, scene, **setting):
    texts, shots, labels, queries = scene
    state = HEADS[name].fit(shots, labels, texts, KNOWN, **setting)
    return HEADS[name].logits(state, queries, texts).double().numpy()


def blended(scene, score, weight):
    """The texts' logits and, in the known columns, centred scores in units of the texts' own spread on the shots."""
    texts, shots, labels, queries = scene
    host, shots, queries = numbers(texts.host, shots, queries)
    centre = lambda rows: np.array([row - np.mean(row) for row in rows])  # noqa: E731
    mine = centre([[score(x, c) for c in range(KNOWN)] for x in shots])
    theirs = centre([[SCALE * x @ host[c] for c in range(KNOWN)] for x in shots])
    unit = theirs.std(ddof=1) / mine.std(ddof=1)
    logits = np.array([[SCALE * x @ t for t in host] for x in queries])
    logits[:, :KNOWN] += weight * unit * centre([[score(x, c) for c in range(KNOWN)] for x in queries])
    return logits


def covariance_within(shots, labels, shrink):
    spread = np.zeros((WIDTH, WIDTH))
    for x, y in zip(shots, labels, strict=True):
        off = x - shots[labels == y].mean(0)
        spread += np.outer(off, off) / len(shots)
    floor = RIDGE * np.mean([(x - shots.mean(0)) ** 2 for x in shots])
    return (1 - shrink) * spread + (shrink * np.trace(spread) / WIDTH + floor) * np.eye(WIDTH)


def test_the_cache_is_tip_adapters(scene):
    shots, labels = scene[1].double().numpy(), scene[2].numpy()
    score = lambda x, c: sum(np.exp(-4 * (1 - x @ k)) for k in shots[labels == c])  # noqa: E731
    assert np.allclose(run("cache", scene, sharpness=4.0, weight=0.7), blended(scene, score, 0.7), atol=1e-4)


def test_the_whitened_cache_measures_by_the_spread_within_classes(scene):
    shots, labels = scene[1].double().numpy(), scene[2].numpy()
    variance, axes = np.linalg.eigh(covariance_within(shots, labels, 0.2))
    view = axes @ np.diag(variance**-0.5) @ axes.T

    def seen(x):
        y = view @ (x - shots.mean(0))
        return y / np.linalg.norm(y)

    score = lambda x, c: sum(np.exp(-4 * (1 - seen(x) @ seen(k))) for k in shots[labels == c])  # noqa: E731
    ours = run("whitened cache", scene, sharpness=4.0, shrink=0.2, weight=0.7)
    assert np.allclose(ours, blended(scene, score, 0.7), atol=1e-3)


def test_the_gaussian_classifier_is_the_linear_discriminant(scene):
    shots, labels = scene[1].double().numpy(), scene[2].numpy()
    inverse = np.linalg.inv(covariance_within(shots, labels, 0.3))
    means = [shots[labels == c].mean(0) for c in range(KNOWN)]
    score = lambda x, c: -0.5 * (x - means[c]) @ inverse @ (x - means[c])  # noqa: E731  (what classes share is centred away)
    offset = lambda x, c: score(x, c) + 0.5 * x @ inverse @ x  # noqa: E731
    assert np.allclose(
        run("Gaussian classifier", scene, shrink=0.3, weight=0.7), blended(scene, offset, 0.7), atol=1e-3
    )


def test_kernel_ridge_learns_what_the_texts_leave_unsaid(scene):
    texts, shots, labels, _ = scene
    host, shots = numbers(texts.host, shots)
    left = np.zeros((len(shots), KNOWN))
    for i, x in enumerate(shots):
        said = np.exp([SCALE * x @ host[c] for c in range(KNOWN)])
        left[i] = np.eye(KNOWN)[labels[i]] - said / said.sum()
    kernel = np.array([[np.exp(-3 * (1 - a @ b)) for b in shots] for a in shots])
    values = np.linalg.inv(kernel + 0.5 * np.eye(len(shots))) @ left
    score = lambda x, c: sum(np.exp(-3 * (1 - x @ k)) * v[c] for k, v in zip(shots, values, strict=True))  # noqa: E731
    ours = run("kernel ridge", scene, sharpness=3.0, ridge=0.5, weight=0.7)
    assert np.allclose(ours, blended(scene, score, 0.7), atol=1e-3)


def descended(loss, start, steps=6000, rate=0.05):
    """Where a loss is least, by plain descent in float64."""
    weight = start.clone().requires_grad_()
    search = torch.optim.Adam([weight], rate)
    for step in range(steps):
        search.param_groups[0]["lr"] = rate * (1 - step / steps)
        search.zero_grad()
        loss(weight).backward()
        search.step()
    return weight.detach()


def test_the_text_residual_is_least_where_a_slow_descent_ends(scene):
    texts, shots, labels, queries = scene
    host, x = texts.host.double(), shots.double()

    def loss(w):
        moved = torch.stack([F.normalize(t + w @ t, dim=0) for t in host[:KNOWN]])
        return F.cross_entropy(SCALE * x @ moved.T, labels) + 0.01 * (w**2).sum()

    w = descended(loss, torch.zeros(WIDTH, WIDTH).double(), 1500)
    moved = torch.stack([F.normalize(t + w @ t, dim=0) for t in host])
    expected = SCALE * queries.double() @ moved.T
    assert np.allclose(run("text residual", scene, decay=0.01), expected.numpy(), atol=0.05)


def test_the_linear_probe_is_least_where_a_slow_descent_ends(scene):
    _, shots, labels, queries = scene
    x = torch.cat([SCALE * shots.double(), torch.ones(len(shots), 1).double()], 1)
    loss = lambda w: F.cross_entropy(x @ w.T, labels) + 0.01 * (w[:, :-1] ** 2).sum()  # noqa: E731
    w = descended(loss, torch.zeros(KNOWN, WIDTH + 1).double(), 1500)
    expected = (SCALE * queries.double() @ w[:, :-1].T + w[:, -1]).log_softmax(1)
    ours = torch.from_numpy(run("linear probe", scene, decay=0.01)).log_softmax(1)
    assert torch.allclose(ours, expected, atol=0.05)


def test_a_blend_of_texts_goes_from_the_host_to_the_templates(scene):
    texts, _, _, queries = scene
    host, ensemble, x = numbers(texts.host, texts.ensemble, queries)
    halfway = [(h + e) / np.linalg.norm(h + e) for h, e in zip(host, ensemble, strict=True)]
    assert np.allclose(run("templates", scene, share=0.5), SCALE * x @ np.array(halfway).T, atol=1e-4)
    assert np.allclose(run("templates", scene, share=0.0), SCALE * x @ host.T, atol=1e-4)


def test_every_tuned_head_has_a_grid_of_one_size_that_starts_at_the_host_or_near_it(scene):
    tuned = {name: head for name, head in HEADS.items() if head.grid != ({},)}
    assert len(tuned) == 7
    for name, head in tuned.items():
        assert len(head.grid) == POINTS and len({str(setting) for setting in head.grid}) == POINTS
        if name != "linear probe":
            host = HEADS["host"].logits({}, scene[3], scene[0]).double().numpy()
            assert np.abs(run(name, scene, **head.grid[0]) - host).max() < 0.5


def test_new_classes_keep_the_texts_logits_beside_a_memory(scene):
    host = HEADS["host"].logits({}, scene[3], scene[0]).numpy()
    for name in ("cache", "whitened cache", "Gaussian classifier", "kernel ridge"):
        strong = run(name, scene, **HEADS[name].grid[-1])
        assert np.allclose(strong[:, KNOWN:], host[:, KNOWN:], atol=1e-5)
        assert not np.allclose(strong[:, :KNOWN], host[:, :KNOWN], atol=0.5)


def test_one_shot_of_a_class_and_none_of_another_give_finite_answers(scene):
    texts, shots, labels, queries = scene
    few = (labels < 2).nonzero().flatten()[[0, 7]]  # one of class 0, one of class 1, none of class 2
    for name, head in HEADS.items():
        state = head.fit(shots[few], labels[few], texts, KNOWN, **head.grid[-1])
        assert head.logits(state, queries, texts).isfinite().all(), name


def test_class_statistics_of_equal_shots_are_round_and_positive():
    shots = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    means, covariance = class_statistics(shots, torch.tensor([0, 0, 1]), 2, 0.1)
    assert torch.equal(means, torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double())
    assert covariance[0, 0] == covariance[1, 1] > 0 and covariance[0, 1] == 0


def test_what_a_head_keeps_is_counted_in_megabytes():
    assert megabytes({"keys": torch.zeros(1000, 250), "weight": torch.zeros(())}) == pytest.approx(1.000004)


# ------------------------------------------------------------------------------------------------------------- judging


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
