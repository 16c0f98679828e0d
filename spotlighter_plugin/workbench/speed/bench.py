"""`spotlighter bench`: the host and Spotlighter timed in turn in one process, on random weights."""

import ast
import itertools
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...config import PRESETS, SpotlighterConfig
from ...files import write_aside
from ...method.schedule import Step, Tower, groups, lengths, rivals
from ...method.schedule import operations as counted
from ...towers.clip import BUNDLED
from ...towers.prompts import normalize
from ...wrapper import SpotlighterWrapper
from . import accuracy
from .bench_hosts import DTYPES, HOSTS, SHAPES, build_host, logits_of, shape_of, sliced, texts_alone, upstream_logits
from .stopwatch import OUTSIDE, STAGES, alternate, operations, peak_memory, stages

METHODS = ("spotlighter", "random", "merging", "evit")
SWEPT = {"batch_size": int, "preset": str, "share": float, "select_block": int, "top_k": int, "method": str}
TEACHER = "ViT-L/14"


@dataclass(frozen=True)
class Setting:
    """What is timed. share, select_block, top_k: None takes the preset's. device: a name of torch's.

    method: spotlighter, or at the same share of the operations tokens chosen at random, merging alone (as in ToMe), or
        cuts at a quarter, a half and three quarters of the depth (as in EViT). options: further options of the plug-in,
        names and values in turn as in a configuration file.
    """

    host: str = "coop"
    backbone: str = "ViT-B/16"
    batch_size: int = 32
    classes: int = 1000
    preset: str = "default"
    share: float | None = None
    select_block: int | None = None
    top_k: int | None = None
    method: str = "spotlighter"
    device: str = "cpu"
    dtype: str = "fp32"
    runs: int = 10
    teacher: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self):
        _one_of("host", self.host, HOSTS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("preset", self.preset, PRESETS)
        _one_of("method", self.method, METHODS)
        for option in ("batch_size", "classes", "runs"):
            if getattr(self, option) < 1:
                raise ValueError(f"{_flag(option)} is {getattr(self, option)}, must be at least 1")
        self.steps  # noqa: B018  (raises for what the tower has not)

    @property
    def config(self) -> SpotlighterConfig:
        options = {"preset": self.preset, "share": self.share, "select_block": self.select_block, "top_k": self.top_k}
        options |= _options(self.options)
        with _own_flags():
            if self.method == "random":
                options["activation"] = "random"
            ours = SpotlighterConfig(**options)
            if self.method in ("spotlighter", "random"):
                return ours
            spent = counted(self.tower, ours.steps(self.tower)) / counted(self.tower)
            placed = {"share": 0.0, "stages": (), "merge": 0} | rivals(spent, self.tower)[self.method]
            return SpotlighterConfig(**options | placed)

    @property
    def tower(self) -> Tower:
        return accuracy.tower_of(self.backbone)

    @property
    def steps(self) -> list[Step]:
        """The blocks before which tokens are merged or cut, ascending, and how many go on at each."""
        with _own_flags():
            return self.config.steps(self.tower)


class Bench:
    """One host and one Spotlighter per setting, all around the same model; every bank and memory is full.

    settings: differ in preset, share, select_block, top_k and method only.
    """

    def __init__(self, settings: list[Setting]):
        self.setting, self.settings = settings[0], settings
        self.device = _device(self.setting.device)
        shape, teacher = shape_of(self.setting.backbone), None
        if self.setting.host == "promptkd":
            named = self.setting.backbone in SHAPES and self.setting.backbone not in BUNDLED
            teacher = shape_of(self.setting.teacher or (TEACHER if named else self.setting.backbone))
        torch.manual_seed(0)
        options = self.setting.classes, self.setting.dtype, self.device, teacher
        self.host = build_host(self.setting.host, shape, *options)
        self.wrappers = [self._wrap(setting.config) for setting in settings]
        size = self.setting.batch_size, 3, shape.image, shape.image
        self.images = torch.randn(size, device=self.device)
        self.labels = torch.arange(self.setting.batch_size, device=self.device) % self.setting.classes

    def _wrap(self, config):
        wrapper = SpotlighterWrapper(self.host, config, check=False).eval()
        bank, memory = wrapper.plugin.bank, wrapper.plugin.memory
        if bank is not None:
            shape = self.setting.classes, config.prototypes
            bank.prototypes = torch.randn(*shape, bank.prototypes.shape[-1], device=self.device)
            bank.filled, bank.is_empty = torch.ones(shape, dtype=torch.bool, device=self.device), False
        if memory is not None:
            memory.metric.fill_diagonal_(1)
            memory.spread.fill_(1)
            memory.means.normal_()
            memory.counts.fill_(config.match_shots)
            memory.weight.fill_(1)
            memory.is_ready = True
        return wrapper

    @torch.no_grad()
    def inference(
        self, upstream: bool = True, compiled: bool = False, limit: bool = False, tick=lambda: None
    ) -> list[dict]:
        """A record per setting, with the keys that `--json` writes; None for what is not timed.

        upstream: the host with texts on every batch, too. compiled: host and Spotlighter as one graph each, too.
        limit: the host on as few tokens as Spotlighter leaves each block, sliced off for nothing, too.
        """
        text, images = self._kept_texts(), self.images
        legs = {"upstream": lambda: upstream_logits(self.host, images)} if upstream else {}
        legs["cached"] = lambda: logits_of(self.host, images, text)
        legs |= {number: partial(_call, wrapper, images) for number, wrapper in enumerate(self.wrappers)}
        eager = {name: work for name, work in legs.items() if name != "upstream"}
        ours = [number for number, setting in enumerate(self.settings) if setting.method == "spotlighter"]
        legs |= {(number, "limit"): self._as_short(number, text) for number in ours if limit}
        if compiled:
            torch._dynamo.reset()
            legs |= {(name, "compiled"): _compiled(eager[name]) for name in ("cached", *ours)}
        taken = alternate(legs, self.setting.runs, self.device, tick)
        memory = {name: peak_memory(work, self.device) for name, work in eager.items()}
        rate = {name: self.setting.batch_size / median(times) for name, times in taken.items()}
        return [
            {
                **self._subject(number),
                "images_per_second_host": rate.get("upstream"),
                "images_per_second_host_cached_text": rate["cached"],
                "images_per_second_spotlighter": rate[number],
                "speedup": _ratio(taken["upstream"], taken[number]) if upstream else None,
                "speedup_over_cached_text": _ratio(taken["cached"], taken[number]),
                "operations_ratio": counted(setting.tower, setting.steps) / counted(setting.tower),
                "extra_parameters": wrapper.extra_parameter_count(),
                "memory_mb": sum(kept.numel() * kept.element_size() for kept in wrapper.plugin.buffers()) / 1e6,
                "peak_memory_mb_host": memory["cached"],
                "peak_memory_mb_spotlighter": memory[number],
                "runs": self.setting.runs,
                "method": setting.method,
                "images_per_second_host_compiled": rate.get(("cached", "compiled")),
                "images_per_second_spotlighter_compiled": rate.get((number, "compiled")),
                "speedup_compiled": (
                    _ratio(taken["cached", "compiled"], taken[number, "compiled"])
                    if (number, "compiled") in taken
                    else None
                ),
                "speedup_limit": _ratio(taken["cached"], taken[number, "limit"])
                if (number, "limit") in taken
                else None,
            }
            for number, (setting, wrapper) in enumerate(zip(self.settings, self.wrappers, strict=True))
        ]

    def training(self, alone: bool = True, tick=lambda: None) -> list[dict]:
        """A record per setting: seconds and peak memory of a training step, of the host with each text encoded alone
        (None if not ``alone``), of the host with the texts' common beginning encoded once for several, and of
        Spotlighter, which has it so, too."""
        legs = self._training_legs(alone)
        taken = alternate(legs, self.setting.runs, self.device, tick)
        memory = {name: peak_memory(work, self.device) for name, work in legs.items()}
        for wrapper in self.wrappers:
            wrapper.eval()
        return [
            {
                **self._subject(number),
                "seconds_per_step_host_texts_alone": median(taken["alone"]) if alone else None,
                "seconds_per_step_host": median(taken["host"]),
                "seconds_per_step_spotlighter": median(taken[number]),
                "time_ratio_of_texts": _ratio(taken["host"], taken["alone"]) if alone else None,
                "time_ratio": _ratio(taken[number], taken["host"]),
                "peak_memory_mb_host_texts_alone": memory.get("alone"),
                "peak_memory_mb_host": memory["host"],
                "peak_memory_mb_spotlighter": memory[number],
                "memory_ratio_of_texts": memory["host"] / memory["alone"] if alone else None,
                "memory_ratio": memory[number] / memory["host"],
                "runs": self.setting.runs,
            }
            for number in range(len(self.wrappers))
        ]

    def _training_legs(self, alone):
        host = self._step(self._host_loss, self.wrappers[0])

        def with_texts_alone():
            with texts_alone(self.host):
                host()

        steps = (self._step(self._loss_of(wrapper), wrapper) for wrapper in self.wrappers)
        return ({"alone": with_texts_alone} if alone else {}) | {"host": host, **dict(enumerate(steps))}

    def operations(self, train: bool = False) -> list[tuple[int, int]]:
        """The host's operations and Spotlighter's in one pass on kept texts, or in one training step, per setting."""
        if train:
            host, *ours = (operations(step) for step in self._training_legs(False).values())
        else:
            text = self._kept_texts()
            with torch.no_grad():
                host = operations(lambda: logits_of(self.host, self.images, text))
                ours = [operations(partial(wrapper, self.images)) for wrapper in self.wrappers]
        return [(host, own) for own in ours]

    @torch.no_grad()
    def profile(self) -> list[dict[str, float]]:
        """Seconds of each stage of an inference pass, per setting."""
        self._kept_texts()
        return [stages(wrapper, self.images, self.setting.runs, self.device) for wrapper in self.wrappers]

    def _as_short(self, number, text):
        """A call of the host with each block as short as with this wrapper."""
        blocks, setting = self.wrappers[number].adapter.layout.blocks, self.settings[number]
        seen = lengths(setting.tower, setting.steps)

        def call():
            with sliced(blocks, seen):
                return logits_of(self.host, self.images, text)

        return call

    def _kept_texts(self):
        """Texts (C, d) that were encoded before, random ones in their place; the wrappers keep them as their own."""
        width = self.wrappers[0].adapter.dim
        text = normalize(torch.randn(self.setting.classes, width, device=self.device)).to(self.host.dtype)
        for wrapper in self.wrappers:
            wrapper.refresh()
            wrapper.adapter.encode_text = lambda: text
            wrapper(self.images)  # keeps them
            del wrapper.adapter.encode_text
        return text

    def _step(self, loss_of, wrapper):
        """One step of gradient descent on all that is trained, on a fresh copy: PromptKD knows its latest batch."""
        parameters = [p for p in wrapper.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

        def step():
            wrapper.train()
            optimizer.zero_grad()
            loss_of(self.images.clone()).backward()
            optimizer.step()

        return step

    def _loss_of(self, wrapper):
        return lambda images: wrapper(images, self.labels)["loss"]

    def _host_loss(self, images):
        adapter = self.wrappers[0].adapter
        text = adapter.encode_text()  # (C, d)
        logits = logits_of(self.host, images, text / text.norm(dim=-1, keepdim=True))
        return adapter.objective(logits, self.labels, {"images": images, "text": text})

    def _subject(self, number):
        setting = self.settings[number]
        last = setting.steps[-1]
        named = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "host": setting.host,
            "backbone": setting.backbone,
            "device": named,
            "dtype": setting.dtype,
            "batch_size": setting.batch_size,
            "classes": setting.classes,
            "select_block": last.block,
            "top_k": last.kept,
        }


def swept(options: dict, sweep: str = "") -> list[Setting]:
    """The settings of `share=0.5,0.8,batch_size=1,8`: all combinations, in the order of ``SWEPT``; one without a sweep.

    options: keyword arguments of ``Setting``.
    """
    values = {name: found.split(",") for name, found in re.findall(r"(\w+)=([^=]+)(?=,\w+=|$)", sweep)}
    names = [name for name in SWEPT if name in values]
    try:
        values = {name: [SWEPT[name](value) for value in values[name]] for name in values}
    except (KeyError, ValueError):
        names = []
    if bool(sweep) != bool(names):
        raise ValueError(f"--sweep {sweep!r}: give {', '.join(SWEPT)} as in select_block=4,8,top_k=16,32")
    combinations = itertools.product(*(values[name] for name in names))
    return [Setting(**options | dict(zip(names, each, strict=True))) for each in combinations]


def write_json(records: list[dict], path: Path) -> None:
    """One record as an object, several as a list."""
    content = records[0] if len(records) == 1 else records
    write_aside(path, lambda file: file.write(f"{json.dumps(content, indent=2)}\n".encode()), "--json")


def plot(records: list[dict], path: Path) -> None:
    """Speed-up over the host with kept texts, against the share of its operations; PNG, SVG or PDF by the name."""
    from ..pictures.figures import figure

    with figure(path, 6, 4) as axes:
        for method, batch in dict.fromkeys((r["method"], r["batch_size"]) for r in records):
            of_line = [r for r in records if (r["method"], r["batch_size"]) == (method, batch)]
            points = sorted((r["operations_ratio"], r["speedup_over_cached_text"]) for r in of_line)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{method}, batch {batch}")
        shares = sorted({r["operations_ratio"] for r in records} | {1.0})
        axes.plot(shares, [1 / share for share in shares], color="grey", ls="--", label="operations alone")
        axes.set(xlabel="share of the host's operations", ylabel="speed-up over the host with kept texts")
        axes.set_title(f"{records[0]['host']}, {records[0]['backbone']}")
        axes.legend()


def inference_table(settings: list[Setting], records: list[dict]) -> Table:
    """Records of one batch size as people read them: a row for each way to run the host, and for each setting."""
    host = records[0]
    peak, kept = f"{host['peak_memory_mb_host']:.0f}", host["images_per_second_host_cached_text"]
    table = Table("", "s", "k", "operations", "images/s", "/host", "peak MB", "right − host", "same", padding=0)
    ways = ("as upstream", "", ""), ("texts kept", "_cached_text", peak), ("compiled", "_compiled", "")
    for name, key, megabytes in ways:
        rate = host[f"images_per_second_host{key}"]
        if rate is not None:
            table.add_row(f"host, {name}", "", "", "1.00", f"{rate:.1f}", f"×{rate / kept:.2f}", megabytes)
    for setting, r in zip(settings, records, strict=True):
        known = r["accuracy_minus_host"] is not None
        table.add_row(
            r["method"],
            *_cuts(setting),
            f"{r['operations_ratio']:.2f}",
            f"{r['images_per_second_spotlighter']:.1f}",
            f"×{r['speedup_over_cached_text']:.2f}",
            f"{r['peak_memory_mb_spotlighter']:.0f}",
            "{accuracy_minus_host:+.1f} ({accuracy_low:+.1f} to {accuracy_high:+.1f})".format(**r) if known else "–",
            f"{r['same_answers']:.1f} %" if known else "–",
        )
        if r["speedup_compiled"] is not None:
            rate, ratio = r["images_per_second_spotlighter_compiled"], r["speedup_compiled"]
            table.add_row("  compiled", "", "", "", f"{rate:.1f}", f"×{ratio:.2f}")
        if r["speedup_limit"] is not None:
            table.add_row("  limit", "", "", "", "", f"×{r['speedup_limit']:.2f}")
    table.title = f"images/s: {_title(host)}"
    table.caption = CAPTION.format(**host)
    return table


def training_table(settings: list[Setting], records: list[dict]) -> Table:
    """Records of training steps as people read them: seconds and MB, each as a share of the column before."""
    table = Table("s", "k", "", "host, each text alone", "texts once per prefix", "with Spotlighter")
    for setting, r in zip(settings, records, strict=True):
        kinds = ("s", ".2f", "seconds_per_step", "time"), ("MB", ".0f", "peak_memory_mb", "memory")
        for unit, form, key, ratio in kinds:
            alone, host, own = (r[f"{key}_{leg}"] for leg in ("host_texts_alone", "host", "spotlighter"))
            once, with_it = r[f"{ratio}_ratio_of_texts"], r[f"{ratio}_ratio"]
            cuts = _cuts(setting) if unit == "s" else ["", ""]
            shared = f"{host:{form}}" if alone is None else f"{host:{form}} ×{once:.3f}"
            table.add_row(*cuts, unit, _number(alone, form), shared, f"{own:{form}} ×{with_it:.3f}")
    table.title = f"one training step: {_title(records[0])}"
    return table


def profile_table(settings: list[Setting], profiles: list[dict[str, float]]) -> Table:
    """Where the time of a pass goes, in percent of it."""
    table = Table("s", "k", "ms", *STAGES, "outside the tower", title="where the time goes, %", padding=0)
    for setting, profile in zip(settings, profiles, strict=True):
        total = sum(profile.values())
        outside = sum(profile[stage] for stage in OUTSIDE)
        shares = [f"{100 * part / total:.1f}" for part in (*profile.values(), outside)]
        table.add_row(*_cuts(setting), f"{1000 * total:.1f}", *shares)
    return table


def operations_table(settings: list[Setting], counted: list[tuple[int, int]]) -> Table:
    """Operations, which no other process on the machine can change."""
    table = Table("s", "k", "host", "Spotlighter", "host / Spotlighter", title="billions of operations")
    for setting, (host, own) in zip(settings, counted, strict=True):
        table.add_row(*_cuts(setting), f"{host / 1e9:.1f}", f"{own / 1e9:.1f}", f"×{host / own:.3f}")
    return table


CAPTION = (
    "/host: over the host with kept texts, compiled over compiled; right, same: the same blocks and tokens (or share "
    "of the operations) on the bundled tower, zero-shot, in points of accuracy with a 95 % interval, and answers that "
    "are the host's; limit: the host on as few tokens, sliced off for nothing; "
    "{memory_mb:.1f} MB kept for {classes} classes"
)
app = typer.Typer(add_completion=False)


@app.command()
def command(
    options: Annotated[list[str], typer.Argument(help="after --: KEY VALUE options of TRAINER.SPOTLIGHTER")] = (),
    host: Annotated[str, typer.Option(help=", ".join(HOSTS))] = "coop",
    backbone: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}, or width=384,layers=6,…")] = "ViT-B/16",
    batch_size: Annotated[int, typer.Option()] = 32,
    classes: Annotated[int, typer.Option()] = 1000,
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "default",
    share: Annotated[
        float | None, typer.Option(help="of the host's operations, in the place of s and k (default: preset's)")
    ] = None,
    select_block: Annotated[
        int | None, typer.Option(help="s; negative counts from the end (default: preset's)")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="k (default: preset's)")] = None,
    sweep: Annotated[str, typer.Option(help="e.g. batch_size=1,8,share=0.5,0.8 or select_block=8,11,top_k=16")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 (default: cuda where there is one)")] = "",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp32",
    runs: Annotated[int, typer.Option(help="rounds, after one that is not counted")] = 10,
    upstream: Annotated[
        bool, typer.Option(help="time the host with texts on every batch, too; in training, with each text alone")
    ] = True,
    others: Annotated[
        bool,
        typer.Option(
            "--others", help=f"{', '.join(METHODS[1:])} at the same share of the operations, and the limit, too"
        ),
    ] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="host and each row as one graph, too")] = False,
    judged: Annotated[
        bool, typer.Option("--accuracy", help="run on the bundled tower what results/ does not know: a minute a row")
    ] = False,
    train: Annotated[bool, typer.Option("--train", help="a training step instead of inference")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="also count operations and show where the time goes")
    ] = False,
    teacher: Annotated[
        str, typer.Option(help=f"PromptKD's teacher (default: {TEACHER}; bundled, custom: as student)")
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the records")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="speed against operations, .png or .svg")] = None,
) -> None:
    """Time a host with and without Spotlighter, in turn, on random weights of the true architecture."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {"host": host, "backbone": backbone, "batch_size": batch_size, "classes": classes, "preset": preset}
    given |= {"share": share, "select_block": select_block, "top_k": top_k, "device": device, "dtype": dtype}
    sweep = f"{sweep},method={','.join(METHODS)}".strip(",") if others else sweep
    settings = swept({**given, "runs": runs, "teacher": teacher, "options": tuple(options)}, sweep)
    for flag, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{flag} {path}: the folder {path.absolute().parent} does not exist")
    for flag, given in (("--plot", plot_file), ("--compiled", compiled), ("--accuracy", judged), ("--others", others)):
        if train and given:
            raise ValueError(f"{flag} shows images/s: leave out --train")
    if plot_file is not None:
        from ..pictures.figures import check_path

        check_path("--plot", plot_file)
    console, records, kept = Console(), [], accuracy.read()
    for size, group in itertools.groupby(settings, key=lambda setting: setting.batch_size):
        group = list(group)
        bench = Bench(group)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            legs = (len(group) + 1) * (1 + compiled) + upstream
            legs += sum(setting.method == "spotlighter" for setting in group) * others
            task = bar.add_task(f"{host}, {backbone}, batch {size}", total=legs * (runs + 1))
            tick = lambda task=task, bar=bar: bar.advance(task)  # noqa: E731
            found = bench.training(upstream, tick) if train else bench.inference(upstream, compiled, others, tick)
        if not train:
            found = [judge(kept, setting, record, judged) for setting, record in zip(group, found, strict=True)]
        console.print((training_table if train else inference_table)(group, found))
        if profile:
            console.print(operations_table(group, bench.operations(train)))
            if not train:
                console.print(profile_table(group, bench.profile()))
        records += found
        if json_file is not None:
            write_json(records, json_file)
    if plot_file is not None:
        plot(records, plot_file)


def judge(kept: dict, setting: Setting, record: dict, run: bool = False) -> dict:
    """The record with the accuracy of its configuration on the bundled tower; None where it is not known."""
    row = accuracy.find(kept, setting.config, setting.tower, setting.dtype, run)
    keys = {"accuracy_minus_host": "minus_host", "accuracy_low": "low", "accuracy_high": "high", "same_answers": "same"}
    return record | {key: row and getattr(row, name) for key, name in keys.items()}


def _call(model, images):
    return model(images)


def _compiled(work):
    made = torch.compile(lambda: work(), fullgraph=True, dynamic=False)
    return lambda: made()


def _ratio(slower: list[float], faster: list[float]) -> float:
    return median(a / b for a, b in zip(slower, faster, strict=True))


def _options(words):
    """{name: value} of names and values in turn; a value that is no Python literal is a string."""
    known, options = {field.name for field in fields(SpotlighterConfig)}, {}
    if len(words) % 2:
        raise ValueError(f"options are KEY VALUE pairs, {words[-1]!r} stands alone")
    for key, value in zip(words[::2], words[1::2], strict=True):
        if key.lower() not in known:
            raise ValueError(f"{key} is no option of TRAINER.SPOTLIGHTER: take {', '.join(sorted(known)).upper()}")
        try:
            options[key.lower()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.lower()] = value
    return options


def _cuts(setting):
    """The columns s and k: the blocks before which tokens are merged or cut, and what goes on, a line each."""
    rows = []
    for group in groups(setting.steps):
        first, last = group[0], group[-1]
        rows.append((f"{first.block}-{last.block}" if len(group) > 1 else f"{first.block}", f"{last.kept}"))
    return ["\n".join(part) for part in zip(*rows, strict=True)] or ["", ""]


def _title(record):
    names = "host", "backbone", "device", "dtype"
    return ", ".join([*(record[name] for name in names), f"batch {record['batch_size']}, {record['classes']} classes"])


def _number(value, form, sign=""):
    return "–" if value is None else f"{sign}{value:{form}}"


def _device(name):
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {name!r} is not there ({str(error).splitlines()[0][:100]}): take cpu or cuda"
        ) from None
    return device


def _one_of(option, value, known):
    if value not in known:
        raise ValueError(f"{_flag(option)} {value!r} is unknown: take {', '.join(known)}")


def _flag(option):
    return "--" + option.replace("_", "-")


@contextmanager
def _own_flags():
    """Errors of the configuration name this command's options."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"TRAINER\.SPOTLIGHTER\.(\w+)", lambda found: _flag(found[1].lower()), str(error))
        raise ValueError(text) from None
