"""Small data sets in the true layouts of CoOp's DATASETS.md, made of crops of a real photograph."""

import io
import itertools
import json

import numpy
from PIL import Image
from sklearn.datasets import load_sample_image
from yacs.config import CfgNode

PETS = ["Abyssinian", "american_bulldog", "Bengal", "great_pyrenees", "Sphynx"]
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2007", "BMW X5 SUV 2007", "Fiat 500 2012"]
FLOWERS = ["pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold"]
AIRCRAFT = ["707-320", "727-200", "A300B4", "Boeing 717", "Cessna 172"]
SCENES = ["/a/abbey", "/a/apse/indoor", "/b/bakery/shop", "/c/church/outdoor", "/z/zen_garden"]
ACTIONS = ["ApplyEyeMakeup", "Archery", "BabyCrawling", "BoxingPunchingBag", "YoYo"]
CALTECH = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "accordion", "airplanes", "yin_yang"]
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "SeaLake"]
DTD = ["banded", "blotchy", "braided", "cobwebbed", "zigzagged"]
FOOD = ["apple_pie", "baby_back_ribs", "caesar_salad", "waffles", "tacos"]
WORDNET = [f"n{1440764 + 7 * i:08d}" for i in range(1000)]
PER_CLASS = 11

_photo = Image.fromarray(load_sample_image("china.jpg"))
_crops = itertools.cycle([_photo.crop((x, y, x + 32, y + 32)) for x in range(0, 600, 40) for y in range(0, 380, 40)])


def _jpeg(crop):
    file = io.BytesIO()
    crop.save(file, "JPEG")
    return file.getvalue()


_jpegs = itertools.cycle([_jpeg(crop) for crop, _ in zip(_crops, range(60), strict=False)])


def image(*path):
    path = path[0].joinpath(*path[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(next(_jpegs))


def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def folders(root, names, pattern="{name}_{i:04d}.jpg"):
    for name in names:
        for i in range(PER_CLASS):
            image(root, name, pattern.format(name=name, i=i))


def imagenet(root):
    names = WORDNET[:5]
    folders(root / "imagenet/images/train", names, "{name}_{i}.JPEG")
    folders(root / "imagenet/images/val", names, "ILSVRC2012_val_{i:08d}.JPEG")
    classnames(root / "imagenet")


def classnames(folder):
    text(folder / "classnames.txt", [f"{name} great thing {i}" for i, name in enumerate(WORDNET)])


def caltech101(root):
    folders(root / "caltech-101/101_ObjectCategories", CALTECH)


def oxford_pets(root):
    lines = {"trainval.txt": [], "test.txt": []}
    for label, (breed, i) in enumerate(itertools.product(PETS, range(PER_CLASS))):
        image(root, "oxford_pets/images", f"{breed}_{i}.jpg")
        lines["test.txt" if i % 3 == 0 else "trainval.txt"].append(f"{breed}_{i} {label // PER_CLASS + 1} 1 1")
    for name, content in lines.items():
        text(root / "oxford_pets/annotations" / name, content)


def stanford_cars(root):
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": numpy.array([CARS], dtype=object)})
    kind = [("class", object), ("fname", object)]
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(label + 1, f"{i:05d}.jpg") for i, label in enumerate(list(range(5)) * PER_CLASS, 1)]
        for _, name in rows:
            image(folder, f"cars_{part}", name)
        savemat(folder / file, {"annotations": numpy.array([rows], dtype=kind)})


def oxford_flowers(root):
    from scipy.io import savemat

    labels = [label for label in (3, 1, 5, 2, 4) for _ in range(PER_CLASS)]
    for i in range(len(labels)):
        image(root, "oxford_flowers/jpg", f"image_{i + 1:05d}.jpg")
    savemat(root / "oxford_flowers/imagelabels.mat", {"labels": numpy.array([labels])})
    names = {str(i): name for i, name in enumerate(FLOWERS, 1)}
    (root / "oxford_flowers/cat_to_name.json").write_text(json.dumps(names))


def food101(root):
    folders(root / "food-101/images", FOOD)


def fgvc_aircraft(root):
    folder = root / "fgvc_aircraft"
    text(folder / "variants.txt", AIRCRAFT)
    for offset, part in enumerate(("train", "val", "test")):
        numbers = range(offset * 100000, offset * 100000 + 5 * PER_CLASS)
        for number in numbers:
            image(folder, "images", f"{number:07d}.jpg")
        text(folder / f"images_variant_{part}.txt", [f"{n:07d} {AIRCRAFT[n % 5]}" for n in numbers])


def sun397(root):
    folder = root / "sun397"
    text(folder / "ClassName.txt", SCENES)
    for part, numbers in (("Training", range(PER_CLASS)), ("Testing", range(PER_CLASS, 2 * PER_CLASS))):
        paths = [f"{scene}/sun_{i:04d}.jpg" for scene in SCENES for i in numbers]
        for path in paths:
            image(folder, "SUN397", path[1:])
        text(folder / f"{part}_01.txt", paths)


def dtd(root):
    folders(root / "dtd/images", DTD)


def eurosat(root):
    folders(root / "eurosat/2750", EUROSAT)


def ucf101(root):
    folder = root / "ucf101"
    spaced = {name: "".join(f"_{c}" if c.isupper() else c for c in name)[1:] for name in ACTIONS}
    text(folder / "ucfTrainTestlist/classInd.txt", [f"{i} {name}" for i, name in enumerate(ACTIONS, 1)])
    for part, numbers in (("train", range(PER_CLASS)), ("test", range(PER_CLASS, 2 * PER_CLASS))):
        lines = []
        for label, (name, i) in enumerate(itertools.product(ACTIONS, numbers)):
            image(folder, "UCF-101-midframes", spaced[name], f"v_{name}_g{i:02d}.jpg")
            lines.append(f"{name}/v_{name}_g{i:02d}.avi" + (f" {label // PER_CLASS + 1}" if part == "train" else ""))
        text(folder / f"ucfTrainTestlist/{part}list01.txt", lines)


def imagenetv2(root):
    for label in range(1000):
        image(root, "imagenetv2/imagenetv2-matched-frequency-format-val", str(label), "0.jpeg")
    classnames(root / "imagenetv2")


def imagenet_sketch(root):
    folders(root / "imagenet-sketch/images", WORDNET[:5], "sketch_{i}.JPEG")
    classnames(root / "imagenet-sketch")


def imagenet_a(root):
    folders(root / "imagenet-adversarial/imagenet-a", WORDNET[3:8], "{i}.jpg")
    text(root / "imagenet-adversarial/imagenet-a/README.txt", ["names"])
    classnames(root / "imagenet-adversarial")


def imagenet_r(root):
    folders(root / "imagenet-rendition/imagenet-r", WORDNET[6:11], "art_{i}.jpg")
    text(root / "imagenet-rendition/imagenet-r/README.txt", ["names"])
    classnames(root / "imagenet-rendition")


BUILDERS = {
    "ImageNet": imagenet,
    "Caltech101": caltech101,
    "OxfordPets": oxford_pets,
    "StanfordCars": stanford_cars,
    "OxfordFlowers": oxford_flowers,
    "Food101": food101,
    "FGVCAircraft": fgvc_aircraft,
    "SUN397": sun397,
    "DescribableTextures": dtd,
    "EuroSAT": eurosat,
    "UCF101": ucf101,
    "ImageNetV2": imagenetv2,
    "ImageNetSketch": imagenet_sketch,
    "ImageNetA": imagenet_a,
    "ImageNetR": imagenet_r,
}
VARIANTS = ("ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR")


def config(root, shots=0, seed=1, subsample="all", trainer="CoOp"):
    """The part of a run's configuration that a data set reads."""
    return CfgNode(
        {
            "SEED": seed,
            "TRAINER": {"NAME": trainer},
            "DATASET": {"ROOT": str(root), "NUM_SHOTS": shots, "SUBSAMPLE_CLASSES": subsample},
        }
    )
