"""`spotlighter visualize`: which tokens are lit, how embeddings move, how accuracy depends on an option."""

import contextlib
import io
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from clip.clip import _transform as clip_transform
from dassl.engine import SimpleTrainer

from ...config import PRESETS, SpotlighterConfig
from ...files import read_picture
from ...towers.clip import load_clip, require_vision_transformer
from ...wrapper import SpotlighterWrapper
from ..training.settings import import_trainers_and_datasets, parse, read_settings, setup_cfg
from .curves import draw_curves, read_points
from .figures import check_path, figure

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Pictures: lit tokens, embeddings, curves.")
LEVELS = ("#ffd21f", "#35a7ff")  # outlines of level 1 and level 2
MEANING = ("level 1: the upper half of the kept tokens by score", "level 2: the lower half", "dark: dropped")
COLUMNS = 6  # images in a row
BATCH = 64  # images at once

RunOption = Annotated[Path | None, typer.Option(help="output folder of a run of train.py, of a host or of Spotlighter")]
EpochOption = Annotated[int | None, typer.Option(help="epoch of the run (default: the best, else the last)")]
RootOption = Annotated[Path | None, typer.Option(help="folder of the data sets (default: the run's)")]


# ----------------------------------------------------------------------------------------------------------- the model


def load_run(folder: Path, epoch: int | None = None, root: Path | None = None) -> SimpleTrainer:
    """The trainer of a run with its checkpoint; a host's run gets Spotlighter around it. Its model is the wrapper.

    Raises:
        FileNotFoundError, ValueError: one line; no run, no such epoch, or a trainer that Spotlighter does not know.
    """
    from ...runtime.dassl.engine.checkpoints import saved_epochs

    note = Path(folder, "config.yaml")
    if not note.is_file():
        raise FileNotFoundError(f"--run {folder} is no output folder of train.py: it has no config.yaml")
    import_trainers_and_datasets()
    cfg = read_settings(note)
    if not cfg.TRAINER.NAME.endswith("Spotlighter"):
        cfg.TRAINER.NAME += "Spotlighter"
    cfg.DATASET.ROOT = str(root or cfg.DATASET.ROOT)
    if epoch is None and not any(Path(folder).glob("*/model-best.pth.tar")):
        epochs = set().union(*(saved_epochs(part) for part in Path(folder).iterdir() if part.is_dir()))
        if not epochs:
            raise FileNotFoundError(f"--run {folder} holds no checkpoint")
        epoch = max(epochs)
    trainer = _build(cfg)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.load_model(str(folder), epoch=epoch)
    trainer.model.eval()
    return trainer


def plain_model(backbone: str, config: SpotlighterConfig, class_names: list[str], device) -> SpotlighterWrapper:
    """Zero-shot CLIP with Spotlighter around it, untrained."""
    clip_model = load_clip(backbone, device).requires_grad_(False)
    require_vision_transformer(clip_model, backbone)
    return SpotlighterWrapper(clip_model, config, class_names=class_names).eval()


def _build(cfg):
    from dassl.engine import TRAINER_REGISTRY, build_trainer

    if cfg.TRAINER.NAME not in TRAINER_REGISTRY.registered_names():
        raise ValueError(f"{cfg.TRAINER.NAME} is no trainer with Spotlighter: take a run of one of the hosts")
    cfg.defrost()
    cfg.USE_CUDA = cfg.USE_CUDA and torch.cuda.is_available()
    cfg.freeze()
    with contextlib.redirect_stdout(io.StringIO()):
        return build_trainer(cfg)


def read_images(paths: list[Path], size: int) -> torch.Tensor:
    """Images as CLIP sees them, (n, 3, size, size). Raises OSError naming the file that is none."""
    look = clip_transform(size)
    return torch.stack([look(read_picture(path)) for path in paths])


# -------------------------------------------------------------------------------------------------------------- tokens


@torch.no_grad()
def lit_levels(wrapper: SpotlighterWrapper, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Level of each patch, 0 where it is dropped: (B, g, g) of 0, 1, 2; and the logits (B, C)."""
    logits = wrapper(images)
    kept, levels = wrapper.kept, wrapper.config.levels  # (B, k), best first
    upper = (kept.shape[1] + 1) // 2 if levels == "1+2" else kept.shape[1] * (levels == "1")
    level = torch.where(torch.arange(kept.shape[1], device=kept.device) < upper, 1, 2)
    grid = round(wrapper.stream.n_tokens**0.5)
    flat = torch.zeros(len(kept), grid * grid, dtype=torch.long, device=kept.device)
    return flat.scatter(1, kept, level.expand_as(kept)).unflatten(1, (grid, grid)).cpu(), logits.cpu()


def draw_tokens(images: torch.Tensor, levels: torch.Tensor, titles: list[str], path: Path) -> None:
    """Each image above the same with its dropped tokens darkened, level 1 and level 2 outlined in their colours.

    images: (n, 3, h, h) as CLIP sees them; levels: (n, g, g).
    """
    pixels = _pixels(images)
    columns, rows = min(len(images), COLUMNS), -(-len(images) // COLUMNS)
    with figure(path, 2.2 * columns, 4.6 * rows, nrows=2 * rows, ncols=columns, squeeze=False) as axes:
        for ax in axes.flat:
            ax.axis("off")
        for number, (picture, level, title) in enumerate(zip(pixels, levels, titles, strict=True)):
            row, column = divmod(number, columns)
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            above.imshow(picture)
            above.set_title(title, fontsize=9)
            _draw_lit(below, picture, level)
        handles = [_patch((0, 0), 1, 1, colour) for colour in (*LEVELS, "none")]
        columns = 1 if columns < 4 else 3
        axes.flat[0].figure.legend(handles, MEANING, loc="outside lower center", ncols=columns, frameon=False)


def _pixels(images):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (images.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()  # (n, h, w, 3)


def _draw_lit(ax, picture, level):
    patch = picture.shape[0] // len(level)
    seen = F.interpolate((level > 0).float()[None, None], scale_factor=patch)[0, 0].numpy()  # (h, w) of 0, 1
    height = len(seen)
    ax.imshow(picture[:height, :height] * (0.2 + 0.8 * seen[..., None]))
    for colour, number in zip(LEVELS, (1, 2), strict=True):
        for row, column in (level == number).nonzero().tolist():
            ax.add_patch(_patch((column * patch - 0.5, row * patch - 0.5), patch, patch, colour))


def _patch(corner, width, height, colour):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1)


@app.command()
def tokens(
    images: Annotated[list[Path], typer.Argument(help="files")],
    backbone: Annotated[str, typer.Option(help="OpenAI's name, a file, tiny or micro; without --run")] = "tiny",
    run: RunOption = None,
    epoch: EpochOption = None,
    root: RootOption = None,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}; without --run")] = "default",
    top_k: Annotated[int | None, typer.Option(help="k (default: the preset's); without --run")] = None,
    select_block: Annotated[int | None, typer.Option(help="s (default: the preset's); without --run")] = None,
    activation: Annotated[str | None, typer.Option(help="of tokens (default: the preset's); without --run")] = None,
    class_names: Annotated[str, typer.Option(help="cat,dog,…: name what is seen; without --run")] = "",
    output: Annotated[Path, typer.Option(help=".png, .svg or .pdf")] = Path("tokens.png"),
) -> None:
    """Draw which tokens are lit, in which level, over each image."""
    check_path("--output", output)
    names = [name.strip() for name in class_names.split(",") if name.strip()]
    if run:
        trainer = load_run(run, epoch, root)
        model, names = trainer.model, list(trainer.model.class_names)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = SpotlighterConfig(preset=preset, top_k=top_k, select_block=select_block, activation=activation)
        model = plain_model(backbone, config, names or ["thing"], device)
    batch = read_images(images, model.adapter.layout.image_size[0])
    found = [lit_levels(model, part.to(model.adapter.logit_scale.device)) for part in batch.split(BATCH)]
    levels, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
    said = [f"\nseen as {names[c].replace('_', ' ')}" if names else "" for c in logits.argmax(1)]
    draw_tokens(batch, levels, [path.name + seen for path, seen in zip(images, said, strict=True)], output)
    print(f"{output}: which tokens are lit. Next: spotlighter visualize tokens --run FOLDER IMAGE… for a trained model")


# ---------------------------------------------------------------------------------------------------------------- tsne


def sample(items: list, classes: int, images: int) -> list:
    """Of Dassl's Datum items, the first ``images`` of ``classes`` labels that lie evenly among all."""
    by_label = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    labels = sorted(by_label)
    chosen = [labels[number * len(labels) // classes] for number in range(min(classes, len(labels)))]
    return [item for label in chosen for item in by_label[label][:images]]


@torch.no_grad()
def embeddings(wrapper: SpotlighterWrapper, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Unit-length embeddings of images (n, 3, h, h): the host's from all tokens, Spotlighter's from the kept ones."""
    host, lit = [], []
    for images in batch.split(BATCH):
        images = images.to(wrapper.adapter.logit_scale.device)
        host.append(F.normalize(wrapper.adapter.encode_image(images).float(), dim=-1))
        lit.append(wrapper.image_embeddings(images))
    return {"host": torch.cat(host).cpu(), "Spotlighter": torch.cat(lit).cpu()}


def draw_tsne(found: dict[str, torch.Tensor], labels: list[str], path: Path, seed: int = 0) -> None:
    """A panel per embedding (n, d), coloured by label; the title has the silhouette of the classes before t-SNE."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    names = list(dict.fromkeys(labels))
    numbers = [names.index(label) for label in labels]
    if len(names) < 2 or len(labels) < len(names) + 1:
        raise ValueError(
            f"t-SNE of {len(labels)} images in {len(names)} classes shows nothing: raise --classes, --images"
        )
    perplexity, colours = min(30, (len(labels) - 1) / 3), "tab10" if len(names) <= 10 else "nipy_spectral"
    with figure(path, 4.5 * len(found) + 1.5, 4.3, ncols=len(found), squeeze=False) as axes:
        for ax, (name, vectors) in zip(axes.flat, found.items(), strict=True):
            flat = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors.numpy())
            dots = ax.scatter(flat[:, 0], flat[:, 1], c=numbers, cmap=colours, s=9)
            silhouette = silhouette_score(vectors.numpy(), numbers)
            ax.set(xticks=[], yticks=[], xlabel="t-SNE, first axis", ylabel="t-SNE, second axis")
            ax.set_title(f"{name} (silhouette {silhouette:.3f})")
        handles = dots.legend_elements(num=list(range(len(names))))[0]
        axes.flat[-1].figure.legend(handles, names, loc="outside right center", fontsize=7, frameon=False)


@app.command()
def tsne(
    run: RunOption = None,
    epoch: EpochOption = None,
    root: RootOption = None,
    trainer: Annotated[str, typer.Option(help="without --run: this one, untrained")] = "CoOpSpotlighter",
    dataset_config_file: Annotated[str, typer.Option(help="without --run")] = "configs/datasets/icon_scenes.yaml",
    classes: Annotated[int, typer.Option(help="how many classes of the test set")] = 10,
    images: Annotated[int, typer.Option(help="how many images of each")] = 30,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option(help=".png, .svg or .pdf")] = Path("tsne.png"),
) -> None:
    """Figure 3: image embeddings of the test set, the host's beside Spotlighter's."""
    check_path("--output", output)
    for flag, value, least in (("--classes", classes, 2), ("--images", images, 1)):
        if value < least:
            raise ValueError(f"{flag} is {value}, must be at least {least}")
    if run:
        made = load_run(run, epoch, root)
    else:
        flags = ["--trainer", trainer, "--dataset-config-file", dataset_config_file, "--root", str(root or "")]
        made = _build(setup_cfg(parse(flags), import_trainers_and_datasets()))
        made.model.eval()
    items = sample(made.dm.dataset.test, classes, images)
    batch = read_images([item.impath for item in items], made.model.adapter.layout.image_size[0])
    draw_tsne(embeddings(made.model, batch), [item.classname.replace("_", " ") for item in items], output, seed)
    print(f"{output}: embeddings, a colour a class. Next: spotlighter visualize tsne --run FOLDER for a trained model")


# -------------------------------------------------------------------------------------------------------------- curves


@app.command()
def curves(
    results: Annotated[list[Path], typer.Argument(help="CSV or JSON; of ablate and report with --format csv")],
    x: Annotated[str, typer.Option(help="column(s) for x: k, or alpha,beta: a panel each")] = "",
    y: Annotated[str, typer.Option(help="column(s) for y (default: HM)")] = "",
    by: Annotated[str, typer.Option(help="column that tells lines apart")] = "",
    log_x: Annotated[bool, typer.Option("--log-x", help="a logarithmic x")] = False,
    output: Annotated[Path, typer.Option(help=".png, .svg or .pdf")] = Path("curves.png"),
) -> None:
    """Figures 4-7: accuracy against k, α, β, λ1-3 or shots."""
    check_path("--output", output)
    draw_curves([point for path in results for point in read_points(path, x, y, by)], output, log_x, y or "accuracy, %")
    print(f"{output}: curves. Next: --output {output.with_suffix('.pdf')} for a paper")
