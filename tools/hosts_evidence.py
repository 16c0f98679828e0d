"""The hosts' table: MaPLe, CLIPFit and PromptKD with and without Spotlighter, base-to-new on the EmojiScenes family.

    python tools/hosts_evidence.py --out docs/hosts             every row of every host, five data sets, three seeds
    python tools/hosts_evidence.py --out docs/hosts --choose    how each host's rate was chosen (validation only)
    python tools/hosts_evidence.py --out docs/hosts --seeds 1 --show    what is there, without running anything

These hosts train through the whole vision tower, so nothing can be cached: trainings are short, and every fourth test
scene is looked at. Finished runs are kept in the output folder, so a killed command goes on where it was.
"""

import argparse
from pathlib import Path

from evidence import FAMILY, Method, cell, run_all, show

THIN = 4
COMMON = {
    "OPTIM.NAME": "sgd", "OPTIM.LR_SCHEDULER": "cosine", "OPTIM.WARMUP_EPOCH": 0, "OPTIM.MAX_EPOCH": 1,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 16, "DATALOADER.NUM_WORKERS": 0, "TRAIN.PRINT_FREQ": 1000,
}  # fmt: skip
HOSTS = {"MaPLe": {"OPTIM.LR": 0.02}, "CLIPFit": {"OPTIM.LR": 0.02}}  # chosen with --choose
CANDIDATES = [("sgd", 0.02), ("adam", 0.001)]
ZERO_SHOT = Method("zero-shot CLIP", "ZeroshotCLIP", {"DATALOADER.NUM_WORKERS": 0})


def rows(host: str) -> list[Method]:
    """A host's rows: alone, with each control, with Spotlighter."""
    options = {**COMMON, **HOSTS[host]}
    plugin = f"{host}Spotlighter"
    return [
        Method(host, host, options, trained_as=host),
        Method(f"{host} + cache of CLS", f"{host}Cache", options, trained_as=host),
        Method(f"{host} + Spotlighter, random tokens", plugin, {**options, "TRAINER.SPOTLIGHTER.ACTIVATION": "random"}),
        Method(f"{host} + Spotlighter", plugin, options),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of finished runs")
    parser.add_argument("--root", default="data")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--datasets", nargs="+", default=FAMILY)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--choose", action="store_true", help="compare the hosts' rates on validation alone")
    parser.add_argument("--show", action="store_true", help="run nothing, print the data sets that are complete")
    args = parser.parse_args()
    import controls  # noqa: F401  (registers the control trainers)

    if args.choose:
        methods = [ZERO_SHOT] + [
            Method(f"{host} {optim} {rate}", host, {**COMMON, **HOSTS[host], "OPTIM.NAME": optim, "OPTIM.LR": rate})
            for host in args.hosts
            for optim, rate in CANDIDATES
        ]
        how = {"classes": ("inner-base", "inner-new"), "block": None, "thin": 2}
        run_all(methods, args.datasets, args.seeds, args.out / "choose", args.root, **how)
        show(methods, args.datasets, args.seeds, args.out / "choose")
        return
    for host in args.hosts:
        methods = [ZERO_SHOT, *rows(host)]
        if not args.show:
            run_all(methods, args.datasets, args.seeds, args.out, args.root, block=None, thin=THIN)
        done = [d for d in args.datasets if all(cell(args.out, d, m, s).exists() for m in methods for s in args.seeds)]
        if done:
            ours, others = methods[-1].name, [m.name for m in methods[1:-1]]
            show(methods, done, args.seeds, args.out, ours, others)


if __name__ == "__main__":
    main()
