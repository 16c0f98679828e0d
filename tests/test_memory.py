"""The memory of shots: literal values, absent classes, the shortlist, and what calibration chooses."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlighter_plugin.method import memory as match

NAMES, M, W = ["ant", "bee", "cat", "doe", "elk"], 3, 4
ROWS = torch.tensor([3, 0, 0, 1, 3, 0, 4])  # nothing of "cat"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def described(n, m=M, seed=0):
    return match.describe(random(n, m, W, seed=seed), random(n, W, seed=seed + 1))


def memory(m=M):
    shots = match.ShotMemory(NAMES, m, W)
    shots.remember(described(len(ROWS), m), ROWS)
    return shots


def unit(x):
    x = x.double()
    return x / x.norm()


@pytest.mark.parametrize("m", [0, M])
def test_a_token_is_described_beside_its_images_cls_and_cls_alone_without_tokens(m):
    tokens, cls = random(2, m, W), random(2, W, seed=1)
    found = match.describe(tokens, cls)
    assert found.shape == (2, max(m, 1), 2 * W if m else W)
    for b in range(2):
        for i in range(max(m, 1)):
            literal = torch.cat([unit(tokens[b, i]), 0.5 * unit(cls[b])]) if m else unit(cls[b])
            torch.testing.assert_close(found[b, i].double(), literal, atol=1e-6, rtol=1e-5)


def test_seen_through_the_view_differences_within_a_class_are_alike_in_every_direction():
    scale = torch.tensor([5.0, 1.0, 0.2, 1.0])
    rows = torch.arange(40).repeat_interleave(50)
    x = random(40, 4, seed=2)[rows] + random(len(rows), 4, seed=3) * scale
    centre, view = match.discriminating_view(x, rows)
    torch.testing.assert_close(centre, x.mean(0))
    seen = (x - centre) @ view
    within = seen - torch.stack([seen[rows == c].mean(0) for c in range(40)])[rows]
    spread = within.square().mean(0).sqrt()
    plain = (scale.square() / (scale.square() + match.RIDGE * scale.square().mean())).sqrt()
    torch.testing.assert_close(spread, plain, atol=0.05, rtol=0.05)


def test_how_the_parts_of_an_image_differ_is_not_taken_for_how_images_of_a_class_do():
    rows = torch.arange(20).repeat_interleave(30)
    part = torch.tensor([[5.0, 0, 0, 0], [-5.0, 0, 0, 0]])  # of each image alike
    noise = random(len(rows), 1, 4, seed=4) * torch.tensor([0.0, 5.0, 0.0, 1.0])  # of each image its own
    shots = match.ShotMemory([str(c) for c in range(20)], 2, 2)
    shots.remember(part + noise + random(20, 1, 4, seed=5)[rows], rows)
    told_apart = shots.view.norm(dim=1)
    assert told_apart[0] > 3 * told_apart[1]


@pytest.mark.parametrize("m", [0, M])
def test_what_is_written_is_found_again_under_its_class_and_nowhere_else(m):
    shots = memory(m)
    keys = shots.look(described(len(ROWS), m))
    for row, name in enumerate(NAMES):
        own = [key for key, r in zip(keys, ROWS.tolist(), strict=True) if r == row]
        assert shots.filled[row].sum() == len(own), name
        for v, key in enumerate(own):
            torch.testing.assert_close(shots.keys[row, v].float(), key, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("many", [len(NAMES) - 1, len(NAMES)])
@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("shortlist", [2, 32])
def test_the_match_is_the_mean_vote_of_each_tokens_best_key_among_the_most_alike_classes(
    monkeypatch, chunk, shortlist, many
):
    monkeypatch.setattr(match, "MANY", many)
    monkeypatch.setattr(match, "ON_CPU", chunk)
    monkeypatch.setattr(match, "SHORTLIST", shortlist)
    shots = memory()
    queries = shots.look(described(6, seed=5))
    cosines, classes = match.resemblance(queries, shots.keys, shots.filled, shots.coarse)
    found = match.votes(cosines, classes, 3.0, len(NAMES))
    keys = shots.keys.double()
    images = {c: [unit(keys[c, v].mean(0)) for v in range(n)] for c, n in enumerate(shots.filled.sum(1).tolist()) if n}
    if many < len(NAMES):
        images = {c: [unit(sum(own))] for c, own in images.items()}
    for b, query in enumerate(queries.double()):
        alike = {c: max(float(unit(query.mean(0)) @ image) for image in own) for c, own in images.items()}
        listed = sorted(alike, key=alike.get, reverse=True)[:shortlist]
        vote = {
            c: sum(
                math.exp(-3 * (1 - max(float(q @ k) for v in range(int(shots.filled[c].sum())) for k in keys[c, v])))
                for q in query
            )
            / M
            for c in listed
        }
        size = min(shortlist, len(NAMES))  # a class without images may be on the list; it votes nothing
        mean = sum(vote.values()) / size
        literal = torch.tensor([max(vote.get(c, 0.0) - mean, 0.0) for c in range(len(NAMES))])
        torch.testing.assert_close(found[b], literal, atol=2e-3, rtol=1e-2)


def test_a_memory_loads_into_one_of_other_classes_whole():
    shots, file = memory(), io.BytesIO()
    torch.save(shots.state_dict(), file)
    file.seek(0)
    other = match.ShotMemory(["yak", "elk"], M, W)
    assert not other.is_ready
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.class_names == NAMES and other.rows.tolist() == [-1, 4] and other.is_ready
    saved = shots.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in other.state_dict().items())
    assert torch.equal(other.coarse, shots.coarse)


DAMAGED = {"keys": (5, 3, M, 9), "centre": (3,), "view": (8, 7), "filled": (5, 2), "names": (3,)}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_memory_of_another_shape_is_one_line_before_anything_is_asked_of_it(name):
    state = memory().state_dict()
    state[name] = torch.full(DAMAGED[name], 97, dtype=state[name].dtype)
    with pytest.raises(ValueError, match=r"the checkpoint's memory") as error:
        match.ShotMemory(NAMES, M, W).load_state_dict(state)
    assert "\n" not in str(error.value)


def test_a_memory_of_other_descriptions_is_refused_with_the_options_to_set():
    with pytest.raises(ValueError, match="MATCH_TOKENS.*BACKBONE"):
        match.ShotMemory(NAMES, M + 1, W).load_state_dict(memory().state_dict())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_the_place_in_its_class_counts_the_images_of_that_class_before(rows):
    assert match.place_in_class(torch.tensor(rows)).tolist() == [rows[:i].count(r) for i, r in enumerate(rows)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_the_chosen_match_is_never_worse_than_none_and_its_accuracy_is_the_one_claimed(seed):
    logits, labels = random(20, 4, seed=seed), torch.arange(20) % 4
    matches = [F.relu(random(20, 4, seed=seed + i)) for i in range(len(match.SHARPNESSES))]
    sharpness, weight, accuracy = match.choose(logits, labels, matches)
    total = logits + weight * matches[match.SHARPNESSES.index(sharpness)]
    assert total.argmax(1).eq(labels).float().mean().item() == pytest.approx(accuracy)
    assert accuracy >= logits.argmax(1).eq(labels).float().mean().item()


def test_of_equally_good_matches_the_lightest_is_taken():
    logits, labels, good = torch.eye(3), torch.arange(3), [torch.eye(3)] * len(match.SHARPNESSES)
    assert match.choose(logits, labels, good)[1] == 0.0  # nothing to win
    assert match.choose(torch.zeros(3, 3), labels, good)[:2] == (match.SHARPNESSES[0], match.WEIGHTS[1])


def test_a_memory_is_written_where_half_does_nothing(monkeypatch):
    before = memory().keys
    monkeypatch.setattr(torch.Tensor, "half", lambda self: self)  # as in a fork without a GPU
    assert memory().keys.dtype == torch.half
    assert torch.equal(memory().keys, before)


def test_without_labels_the_best_class_stands_out_a_quarter_as_far_by_the_match_as_by_the_texts():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 3.0, 0.0]])  # stand out by 6 and 2: 4 on average
    found = torch.tensor([[0.0, 0.3, 0.0], [0.9, 0.0, 0.0]])  # by 0.2 and 0.6
    assert match.unjudged(logits, found) == pytest.approx(10 / 4)
    assert match.unjudged(logits, torch.zeros(2, 3)) == 0.0  # nothing resembles
