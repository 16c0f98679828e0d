"""What OpenAI's clip, torchvision and Dassl need to run on today's PyTorch, each fix with its reason.

`import spotlighter_plugin` sees to them all, without importing torch: what mends a library waits until that library is
imported. Each is harmless where it is not needed and acts once.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

_BUNDLED = Path(__file__).resolve().with_name("bundled")  # in an installed package, see setup.py
ROOT = _BUNDLED if _BUNDLED.is_dir() else _BUNDLED.parents[1]  # trainers/, datasets/, configs/, patches/ are below it
RUNTIME = Path(__file__).with_name("runtime")
_libraries = []  # torch.library.Library objects: a declaration lives as long as its object


def apply() -> None:
    """Make clip, torchvision and Dassl importable, and give a real Dassl what ours has."""
    silence_clip_import()
    provide_dassl()
    mend_on_import()


def mend_dassl() -> None:
    """Give a real Dassl what ours has."""
    accept_verbose_in_lr_schedulers()
    import_dassl_without_unused()
    load_checkpoints_safely()
    resume_exactly()
    report_numbers_alone()
    skip_unreadable_images()
    name_classes_without_images()


def once(fix) -> Callable[[], None]:
    """Run a fix the first time only."""

    @functools.wraps(fix)
    def guarded():
        if not guarded.done:
            guarded.done = True
            fix()

    guarded.done = False
    return guarded


@once
def mend_on_import() -> None:
    """Declare torchvision's operators before it is executed, mend a real Dassl after; at once where it is already."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, Mended("torchvision", before=declare_torchvision_operators))
    if "dassl" in sys.modules and real_dassl():
        mend_dassl()
    elif real_dassl():
        sys.meta_path.insert(0, Mended("dassl", after=mend_dassl))


class Mended(importlib.abc.MetaPathFinder):
    """Finds one module where the other finders find it, and runs a fix before or after it is executed."""

    def __init__(self, name, before=None, after=None):
        self.name, self.before, self.after = name, before, after

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if not isinstance(finder, Mended))
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)
        return spec

    def _execute(self, execute, module):
        if self.before:
            self.before()
        execute(module)
        if self.after:
            self.after()


@once
def declare_torchvision_operators() -> None:
    """torchvision's wheel for CUDA beside a CPU-only torch cannot load its C++ operators; its Python part registers
    fake kernels for `nms` and `qnms` all the same and fails because nobody declared them. Declaring the two
    signatures lets it import; clip and Dassl use transforms only, which need no C++ operator."""
    import torch

    if _torchvision_operators_load():
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)


def _torchvision_operators_load():
    """Whether torchvision's own extension loads with this torch (tried without importing torchvision)."""
    import torch

    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    for extension in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(extension))
            return True
        except OSError:
            pass
    return False


@once
def silence_clip_import() -> None:
    """clip imports pkg_resources, whose deprecation notice would open every log; constraints.txt holds setuptools."""
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)


def openai_clip_model() -> types.ModuleType:
    """OpenAI's module clip.model. A fork's own `clip` stands in front of it, and MaPLe's and PromptKD's build another
    model, from more than a state dict: then OpenAI's is looked for further down the path."""
    first = importlib.import_module("clip.model")
    if len(inspect.signature(first.build_model).parameters) == 1:
        return first
    for entry in sys.path:
        file = Path(entry, "clip", "model.py")
        if file.is_file() and not file.samefile(first.__file__):
            spec = importlib.util.spec_from_file_location(f"{__package__}.openai_clip_model", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError("OpenAI's clip is not installed; the fork's own builds no plain CLIP: pip install openai-clip")


@once
def provide_dassl() -> None:
    """Dassl is on no package registry. Where it is not installed, our own part of its interface takes its name."""
    if not real_dassl():
        sys.path.append(str(RUNTIME))


def real_dassl() -> bool:
    """Whether `import dassl` means the real toolbox (and not ours, or a mere folder of that name)."""
    spec = importlib.util.find_spec("dassl")
    return spec is not None and spec.origin is not None and not Path(spec.origin).is_relative_to(RUNTIME)


@once
def import_dassl_without_unused() -> None:
    """Importing Dassl imports `wilds`, `pandas`, `gdown` (three of its benchmarks, a downloader), tabulate (one
    printed table) and TensorBoard (curves): gigabytes of dependencies that prompt tuning never calls. Missing ones
    are there while Dassl is imported, as modules whose members refuse to be called, or fall back to plain text or
    silence, and gone afterwards, so that nobody else takes pandas for installed."""
    importlib.import_module("torchvision")  # looks for pandas itself: must not find ours
    stubs = {name: _Refusing(name) for name in ("wilds", "pandas", "gdown") if not _importable(name)}
    if not _importable("tabulate"):
        stubs["tabulate"] = _module("tabulate", tabulate=lambda rows: "\n".join("  ".join(map(str, r)) for r in rows))
    if not _importable("tensorboard"):
        stubs["torch.utils.tensorboard"] = _module("torch.utils.tensorboard", SummaryWriter=_SilentWriter)
    sys.modules.update(stubs)
    try:
        importlib.import_module("dassl.engine")
    finally:
        for name in stubs:
            if name != "torch.utils.tensorboard":  # forks that bring their own engine import it again
                del sys.modules[name]


def _importable(name):
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _module(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


class _Refusing(types.ModuleType):
    """A module whose every attribute is a class that cannot be used."""

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)

        def refuse(*args, **kwargs):
            raise ImportError(f"{self.__name__}.{attribute} was called, but {self.__name__} is not installed")

        return type(attribute, (), {"__init__": refuse})


class _SilentWriter:
    def __init__(self, *args, **kwargs):
        pass

    def add_scalar(self, *args, **kwargs):
        pass

    def close(self):
        pass


@once
def accept_verbose_in_lr_schedulers() -> None:
    """Dassl's warm-up schedulers pass `verbose` to LRScheduler, which no longer takes it since PyTorch 2.7."""
    import torch

    original = torch.optim.lr_scheduler.LRScheduler.__init__
    if "verbose" in inspect.signature(original).parameters:
        return

    @functools.wraps(original)
    def init(self, optimizer, last_epoch=-1, verbose=False):
        original(self, optimizer, last_epoch)

    torch.optim.lr_scheduler.LRScheduler.__init__ = init


@once
def load_checkpoints_safely() -> None:
    """Dassl's checkpoints carry the scheduler that follows the warm-up as a whole object, which torch.load refuses
    since PyTorch 2.6 (weights_only=True). Ours reads old ones without running what they contain and writes aside."""
    from .runtime.dassl.utils import checkpoint as ours

    dassl_utils = importlib.import_module("dassl.utils")
    theirs = importlib.import_module("dassl.utils.torchtools")
    for name in ("load_checkpoint", "save_checkpoint", "resume_from_checkpoint", "load_pretrained_weights"):
        for module in (theirs, dassl_utils, sys.modules.get("dassl.engine.trainer")):
            if hasattr(module, name):
                setattr(module, name, getattr(ours, name))


@once
def resume_exactly() -> None:
    """Dassl's checkpoints leave out the random-number state, so that a resumed run differs from an uninterrupted
    one, and hold the successor of a warm-up schedule as an object, which becomes plain values. Its load_model cannot
    print a checkpoint that was saved without a validation result, which all but model-best are. It saves the last
    epoch alone, unless told otherwise, so that a killed run loses everything."""
    import torch

    from .runtime.dassl.engine import checkpoints

    base = importlib.import_module("dassl.engine.trainer").TrainerBase
    for name in ("save_model", "load_model", "resume_model_if_exist"):
        setattr(base, name, getattr(checkpoints, name))
    importlib.import_module("dassl.engine.trainer").SimpleTrainer.after_epoch = checkpoints.after_epoch
    warmup = importlib.import_module("dassl.optim.lr_scheduler")._BaseWarmupScheduler
    parent = torch.optim.lr_scheduler.LRScheduler

    def state_dict(self):
        return {**parent.state_dict(self), "successor": self.successor.state_dict()}

    def load_state_dict(self, state):
        self.successor.load_state_dict(state["successor"])
        parent.load_state_dict(self, {key: value for key, value in state.items() if key != "successor"})

    warmup.state_dict, warmup.load_state_dict = state_dict, load_state_dict


@once
def report_numbers_alone() -> None:
    """Dassl takes the first class for the answer where logits are not a number, and reports an accuracy. Of several
    processes it reports the first one's images alone."""
    import torch

    from . import ranks
    from .runtime.dassl.evaluation import require_numbers

    theirs = importlib.import_module("dassl.evaluation.evaluator").Classification
    process, evaluate = theirs.process, theirs.evaluate

    def checked(self, mo, gt):
        require_numbers(mo, "the evaluation")
        process(self, mo, gt)

    def of_all(self):
        if ranks.world() > 1:
            found = ranks.gather_objects((self._y_true, self._y_pred))
            true, pred = (sum(lists, []) for lists in zip(*found, strict=True))
            self.reset()
            if true:
                process(self, torch.nn.functional.one_hot(torch.tensor(pred)), torch.tensor(true))
        return evaluate(self)

    theirs.process, theirs.evaluate = checked, of_all


@once
def skip_unreadable_images() -> None:
    """One missing or damaged image ends a Dassl run with a traceback, or with a bare assertion before it begins."""
    from .runtime.dassl.data import data_manager as ours

    theirs = importlib.import_module("dassl.data.data_manager")
    theirs.build_data_loader, theirs.DatasetWrapper = ours.build_data_loader, ours.DatasetWrapper
    importlib.import_module("dassl.data").DatasetWrapper = ours.DatasetWrapper
    importlib.import_module("dassl.data.datasets.base_dataset").check_isfile = lambda path: True


@once
def name_classes_without_images() -> None:
    """A class without images shows up in Dassl as a mismatch of shapes, far from its cause."""
    from .runtime.dassl.data.datasets import DatasetBase

    theirs = importlib.import_module("dassl.data.datasets").DatasetBase
    theirs.get_num_classes = staticmethod(DatasetBase.get_num_classes)
