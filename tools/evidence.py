"""The evidence table: CoOp, the controls and Spotlighter, base-to-new on the EmojiScenes family, with paired intervals.

    python tools/evidence.py --out docs/evidence            every row, five data sets, three seeds
    python tools/evidence.py --out docs/evidence --choose host      how CoOp's rate and length were chosen
    python tools/evidence.py --out docs/evidence --choose plugin    how the plug-in's options were chosen

Choices look at validation scenes of base classes only.

Every finished run is kept in the output folder, so a killed command goes on where it was.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from spotlighter_plugin.workbench.training.experiment import FAMILY, Laboratory, Method, Outcome, paired_interval  # noqa: E402

COMMON = {
    "OPTIM.NAME": "sgd", "OPTIM.LR_SCHEDULER": "cosine", "OPTIM.WARMUP_EPOCH": 1, "OPTIM.WARMUP_TYPE": "constant",
    "OPTIM.WARMUP_CONS_LR": 1e-5, "DATALOADER.TRAIN_X.BATCH_SIZE": 256, "DATALOADER.NUM_WORKERS": 0,
    "TRAINER.COOP.PREC": "fp32", "TRAIN.PRINT_FREQ": 1000,
}  # fmt: skip
HOST = {**COMMON, "OPTIM.LR": 0.1, "OPTIM.MAX_EPOCH": 20}  # --choose compares: docs/ablations.md
LONG, LONGEST = {**HOST, "OPTIM.MAX_EPOCH": 60}, {**HOST, "OPTIM.MAX_EPOCH": 200}  # 200: upstream's for 16 shots
SHORT = {**COMMON, "OPTIM.LR": 0.3, "OPTIM.MAX_EPOCH": 5}  # what is remembered need not be learned
PLUGIN = {**SHORT, "TRAINER.SPOTLIGHTER.LOSSES": "()"}
HOST_ROWS = HOST_ROW, SHORT_ROW, LONG_ROW, LONGEST_ROW = (
    "CoOp", "CoOp, short", "CoOp, trained long", "CoOp, 200 epochs",
)  # fmt: skip
OURS = "Spotlighter"
CONTROLS = (
    "CoOp + L_reg_text", "CoOp + text residual", "CoOp + cache of CLS", "CoOp, short, + cache of CLS",
    "Spotlighter, random tokens",
)  # fmt: skip
METHODS = [
    Method("zero-shot CLIP", "ZeroshotCLIP", sees_tokens=False),
    Method(HOST_ROW, "CoOp", HOST, HOST_ROW, False),
    Method(SHORT_ROW, "CoOp", SHORT, SHORT_ROW, False),
    Method(LONG_ROW, "CoOp", LONG, sees_tokens=False),
    Method(LONGEST_ROW, "CoOp", LONGEST, sees_tokens=False),
    Method(CONTROLS[0], "CoOpTextRegularised", HOST, CONTROLS[0], False),
    Method(CONTROLS[1], "CoOpTextResidual", HOST, sees_tokens=False),
    Method(CONTROLS[2], "CoOpCache", HOST, HOST_ROW, False),
    Method(CONTROLS[3], "CoOpCache", SHORT, SHORT_ROW, False),
    Method(CONTROLS[4], "CoOpSpotlighter", {**PLUGIN, "TRAINER.SPOTLIGHTER.ACTIVATION": "random"}),
    Method(OURS, "CoOpSpotlighter", PLUGIN),
]
S = "TRAINER.SPOTLIGHTER."
VARIANTS = {
    "as it is": {}, "20 epochs at 0.1": HOST, "10 epochs at 0.1": {**HOST, "OPTIM.MAX_EPOCH": 10},
    "8 matched": {S + "MATCH_TOKENS": 8}, "16 matched": {S + "MATCH_TOKENS": 16},
    "CLS alone remembered": {S + "MATCH_TOKENS": 0}, "nothing remembered": {S + "PROTOTYPE_LOGITS": False},
    "with L_reg_text": {S + "LOSSES": "('reg_text',)"}, "λ2 = 4": {S + "LOSSES": "('reg_text',)", S + "LAMBDA2": 4.0},
    "λ2 = 4, 20 epochs at 0.1": {**HOST, S + "LOSSES": "('reg_text',)", S + "LAMBDA2": 4.0},
    "with L_gra": {S + "LOSSES": "('gra',)"},
    **{
        f"{name}, 8 matched": {S + "SELECT_BLOCK": block, S + "TOP_K": k, S + "MATCH_TOKENS": 8}
        for name, block, k in (
            ("48 before L-2", -2, 48), ("64 before L-2", -2, 64), ("36 before L-1", -1, 36), ("all tokens", -2, 144),
        )
    },
    "a quarter kept": {S + "TOP_K": 36}, "a quarter kept, random": {S + "TOP_K": 36, S + "ACTIVATION": "random"},
    "all kept": {S + "SELECT_BLOCK": -2, S + "TOP_K": 144},
}  # fmt: skip
CANDIDATES = [(rate, epochs) for epochs in (5, 20, 60) for rate in (0.03, 0.1, 0.3)]


def cell(folder: Path, dataset: str, method: Method, seed: int) -> Path:
    return folder / f"{Path(dataset).stem}-{method.name.replace(' ', '_').replace(',', '')}-seed{seed}.npz"


def run_all(methods, datasets, seeds, folder: Path, root: str, classes=("base", "new"), **how) -> None:
    """Run every cell that the folder does not hold yet; ``how`` is for the Laboratory."""
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        todo = [(m, s) for s in seeds for m in methods if not cell(folder, dataset, m, s).exists()]
        laboratory = Laboratory(dataset, root, **{"classes": classes, **how}) if todo else None
        for method, seed in track(todo, Path(dataset).stem):
            name = method.trained_as
            kept = folder / "trained" / cell(folder, dataset, Method(name, ""), seed).stem if name else None
            outcome = laboratory.run(method, seed, kept=kept)
            aside = folder / f".{os.getpid()}.npz"
            np.savez_compressed(aside, parameters=outcome.parameters, seconds=outcome.seconds, **outcome.correct)
            os.replace(aside, cell(folder, dataset, method, seed))
            print(f"{Path(dataset).stem} seed {seed} {method.name}: {outcome.harmonic_mean:.1f}", flush=True)


def read(folder: Path, dataset: str, method: Method, seed: int) -> Outcome:
    with np.load(cell(folder, dataset, method, seed)) as data:
        correct = {part: data[part] for part in ("base", "new")}
        return Outcome(correct, int(data["parameters"]), float(data["seconds"]))


def show(methods, datasets, seeds, folder: Path, ours=OURS, others=(*HOST_ROWS, *CONTROLS)) -> dict:
    """Print the table of means over seeds and the paired differences of ``ours`` to ``others``; returns both."""
    outcomes = {m.name: [read(folder, d, m, s) for d in datasets for s in seeds] for m in methods}
    n = len(seeds)
    short = [Path(d).stem.replace("emoji_scenes", "").strip("_") or "clean" for d in datasets]
    table = Table("method", *(f"{name}\nbase / new / HM" for name in [*short, "average"]), "± seeds", "trained")
    rows = {}
    for method in methods:
        every = outcomes[method.name]
        figures = np.array([[o.accuracy("base"), o.accuracy("new"), o.harmonic_mean] for o in every])
        figures = figures.reshape(len(datasets), n, 3)
        spread = f"{figures[..., 2].mean(0).std(ddof=1):.2f}" if n > 1 else "–"
        means = [*figures.mean(1), figures.mean((0, 1))]
        rows[method.name] = {
            "HM per seed": figures[..., 2].mean(0).round(2).tolist(), "parameters": every[0].parameters,
            **{name: dict(zip(("base", "new", "HM"), m.round(4).tolist(), strict=True))
               for name, m in zip([*short, "average"], means, strict=True)},
        }  # fmt: skip
        cells = [" / ".join(f"{x:.1f}" for x in m) for m in means]
        table.add_row(method.name, *cells, spread, f"{every[0].parameters:,}")
    Console(width=200).print(table)
    differences = {}
    for other in others:
        if ours in outcomes and other in outcomes:
            differences[other] = mean, low, high = paired_interval(outcomes[ours], outcomes[other])
            pairs = zip(outcomes[ours], outcomes[other], strict=True)
            alone = np.reshape([a.harmonic_mean - b.harmonic_mean for a, b in pairs], (len(datasets), n))
            seeds_alone = " ".join(f"{gain:+.2f}" for gain in alone.mean(0))
            print(
                f"{ours} minus {other}: {mean:+.2f} HM (95 % interval {low:+.2f} to {high:+.2f}); "
                f"by seed {seeds_alone}; least on a set with a seed {alone.min():+.2f}"
            )
    return {"rows": rows, "differences": differences}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of finished runs and table.json")
    parser.add_argument("--root", default="data")
    parser.add_argument("--datasets", nargs="+", default=FAMILY)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to run (default: all)")
    parser.add_argument(
        "--choose", choices=["host", "plugin"],
        help="on validation alone: CoOp's rates and lengths, or the plug-in's options",
    )  # fmt: skip
    args = parser.parse_args()
    import controls  # noqa: F401  (registers the control trainers)

    methods, folder, classes, compared = METHODS, args.out, ("base", "new"), {}
    if args.choose == "host":
        methods = METHODS[:1] + [
            Method(f"CoOp {r} {n}", "CoOp", {**COMMON, "OPTIM.LR": r, "OPTIM.MAX_EPOCH": n}, sees_tokens=False)
            for r, n in CANDIDATES
        ]
    elif args.choose == "plugin":
        methods = [Method(name, "CoOpSpotlighter", {**PLUGIN, **options}) for name, options in VARIANTS.items()]
    names = [method.name for method in methods]
    if unknown := set(args.rows or ()).difference(names):
        parser.error(f"--rows {min(unknown)}: no such row; there are {', '.join(names)}")
    methods = [method for method in methods if not args.rows or method.name in args.rows]
    if args.choose:
        folder, classes = folder / "choose", ("inner-base", "inner-new")
        compared = {"ours": methods[0].name, "others": [method.name for method in methods[1:]]}
    run_all(methods, args.datasets, args.seeds, folder, args.root, classes)
    result = show(methods, args.datasets, args.seeds, folder, **compared)
    aside = folder / "table.tmp"
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, folder / "table.json")


if __name__ == "__main__":
    main()
