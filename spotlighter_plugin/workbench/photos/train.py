"""`spotlighter train PHOTOS`: a host and Spotlighter on a folder of class folders."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..training.train import Run

CONFIGURATION = "configs/datasets/pictures.yaml"
BACKBONES = {  # by library
    None: "ViT-B/16",
    "open_clip": "ViT-B-16/laion2b_s34b_b88k",
    "transformers": "openai/clip-vit-base-patch16",
}

app = typer.Typer(add_completion=False)


@app.command()
def command(
    photos: Annotated[Path, typer.Argument(help="a folder of pictures for each class, or such in train/ val/ test/")],
    options: Annotated[list[str] | None, typer.Argument(help="behind --: KEY VALUE …, options of train.py")] = None,
    host: Annotated[str, typer.Option(help="what is trained: CoOp, MaPLe, CLIPFit …")] = "CoOp",
    shots: Annotated[int, typer.Option(help="pictures of a class to train on; 0: all")] = 16,
    backbone: Annotated[
        str, typer.Option(help="OpenAI's name (default: ViT-B/16), a file, tiny or micro; or the library's name")
    ] = "",
    library: Annotated[
        str | None, typer.Option(help="open_clip (--backbone MODEL/WEIGHTS) or transformers (a name or a folder)")
    ] = None,
    output: Annotated[str, typer.Option(help="folder of the run (default: output/PHOTOS/HOST)")] = "",
    epochs: Annotated[int, typer.Option(help="0: as many as the host's configuration says")] = 0,
    seed: Annotated[int, typer.Option(help="of the split, the shots and the training")] = 1,
    without: Annotated[bool, typer.Option("--without", help="train the host alone, without Spotlighter")] = False,
) -> None:
    """Train on a folder of your own pictures. Nothing is written beside them."""
    from ... import ranks
    from ...errors import tell

    try:
        with ranks.joined():
            run = train(photos, host, shots, backbone, output, epochs, seed, without, options or (), library)
            if not ranks.is_first():
                return
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on")
        raise typer.Exit(130) from None
    folder = run.cfg.OUTPUT_DIR
    tested = len(run.trainer.dm.dataset.test)
    print(f"{run.results['accuracy']:.1f} % of {tested} other pictures are named right; the run is in {folder}")
    print(f"next: spotlighter predict {folder} PICTURES")


def train(
    photos: str | os.PathLike,
    host: str = "CoOp",
    shots: int = 16,
    backbone: str = "",
    output: str = "",
    epochs: int = 0,
    seed: int = 1,
    without: bool = False,
    options: tuple = (),
    library: str | None = None,
) -> "Run":
    """What the command does; returns the run. A killed run goes on where it was.

    Args: as the command's; options: names and values in turn.
    Raises: FileNotFoundError, FileExistsError, ValueError …, one line, for a user's mistake.
    """
    from ... import ranks
    from ...compat import ROOT
    from ...towers.clip import load_clip
    from ..training.runs import NOTE
    from ..training.saved import hosts
    from ..training.settings import import_trainers_and_datasets
    from ..training.train import run

    import_trainers_and_datasets()
    from datasets.pictures import class_pictures

    if library not in BACKBONES:
        raise ValueError(f"--library {library}: take open_clip or transformers, or leave it out")
    backbone = ":".join(filter(None, (library, backbone or BACKBONES[library])))
    photos = Path(photos).expanduser().absolute()
    class_pictures(photos)  # before weights are fetched
    known = {name.lower(): name for name in hosts()}
    if host.lower() not in known:
        raise ValueError(f"--host {host}: take one of {', '.join(known.values())}")
    trainer = known[host.lower()] + ("" if without else "Spotlighter")
    folder = Path(output or Path("output", photos.name, trainer))
    if (folder / NOTE).exists():
        raise FileExistsError(f"{folder} holds a finished run: take another --output or delete that folder")
    with ranks.first_alone():  # weights are fetched once
        size = load_clip(backbone).visual.input_resolution
    settings = {"DATASET.NUM_SHOTS": shots, "INPUT.SIZE": f"({size}, {size})"}
    settings |= {"OPTIM.MAX_EPOCH": epochs} if epochs else {}
    flags = ["--trainer", trainer, "--dataset-config-file", str(ROOT / CONFIGURATION), "--root", str(photos)]
    flags += ["--backbone", backbone, "--seed", str(seed), "--output-dir", str(folder)]
    return run([*flags, *(str(part) for pair in settings.items() for part in pair), *map(str, options)])
