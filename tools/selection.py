"""What keeping k tokens costs, before anything is trained: zero-shot harmonic means on the IconScenes family.

    python tools/selection.py --out docs/selection.json

Tokens are selected before the last block. Every way to score them is compared with random tokens and with all tokens;
"+ semantic" adds the semantic-wise score, from a bank that has seen the 16 shots of the base classes.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper  # noqa: E402
from spotlighter_plugin.config import ACTIVATIONS  # noqa: E402
from spotlighter_plugin.workbench.sweeps.plan import ICONS  # noqa: E402
from spotlighter_plugin.workbench.training.experiment import Laboratory, Method, harmonic_mean  # noqa: E402

FAMILY = [f"configs/datasets/{name}.yaml" for name in ICONS]
ZERO_SHOT = Method("zero-shot CLIP", "ZeroshotCLIP")


@torch.no_grad()
def accuracy(wrapper, loader) -> float:
    return 100 * np.mean(np.concatenate([(wrapper(b["img"]).argmax(1) == b["label"]).numpy() for b in loader]))


def harmonic_means(dataset: str, root: str, block: int, kept: list[int], thin: int) -> dict[str, float]:
    """{"attention 36": HM, …} of one data set."""
    laboratory, result = Laboratory(dataset, root, block, thin=thin), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        base, new = (laboratory.trainer(ZERO_SHOT, 1, part, folder) for part in ("base", "new"))
    for activation in ACTIVATIONS:
        for semantic in (False, True):
            for k in kept:
                if k == max(kept) and (activation, semantic) != ("attention", False):
                    continue
                config = SpotlighterConfig(
                    top_k=k, mapping="none", activation=activation, semantic_activation=semantic, select_block=block,
                    prototype_logits=False, losses=(),
                )  # fmt: skip
                scores, bank = [], None
                for trainer in (base, new):
                    classes = trainer.dm.dataset.classnames
                    wrapper = SpotlighterWrapper(trainer.clip_model, config, class_names=classes)
                    if semantic and trainer is base:
                        wrapper.train()
                        with torch.no_grad():
                            for batch in trainer.train_loader_x:
                                wrapper(batch["img"], batch["label"])
                        bank = wrapper.state_dict()
                    elif semantic:
                        wrapper.load_state_dict(bank)
                    scores.append(accuracy(wrapper.eval(), trainer.test_loader))
                    wrapper.detach()
                result[f"{activation}{' + semantic' * semantic} {k}"] = harmonic_mean(*scores)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--block", type=int, default=-1, help="tokens are selected before this block")
    parser.add_argument("--kept", type=int, nargs="+", default=[8, 16, 48, 96, 196], help="the last must be all tokens")
    parser.add_argument("--thin", type=int, default=1, help="look at every n-th test scene only")
    parser.add_argument("--datasets", nargs="+", default=FAMILY, help="configuration files")
    args = parser.parse_args()
    every = {Path(d).stem: harmonic_means(d, args.root, args.block, args.kept, args.thin) for d in args.datasets}
    mean = {row: float(np.mean([results[row] for results in every.values()])) for row in next(iter(every.values()))}
    table = Table("score", *(f"k = {k}" for k in args.kept), title="zero-shot HM, mean over the data sets")
    for row in dict.fromkeys(name.rsplit(" ", 1)[0] for name in mean):
        table.add_row(row, *(f"{mean[f'{row} {k}']:.1f}" if f"{row} {k}" in mean else "" for k in args.kept))
    Console().print(table)
    if args.out:
        aside = args.out.with_suffix(".tmp")
        aside.write_text(json.dumps({"block": args.block, "mean": mean, "datasets": every}, indent=1) + "\n")
        os.replace(aside, args.out)


if __name__ == "__main__":
    main()
