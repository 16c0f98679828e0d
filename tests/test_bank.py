"""The Semantic Memory Bank: filling, updating, and travelling between sets of classes; which row is whose."""

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_kit import coop_host, some_images, wrap

from spotlighter_plugin.method.bank import SemanticMemoryBank, affinity, assign
from spotlighter_plugin.method.classes import NamedClasses, rows_of

W = 5


def project(hidden):
    return F.normalize(hidden.float(), dim=-1)


def updated(bank, hidden, rows, beta=0.8):
    bank.update(hidden, project(hidden), torch.tensor(rows), beta, project)
    return bank


def tokens(batch, k, seed=0):
    return torch.randn(batch, k, W, generator=torch.Generator().manual_seed(seed))


def test_a_classs_first_image_fills_its_prototypes_with_its_most_activated_tokens():
    hidden = tokens(2, 6)
    bank = updated(SemanticMemoryBank(["a", "b", "c"], 3, W), hidden, [1, 1], beta=1.0)
    assert torch.equal(bank.prototypes[1], hidden[0, :3])
    assert bank.filled.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert not bank.is_empty


def test_prototypes_that_one_image_could_not_fill_are_filled_by_the_next():
    bank = SemanticMemoryBank(["a"], 3, W)
    first, second = tokens(1, 2), tokens(1, 2, seed=1)
    updated(bank, first, [0], beta=1.0)
    assert bank.filled.tolist() == [[True, True, False]]
    updated(bank, second, [0], beta=1.0)
    assert bank.filled.all() and torch.equal(bank.prototypes[0], torch.cat([first[0], second[0, :1]]))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=6), st.integers(2, 5), st.integers(1, 4), st.integers(0, 99))
def test_only_classes_in_the_batch_change_and_prototypes_stay_within_their_tokens(rows, k, n_prototypes, seed):
    bank = SemanticMemoryBank(list("abcd"), n_prototypes, W)
    for step in range(3):
        before = bank.prototypes.clone()
        updated(bank, tokens(len(rows), k, seed + step), rows)
        for row in range(4):
            if row not in rows:
                assert step == 0 or torch.equal(bank.prototypes[row], before[row])
                assert not bank.filled[row].any()
    assert bank.is_empty == (set(rows) == {-1})
    largest = max(tokens(len(rows), k, seed + step).abs().max() for step in range(3))
    assert torch.isfinite(bank.prototypes).all() and bank.prototypes.abs().max() <= largest + 1e-5


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.integers(0, 99))
def test_the_order_of_images_does_not_matter_once_prototypes_exist(order, seed):
    rows = [0, 1, 0, 0, 1]
    start = updated(SemanticMemoryBank(["a", "b"], 2, W), tokens(2, 4, seed), [0, 1]).state_dict()
    results = []
    for permutation in (list(range(5)), list(order)):
        bank = SemanticMemoryBank(["a", "b"], 2, W)
        bank.load_state_dict(start)
        updated(bank, tokens(5, 4, seed + 1)[permutation], [rows[i] for i in permutation])
        results.append(bank.prototypes)
    torch.testing.assert_close(*results)


def test_a_class_without_prototypes_assigns_nothing():
    degree, _ = assign(project(tokens(1, 4)), project(tokens(1, 2)), torch.zeros(1, 2, dtype=torch.bool))
    assert torch.equal(degree, torch.zeros(1, 4))


def test_an_update_of_a_bank_keeps_no_graph():
    hidden = tokens(1, 4).requires_grad_()
    bank = updated(SemanticMemoryBank(["a"], 2, W), hidden, [0])
    assert not bank.prototypes.requires_grad


def test_a_bank_loaded_into_a_model_with_other_classes_stays_whole_with_its_names():
    bank = updated(SemanticMemoryBank(["sea shell", "жук", "c"], 2, W), tokens(2, 4), [0, 1])
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = SemanticMemoryBank(["x"], 7, W)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.class_names == ["sea shell", "жук", "c"] and not other.is_empty
    assert torch.equal(other.prototypes, bank.prototypes) and torch.equal(other.filled, bank.filled)
    assert other.rows.tolist() == [-1] and not other.knows_any


def test_a_bank_of_another_width_is_one_clear_line():
    state = SemanticMemoryBank(["a"], 2, W + 1).state_dict()
    with pytest.raises(ValueError, match=rf"is {W + 1} wide and this vision tower {W}") as error:
        SemanticMemoryBank(["a"], 2, W).load_state_dict(state)
    assert "\n" not in str(error.value)


def test_classes_without_prototypes_match_nothing():
    filled = torch.tensor([[True, False], [False, False]])
    match = affinity(project(tokens(3, 4)), project(tokens(2, 2, seed=1)), filled)
    assert (match[:, 1] == -torch.inf).all() and torch.isfinite(match[:, 0]).all()


def test_images_of_one_batch_fill_prototypes_one_after_the_other():
    bank = SemanticMemoryBank(["a", "b"], 3, W)
    hidden = tokens(4, 2)
    bank.update(hidden, project(hidden), torch.tensor([0, 1, 0, -1]), 1.0, project)
    expected = torch.stack([hidden[0, 0], hidden[0, 1], hidden[2, 0]])
    torch.testing.assert_close(bank.prototypes[0], expected)  # the first image's tokens, then the next one's best
    torch.testing.assert_close(bank.prototypes[1, :2], hidden[1])
    assert bank.filled.tolist() == [[True] * 3, [True, True, False]]


# --------------------------------------------------------------------------------------------------- which row is whose


TWICE = ["sunglasses", "tree frog", "sunglasses", "Tree_Frog", "missile", "missile"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "A", "b_c", "b c"]), min_size=1, max_size=9))
def test_the_same_list_goes_by_position_whatever_names_it_repeats(names):
    assert rows_of(names, names) == list(range(len(names)))


def test_of_another_list_the_nth_of_a_name_is_the_nth_of_that_name():
    assert rows_of(TWICE, ["missile", "owl", "sunglasses", "missile", "Sunglasses", "missile"]) == [4, -1, 0, 5, 2, -1]


def test_names_are_the_same_where_their_prompts_are():
    assert rows_of(["Tree_Frog", "sea  shell"], ["sea shell", "tree frog"]) == [1, 0]


def test_names_stay_one_per_class_whatever_is_in_them():
    kept = NamedClasses(["two\nlines", "жук", "plain"])
    assert kept.class_names == ["two lines", "жук", "plain"] and kept.rows.tolist() == [0, 1, 2]


def test_two_classes_of_one_name_are_each_told_by_their_own_shots():
    """All six texts may be alike: what tells the classes apart is the memory."""
    labels = torch.arange(24) % 6
    looks = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    images = looks[labels] + 0.1 * some_images(24, seed=6)
    wrapper = wrap(coop_host(TWICE), TWICE, prototype_logits=True).eval()
    wrapper.remember([(images, labels)])
    wrapper.plugin.memory.weight.fill_(1e4)
    loaded = wrap(coop_host(TWICE), TWICE, prototype_logits=True).eval()
    loaded.load_state_dict(wrapper.state_dict())
    part = ["missile", "sunglasses", "missile"]
    some = wrap(coop_host(part), part, prototype_logits=True).eval()
    some.load_state_dict(wrapper.state_dict())
    with torch.no_grad():
        assert torch.equal(wrapper(looks).argmax(1), torch.arange(6))
        assert torch.equal(loaded(looks).argmax(1), torch.arange(6))
        assert some(looks[[4, 0, 5]]).argmax(1).tolist() == [0, 1, 2]


def test_prototypes_of_two_classes_of_one_name_are_two():
    wrapper = wrap(coop_host(TWICE), TWICE, preset="paper")
    wrapper.train()(some_images(6), torch.arange(6))
    prototypes = F.normalize(wrapper.plugin.bank.prototypes.mean(1), dim=-1)
    assert not torch.allclose(prototypes[0], prototypes[2]) and not torch.allclose(prototypes[4], prototypes[5])
