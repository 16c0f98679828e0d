"""The eleven benchmarks and ImageNet's four variants, under the names and in the folders of CoOp's DATASETS.md."""

import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

from dassl.data.datasets import DATASET_REGISTRY, DatasetBase

from . import raw
from .common import datums, few_shots, pack, read_split, splits_of_the_protocol, write_cache


@dataclass(frozen=True)
class Layout:
    """Where a data set lies under DATASET.ROOT and how it is read.

    Attributes:
        folder: under DATASET.ROOT.
        images: the image folder in it; paths in the split file are relative to it. "" is `folder` itself.
        read: reader of raw.py, used where there is no split file.
        split: name of the split file in `folder`, "" if the data set's own lists fix the split.
        source: where the data come from, for the message that they are missing.
    """

    folder: str
    images: str
    read: Callable
    source: str
    split: str = ""


CALTECH_NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
VGG = "https://www.robots.ox.ac.uk/~vgg/data"

BENCHMARKS = {
    "ImageNet": Layout("imagenet", "images", raw.imagenet, "https://image-net.org"),
    "Caltech101": Layout(
        "caltech-101",
        "101_ObjectCategories",
        raw.folders(ignored=("BACKGROUND_Google", "Faces_easy"), renamed=CALTECH_NAMES),
        "https://data.caltech.edu/records/mzrjq-6wc02",
        "split_zhou_Caltech101.json",
    ),
    "OxfordPets": Layout("oxford_pets", "images", raw.pets, f"{VGG}/pets", "split_zhou_OxfordPets.json"),
    "StanfordCars": Layout(
        "stanford_cars",
        "",
        raw.cars,
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        "split_zhou_StanfordCars.json",
    ),
    "OxfordFlowers": Layout(
        "oxford_flowers", "jpg", raw.flowers, f"{VGG}/flowers/102", "split_zhou_OxfordFlowers.json"
    ),
    "Food101": Layout(
        "food-101",
        "images",
        raw.folders(),
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        "split_zhou_Food101.json",
    ),
    "FGVCAircraft": Layout("fgvc_aircraft", "images", raw.aircraft, f"{VGG}/fgvc-aircraft"),
    "SUN397": Layout(
        "sun397",
        "SUN397",
        raw.scenes,
        "https://vision.princeton.edu/projects/2010/SUN",
        "split_zhou_SUN397.json",
    ),
    "DescribableTextures": Layout("dtd", "images", raw.folders(), f"{VGG}/dtd", "split_zhou_DescribableTextures.json"),
    "EuroSAT": Layout(
        "eurosat",
        "2750",
        raw.folders(renamed=EUROSAT_NAMES),
        "https://github.com/phelber/EuroSAT",
        "split_zhou_EuroSAT.json",
    ),
    "UCF101": Layout(
        "ucf101",
        "UCF-101-midframes",
        raw.actions,
        "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md#ucf101",
        "split_zhou_UCF101.json",
    ),
}

VARIANTS = {  # for testing only
    "ImageNetV2": Layout(
        "imagenetv2",
        "imagenetv2-matched-frequency-format-val",
        raw.imagenet_numbers,
        "https://github.com/modestyachts/ImageNetV2",
    ),
    "ImageNetSketch": Layout(
        "imagenet-sketch", "images", raw.imagenet_folders, "https://github.com/HaohanWang/ImageNet-Sketch"
    ),
    "ImageNetA": Layout(
        "imagenet-adversarial",
        "imagenet-a",
        raw.imagenet_folders,
        "https://github.com/hendrycks/natural-adv-examples",
    ),
    "ImageNetR": Layout(
        "imagenet-rendition", "imagenet-r", raw.imagenet_folders, "https://github.com/hendrycks/imagenet-r"
    ),
}


class Benchmark(DatasetBase):
    """A data set with splits, few shots and base/new halves. Subclasses are made below, one a line of BENCHMARKS.

    Raises: FileNotFoundError (a folder or file is missing: which, and where it comes from), ValueError (damaged file).
    """

    layout: Layout

    def __init__(self, cfg):
        with _finding(self, cfg):
            rng = random.Random(cfg.SEED if cfg.SEED >= 0 else None)
            train, val, test = self._splits(rng)
            cache = os.path.join(self.dataset_dir, "split_fewshot")
            train, val = few_shots(self, train, val, cfg.DATASET.NUM_SHOTS, cfg.SEED, cache, rng)
            test = datums(test, "the test split")
            _check_classes(train, test)
        train, val, test = splits_of_the_protocol(cfg, train, test if val is None else val, test)
        super().__init__(train_x=train, val=val, test=test)

    def _splits(self, rng):
        path = os.path.join(self.dataset_dir, self.layout.split)
        if self.layout.split and os.path.exists(path):
            print(f"Reading split from {path}")
            return read_split(path, self.image_dir)
        splits = self.layout.read(self.dataset_dir, self.image_dir, rng)
        if self.layout.split:
            print(
                f"{path} is not there: splitting anew, so figures are not comparable with those on the published split"
            )
            parts = zip(("train", "val", "test"), splits, strict=True)
            write_cache({part: pack(rows, self.image_dir) for part, rows in parts}, path)
        return splits


class Variant(DatasetBase):
    """A test set for models trained on ImageNet. Subclasses are made below, one a line of VARIANTS.

    Raises: as Benchmark.
    """

    layout: Layout

    def __init__(self, cfg):
        with _finding(self, cfg):
            data = datums(self.layout.read(self.dataset_dir, self.image_dir), "the test set")
        super().__init__(train_x=data, test=data)


@contextmanager
def _finding(dataset, cfg):
    """Set the folders of a data set, and say in one line what is missing in them and where it comes from."""
    layout = dataset.layout
    root = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
    dataset.dataset_dir = os.path.join(root, layout.folder)
    dataset.image_dir = os.path.join(dataset.dataset_dir, layout.images) if layout.images else dataset.dataset_dir
    try:
        raw.need(dataset.dataset_dir)
        raw.need(dataset.image_dir)
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: get it from {layout.source} (layout: docs/datasets.md) or set --root (now {root})"
        ) from None
    except KeyError as error:
        raise ValueError(f"{dataset.dataset_dir}: {error} is not in the data set's list of classes") from None


def _check_classes(train, test):
    """Every class needs a training image, or the labels of the rest would be wrong."""
    absent = {item.label: item.classname for item in test}
    for item in train:
        absent.pop(item.label, None)
    if absent:
        raise ValueError(f"class {next(iter(absent.values()))!r} has no training image ({len(absent)} such classes)")


for base, layouts in ((Benchmark, BENCHMARKS), (Variant, VARIANTS)):
    for name, layout in layouts.items():
        DATASET_REGISTRY.register()(type(name, (base,), {"layout": layout, "__module__": __name__}))
