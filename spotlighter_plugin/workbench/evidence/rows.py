"""The rows of the table: a name, how to make it on one data set with one seed, and the grid that it is tuned over.

Every row is tuned on a miniature of the task that is made of base classes alone: half of them play new, their
validation pictures are the test. Heads are tuned twice: for the harmonic mean of own halves and, in rows that end in
OPEN, for that in one label space.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from ...config import SpotlighterConfig, from_cfg
from . import heads, hosts
from .cell import Cell, Fitted, ReleasedFit
from .hosts import PICTURES, Kind, TextRegularised, rates
from .plugin import Attached, attach, first_hooked, measure
from .tasks import Task, configuration

OPEN = ", open"
WEIGHTS = (20.0, 5.0, 1.0)  # of L_reg_text
PROBE = "linear probe"
HALF = 0.5  # of the host's operations
TRAINING = ("losses", "lambda1", "lambda2", "lambda3", "lr_multiplier")  # options that a trained host does not meet


@dataclass
class Made:
    """A row on one data set with one seed.

    Attributes:
        fitted: answers pictures. trained: numbers trained. megabytes: what is kept beside the host.
        share: operations as a share of the host's. chosen: the setting that tuning chose.
    """

    fitted: Fitted
    trained: int = 0
    megabytes: float = 0.0
    share: float = 1.0
    chosen: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """settings: what a kept result of this row depends on, beside tower, data set and seed."""

    name: str
    make: Callable[[Cell], Made]
    settings: object = ""


def rows(kind: Kind) -> list[Row]:
    """All rows of a host, in the table's order."""
    host, memory = kind.trainer, ("cache", "whitened cache", "Gaussian classifier", "kernel ridge")
    short = rates(hosts.SHORT)
    released = [
        Row(f"{host} + TextRefiner", _released(False, short), short),
        Row(f"{host} + Spotlighter, as released", _released(True, short), short),
    ]
    return [
        Row("zero-shot", _zero_shot("zero-shot")),
        Row("zero-shot + templates", _zero_shot("zero-shot + templates")),
        Row(host, _host, kind.grid),
        *([] if kind.student else [Row(f"{host} + L_reg_text", _regularised, _regularised_grid(kind))]),
        *(
            Row(f"{host} + {name}{suffix}", _tuned_head(name, suffix), (kind.grid, heads.HEADS[name].grid))
            for suffix in ("", OPEN) for name in ("text residual", "templates", *memory)
        ),
        Row(f"{PROBE}, shots of all classes", _tuned_head(PROBE, ""), (kind.grid, heads.HEADS[PROBE].grid)),
        *(released if host == "CoOp" else ()),
        _with_plugin(kind, ", paper", _trained_with, preset="paper"),
        _with_plugin(kind, ", all tokens", _attached_to_all),
        _with_plugin(kind, ", half of the operations, random tokens", _attached, share=HALF, activation="random"),
        _with_plugin(kind, ", half of the operations", _attached, share=HALF),
        *(() if kind.keeps_tower else (_with_plugin(kind, ", trained together", _trained_with),)),
        _with_plugin(kind, "", _attached),
    ]  # fmt: skip


def _with_plugin(kind: Kind, suffix: str, way: Callable, **options) -> Row:
    config = asdict(SpotlighterConfig(**options))
    read = {name: value for name, value in config.items() if way is _trained_with or name not in TRAINING}
    settings = kind.grid, kind.grid_with_tokens, read
    return Row(f"{kind.trainer} + Spotlighter{suffix}", way(**options), settings)


# ---------------------------------------------------------------------------------------------------- how rows are made


def _zero_shot(name: str):
    return lambda cell: Made(cell.head_on(None, cell.task, name))


def _host(cell: Cell) -> Made:
    best, _, host = cell.host
    return Made(cell.head_on(host, cell.task, "host"), host.trained, chosen=best)


def _tuned_head(name: str, suffix: str):
    def make(cell: Cell) -> Made:
        host, head = cell.host[2], heads.HEADS[name]
        means = [mean[1 if suffix == OPEN else 0] for mean in cell.means_of(name)]
        best = head.grid[means.index(max(means))]
        fitted = cell.head_on(host, cell.task, name, best)
        trained = sum(v.numel() for v in fitted.state.values()) if name in ("text residual", PROBE) else 0
        return Made(fitted, host.trained + trained, heads.megabytes(fitted.state), chosen=best)

    return make


def _regularised(cell: Cell) -> Made:
    def make(cell: Cell, task: Task, setting: dict) -> Fitted:
        part = type("Regularised", (TextRegularised,), {"weight": setting["weight"]})
        return cell.head_on(cell.train(task, setting, parts=(part,)), task, "host")

    best, fitted = cell.tuned("L_reg_text", _regularised_grid(cell.kind), make)
    return Made(fitted, fitted.host.trained, chosen=best)


def _regularised_grid(kind: Kind) -> tuple[dict, ...]:
    """Weights by settings of the host's grid, as many in all as the host has."""
    n = len(kind.grid)
    return tuple({**kind.grid[i], "weight": WEIGHTS[(i + i // len(WEIGHTS)) % len(WEIGHTS)]} for i in range(n))


def _released(image_branch: bool, grid):
    def make(cell: Cell, task: Task, setting: dict) -> ReleasedFit:
        options = {**setting, "TRAINER.RELEASED.IMAGE_BRANCH": image_branch}
        last = len(cell.tower.vision.transformer.resblocks) - 1
        return ReleasedFit(cell.train(task, options, "CoOpReleased", block=last), task)

    def row(cell: Cell) -> Made:
        best, fitted = cell.tuned("released" if image_branch else "TextRefiner", grid, make)
        memory = fitted.host.state["refiner.memory"]
        return Made(fitted, fitted.host.trained, memory.numel() * 4 / 1e6, chosen=best)

    return row


def _attached(**options):
    """Spotlighter on the trained host: nothing more is trained."""

    def make(cell: Cell) -> Made:
        best, _, host = cell.host
        fitted = attach(host, SpotlighterConfig(**options), cell.task, cell.learned(host, cell.task), cell.tower)
        share, megabytes = measure(fitted, cell.tower)
        return Made(fitted, host.trained, megabytes, share, best)

    return make


def _attached_to_all():
    """Spotlighter that keeps every token: what its memory is worth alone."""

    def make(cell: Cell) -> Made:
        n_tokens = len(cell.tower.clip.visual.positional_embedding) - 1
        return _attached(select_block=-1, top_k=n_tokens)(cell)

    return make


def _trained_with(**options):
    """Spotlighter trained together with the host."""
    given = {f"TRAINER.SPOTLIGHTER.{name.upper()}": value for name, value in options.items()}

    def make(cell: Cell, task: Task, setting: dict) -> Attached:
        trainer = f"{cell.kind.trainer}Spotlighter"
        config = from_cfg(configuration(cell.dataset, cell.seed, cell.root, trainer, given))
        block = PICTURES
        if cell.kind.keeps_tower:
            untrained = Attached(cell.host[2], config, cell.task, {}, 0)
            block = first_hooked(untrained.wrapper(cell.task.names[: cell.task.known], cell.tower.device))
        host = cell.train(task, {**given, **setting}, trainer, block=block)
        return attach(host, config, task, task.pooled if cell.kind.student else task, cell.tower)

    def row(cell: Cell) -> Made:
        name = "-".join(["Spotlighter", *map(str, options.values())])
        best, fitted = cell.tuned(name, cell.kind.grid_with_tokens, make)
        share, megabytes = measure(fitted, cell.tower)
        return Made(fitted, fitted.host.trained, megabytes, share, best)

    return row
