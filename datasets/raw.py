"""Splits made from the archives as their authors publish them, for folders that have no `split_zhou_*.json` yet.

A reader takes the data set's folder, its image folder and a seeded random.Random, and returns (train, val, test), lists
of `Row`. Shuffles are done in CoOp's order, so that the same seed makes the same split. A missing file raises
FileNotFoundError with one line.
"""

import os
import re
from collections import defaultdict

from spotlighter_plugin.files import is_picture, regular

from .common import Row, pack, read_json, read_pickled, unpack, write_cache


def need(path):
    """`path`, or FileNotFoundError with one line if there is nothing."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing")
    return path


def lines(*path):
    """The stripped lines of a text file."""
    with open(regular(need(os.path.join(*path))), encoding="utf-8-sig") as file:
        return [line.strip() for line in file if line.strip()]


def class_folders(image_dir):
    """Names of the folders in a folder, sorted; notes beside them are no classes."""
    return sorted(entry.name for entry in _entries(image_dir) if entry.is_dir())


def pictures(*folder):
    """Paths of the pictures in a folder, in the file system's order; Thumbs.db and notes among them are none."""
    return [entry.path for entry in _entries(os.path.join(*folder)) if is_picture(entry.name) and entry.is_file()]


def _entries(folder):
    with os.scandir(need(folder)) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def matlab(*path):
    """The content of a .mat file, a dict of arrays."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ImportError(f"reading {os.path.join(*path)} needs scipy: pip install scipy") from None
    return loadmat(need(os.path.join(*path)))


def in_three(groups, rng):
    """Half of each class for training, a fifth for validation, the rest for testing.

    Args: groups: (label, class name, image paths) triples in the order in which they are to be shuffled.
    """
    splits = [], [], []
    for label, classname, impaths in groups:
        rng.shuffle(impaths)
        first, second = round(len(impaths) * 0.5), round(len(impaths) * 0.5) + round(len(impaths) * 0.2)
        if not 0 < first < second < len(impaths):
            raise ValueError(f"class {classname!r} has {len(impaths)} images, too few to train, validate and test")
        rows = [Row(impath, label, classname) for impath in impaths]
        for split, part in zip(splits, (rows[:first], rows[first:second], rows[second:]), strict=True):
            split.extend(part)
    return splits


def fifth_for_validation(trainval, rng):
    """Split a training list: a fifth of each class for validation. Returns (train, val)."""
    groups = defaultdict(list)
    for row in trainval:
        groups[row.label].append(row)
    train, val = [], []
    for group in groups.values():
        count = round(len(group) * 0.2)
        if not count:
            raise ValueError(f"class {group[0].classname!r} has {len(group)} training images, too few to validate")
        rng.shuffle(group)
        val.extend(group[:count])
        train.extend(group[count:])
    return train, val


def folders(ignored=(), renamed=None):
    """A reader of one folder a class; `ignored` folders are left out, `renamed` maps folders to class names."""

    def read(folder, image_dir, rng):
        names = [name for name in class_folders(image_dir) if name not in ignored]
        groups = [(i, (renamed or {}).get(name, name), pictures(image_dir, name)) for i, name in enumerate(names)]
        return in_three(groups, rng)

    return read


def pets(folder, image_dir, rng):
    def rows(name):
        for image, label, _, _ in (line.split(" ") for line in lines(folder, "annotations", name)):
            breed = image.rpartition("_")[0].lower()
            yield Row(os.path.join(image_dir, f"{image}.jpg"), int(label) - 1, breed)

    trainval, test = list(rows("trainval.txt")), list(rows("test.txt"))
    return *fifth_for_validation(trainval, rng), test


def cars(folder, image_dir, rng):
    models = [str(name[0]) for name in matlab(folder, "devkit", "cars_meta.mat")["class_names"][0]]

    def rows(images, *annotations):
        for annotation in matlab(folder, *annotations)["annotations"][0]:
            label = int(annotation["class"][0, 0]) - 1
            model, _, year = models[label].rpartition(" ")
            yield Row(os.path.join(folder, images, str(annotation["fname"][0])), label, f"{year} {model}")

    trainval = list(rows("cars_train", "devkit", "cars_train_annos.mat"))
    test = list(rows("cars_test", "cars_test_annos_withlabels.mat"))
    return *fifth_for_validation(trainval, rng), test


def flowers(folder, image_dir, rng):
    names = read_json(need(os.path.join(folder, "cat_to_name.json")))
    impaths = defaultdict(list)
    for number, label in enumerate(matlab(folder, "imagelabels.mat")["labels"][0], 1):
        impaths[int(label)].append(os.path.join(image_dir, f"image_{number:05d}.jpg"))
    return in_three([(label - 1, names[str(label)], paths) for label, paths in impaths.items()], rng)


def aircraft(folder, image_dir, rng):
    labels = {name: label for label, name in enumerate(lines(folder, "variants.txt"))}

    def rows(part):
        for line in lines(folder, f"images_variant_{part}.txt"):
            image, _, variant = line.partition(" ")
            yield Row(os.path.join(image_dir, f"{image}.jpg"), labels[variant], variant)

    return [list(rows(part)) for part in ("train", "val", "test")]


def scenes(folder, image_dir, rng):
    labels = {line[1:]: label for label, line in enumerate(lines(folder, "ClassName.txt"))}

    def rows(name):
        for line in lines(folder, name):
            category = os.path.dirname(line[1:])
            words = category.split("/")[
                1:
            ]  # the first part is the initial; indoor or outdoor comes last, and is said first
            yield Row(os.path.join(image_dir, line[1:]), labels[category], " ".join(reversed(words)))

    trainval, test = list(rows("Training_01.txt")), list(rows("Testing_01.txt"))
    return *fifth_for_validation(trainval, rng), test


def actions(folder, image_dir, rng):
    lists = os.path.join(folder, "ucfTrainTestlist")
    labels = {name: int(label) - 1 for label, name in (line.split(" ") for line in lines(lists, "classInd.txt"))}

    def rows(name):
        for line in lines(lists, name):
            action, video = line.split(" ")[0].split("/")
            words = "_".join(re.findall("[A-Z][^A-Z]*", action))
            yield Row(os.path.join(image_dir, words, video.replace(".avi", ".jpg")), labels[action], words)

    trainval, test = list(rows("trainlist01.txt")), list(rows("testlist01.txt"))
    return *fifth_for_validation(trainval, rng), test


def imagenet_names(folder):
    """{WordNet folder: class name} in the order of `classnames.txt`."""
    return dict(line.split(" ", 1) for line in lines(folder, "classnames.txt"))


def one_folder_a_class(image_dir, names, directories):
    """Rows of the images in `directories`, labelled in that order; `names` maps each to its class name."""
    return [
        Row(impath, label, names[directory])
        for label, directory in enumerate(directories)
        for impath in pictures(image_dir, directory)
    ]


def imagenet(folder, image_dir, rng):
    """ImageNet has no validation split of its own: its validation images are the test images, and val is None."""
    pickled, own = os.path.join(folder, "preprocessed.pkl"), os.path.join(folder, "preprocessed.json")
    if os.path.exists(pickled):
        parts = read_pickled(pickled, folder)
        return parts["train"], None, parts["test"]
    if os.path.exists(own):
        parts = read_json(own)
        if not isinstance(parts, dict) or not {"train", "test"} <= parts.keys():
            raise ValueError(f"{own} lacks the list train or test: delete it")
        return unpack(parts["train"], folder, own), None, unpack(parts["test"], folder, own)
    names = imagenet_names(folder)
    splits = []
    for part in ("train", "val"):
        directory = os.path.join(image_dir, part)
        splits.append(one_folder_a_class(directory, names, class_folders(directory)))
    write_cache({part: pack(rows, folder) for part, rows in zip(("train", "test"), splits, strict=True)}, own)
    return splits[0], None, splits[1]


def imagenet_folders(folder, image_dir):
    """A test set whose folders are WordNet's, some of ImageNet's; README.txt lies beside them."""
    return one_folder_a_class(image_dir, imagenet_names(folder), class_folders(image_dir))


def imagenet_numbers(folder, image_dir):
    """A test set whose folders are ImageNet's labels, 0 to 999."""
    names = {str(label): name for label, name in enumerate(imagenet_names(folder).values())}
    return one_folder_a_class(image_dir, names, names)
