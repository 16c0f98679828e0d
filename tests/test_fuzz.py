"""Whatever comes in: one line that names it, or a right result, and nothing half written.

SPOTLIGHTER_FUZZ multiplies the number of inputs: 4 gives 2,240.
"""

import copy
import functools
import io
import json
import os
import pickle
import string
import warnings
from collections import Counter

import miniatures
import numpy as np
import pytest
import torch
from dassl_kit import draw_squares, squares_args
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import common
from datasets.benchmarks import DATASET_REGISTRY
from spotlighter_plugin import files
from spotlighter_plugin.errors import one_line
from spotlighter_plugin.runtime.dassl import evaluation, utils
from spotlighter_plugin.runtime.dassl.utils import checkpoint
from spotlighter_plugin.workbench.training import settings as options
from spotlighter_plugin.workbench.training.train import main

TIMES = int(os.environ.get("SPOTLIGHTER_FUZZ", "0"))
asked, drawn = {}, Counter()  # by test


def inputs(number):
    """The same inputs every time; with SPOTLIGHTER_FUZZ N, N times as many and other ones. Each is counted."""

    def decorate(test):
        inner, name = test.hypothesis.inner_test, test.__name__
        asked[name] = number * max(TIMES, 1)

        @functools.wraps(inner)
        def counted(*args, **kwargs):
            drawn[name] += 1
            return inner(*args, **kwargs)

        test.hypothesis.inner_test = counted
        return settings(
            max_examples=asked[name], derandomize=not TIMES, deadline=None, suppress_health_check=list(HealthCheck)
        )(test)

    return decorate


def told(call, *names):
    """What `call` returns; None where it raises what a user sees as one line, which has one of the names in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        named = not names or any(str(name) in line or repr(name)[1:-1] in line for name in names)
        assert "\n" not in line and line and named, line
        return None


numbers = st.one_of(
    st.integers(-5, 100),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0.1, 1e39, 2**31, 2**32, 2**63, -1, 0]),
)
plain = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=8), st.sampled_from(["sgd", "adam", "cosine"]))
short = st.text(max_size=3)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(short, inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    return options.import_trainers_and_datasets()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    draw_squares(folder)
    return folder


@pytest.fixture(scope="module")
def keys(modules):
    args = options.parse(["--trainer", "CoOp", "--dataset-config-file", "configs/datasets/dtd.yaml"])
    return sorted(options.flat(options.setup_cfg(args, modules)))


@inputs(80)
@given(st.data())
def test_options(modules, keys, root, data):
    key = data.draw(st.one_of(st.sampled_from(keys), st.text(string.ascii_uppercase + ".", max_size=12)))
    value = str(data.draw(values))
    args = squares_args(root, root / "out")
    cfg = told(
        lambda: options.setup_cfg(options.parse([*args, key, value]), modules), key, value[:50], "flags", "OPTIM"
    )
    for leaf in options.flat(cfg).values() if cfg else ():
        for each in leaf if isinstance(leaf, (list, tuple)) else [leaf]:
            assert not isinstance(each, float) or abs(each) < 3.5e38


SAFE = [  # what a run may be built with, however odd
    *("DATALOADER.K_TRANSFORMS", "DATALOADER.TRAIN_X.BATCH_SIZE", "DATALOADER.TRAIN_X.SAMPLER", "DATASET.NUM_SHOTS"),
    *("DATALOADER.TRAIN_X.N_DOMAIN", "DATALOADER.TRAIN_X.N_INS", "DATALOADER.RETURN_IMG0", "DATASET.SUBSAMPLE_CLASSES"),
    *("INPUT.CROP_PADDING", "INPUT.RRCROP_SCALE", "INPUT.INTERPOLATION", "INPUT.TRANSFORMS", "INPUT.NO_TRANSFORM"),
    *("INPUT.CUTOUT_N", "INPUT.GN_STD", "INPUT.COLORJITTER_B", "INPUT.COLORJITTER_H", "INPUT.RGS_P", "INPUT.GB_K"),
    *("OPTIM.NAME", "OPTIM.LR", "OPTIM.MOMENTUM", "OPTIM.WEIGHT_DECAY", "OPTIM.SGD_DAMPNING", "OPTIM.SGD_NESTEROV"),
    *("OPTIM.LR_SCHEDULER", "OPTIM.STEPSIZE", "OPTIM.GAMMA", "OPTIM.WARMUP_EPOCH", "OPTIM.WARMUP_TYPE"),
    *("OPTIM.WARMUP_CONS_LR", "OPTIM.ADAM_BETA1", "OPTIM.STAGED_LR", "OPTIM.NEW_LAYERS", "TEST.FINAL_MODEL"),
    *("TEST.EVALUATOR", "TEST.SPLIT", "TEST.PER_CLASS_RESULT", "TEST.COMPUTE_CMAT", "TRAIN.PRINT_FREQ", "SEED"),
    *("TRAIN.CHECKPOINT_FREQ", "USE_CUDA", "VERBOSE", "MODEL.INIT_WEIGHTS"),
]


@inputs(40)
@example(key="DATALOADER.K_TRANSFORMS", value=2, transform="colorjitter")
@example(key="DATALOADER.K_TRANSFORMS", value=None, transform="colorjitter")
@example(key="OPTIM.MOMENTUM", value=None, transform="cutout")
@example(key="INPUT.CROP_PADDING", value=1_073_741_816, transform="random_crop")
@given(key=st.sampled_from(SAFE), value=values, transform=st.sampled_from(["colorjitter", "random_crop", "cutout"]))
def test_runs(root, tmp_path_factory, key, value, transform):
    out = tmp_path_factory.mktemp("run")
    small = ("OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "2", "DATALOADER.TRAIN_X.BATCH_SIZE", "3")
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.setattr("sys.stderr", text)
        code = main(squares_args(root, out, *small, "INPUT.TRANSFORMS", f"('{transform}',)", key, str(value)))
    lines = [line for line in text.getvalue().splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in {(0, 0), (1, 1)}, text.getvalue()
    assert not list(out.rglob("*.tmp"))
    if code == 0:
        weights = torch.load(out / "linear" / "model.pth.tar-1", weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())


flags = ["--trainer", "--root", "--seed", "--resume", "--backbone", "--transforms", "--load-epoch", "--model-dir"]
flags += ["--config-file", "--dataset-config-file", "--eval-only", "--force", "--no-train", "--nonsense", "-x"]
words = st.one_of(  # on a command line
    st.sampled_from([*flags, "Linear", "CoOp", "3", "-1", ""]), st.text(max_size=6), numbers.map(str)
)


@inputs(60)
@given(st.lists(words, max_size=6))
def test_flags(modules, root, monkeypatch_cwd, arguments):
    told(lambda: options.setup_cfg(options.parse([*squares_args(root, root / "out"), *arguments]), modules))


@pytest.fixture
def monkeypatch_cwd(root, monkeypatch):
    monkeypatch.chdir(root)


@inputs(50)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), values.map(str).map(str.encode)))
def test_configuration_files(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("yaml") / "some.yaml"
    path.write_bytes(content)
    told(lambda: options.read_settings(path), path)


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("textures")
    miniatures.dtd(folder)
    DATASET_REGISTRY.get("DescribableTextures")(miniatures.config(folder))  # writes the split
    path = folder / "dtd" / "split_zhou_DescribableTextures.json"
    return folder, path, json.loads(path.read_text())


json_values = st.recursive(
    st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4,
)  # fmt: skip


@inputs(60)
@given(st.data())
def test_splits(textures, data):
    folder, path, split = textures
    split = copy.deepcopy(split)
    part = data.draw(st.sampled_from(["train", "val", "test"]))
    row = data.draw(st.integers(0, len(split[part]) - 1))
    what = data.draw(st.sampled_from(["field", "row", "part", "all", "bytes"]))
    if what == "field":
        split[part][row][data.draw(st.integers(0, 2))] = data.draw(json_values)
    elif what == "row":
        split[part][row] = data.draw(json_values)
    elif what == "part":
        split[part] = data.draw(json_values)
    content = json.dumps(data.draw(json_values) if what == "all" else split).encode()
    path.write_bytes(damaged(data, content) if what == "bytes" else content)
    seen = told(lambda: DATASET_REGISTRY.get("DescribableTextures")(miniatures.config(folder)), folder, "class")
    for item in (*seen.train_x, *seen.val, *seen.test) if seen else ():
        assert type(item.label) is int and item.classname == seen.lab2cname[item.label] and os.path.isfile(item.impath)
    assert not list(folder.rglob("*.tmp"))


def damaged(data, content):
    """Bytes of a file with some of them cut off, changed, left out or put in."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, max(len(content) - 1, 0)))
        match data.draw(st.sampled_from(["cut", "change", "drop", "insert"])):
            case "cut":
                del content[where:]
            case "change" if content:
                content[where] = data.draw(st.integers(0, 255))
            case "drop":
                del content[where : where + data.draw(st.integers(1, 40))]
            case "insert":
                content[where:where] = data.draw(st.binary(max_size=20))
    return bytes(content)


@inputs(50)
@given(st.data())
def test_pickled_caches(tmp_path_factory, data):
    item = common.Datum("a/images/x.jpg", 0, 0, "cat")
    content = pickle.dumps({"train": [item] * 3, "val": data.draw(values)}, data.draw(st.integers(2, 5)))
    path = tmp_path_factory.mktemp("cache") / "shots.pkl"
    path.write_bytes(damaged(data, content))
    parts = told(lambda: common.read_pickled(str(path), "a"), path)
    assert parts is None or all(type(row.label) is int for rows in parts.values() for row in rows)


def parts_of_a_checkpoint():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer, {"state_dict": model.state_dict(), "epoch": 3, "optimizer": optimizer.state_dict()}


@inputs(60)
@given(st.data())
def test_checkpoints(tmp_path_factory, data):
    model, optimizer, content = parts_of_a_checkpoint()
    folder = tmp_path_factory.mktemp("checkpoint")
    path = folder / "model.pth.tar-3"
    what = data.draw(st.sampled_from(["bytes", "state_dict", "tensor", "epoch", "optimizer", "all"]))
    if what == "tensor":
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        kind = data.draw(st.sampled_from([torch.float32, torch.half, torch.long, torch.bool, torch.complex64]))
        content["state_dict"] = {**content["state_dict"], "weight": torch.ones(shape, dtype=kind)}
    elif what == "all":
        content = data.draw(values)
    elif what != "bytes":
        content[what] = data.draw(values)
    torch.save(content, path)
    if what == "bytes":
        path.write_bytes(damaged(data, path.read_bytes()))
    (folder / "checkpoint").write_text(path.name)
    seen = told(lambda: utils.resume_from_checkpoint(str(folder), model, optimizer), path)
    if seen is not None:
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    told(lambda: utils.load_pretrained_weights(model, str(path)), path)
    told(lambda: checkpoint.load_weights(model, utils.load_checkpoint(str(path))["state_dict"], path), path)


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"),
    "WEBP": ("RGB", "RGBA"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I"),
    "AVIF": ("RGB", "RGBA"),
    "ICO": ("RGB", "RGBA"),
    "PCX": ("1", "L", "P", "RGB"),
}
PAIRS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
GREY = 128  # of 255


def picture(kind, mode):
    """A grey square of 8 pixels as bytes."""
    full = {"I": 65535, "I;16": 65535, "F": 1.0, "1": 255}.get(mode, 255)
    if mode in ("I", "I;16", "F"):
        kinds = {"I": np.int32, "I;16": np.uint16, "F": np.float32}
        image = Image.fromarray((np.ones((8, 8)) * full * GREY / 255).astype(kinds[mode]))
    else:
        image = Image.new("RGB", (8, 8), (GREY,) * 3)
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_each_mode_and_format_gives_its_grey(kind, mode, tmp_path):
    try:
        content = picture(kind, mode)
    except (OSError, KeyError) as error:
        pytest.skip(f"Pillow writes no such picture here: {error}")
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(content)
    pixels = np.asarray(files.read_picture(path))
    assert pixels.shape == (8, 8, 3)
    assert abs(pixels.mean() - GREY) < (70 if mode in ("1", "P") or kind == "GIF" else 3)  # dither and palette


@inputs(100)
@given(st.data())
def test_damaged_pictures(tmp_path_factory, data):
    kind, mode = data.draw(st.sampled_from(PAIRS))
    try:
        content = picture(kind, mode)
    except (OSError, KeyError):
        return
    path = tmp_path_factory.mktemp("picture") / "a.jpg"
    path.write_bytes(damaged(data, content))
    try:
        assert files.read_picture(path).mode == "RGB"
    except OSError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@inputs(60)
@given(st.data())
def test_logits_and_labels(data):
    n, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    cell = st.one_of(st.floats(-100, 100, width=16), st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))
    logits = torch.tensor(data.draw(st.lists(cell, min_size=n * classes, max_size=n * classes))).view(n, classes)
    labels = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.half, torch.bfloat16])))
    from dassl.config import get_cfg_default

    evaluator = evaluation.Classification(get_cfg_default())
    named = bool(torch.isfinite(logits.float().amax(1)).all())
    if told(lambda: evaluator.process(logits, labels) or True, "nan or inf"):
        right = sum(
            int(row.tolist().index(max(row.tolist())) == label) for row, label in zip(logits, labels, strict=True)
        )
        assert named and evaluator.evaluate()["accuracy"] == pytest.approx(100 * right / n)
    else:
        assert not named


def test_as_many_inputs_came_in_as_were_asked_for(capsys):
    if drawn.keys() < asked.keys():
        pytest.skip("a part of the tests ran")
    with capsys.disabled():
        print(f"\n{sum(drawn.values()):,} inputs, none with a traceback", end=" ")
    assert sum(drawn.values()) >= 0.9 * sum(asked.values())  # a choice among few may be drawn to its end
