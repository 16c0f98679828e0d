"""The hosts' table: MaPLe, CLIPFit and PromptKD with and without Spotlighter, base-to-new on the EmojiScenes family.

    python tools/hosts_evidence.py --out docs/hosts             every row of every host, five data sets, three seeds
    python tools/hosts_evidence.py --out docs/hosts --choose    rates of each host, compared on validation alone
    python tools/hosts_evidence.py --out docs/hosts --show      what is there, without running anything

These hosts train through the whole vision tower, so no hidden state can be kept: trainings are short, and every fifth
test scene is looked at. Finished runs are kept in the output folder, so a killed command goes on where it was.
PromptKD's student is the bundled micro CLIP, its teacher the wider tiny one, tuned by PromptSRC on the base classes'
shots. The student sees the shots of all classes without labels, as upstream's does (TRAINER.MODAL base2novel), and what
is remembered is filed under the teacher's labels. Its rates are compared on base classes alone (cross).
"""

import argparse
import contextlib
from pathlib import Path

import torch
from evidence import FAMILY, Method, cell, run_all, show
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from spotlighter_plugin.towers.clip import cpu_has_bfloat16

THIN = 5  # scenes of a class take turns between two vendors: an even number would see one of them alone
RATE, EPOCHS, TOWER = "OPTIM.LR", "OPTIM.MAX_EPOCH", "MODEL.BACKBONE.NAME"
BATCH = "DATALOADER.TRAIN_X.BATCH_SIZE"
TEN = "a photo on a gray spotted background of a flat"  # what the captions of the bundled towers are like
MAPLE_TEN = {"TRAINER.MAPLE.N_CTX": 10, "TRAINER.MAPLE.CTX_INIT": TEN}
MAPLE_TWO = {"TRAINER.MAPLE.N_CTX": 2, "TRAINER.MAPLE.CTX_INIT": "a photo of a"}
SRC_TEN = {"TRAINER.PROMPTSRC.N_CTX_TEXT": 10, "TRAINER.PROMPTSRC.CTX_INIT": TEN}
SRC_FOUR = {"TRAINER.PROMPTSRC.N_CTX_TEXT": 4, "TRAINER.PROMPTSRC.CTX_INIT": "a photo of a"}
TEXT_LOSS = "TRAINER.PROMPTSRC.TEXT_LOSS_WEIGHT"
COMMON = {
    "OPTIM.NAME": "sgd", "OPTIM.LR_SCHEDULER": "cosine", "OPTIM.WARMUP_EPOCH": 0, "OPTIM.LR": 0.02,
    "OPTIM.MAX_EPOCH": 1, "DATALOADER.TRAIN_X.BATCH_SIZE": 16, "DATALOADER.NUM_WORKERS": 0, "TRAIN.PRINT_FREQ": 1000,
    "TRAINER.SPOTLIGHTER.LOSSES": "()",
}  # fmt: skip
HOSTS = {
    "MaPLe": {RATE: 0.04, EPOCHS: 2, BATCH: 32, "TRAINER.MAPLE.PREC": "amp", **MAPLE_TEN},
    "CLIPFit": {RATE: 0.02, EPOCHS: 2, BATCH: 32, "TRAINER.CLIPFIT.PREC": "amp"},
    "PromptKD": {
        TOWER: "micro", "OPTIM.NAME": "adam", "OPTIM.LR": 0.003, "OPTIM.MAX_EPOCH": 3, "TRAINER.MODAL": "base2novel",
        "TRAINER.PROMPTKD.TEACHER_NAME": "tiny", "TRAINER.PROMPTKD.PREC": "amp", "TRAINER.PROMPTKD.KD_WEIGHT": 1000.0,
        "TRAINER.PROMPTKD.CTX_INIT": TEN, "TRAINER.SPOTLIGHTER.MATCH_SHOTS": 32,
    },
}  # fmt: skip
CANDIDATES = {
    "MaPLe": [
        {RATE: r, EPOCHS: n, BATCH: b, **words}
        for r, n, b, words in (
            (0.04, 2, 32, MAPLE_TWO), (0.04, 2, 32, MAPLE_TEN), (0.02, 1, 16, MAPLE_TEN), (0.02, 3, 16, MAPLE_TWO),
        )
    ],
    "CLIPFit": [
        {RATE: r, EPOCHS: n, BATCH: b} for r, n, b in ((0.01, 2, 32), (0.01, 1, 16), (0.02, 2, 32), (0.005, 3, 16))
    ],
    "PromptSRC": [
        {RATE: r, EPOCHS: 2, BATCH: 32, **words, TEXT_LOSS: weight}
        for r, words, weight in ((0.02, SRC_FOUR, 25), (0.05, SRC_TEN, 1), (0.02, SRC_TEN, 25))
    ],
    "PromptKD": [{"TRAINER.MODAL": "cross", RATE: r, EPOCHS: n} for r, n in ((0.003, 3), (0.01, 3))],
}  # fmt: skip
RANDOM = {"TRAINER.SPOTLIGHTER.ACTIVATION": "random"}
ZERO_SHOT = Method("zero-shot CLIP", "ZeroshotCLIP", {"DATALOADER.NUM_WORKERS": 0})
STUDENT = Method("zero-shot CLIP, student's tower", "ZeroshotCLIP", {**ZERO_SHOT.options, TOWER: "micro"})
TUNED = {**COMMON, RATE: 0.02, EPOCHS: 2, BATCH: 32, **SRC_TEN, TEXT_LOSS: 1, "TRAINER.PROMPTSRC.PREC": "amp"}
TEACHER = Method("PromptSRC (teacher)", "PromptSRC", TUNED, "PromptSRC")


def options_of(host: str, folder: Path, dataset: str, seed: int) -> dict:
    """A host's options; those of PromptKD name the teacher of this data set and seed."""
    options = {**COMMON, **HOSTS[host]}
    if host == "PromptKD":
        run = folder / "trained" / cell(folder, dataset, Method(TEACHER.trained_as, ""), seed).stem
        options["TRAINER.PROMPTKD.TEACHER_CHECKPOINT"] = run / f"VLPromptLearner/model.pth.tar-{TUNED[EPOCHS]}"
    return options


def rows(host: str, options: dict) -> list[Method]:
    """A host's rows: alone, with each control, with Spotlighter. PromptKD's texts are its teacher's, not tuned."""
    plugin, kind = f"{host} + Spotlighter", f"{host}Spotlighter"
    text_controls = [
        Method(f"{host} + L_reg_text", f"{host}TextRegularised", options),
        Method(f"{host} + text residual", f"{host}TextResidual", options),
    ]
    return [
        ZERO_SHOT,
        *([TEACHER, STUDENT] if host == "PromptKD" else []),
        Method(host, host, options, trained_as=host),
        *([] if host == "PromptKD" else text_controls),
        Method(f"{host} + cache of CLS", f"{host}Cache", options, trained_as=host),
        Method(f"{plugin}, attached, random tokens", f"{host}Attached", {**options, **RANDOM}, trained_as=host),
        Method(f"{plugin}, attached when trained", f"{host}Attached", options, trained_as=host),
        Method(plugin, kind, options),
    ]


def candidates(host: str, options: dict) -> list[Method]:
    """A host alone at every rate and length."""
    trained = {"PromptSRC": TUNED, host: options} if host == "PromptKD" else {host: options}
    methods = [
        Method(" ".join(str(part) for part in (name, *chosen.values()) if part != "cross"), name, {**common, **chosen})
        for name, common in trained.items() for chosen in CANDIDATES[name]
    ]  # fmt: skip
    there = rows(host, options)
    return [*there[: [method.trainer for method in there].index(host)], *methods]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of finished runs")
    parser.add_argument("--root", default="data")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--datasets", nargs="+", default=FAMILY)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    names = {method.name: None for host in HOSTS for method in rows(host, {})}
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help="rows to run (default: all)")
    parser.add_argument("--choose", action="store_true", help="compare rates of each host on validation alone")
    parser.add_argument("--show", action="store_true", help="run nothing; print the rows that are there")
    args = parser.parse_args()
    import controls  # noqa: F401  (registers the control trainers)

    make, folder, how = rows, args.out, {"thin": THIN}
    if args.choose:
        make, folder, how = candidates, args.out / "choose", {"thin": 2, "classes": ("inner-base", "inner-new")}
    tables = {}
    for host in args.hosts:
        pairs = [(dataset, seed) for dataset in args.datasets for seed in args.seeds]
        for dataset, seed in () if args.show else pairs:
            methods = make(host, options_of(host, folder, dataset, seed))
            methods = [method for method in methods if not args.rows or method.name in args.rows]
            with plain_attention():
                run_all(methods, [dataset], [seed], folder, args.root, block=None, **how)
        tables[host] = print_table(host, make(host, {}), args.datasets, args.seeds, folder)
    if not args.choose:
        needed = {host: {ZERO_SHOT.name, host, f"{host} + Spotlighter"} for host in tables}
        whole = {host: table for host, table in tables.items() if needed[host] <= table["rows"].keys()}
        if whole:
            print_summary(whole)


def plain_attention():
    """In bfloat16 on a CPU the fused attention kernel is the slower one, by a fifth of a training step."""
    in_bfloat16 = cpu_has_bfloat16() and not torch.cuda.is_available()
    return sdpa_kernel(SDPBackend.MATH) if in_bfloat16 else contextlib.nullcontext()


def print_table(host: str, methods: list[Method], datasets: list[str], seeds: list[int], folder: Path) -> dict:
    """Print the rows that are complete on the data sets and seeds on which the host is; says what is missing.

    Returns what `evidence.show` returns.
    """
    there = lambda method, dataset: all(cell(folder, dataset, method, seed).exists() for seed in seeds)  # noqa: E731
    alone = next(method for method in methods if method.trainer == host)
    done = [dataset for dataset in datasets if there(alone, dataset)]
    complete = [method for method in methods if done and all(there(method, dataset) for dataset in done)]
    table = {"rows": {}, "differences": {}}
    if complete:
        names = [method.name for method in complete]
        others = [name for name in names[:-1] if name.startswith(host)]  # the last is trained together, else attached
        table = show(complete, done, seeds, folder, names[-1], others)
    missing = [method.name for method in methods if method not in complete]
    if missing or len(done) < len(datasets):
        print(f"{host}: {len(done)} of {len(datasets)} data sets; not there yet: {', '.join(missing) or 'no row'}")
    return table


def print_summary(tables: dict[str, dict]) -> None:
    """Print a row for each host of the tables: its rows' average HM, and what Spotlighter gains."""
    short = ["host", "L_reg_text", "text residual", "cache", "random tokens", "attached", "trained together"]
    columns = [f"{name}\nHM" for name in short]
    summary = Table("host", "zero-shot\nbase / HM", "host\nbase", *columns, "minus host", "minus cache", "added to")
    for host, table in tables.items():
        averages = {name: row["average"] for name, row in table["rows"].items()}
        names = [method.name for method in rows(host, {}) if method.name.startswith(host)]
        names = names if len(names) == len(short) else [names[0], None, None, *names[1:]]  # texts are the teacher's
        gains = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*table["differences"][name]) if name in averages else "–"
            for name in (host, f"{host} + cache of CLS")
        ]
        own, with_ours = (table["rows"][name]["parameters"] for name in (host, f"{host} + Spotlighter"))
        summary.add_row(
            host, f"{averages[ZERO_SHOT.name]['base']:.1f} / {averages[ZERO_SHOT.name]['HM']:.1f}",
            f"{averages[host]['base']:.1f}", *(f"{averages[n]['HM']:.1f}" if n in averages else "–" for n in names),
            *gains, f"{with_ours - own} to {own:,}",
        )  # fmt: skip
    Console(width=200).print(summary)


if __name__ == "__main__":
    main()
