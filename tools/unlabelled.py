"""How much the match should say where no label judges it: shots filed under a teacher's guesses, validation scenes.

    python tools/unlabelled.py --datasets configs/datasets/emoji_scenes{,_shift}.yaml

The micro CLIP, untrained, remembers the shots of all classes under what the tiny one takes them for. Printed are base /
new / HM on every third validation scene, for shares of what the texts say (see ``memory.unjudged``) and each sharpness.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosts_evidence import plain_attention  # noqa: E402

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper  # noqa: E402
from spotlighter_plugin.hosts.promptkd import classes_of_split  # noqa: E402
from spotlighter_plugin.method.memory import SAY, unjudged  # noqa: E402
from spotlighter_plugin.towers.clip import encode_prompts, load_clip  # noqa: E402
from spotlighter_plugin.towers.prompts import normalize  # noqa: E402
from spotlighter_plugin.trainer import _every_second  # noqa: E402
from spotlighter_plugin.workbench.training.experiment import harmonic_mean  # noqa: E402
from spotlighter_plugin.workbench.training.settings import import_trainers_and_datasets, parse, setup_cfg  # noqa: E402

SHARES = (0, 0.125, 0.25, 0.5, 1, 2)
SHARPNESSES = (3.0, 6.0, 10.0)


def loaders(dataset: str, root: str, modules):
    """The data set's class names, its shots and its validation scenes in batches."""
    from dassl.data import DataManager
    from dassl.data.data_manager import build_data_loader
    from dassl.data.transforms import build_transform

    cfg = setup_cfg(parse(["--trainer", "CoOp", "--dataset-config-file", dataset, "--root", root]), modules)
    data = DataManager(cfg).dataset
    transform = build_transform(cfg, is_train=False)
    parts = (
        build_data_loader(cfg, "SequentialSampler", items, 256, tfm=transform, is_train=False)
        for items in (data.train_x, data.val[::3])
    )
    return [name.replace("_", " ") for name in data.classnames], *parts


def look(wrapper, batches):
    """Text logits (n, C), labels (n,) and the match at each sharpness (s, n, C)."""
    logits, labels, matches = [], [], []
    with wrapper._evaluating():
        for images, targets in batches:
            batch = wrapper._begin(wrapper.adapter, images)[1]
            image, batch.describes = wrapper._encode(wrapper.adapter, batch), False
            logits.append(batch.logits(image, batch.tokens).float())
            matches.append(torch.stack([wrapper.plugin.memory.match(batch.described, b) for b in SHARPNESSES]).float())
            labels.append(targets)
    return torch.cat(logits), torch.cat(labels), torch.cat(matches, 1)


def accuracies(logits, labels) -> str:
    """base / new / HM in percent; each half is classified among its own classes."""
    n, found = logits.shape[1], []
    for split in ("val", "test"):
        kept = classes_of_split("base2novel", n, split)
        classes = torch.arange(n)[kept]
        mine = torch.isin(labels, classes)
        found.append(100 * (classes[logits[mine][:, kept].argmax(1)] == labels[mine]).float().mean().item())
    return " / ".join(f"{value:.1f}" for value in (*found, harmonic_mean(*found)))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--root", default="data")
    args = parser.parse_args()
    modules, teacher = import_trainers_and_datasets(), load_clip("tiny")
    for dataset in args.datasets:
        with contextlib.redirect_stdout(io.StringIO()):
            names, shots, scenes = loaders(dataset, args.root, modules)
        texts = encode_prompts(teacher, [f"a photo of a {name}." for name in names])
        config = SpotlighterConfig(prototype_logits=True, match_shots=32)
        wrapper = SpotlighterWrapper(load_clip("micro"), config, class_names=names)
        with plain_attention(), torch.autocast("cpu", dtype=torch.bfloat16):
            filed = [(b["img"], (normalize(teacher.visual(b["img"])) @ texts.T).argmax(1)) for b in shots]
            wrapper.remember(_every_second(filed, 0))
            logits, _, matches = look(wrapper, _every_second(filed, 1))
            weights = [unjudged(logits, match) / SAY for match in matches]
            wrapper.remember(filed)
            logits, labels, matches = look(wrapper, ((b["img"], b["label"]) for b in scenes))
        for sharpness, weight, match in zip(SHARPNESSES, weights, matches, strict=True):
            rows = [f"{share}: {accuracies(logits + share * weight * match, labels)}" for share in SHARES]
            print(f"{Path(dataset).stem}, sharpness {sharpness}: {', '.join(rows)}", flush=True)


if __name__ == "__main__":
    main()
