"""The fifteen data sets of the paper, on miniatures of their true layouts."""

import json
import os
import pathlib
import pickle
import random
import shutil
from collections import Counter

import miniatures
import pytest
import yaml
from miniatures import BUILDERS, VARIANTS, config
from PIL import Image

import datasets.common
from datasets.benchmarks import DATASET_REGISTRY
from datasets.common import Datum
from datasets.templates import TEMPLATES

TRAINABLE = [name for name in BUILDERS if name not in VARIANTS]
SPLIT_MADE_HERE = [name for name in TRAINABLE if name not in ("ImageNet", "FGVCAircraft")]
CLASS_NAMES = {
    "ImageNet": [f"great thing {i}" for i in range(5)],
    "Caltech101": ["face", "leopard", "accordion", "airplane", "yin_yang"],
    "OxfordPets": ["abyssinian", "american_bulldog", "bengal", "great_pyrenees", "sphynx"],
    "StanfordCars": [
        "2000 AM General Hummer SUV",
        "2012 Acura RL Sedan",
        "2007 Audi S4 Sedan",
        "2007 BMW X5 SUV",
        "2012 Fiat 500",
    ],
    "OxfordFlowers": miniatures.FLOWERS,
    "Food101": sorted(miniatures.FOOD),
    "FGVCAircraft": miniatures.AIRCRAFT,
    "SUN397": ["abbey", "indoor apse", "shop bakery", "outdoor church", "zen_garden"],
    "DescribableTextures": miniatures.DTD,
    "EuroSAT": ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road", "Sea or Lake"],
    "UCF101": ["Apply_Eye_Makeup", "Archery", "Baby_Crawling", "Boxing_Punching_Bag", "Yo_Yo"],
    "ImageNetV2": [f"great thing {i}" for i in range(1000)],
    "ImageNetSketch": [f"great thing {i}" for i in range(5)],
    "ImageNetA": [f"great thing {i}" for i in range(3, 8)],
    "ImageNetR": [f"great thing {i}" for i in range(6, 11)],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One folder with all fifteen; tests that write use a copy."""
    root = tmp_path_factory.mktemp("data")
    for build in BUILDERS.values():
        build(root)
    return root


@pytest.fixture
def textures(tmp_path):
    miniatures.dtd(tmp_path)
    return tmp_path


def load(name, *args, **kwargs):
    return DATASET_REGISTRY.get(name)(config(*args, **kwargs))


def content(items):
    return [(item.impath, item.label, item.classname) for item in items]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_true_layout_loads_with_upstreams_class_names(name, built):
    dataset = load(name, built)
    assert dataset.classnames == CLASS_NAMES[name]
    for split in (dataset.train_x, dataset.val or [], dataset.test):
        assert all(CLASS_NAMES[name][item.label] == item.classname for item in split)
        assert all(Image.open(item.impath).size == (32, 32) for item in split[:3])
    if name not in VARIANTS and name != "ImageNet":
        parts = [{item.impath for item in split} for split in (dataset.train_x, dataset.val, dataset.test)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


@pytest.mark.parametrize("name", TRAINABLE)
def test_base_and_new_are_the_two_halves_of_the_labels_each_from_zero(name, built):
    everything, base, new = (load(name, built, subsample=part) for part in ("all", "base", "new"))
    assert base.classnames == CLASS_NAMES[name][:3] and new.classnames == CLASS_NAMES[name][3:]
    assert len(base.test) + len(new.test) == len(everything.test)
    assert all(new.classnames[item.label] == item.classname for item in new.test)


@pytest.mark.parametrize("name", TRAINABLE)
def test_few_shots_are_those_of_a_run_seeded_as_upstream(name, built, tmp_path):
    everything = load(name, built)
    dataset = load(name, built, shots=4, seed=3)
    random.seed(3)
    groups = {}
    for item in everything.train_x:
        groups.setdefault(item.label, []).append(item.impath)
    assert [item.impath for item in dataset.train_x] == [
        path for group in groups.values() for path in random.sample(group, min(4, len(group)))
    ]


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_second_run_reads_the_shots_of_the_first_from_json(name, built, capsys):
    first = load(name, built, shots=2, seed=7)
    capsys.readouterr()
    second = load(name, built, shots=2, seed=7)
    assert "Loading preprocessed few-shot data from" in capsys.readouterr().out
    assert content(first.train_x) == content(second.train_x) and content(first.val) == content(second.val)
    assert Counter(item.label for item in second.train_x) == dict.fromkeys(range(5), 2)
    folder = pathlib.Path(first.dataset_dir)
    assert {path.suffix for path in (folder / "split_fewshot").iterdir()} == {".json"}


@pytest.mark.parametrize("name", SPLIT_MADE_HERE)
def test_a_published_split_file_is_followed(name, built, tmp_path):
    load(name, built)  # writes the split file
    (path,) = pathlib.Path(load(name, built).dataset_dir).glob("split_zhou_*.json")
    split = json.loads(path.read_text())
    assert not any(os.path.isabs(row[0]) for rows in split.values() for row in rows)
    changed = split | {"train": split["train"][::-1], "test": split["test"][1:]}
    try:
        path.write_text(json.dumps(changed))
        dataset = load(name, built)
        assert [item.impath for item in dataset.train_x] == [
            str(pathlib.Path(dataset.image_dir, row[0])) for row in changed["train"]
        ]
        assert len(dataset.test) == len(split["test"]) - 1
    finally:
        path.write_text(json.dumps(split))


def test_drawing_shots_leaves_the_global_random_state_alone(textures):
    random.seed(5)
    state = random.getstate()
    load("DescribableTextures", textures, shots=2)
    assert random.getstate() == state


def test_validation_has_at_most_four_shots(textures):
    dataset = load("DescribableTextures", textures, shots=5)
    assert Counter(item.label for item in dataset.val) == dict.fromkeys(range(5), 2)  # a fifth of 11 is all there is
    miniatures.oxford_pets(textures)
    assert max(Counter(item.label for item in load("OxfordPets", textures, shots=16).val).values()) <= 4


class _UpstreamsDatum:
    def __init__(self, impath, label, classname):
        self._impath, self._label, self._domain, self._classname = impath, label, 0, classname


def pickled_as_upstream(parts, path, monkeypatch):
    """Write a cache whose items call themselves dassl.data.datasets.base_dataset.Datum."""
    import sys
    import types

    name = "dassl.data.datasets.base_dataset"
    module = types.ModuleType(name)
    module.Datum = type("Datum", (_UpstreamsDatum,), {"__module__": name, "__qualname__": "Datum"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        made = {part: [module.Datum(*row) for row in rows] for part, rows in parts.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(made, protocol=pickle.HIGHEST_PROTOCOL))


@pytest.mark.parametrize("written_at", ["here", "/home/someone/data/dtd/images"])
def test_upstreams_pickled_shots_are_used_also_after_the_data_moved(written_at, textures, monkeypatch):
    images = textures / "dtd/images"
    rows = [(f"{name}/{name}_0003.jpg", label, name) for label, name in enumerate(miniatures.DTD)]
    root = str(images) if written_at == "here" else written_at
    parts = {part: [(f"{root}/{path}", label, name) for path, label, name in rows] for part in ("train", "val")}
    pickled_as_upstream(parts, textures / "dtd/split_fewshot/shot_1-seed_2.pkl", monkeypatch)
    dataset = load("DescribableTextures", textures, shots=1, seed=2)
    assert content(dataset.train_x) == [(str(images / path), label, name) for path, label, name in rows]


def test_imagenets_pickled_file_list_is_used(tmp_path, monkeypatch):
    miniatures.imagenet(tmp_path)
    images = tmp_path / "imagenet/images"
    rows = [(str(images / "train" / n / f"{n}_0.JPEG"), i, f"thing {i}") for i, n in enumerate(miniatures.WORDNET[:5])]
    pickled_as_upstream({"train": rows, "test": rows}, tmp_path / "imagenet/preprocessed.pkl", monkeypatch)
    assert content(load("ImageNet", tmp_path).train_x) == rows


class _Exploit:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploited"),)


def test_a_pickle_that_runs_code_is_refused_without_running_it(textures, monkeypatch):
    monkeypatch.chdir(textures)
    path = textures / "dtd/split_fewshot/shot_1-seed_1.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({"train": [_Exploit()], "val": []}))
    with pytest.raises(ValueError, match="is not a cache of image lists"):
        load("DescribableTextures", textures, shots=1)
    assert not (textures / "exploited").exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"train": [1]}', '{"train": [["a", 0, "b"]]}'])
@pytest.mark.parametrize("file", ["split_fewshot/shot_1-seed_1.json", "split_zhou_DescribableTextures.json"])
def test_a_damaged_file_is_named_in_one_line(file, damage, textures):
    path = textures / "dtd" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(damage)
    with pytest.raises(ValueError) as caught:
        load("DescribableTextures", textures, shots=1)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_missing_folder_is_named_with_where_it_comes_from(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    folder = datasets.benchmarks.BENCHMARKS.get(name) or datasets.benchmarks.VARIANTS[name]
    assert str(tmp_path / folder.folder) in str(caught.value) and folder.source in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ImageNet", "imagenet/classnames.txt"),
        ("ImageNet", "imagenet/images/val"),
        ("OxfordPets", "oxford_pets/annotations/test.txt"),
        ("StanfordCars", "stanford_cars/devkit/cars_meta.mat"),
        ("OxfordFlowers", "oxford_flowers/cat_to_name.json"),
        ("FGVCAircraft", "fgvc_aircraft/variants.txt"),
        ("SUN397", "sun397/ClassName.txt"),
        ("UCF101", "ucf101/ucfTrainTestlist/classInd.txt"),
        ("ImageNetV2", "imagenetv2/classnames.txt"),
        ("ImageNetA", "imagenet-adversarial/imagenet-a"),
    ],
)
def test_a_missing_file_is_named_with_where_it_comes_from(name, file, tmp_path):
    BUILDERS[name](tmp_path)
    path = tmp_path / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    assert str(path) in str(caught.value) and "https://" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_images_are_left_out_with_a_count_unless_all_are(textures, capsys):
    load("DescribableTextures", textures)
    path = textures / "dtd/split_zhou_DescribableTextures.json"
    gone = json.loads(path.read_text())["test"][0][0]
    (textures / "dtd/images" / gone).unlink()
    dataset = load("DescribableTextures", textures)
    assert gone not in "".join(item.impath for item in dataset.test)
    assert "Left out 1 of the " in capsys.readouterr().out
    for image in (textures / "dtd/images").rglob("*.jpg"):
        image.unlink()
    with pytest.raises(FileNotFoundError, match="none of the .* images of the training split is on disk"):
        load("DescribableTextures", textures)


def test_a_class_without_training_images_is_named(textures):
    load("DescribableTextures", textures)
    path = textures / "dtd/split_zhou_DescribableTextures.json"
    split = json.loads(path.read_text())
    split["train"] = [row for row in split["train"] if row[2] != "braided"]
    path.write_text(json.dumps(split))
    with pytest.raises(ValueError, match="class 'braided' has no training image"):
        load("DescribableTextures", textures)


def test_a_data_folder_that_cannot_be_written_still_serves(textures, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(datasets.common.os, "replace", refuse)
    dataset = load("DescribableTextures", textures, shots=1)
    assert len(dataset.train_x) == 5 and "Not saved" in capsys.readouterr().out
    assert not list(textures.rglob("*.json")) and not list(textures.rglob("*.tmp"))


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.common.json, "dumps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        datasets.common.write_json({}, str(tmp_path / "cache.json"))
    assert not list(tmp_path.iterdir())


def test_few_shots_keep_the_domain(tmp_path):
    miniatures.dtd(tmp_path)
    first = load("DescribableTextures", tmp_path)
    items = [Datum(item.impath, item.label, item.label % 3, item.classname) for item in first.train_x]
    for _ in ("drawn", "read back"):
        train, val = datasets.common.few_shots(first, items, None, 2, 1, str(tmp_path / "dtd/split_fewshot"))
        assert val is None and all(item.domain == item.label % 3 for item in train)


def test_an_unknown_half_is_named():
    with pytest.raises(ValueError, match="SUBSAMPLE_CLASSES is 'novel': take all, base or new"):
        datasets.common.subsample_classes([], subsample="novel")


def test_promptkd_trains_on_all_classes_and_tests_base_and_new(textures):
    cfg = config(textures, trainer="PromptKDSpotlighter")
    cfg.TRAINER.MODAL = "base2novel"
    dataset = DATASET_REGISTRY.get("DescribableTextures")(cfg)
    base, new = (load("DescribableTextures", textures, subsample=part) for part in ("base", "new"))
    assert dataset.num_classes == 5
    assert content(dataset.val) == content(base.test) and content(dataset.test) == content(new.test)


def test_every_data_set_has_a_config_and_a_prompt():
    folder = pathlib.Path(__file__).parents[1] / "configs/datasets"
    named = {yaml.safe_load(path.read_text())["DATASET"]["NAME"] for path in folder.glob("*.yaml")}
    assert set(BUILDERS) <= named and set(BUILDERS) <= set(TEMPLATES)
    assert all(template.count("{}") == 1 for template in TEMPLATES.values())
