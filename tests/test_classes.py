"""Which row is whose: the same list goes by position, another one by the n-th of a name."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_kit import coop_host, some_images, wrap

from spotlighter_plugin.method.classes import NamedClasses, rows_of

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
