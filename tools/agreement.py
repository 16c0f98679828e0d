"""How far ways to cut tokens leave the host's own answers alone: untrained prompts, nothing remembered.

    python tools/agreement.py

Validation scenes of the base classes' halves, five data sets. Prints for each way to cut on how many scenes the class
named is the one that all tokens name, the accuracy on both halves, and the speed-up of a ViT-B/16 by its arithmetic.
"""

import argparse
import contextlib
import io
import tempfile

import torch
from evidence import S
from rich.console import Console
from rich.table import Table

from spotlighter_plugin.workbench.speed.bench import Setting, arithmetic_limit
from spotlighter_plugin.workbench.training.experiment import FAMILY, Laboratory, Method

HALVES = ("inner-base", "inner-new")
OPTIONS = {S + "LOSSES": "()", S + "PROTOTYPE_LOGITS": False, "TRAINER.COOP.PREC": "fp32", "DATALOADER.NUM_WORKERS": 0}
ALL = ((-1, 1.0),)
CUTS = (  # (block, share of the tower's tokens that goes on), …
    ALL, ((-2, 1 / 3),), ((-2, 4 / 9),), ((-2, 2 / 3),),
    ((-2, 0.5), (-1, 1 / 3)), ((-2, 2 / 3), (-1, 1 / 3)), ((-2, 0.75), (-1, 1 / 3)), ((-1, 1 / 3),), ((-1, 0.25),),
)  # fmt: skip


def options(cuts, n_tokens: int) -> dict:
    """Options of the plug-in that make these cuts in a tower of so many tokens."""
    *early, (block, share) = cuts
    stages = tuple((at, round(kept * n_tokens)) for at, kept in early)
    return {"STAGES": stages, "SELECT_BLOCK": block, "TOP_K": round(share * n_tokens)}


@torch.no_grad()
def answers(laboratory: Laboratory, cuts) -> tuple[torch.Tensor, torch.Tensor]:
    """The class named for each scene of both halves, (n,), and whether it is the right one, (2, n / 2)."""
    named, right = [], []
    flags = OPTIONS | {S + name: value for name, value in options(cuts, 144).items()}
    for half in HALVES:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            trainer = laboratory.trainer(Method("", "CoOpSpotlighter", flags), 1, half, folder)
        trainer.set_model_mode("eval")
        batches = [trainer.parse_batch_test(batch) for batch in trainer.test_loader]
        named.append(torch.cat([trainer.model_inference(images).argmax(1) for images, _ in batches]))
        right.append(named[-1] == torch.cat([labels for _, labels in batches]))
    return torch.cat(named), torch.stack(right)


def limit(cuts) -> float:
    """The speed-up of a ViT-B/16 by blocks × tokens alone; the dropped tokens go on as one."""
    made = options(cuts, 196)
    stages = ("STAGES", repr(made["STAGES"]))
    return arithmetic_limit(Setting(select_block=made["SELECT_BLOCK"], top_k=made["TOP_K"], options=stages))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=FAMILY)
    parser.add_argument("--root", default="data")
    args = parser.parse_args()
    found = {cuts: [] for cuts in CUTS}
    for dataset in args.datasets:
        laboratory = Laboratory(dataset, args.root, classes=HALVES)
        for cuts in CUTS:
            found[cuts].append(answers(laboratory, cuts))
    host = torch.cat([named for named, _ in found[ALL]])
    table = Table("before which block: tokens that go on", "as the host, %", "base", "new", "limit on a ViT-B/16")
    for cuts, results in found.items():
        same = (torch.cat([named for named, _ in results]) == host).float().mean()
        base, new = torch.cat([right for _, right in results], 1).float().mean(1).tolist()
        figures = [f"{100 * share:.2f}" for share in (same, base, new)]
        table.add_row(", ".join(f"L{at}: {kept:.0%}" for at, kept in cuts), *figures, f"× {limit(cuts):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
