"""What every data set shares: split files, few-shot samples with their cache, and the base/new halves of the classes.

Files and draws are interchangeable with CoOp's: the same `split_zhou_*.json`, the same images for the same seed. Its
pickled caches are read through an unpickler that can build nothing but Dassl's `Datum`. What is written here is JSON.
"""

import io
import json
import math
import os
import pickle
import random
from typing import NamedTuple

from dassl.data.datasets import Datum

from spotlighter_plugin.files import Unpickler, is_picture, regular, write_aside


class Row(NamedTuple):
    """One image as the files list it; has the attributes of Dassl's `Datum` but does not touch the disk."""

    impath: str
    label: int
    classname: str
    domain: int = 0


def write_json(content, path):
    """Write `content` as JSON so that `path` is whole or absent, also when several processes write it."""
    write_aside(path, lambda file: file.write(json.dumps(content).encode()), "--root")


def write_cache(content, path):
    """Like `write_json`, for files that only save time: in a folder that cannot be written, say so and go on."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_json(content, path)
    except OSError as error:
        print(f"Not saved: {path} ({error.strerror or error}); it is made again in the next run")


def read_json(path):
    """The content of a JSON file, which is UTF-8; raises ValueError with one line if it is damaged."""
    try:
        with open(regular(path), encoding="utf-8-sig") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it or fetch it again") from None


def pack(items, folder, domain=False):
    """Items as JSON rows `[path relative to folder, label, class name]`, as in `split_zhou_*.json` (and the domain)."""
    return [
        (os.path.relpath(item.impath, folder), item.label, item.classname, *([item.domain] if domain else []))
        for item in items
    ]


def unpack(rows, folder, path):
    """JSON rows as `Row`s with whole paths. Raises ValueError naming `path`, their file, and the first that is none."""
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__} where rows [path, label, class name] belong")
    return [checked_row(row, path, folder) for row in rows]


def checked_row(row, path, folder=""):
    """[path, label, class name(, domain)] as a `Row`. Raises ValueError naming the row and its file, `path`."""
    impath, label, name, domain = (*row, 0)[:4] if isinstance(row, (list, tuple)) and len(row) in (3, 4) else [None] * 4
    if not isinstance(impath, str) or not impath or "\0" in impath or not _is_text(impath):
        wrong = "is no [path, label, class name]"
    elif type(label) is not int or not 0 <= label < 2**31:
        wrong = f"has the label {label!r}, must be a whole number from 0"
    elif not isinstance(name, str) or not name.strip():
        wrong = f"has the class name {name!r}, must be words"
    elif type(domain) is not int:
        wrong = f"has the domain {domain!r}, must be a whole number"
    else:
        impath = os.fsdecode(impath.encode("utf-8", "surrogateescape"))  # as the file system's names are read here
        whole = os.path.join(folder, impath)
        if "\\" in impath and not os.path.exists(whole):  # written on Windows
            whole = os.path.join(folder, impath.replace("\\", "/"))
        return Row(whole, label, name, domain)
    raise ValueError(f"{path}: {str(row)[:100]} {wrong}")


def _is_text(words):
    try:
        return bool(words.encode("utf-8", "surrogateescape"))
    except UnicodeError:
        return False


def one_name_a_label(rows, path):
    """`rows`; raises ValueError, naming `path`, their file, if one label stands for two class names."""
    names = {}
    for row in rows:
        if names.setdefault(row.label, row.classname) != row.classname:
            raise ValueError(f"{path}: label {row.label} is both {names[row.label]!r} and {row.classname!r}")
    return rows


def read_split(path, image_dir):
    """The (train, val, test) `Row` lists of a `split_zhou_*.json` file; rows that name no picture are left out."""
    split = read_json(path)
    if not isinstance(split, dict) or not {"train", "val", "test"} <= split.keys():
        raise ValueError(f"{path} lacks one of the lists train, val, test: delete it or fetch it again")
    parts = [unpack(split[part], image_dir, path) for part in ("train", "val", "test")]
    one_name_a_label([row for rows in parts for row in rows], path)
    kept = tuple([row for row in rows if is_picture(row.impath)] for rows in parts)
    shown = {row.label for row in parts[0]}
    for row in (*parts[1], *parts[2]):
        if shown and row.label not in shown:
            raise ValueError(f"{path}: class {row.classname!r} has no training image with its label {row.label}")
    if left := sum(map(len, parts)) - sum(map(len, kept)):
        print(f"Left out {left} rows of {path} that name no picture")
    return kept


def datums(items, what="the split"):
    """Items as Dassl's `Datum`s. Images that are not on disk are left out with a count.

    Raises FileNotFoundError with one line if every one of them is missing.
    """
    found = [item for item in items if isinstance(item, Datum) or os.path.isfile(item.impath)]
    missing = len(items) - len(found)
    if missing:
        example = next(item.impath for item in items if not os.path.isfile(item.impath))
        if not found:
            raise FileNotFoundError(f"none of the {missing} images of {what} is on disk, e.g. {example}")
        print(f"Left out {missing} of the {len(items)} images of {what} that are not on disk, e.g. {example}")
    return [
        item if isinstance(item, Datum) else Datum(item.impath, item.label, item.domain, item.classname)
        for item in found
    ]


class _DatumsAlone:
    """Lets an unpickler build `Datum`s, lists, dicts, strings and numbers, and nothing else: it cannot run code."""

    class _Item:
        pass

    def find_class(self, module, name):
        if name == "Datum" and module.split(".")[0] == "dassl":
            return self._Item
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class _Careful(_DatumsAlone, Unpickler):
    """Cannot ask for more than its file holds."""


class _Fast(_DatumsAlone, pickle.Unpickler):
    """Ten times as fast, for large files."""


def read_pickled(path, folder):
    """CoOp's pickled cache as {part: list of `Row`}; only `Datum`s may be inside.

    Paths were absolute where the file was written. Where they do not exist, the part after `folder`'s name is taken to
    lie in `folder`, so that caches survive a move of the data. Raises ValueError with one line for any other pickle.
    """
    try:
        with open(regular(path), "rb") as file:
            small = os.path.getsize(path) < 2**25
            content = (_Careful(io.BytesIO(file.read())) if small else _Fast(file)).load()
        name = os.path.basename(folder)
        parts = {}
        for part, items in content.items():
            states = [vars(item) for item in items]
            first = states[0]["_impath"] if states else ""
            moved = bool(first) and not os.path.isfile(first)
            rows = [(state["_impath"], state["_label"], state["_classname"], state["_domain"]) for state in states]
            rows = [(_moved(row[0], name, folder), *row[1:]) for row in rows] if moved else rows
            parts[part] = [checked_row(row, path) for row in rows]
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle makes its reader do
        raise ValueError(f"{path} is not a cache of image lists ({error or type(error).__name__}): delete it") from None
    one_name_a_label([row for rows in parts.values() for row in rows], path)
    return parts


def _moved(impath, name, folder):
    _, mark, after = impath.replace("\\", "/").rpartition(f"/{name}/")
    return os.path.join(folder, after) if mark else impath


def few_shots(dataset_base, train, val, num_shots, seed, cache_dir, rng=None):
    """Draw `num_shots` images of each class for training and `min(num_shots, 4)` for validation.

    Draws are CoOp's for the same seed, and do not disturb the global random state. They are kept in
    `cache_dir/shot_{num_shots}-seed_{seed}.json`; CoOp's own `.pkl` of that name is taken where it exists.

    Args:
        dataset_base: the DatasetBase that asks; its `split_dataset_by_label` groups the images.
        train, val: lists of items with impath, label, classname and domain; val may be None.
        num_shots: images of a class; below 1 everything is kept.
        seed: cfg.SEED; a negative seed draws differently each time.
        cache_dir: usually `<data set's folder>/split_fewshot`; paths are kept relative to the folder it lies in.
        rng: a random.Random already in use for this data set, else a new one of that seed.

    Returns: (train, val), lists of Datum (val None if it was None).
    Raises: ValueError (damaged cache), FileNotFoundError (no image on disk).
    """
    if num_shots >= 1:
        folder = os.path.dirname(os.path.abspath(cache_dir))
        name = os.path.join(cache_dir, f"shot_{num_shots}-seed_{seed}")
        pickled, own = f"{name}.pkl", f"{name}.json"
        if os.path.exists(pickled) or os.path.exists(own):
            path = pickled if os.path.exists(pickled) else own
            print(f"Loading preprocessed few-shot data from {path}")
            parts = read_pickled(path, folder) if path == pickled else read_json(path)
            if not isinstance(parts, dict) or not {"train"} | (set() if val is None else {"val"}) <= parts.keys():
                raise ValueError(f"{path} lacks the list train or val: delete it")
            train = _rows(parts["train"], folder, path)
            val = None if val is None else _rows(parts["val"], folder, path)
            one_name_a_label([*train, *(val or ())], path)
        else:
            rng = rng or random.Random(seed if seed >= 0 else None)
            print(f"Creating a {num_shots}-shot dataset")
            train = _draw(dataset_base, train, num_shots, rng)
            val = None if val is None else _draw(dataset_base, val, min(num_shots, 4), rng)
            parts = {"train": train} if val is None else {"train": train, "val": val}
            print(f"Saving preprocessed few-shot data to {own}")
            write_cache({part: pack(items, folder, domain=True) for part, items in parts.items()}, own)
    return datums(train, "the training split"), None if val is None else datums(val, "the validation split")


def _rows(rows, folder, path):
    return rows if rows and isinstance(rows[0], Row) else unpack(rows, folder, path)


def _draw(dataset_base, items, num_shots, rng):
    drawn = []
    for group in dataset_base.split_dataset_by_label(items).values():
        drawn.extend(rng.sample(group, num_shots) if len(group) >= num_shots else group)
    return drawn


def subsample_classes(*splits, subsample="all"):
    """Keep the base classes (first half of the sorted labels, the larger one if odd) or the new ones, labels from 0.

    Args:
        splits: lists of Datum; the labels of the first one are the classes. None stays None.
        subsample: "all", "base" or "new".

    Returns: a tuple of as many lists. Raises: ValueError for another `subsample`.
    """
    if subsample not in ("all", "base", "new"):
        raise ValueError(f"DATASET.SUBSAMPLE_CLASSES is {subsample!r}: take all, base or new")
    if subsample == "all":
        return splits
    labels = sorted({item.label for item in splits[0]})
    half = math.ceil(len(labels) / 2)
    print(f"SUBSAMPLE {subsample.upper()} CLASSES!")
    new_label = {label: i for i, label in enumerate(labels[:half] if subsample == "base" else labels[half:])}
    return tuple(
        split
        and [
            Datum(item.impath, new_label[item.label], item.domain, item.classname)
            for item in split
            if item.label in new_label
        ]
        for split in splits
    )


def takes_all_classes(cfg):
    """Whether a run trains on the unlabelled images of all classes and tests base and new ones in one go (PromptKD)."""
    return cfg.TRAINER.NAME.startswith("PromptKD") and cfg.TRAINER.get("MODAL") == "base2novel"


def splits_of_the_protocol(cfg, train, val, test):
    """The three splits that a run of `cfg` uses, given those of all classes.

    Usually `subsample_classes`. PromptKD's base-to-novel protocol (TRAINER.MODAL "base2novel") trains on the unlabelled
    images of all classes and tests twice, so there val holds the base classes' test images and test the new ones'.
    """
    if takes_all_classes(cfg):
        _, base = subsample_classes(train, test, subsample="base")
        _, new = subsample_classes(train, test, subsample="new")
        return train, base, new
    return subsample_classes(train, val, test, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
