"""`spotlighter bench`: the host and Spotlighter timed in turn in one process, on random weights."""

import ast
import itertools
import json
import os
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
from ...method.schedule import Step, Tower, groups, lengths
from ...method.schedule import operations as counted
from ...towers.clip import BUNDLED
from ...towers.prompts import normalize
from ...wrapper import SpotlighterWrapper
from .bench_hosts import DTYPES, HOSTS, SHAPES, build_host, logits_of, shape_of, upstream_logits
from .stopwatch import OUTSIDE, STAGES, alternate, operations, peak_memory, stages

SWEPT = {"preset": str, "select_block": int, "top_k": int}
TEACHER = "ViT-L/14"


@dataclass(frozen=True)
class Setting:
    """What is timed. select_block, top_k: None takes the preset's. device: a name of torch's.

    options: further options of the plug-in, names and values in turn as in a configuration file.
    """

    host: str = "coop"
    backbone: str = "ViT-B/16"
    batch_size: int = 32
    classes: int = 1000
    preset: str = "default"
    select_block: int | None = None
    top_k: int | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    runs: int = 10
    teacher: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self):
        _one_of("host", self.host, HOSTS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("preset", self.preset, PRESETS)
        for option in ("batch_size", "classes", "runs"):
            if getattr(self, option) < 1:
                raise ValueError(f"{_flag(option)} is {getattr(self, option)}, must be at least 1")
        self.steps  # noqa: B018  (raises for what the tower has not)

    @property
    def config(self) -> SpotlighterConfig:
        options = {"preset": self.preset, "select_block": self.select_block, "top_k": self.top_k}
        with _own_flags():
            return SpotlighterConfig(**options | _options(self.options))

    @property
    def tower(self) -> Tower:
        shape = shape_of(self.backbone)
        return Tower(shape.tokens, shape.layers, shape.width, shape.width // 64, shape.dim, shape.patch)

    @property
    def steps(self) -> list[Step]:
        """The blocks before which tokens are merged or cut, ascending, and how many go on at each."""
        with _own_flags():
            return self.config.steps(self.tower)


class Bench:
    """One host and one Spotlighter per setting, all around the same model; every bank and memory is full.

    settings: differ in preset, select_block and top_k only.
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
    def inference(self, upstream: bool = True, tick=lambda: None) -> list[dict]:
        """A record per setting, with the keys that `--json` writes; those of upstream are None if it is not timed."""
        text = self._kept_texts()
        legs = {"upstream": lambda: upstream_logits(self.host, self.images)} if upstream else {}
        legs["cached"] = lambda: logits_of(self.host, self.images, text)
        legs |= {number: partial(wrapper, self.images) for number, wrapper in enumerate(self.wrappers)}
        taken = alternate(legs, self.setting.runs, self.device, tick)
        memory = {name: peak_memory(work, self.device) for name, work in legs.items() if name != "upstream"}
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
                "peak_memory_mb_host": memory["cached"],
                "peak_memory_mb_spotlighter": memory[number],
                "runs": self.setting.runs,
            }
            for number, (setting, wrapper) in enumerate(zip(self.settings, self.wrappers, strict=True))
        ]

    def training(self, tick=lambda: None) -> list[dict]:
        """A record per setting: seconds and peak memory of a training step, host's and Spotlighter's."""
        legs = self._training_legs()
        taken = alternate(legs, self.setting.runs, self.device, tick)
        memory = {name: peak_memory(work, self.device) for name, work in legs.items()}
        for wrapper in self.wrappers:
            wrapper.eval()
        return [
            {
                **self._subject(number),
                "seconds_per_step_host": median(taken["host"]),
                "seconds_per_step_spotlighter": median(taken[number]),
                "time_ratio": _ratio(taken[number], taken["host"]),
                "peak_memory_mb_host": memory["host"],
                "peak_memory_mb_spotlighter": memory[number],
                "memory_ratio": memory[number] / memory["host"],
                "runs": self.setting.runs,
            }
            for number in range(len(self.wrappers))
        ]

    def _training_legs(self):
        legs = {"host": self._step(self._host_loss, self.wrappers[0])}
        return legs | {
            number: self._step(self._loss_of(wrapper), wrapper) for number, wrapper in enumerate(self.wrappers)
        }

    def operations(self, train: bool = False) -> list[tuple[int, int]]:
        """The host's operations and Spotlighter's in one pass on kept texts, or in one training step, per setting."""
        if train:
            host, *ours = (operations(step) for step in self._training_legs().values())
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


def arithmetic_limit(setting: Setting) -> float:
    """Speed-up by blocks × tokens alone: L (N + 1) / (s (N + 1) + (L - s)(k + 1)), and so on for further steps."""
    return sum(lengths(setting.tower)) / sum(lengths(setting.tower, setting.steps))


def swept(options: dict, sweep: str = "") -> list[Setting]:
    """The settings of `select_block=4,8,top_k=16,32`: all combinations, in the order of ``SWEPT``; one without a sweep.

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
    """One record as an object, several as a list; written aside, then renamed."""
    content = records[0] if len(records) == 1 else records
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)


def plot(records: list[dict], path: Path) -> None:
    """Images/s against kept tokens, a line per block, with the host on cached text; PNG, SVG or PDF by the name."""
    from ..pictures.figures import figure

    with figure(path, 6, 4) as axes:
        for block in sorted({record["select_block"] for record in records}):
            points = sorted(
                (r["top_k"], r["images_per_second_spotlighter"]) for r in records if r["select_block"] == block
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=f"before block {block}")
        axes.axhline(records[0]["images_per_second_host_cached_text"], color="grey", ls="--", label="host, cached text")
        axes.set(xlabel="kept tokens k", ylabel="images/s", title=f"{records[0]['host']}, {records[0]['backbone']}")
        axes.set_ylim(bottom=0)
        axes.legend()


def inference_table(settings: list[Setting], records: list[dict]) -> Table:
    """Records as people read them."""
    table = Table("s", "k", "upstream", "cached", "ours", "/upstream", "/cached", "limit", "MB")
    for setting, r in zip(settings, records, strict=True):
        table.add_row(
            *_cuts(setting),
            _number(r["images_per_second_host"], ".1f"),
            _number(r["images_per_second_host_cached_text"], ".1f"),
            _number(r["images_per_second_spotlighter"], ".1f"),
            _number(r["speedup"], ".3f", "×"),
            _number(r["speedup_over_cached_text"], ".3f", "×"),
            f"×{arithmetic_limit(setting):.3f}",
            f"{r['peak_memory_mb_host']:.0f} → {r['peak_memory_mb_spotlighter']:.0f}",
        )
    table.title = f"images/s: {_title(records[0])}"
    table.caption = "upstream: texts encoded on every batch; cached: host with texts kept; limit: blocks × tokens"
    return table


def training_table(settings: list[Setting], records: list[dict]) -> Table:
    table = Table("s", "k", "host s/step", "Spotlighter s/step", "time", "host MB", "Spotlighter MB", "memory")
    for setting, r in zip(settings, records, strict=True):
        numbers = r["seconds_per_step_host"], r["seconds_per_step_spotlighter"], r["time_ratio"]
        memory = r["peak_memory_mb_host"], r["peak_memory_mb_spotlighter"], r["memory_ratio"]
        row = "{:.3f} {:.3f} ×{:.3f} {:.0f} {:.0f} ×{:.3f}".format(*numbers, *memory).split()
        table.add_row(*_cuts(setting), *row)
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


app = typer.Typer(add_completion=False)


@app.command()
def command(
    options: Annotated[list[str], typer.Argument(help="after --: KEY VALUE options of TRAINER.SPOTLIGHTER")] = (),
    host: Annotated[str, typer.Option(help=", ".join(HOSTS))] = "coop",
    backbone: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}, or width=384,layers=6,…")] = "ViT-B/16",
    batch_size: Annotated[int, typer.Option()] = 32,
    classes: Annotated[int, typer.Option()] = 1000,
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "default",
    select_block: Annotated[
        int | None, typer.Option(help="s; negative counts from the end (default: preset's)")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="k (default: preset's)")] = None,
    sweep: Annotated[str, typer.Option(help="e.g. select_block=4,8,11,top_k=16,32 or preset=default,paper")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 (default: cuda where there is one)")] = "",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp32",
    runs: Annotated[int, typer.Option(help="rounds, after one that is not counted")] = 10,
    upstream: Annotated[bool, typer.Option(help="time the host with texts on every batch, too")] = True,
    train: Annotated[bool, typer.Option("--train", help="a training step instead of inference")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="also count operations and show where the time goes")
    ] = False,
    teacher: Annotated[
        str, typer.Option(help=f"PromptKD's teacher (default: {TEACHER}; bundled, custom: as student)")
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the records")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="speed against kept tokens, .png or .svg")] = None,
) -> None:
    """Time a host with and without Spotlighter, in turn, on random weights of the true architecture."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {"host": host, "backbone": backbone, "batch_size": batch_size, "classes": classes, "preset": preset}
    given |= {"select_block": select_block, "top_k": top_k, "device": device, "dtype": dtype, "runs": runs}
    settings = swept({**given, "teacher": teacher, "options": tuple(options)}, sweep)
    for flag, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{flag} {path}: the folder {path.absolute().parent} does not exist")
    if plot_file is not None:
        if train:
            raise ValueError("--plot shows images/s: leave out --train")
        from ..pictures.figures import check_path

        check_path("--plot", plot_file)
    bench, errors = Bench(settings), Console(stderr=True)
    with Progress(console=errors, transient=True) as bar:
        legs = len(settings) + 1 + (upstream and not train)
        task = bar.add_task(f"{host}, {backbone}", total=legs * (runs + 1))
        tick = lambda: bar.advance(task)  # noqa: E731
        records = bench.training(tick) if train else bench.inference(upstream, tick)
    console = Console()
    console.print((training_table if train else inference_table)(settings, records))
    if profile:
        console.print(operations_table(settings, bench.operations(train)))
        if not train:
            console.print(profile_table(settings, bench.profile()))
    if json_file is not None:
        write_json(records, json_file)
    if plot_file is not None:
        plot(records, plot_file)


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
