"""A saved wrapper comes back without its training data, and names the classes of pictures."""

import json

import pytest
import torch
from method_kit import CLASS_NAMES, coop_host, some_images, train_a_little, wrap

from spotlighter_plugin import SpotlighterWrapper

SHOTS = [(some_images(6, seed=30), torch.arange(6))]


def trained(**options):
    wrapper = wrap(**options)
    train_a_little(wrapper)
    wrapper.remember(SHOTS)
    return wrapper.eval()


@pytest.mark.parametrize(
    "options",
    [{"preset": "default"}, {"preset": "paper"}, {"mapping": "none", "losses": (), "prototype_logits": False}],
    ids=["default", "paper", "nothing to save"],
)
def test_a_saved_wrapper_answers_bit_for_bit_as_before(tmp_path, options):
    wrapper = trained(**options)
    wrapper.save_pretrained(tmp_path / "made" / "here")
    loaded = SpotlighterWrapper.from_pretrained(tmp_path / "made" / "here", wrapper.host)
    assert loaded.config == wrapper.config and loaded.class_names == CLASS_NAMES and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(some_images()), wrapper(some_images()))
    assert sorted(path.name for path in (tmp_path / "made/here").iterdir()) == ["config.json", "model.safetensors"]


def test_a_saved_wrapper_comes_back_around_a_host_of_other_classes(tmp_path):
    trained(preset="default").save_pretrained(tmp_path)
    names = ["yellow", "someone new", "red"]
    loaded = SpotlighterWrapper.from_pretrained(tmp_path, coop_host(names), class_names=names)
    assert loaded.class_names == names and loaded.plugin.memory.rows.tolist() == [3, -1, 0]
    assert loaded(some_images()).shape == (5, 3)


def test_saving_again_replaces_what_was_there_and_an_interrupted_one_leaves_it(tmp_path, monkeypatch):
    first, second = trained(preset="default"), trained(preset="default", top_k=4)
    first.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("spotlighter_plugin.pretrained.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            second.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    second.save_pretrained(tmp_path)
    assert SpotlighterWrapper.from_pretrained(tmp_path, second.host).config.top_k == 4


def broken(tmp_path, name, content):
    trained(preset="default").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"config": {"no_such_option": 1}, "class_names": []}'),
        ("config.json", b'{"config": {"top_k": "many"}, "class_names": ["a"]}'),
        ("config.json", b"\xff\xfe"),
        ("config.json", json.dumps({"config": {"losses": []}, "class_names": CLASS_NAMES[:2]}).encode()),
        ("config.json", json.dumps({"config": {}, "class_names": "red"}).encode()),
        ("model.safetensors", b"no tensors"),
        ("model.safetensors", b""),
    ],
)
def test_a_damaged_file_is_one_line_and_the_host_stays_unhooked(tmp_path, name, content):
    broken(tmp_path, name, content)
    host = coop_host()
    with pytest.raises(ValueError) as error:
        SpotlighterWrapper.from_pretrained(tmp_path, host)
    assert "\n" not in str(error.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


def test_a_folder_without_a_saved_wrapper_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json: save_pretrained writes it"):
        SpotlighterWrapper.from_pretrained(tmp_path, coop_host())


# -------------------------------------------------------------------------------------------------------------- predict


def test_predictions_are_the_names_and_probabilities_of_the_logits():
    wrapper = trained(preset="default")
    images = some_images()
    with torch.no_grad():
        expected = wrapper(images).softmax(-1)
    names, probabilities = wrapper.predict(images)
    assert names == [CLASS_NAMES[c] for c in expected.argmax(-1).tolist()]
    assert torch.equal(probabilities, expected.amax(-1))
    names, probabilities = wrapper.predict(images, top_k=6)
    assert all(sorted(row) == sorted(CLASS_NAMES) for row in names) and probabilities.shape == (5, 6)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    assert (probabilities.diff(dim=1) <= 0).all() and not probabilities.requires_grad


def test_predicting_in_mid_training_is_evaluation_and_training_goes_on():
    wrapper = trained(preset="default")
    expected = wrapper.predict(some_images())
    wrapper.train()
    found = wrapper.predict(some_images())
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert wrapper.training and wrapper.plugin.training and wrapper.host.training


@pytest.mark.parametrize("top_k", [0, 7])
def test_more_classes_than_there_are_is_one_line(top_k):
    with pytest.raises(ValueError, match=f"top_k = {top_k}: take 1 to 6"):
        wrap().predict(some_images(), top_k=top_k)
