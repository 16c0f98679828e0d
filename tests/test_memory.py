"""The memory of classes: evidence against its literal definition, absent classes, and what weighing may choose."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlighter_plugin.method import memory
from spotlighter_plugin.method.memory import ClassMemory, fit, folded, statistics, weigh

NAMES, D = ["ant", "bee", "cat", "doe", "elk"], 4
ROWS = torch.tensor([3, 0, 0, 1, 3, 0, 4, 4, 1, 1, 4])  # nothing of "cat"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def images_of(centres, shots, noise, seed=0):
    """Images around class centres (C, d): (C·shots, d) unit length, and their classes."""
    rows = torch.arange(len(centres)).repeat_interleave(shots)
    return F.normalize(centres[rows] + noise * random(len(rows), centres.shape[1], seed=seed), dim=-1), rows


def remembered(rows=ROWS, names=NAMES, judged=True):
    kept = ClassMemory(names, D)
    texts = unit(len(names), D, seed=1), unit(len(names), D, seed=2)
    kept.remember(unit(len(rows), D), rows, *texts, 20.0, judged=judged)
    return kept


def log_normal(x, mean, variance):
    each = zip(x, mean, variance, strict=True)
    return sum(-0.5 * math.log(2 * math.pi * v) - (a - m) ** 2 / (2 * v) for a, m, v in each)


def test_evidence_is_how_much_likelier_an_image_is_in_the_class_than_in_one_that_nobody_has_shown():
    classes = fit(statistics(unit(len(ROWS), D), ROWS, len(NAMES)))
    queries = unit(3, D, seed=5)
    found = memory.evidence_of(queries, classes, *folded(classes))
    for i, query in enumerate(queries.double()):
        u = ((query - classes.centre.double()) @ classes.metric.double()).tolist()
        for c, n in enumerate(classes.counts.tolist()):
            spread = classes.spread.double().tolist()
            mean = [n * s / (n * s + 1) * m for s, m in zip(spread, classes.means[c].double().tolist(), strict=True)]
            shown = log_normal(u, mean, [1 + s / (n * s + 1) for s in spread])
            expected = shown - log_normal(u, [0] * D, [1 + s for s in spread])
            assert found[i, c].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert found[:, NAMES.index("cat")].abs().max() < 1e-6


def test_in_the_metric_images_of_a_class_differ_alike_in_all_directions_and_means_are_uncorrelated():
    images, rows = images_of(random(40, D), 30, 0.4)
    shots = statistics(images, rows, 40)
    literal = torch.zeros(D, D, dtype=torch.float64)
    for c in range(40):
        mine = images[rows == c].double()
        literal += (mine - mine.mean(0)).T @ (mine - mine.mean(0))
    assert torch.allclose(shots.within.double(), literal / (len(rows) - 40), atol=1e-6)
    classes = fit(shots)
    within = classes.metric.T @ shots.within @ classes.metric
    assert (within - torch.eye(D)).abs().max() < 0.05  # all but the little that is shrunk
    between = classes.means.T @ classes.means / 39
    assert torch.allclose(between.diagonal() - 1 / 30, classes.spread, rtol=0.15)
    assert (between - between.diagonal().diag()).abs().max() < 0.1 * between.max()


def test_an_unfamiliar_image_gets_no_evidence_and_a_familiar_one_for_its_own_class():
    centres = F.normalize(random(6, 32), dim=-1)
    images, rows = images_of(centres[:4], 16, 0.1)
    classes = fit(statistics(images, rows, 4))
    queries, labels = images_of(centres, 8, 0.1, seed=3)
    evidence = memory.evidence_of(queries, classes, *folded(classes))
    known = labels < 4
    assert (evidence[known].argmax(1) == labels[known]).all()
    assert (evidence[known].amax(1) > 0).float().mean() > 0.9
    assert (evidence[~known] < 0).all()


def test_classes_without_shots_keep_the_logits_of_their_texts():
    kept = remembered()
    logits, image = random(2, 5, seed=7), unit(2, D, seed=8)
    kept.weight.fill_(0.3)
    added = kept.add_to(logits, image, kept.evidence()) - logits
    assert added[:, 2].abs().max() == 0 and (added[:, [0, 1, 3, 4]].abs() > 0).all()


def test_evidence_has_its_closed_weight_where_every_class_was_shown_and_the_other_beside_unknown_ones():
    kept = remembered()
    kept.weight = torch.tensor([0.25, 1.0])
    file = kept.state_dict()
    closed = ClassMemory([NAMES[c] for c in (0, 1, 3, 4)], D)
    closed.load_state_dict(file)
    for mine, theirs in zip(kept.evidence(), closed.evidence(), strict=True):
        assert torch.allclose(4 * mine[..., [0, 1, 3, 4]], theirs) and theirs.abs().max() > 0


def test_a_memory_loads_into_a_model_of_other_classes_by_name():
    kept = remembered()
    kept.weight.fill_(0.5)
    file = io.BytesIO()
    torch.save(kept.state_dict(), file)
    file.seek(0)
    other = ClassMemory(["yak", "elk", "ant"], D)
    other.load_state_dict(torch.load(file, weights_only=True))
    image, texts = unit(3, D, seed=9), unit(3, D, seed=10)
    assert other.is_ready and other.uses_templates == kept.uses_templates
    mine, theirs = (m.add_to(torch.zeros(3, n), image, m.evidence()) for m, n in ((kept, 5), (other, 3)))
    assert torch.equal(theirs[:, 0], torch.zeros(3)) and torch.allclose(theirs[:, 1:], mine[:, [4, 0]], atol=1e-6)
    assert torch.equal(kept.cosine(image, kept.texts(texts, texts)), other.cosine(image, other.texts(texts, texts)))


def test_a_thousand_classes_of_a_vit_b_16_take_at_most_10_mb():
    state = ClassMemory([str(c) for c in range(1000)], 512).state_dict()
    assert sum(v.numel() * v.element_size() for v in state.values()) < 10e6


def test_a_memory_of_single_shots_or_of_another_width_is_refused_in_one_line():
    kept = remembered()
    with pytest.raises(ValueError, match="remember them anew"):
        kept.load_state_dict({"keys": torch.zeros(5, 1, 1, 8)}, strict=False)
    with pytest.raises(ValueError, match="0 wide, 4 out, .* 0 wide, 6 out: set MODEL.BACKBONE.NAME"):
        ClassMemory(NAMES, 6).load_state_dict(kept.state_dict())


def test_weighing_finds_that_images_know_more_than_vague_texts_and_adds_nothing_to_right_ones():
    centres = F.normalize(random(12, 32), dim=-1)
    images, rows = images_of(centres, 8, 0.12)
    vague = F.normalize(centres + 0.3 * random(12, 32, seed=4), dim=-1)
    found = weigh(images, rows, vague, None, 20.0)
    assert found.weight > 0 and found.accuracy > found.host + 0.05 and "left out" in found.describe()
    alike = images_of(centres, 8, 0.02)
    right = weigh(*alike, centres, None, 20.0)
    assert right.host == 1 and right.weight == right.closed == 0
    better = weigh(images, rows, vague, centres, 20.0)
    assert better.ensemble > 0 and better.accuracy > found.accuracy


@given(st.integers(2, 9), st.integers(3, 6), st.floats(0.01, 2.0), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_a_choice_is_never_worse_than_the_host_on_what_was_left_out(n_classes, shots, noise, seed):
    images, rows = images_of(unit(n_classes, 8, seed=seed), shots, noise, seed)
    found = weigh(images, rows, unit(n_classes, 8, seed=seed + 1), None, 10.0)
    assert found.accuracy >= found.host or found.host != found.host


@pytest.mark.parametrize(
    "rows, judged, why",
    [
        (torch.arange(5), True, "fewer than three shots"),
        (torch.zeros(4, dtype=torch.long), True, "one class"),
        (ROWS, False, "guessed labels"),
    ],
)
def test_what_cannot_be_judged_gets_a_fixed_weight_and_says_why(rows, judged, why):
    kept = remembered(rows, judged=judged)
    one_shot, closed = rows.bincount().max() == 1, memory.UNJUDGED if judged else memory.GUESSED
    assert kept.weight.tolist() == pytest.approx([memory.UNJUDGED / (4 if one_shot else 1), closed])
    assert why in kept.choice.describe()
    logits = kept.add_to(torch.zeros(2, 5), unit(2, D, seed=3), kept.evidence())
    assert logits.isfinite().all()


def test_many_more_shots_of_one_class_than_of_others_leave_everything_finite():
    rows = torch.cat([torch.zeros(60, dtype=torch.long), torch.tensor([1, 2, 2, 3, 4])])
    kept = remembered(rows)
    assert all(value.isfinite().all() for value in kept.state_dict().values() if value.is_floating_point())
    assert kept.add_to(torch.zeros(2, 5), unit(2, D, seed=3), kept.evidence()).isfinite().all()
