"""Prints docs/compatibility.md's tables: libraries and public repositories, tried for real with small random weights.

    SPOTLIGHTER_UPSTREAM=checkouts python tools/compatibility.py [libraries] [NAME …]

SPOTLIGHTER_UPSTREAM names a folder with checkouts by the names below, and of Dassl as `dassl`; what is not there is
left out. Each repository's own train.py runs on a copy, on the CPU, with a CLIP of random weights and 80 pictures of
plain colours: attached, trained for an epoch on the base classes, loaded again and evaluated on the new ones, detached.
What repositories import has to be installed: plotnine (DePT), learn2learn (ProMetaR), kmeans-pytorch (TAC).
"""

import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

importlib.import_module("spotlighter_plugin")  # before clip: mends what it imports

import fork_kit  # noqa: E402
import torch  # noqa: E402
from fork_kit import SHORT_RUN, UPSTREAM, execute  # noqa: E402

COLUMNS = ("recognised", "attached", "invariance error", "trained", "new classes", "detached")
CALL = ("-m", "spotlighter_plugin")


@dataclass(frozen=True)
class Repository:
    """A checkout by its folder, the trainer, its configuration, and options that suit a tower of so many blocks."""

    folder: str
    trainer: str
    config: str
    options: tuple[str, ...] = ()
    size: int = 32
    patch: int = 8
    embed: int = 512
    dassl: str = "dassl"
    data: str = "dtd"
    flags: tuple[str, ...] = ()  # of its train.py alone
    into: str = ""  # the checkout among whose trainers its one file belongs


B16 = "ViT-B/16"
REPOSITORIES = {
    "CoOp": Repository("CoOp", "CoOp", "trainers/CoOp/vit_b16"),
    "CoCoOp": Repository("CoOp", "CoCoOp", "trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1"),
    "MaPLe": Repository("multimodal-prompt-learning", "MaPLe", "trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx"),
    "PromptKD": Repository("PromptKD", "PromptKD", "trainers/PromptKD/vit_b16_c2_ep20_batch8_4+4ctx"),
    "CLIPFit": Repository("CLIPFit/CLIPFit", "ClipFit", "trainers/ClipFit/vit_b16_ep30"),
    "KgCoOp": Repository("KgCoOp/KgCoOp", "KgCoOp", "trainers/KgCoOp/vit_b16_ep100_ctxv1"),
    "ProGrad": Repository(
        "ProGrad/ProGrad.public",
        "ProGrad",
        "trainers/ProGrad/rn50",
        ("MODEL.BACKBONE.NAME", B16),
        dassl="ProGrad/Dassl.ProGrad.pytorch",
    ),
    "PromptSRC": Repository("PromptSRC", "PromptSRC", "trainers/PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx"),
    "TCP": Repository("TCP", "TCP", "trainers/TCP/vit_b16_ep100_ctxv1"),
    "MMA": Repository(
        "MMA",
        "MultiModalAdapter",
        "trainers/MultiModalAdapter/vit_b16_ep5",
        ("TRAINER.MMADAPTER.ADAPTER_START", "1", "TRAINER.MMADAPTER.ADAPTER_END", "2"),
    ),
    "RPO": Repository("RPO", "RPO", "trainers/RPO/main_K4", size=224, patch=16),
    "DePT": Repository("DePT", "ExtrasLinearProbeCoOp", "trainers/ExtrasLinearProbeCoOp/vit_b16_ep10_bs4_lr35"),
    "MMRL": Repository("MMRL", "MMRL", "trainers/MMRL/vit_b16", ("TASK", "B2N", "TRAINER.MMRL.REP_LAYERS", "[1,2]")),
    "MMRL++": Repository(
        "MMRL", "MMRLpp", "trainers/MMRLpp/vit_b16", ("TASK", "B2N", "TRAINER.MMRLpp.REP_LAYERS", "[1,2]")
    ),
    "ProMetaR": Repository("ProMetaR", "ProMetaR", "trainers/ProMetaR/vit_b16_c2_ep10_batch4_4+4ctx"),
    "CoPrompt": Repository("CoPrompt", "CoPrompt", "trainers/coprompt"),
    "LoCoOp": Repository("LoCoOp", "LoCoOp", "trainers/LoCoOp/vit_b16_ep50", data="imagenet", flags=("--topk", "2")),
    "TAC": Repository("TAC", "TAC", "trainers/TAC/basetonovel"),
    "HPT": Repository("HPT", "HPT", "trainers/HPT/b2n", ("DATASET.GPT_DIR", "data/gpt_data"), data="b2n/dtd"),
    "LASP": Repository("LASP", "LASP", "LASP/vit_b16_c4_ep10_batch1_cls_t2t_5_wcl_25_g1_b"),
    "PLOT++": Repository(
        "PLOT/plot-pp", "PLOTPP", "trainers/PLOTPP/vit", ("DATASET.NUM_SHOTS", "1"), flags=("--device", "cuda:0")
    ),
    "TaskRes": Repository(
        "TaskRes", "TaskRes", "trainers/TaskRes/adam_lr2e-3_B256_ep100", ("MODEL.BACKBONE.NAME", B16)
    ),
    "TextRefiner": Repository("TextRefiner", "TextRefiner", "trainers/TextRefiner/vit_b16_ep10_ctxv1"),
    "CLIP-Adapter": Repository("CLIP-Adapter", "CLIP_Adapter", "trainers/CoOp/vit_b16", embed=1024, into="CoOp"),
}
SCRIPTS = {  # repositories that are no trainers of Dassl's: their own clip, wrapped in Python
    "CLIP-LoRA": """
from types import SimpleNamespace
from loralib.utils import apply_lora
args = SimpleNamespace(encoder="both", position="all", backbone="ViT-B/16", params=["q", "k", "v"])
args.r, args.alpha, args.dropout_rate = 2, 1, 0.25
for tower in (model.transformer.resblocks, model.visual.transformer.resblocks):
    assert len(tower) == 12
layers = apply_lora(args, model)
for layer in layers:
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
""",
    "Tip-Adapter": "",
}
SCRIPT = """
import sys, torch
sys.path.insert(0, ".")
import spotlighter_plugin
from clip.model import CLIP
torch.manual_seed(0)
model = CLIP(64, 32, 12, 64, 8, 77, 49408, 64, 1, 12).eval()
{own}
model.eval()
from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
images, names = torch.randn(6, 3, 32, 32), ["red", "green", "blue"]
with torch.no_grad():
    state, before = {{k: v.clone() for k, v in model.state_dict().items()}}, model.encode_image(images)
    wrapper = SpotlighterWrapper(model, SpotlighterConfig(top_k=8), class_names=names)
    print("differ by", f"{{wrapper.invariance:.1e}}", "of their scale")
    labels = torch.arange(6) % 3
    wrapper.remember([(images, labels)])
    assert wrapper(images).shape == (6, 3)
    wrapper.detach()
    assert torch.equal(model.encode_image(images), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
print("done")
"""


def try_repository(repository: Repository, folder: Path) -> dict[str, str]:
    """The row of one repository."""
    copy, row = folder / "fork", dict.fromkeys(COLUMNS, "")
    ignore = shutil.ignore_patterns(".git", "*.png", "*.jpg", "Dassl*", "output", "__pycache__")
    shutil.copytree(UPSTREAM / (repository.into or repository.folder), copy, ignore=ignore)
    if repository.into:
        add_trainer(UPSTREAM / repository.folder, copy)
    fork_kit.provide(copy, folder, repository.embed, repository.size, repository.patch)
    before = contents(copy)
    out, err, status = execute(copy, *CALL, "attach", ".", "--trainer", repository.trainer)
    row["recognised"] = "yes" if status == 0 else one_line(err)
    if status:
        return row
    trainer = re.search(r"--trainer (\S+)", out)[1]
    short = [*SHORT_RUN, "INPUT.SIZE", f"({repository.size}, {repository.size})", "TRAINER.SPOTLIGHTER.TOP_K", "8"]

    def run(output, classes, *flags):
        """What a run said, on the screen or (DePT) in its log alone; what went wrong, and the exit code."""
        command = (
            *("train.py", "--root", str(folder / "data"), "--seed", "1", "--trainer", trainer, "--output-dir", output),
            *("--dataset-config-file", f"configs/datasets/{repository.data}.yaml", *repository.flags, *flags),
            *("--config-file", f"configs/{repository.config}.yaml", *short, *repository.options),
        )
        try:
            out, err, status = execute(copy, *command, "DATASET.SUBSAMPLE_CLASSES", classes, dassl=repository.dassl)
        except subprocess.TimeoutExpired as error:
            out, err, status = (error.stdout or b"").decode(), f"not done within {error.timeout:.0f} s", 124
        return "\n".join([out, *(log.read_text() for log in (copy / output).glob("log.txt*"))]), err, status

    out, err, status = run("output/a", "base")
    found = re.search(r"differ by (\S+) of their scale", out)
    row["attached"] = "yes" if found else one_line(err)
    row["invariance error"] = found[1] if found else ""
    row["trained"] = "yes" if status == 0 and "* accuracy" in out else one_line(err) if found else ""
    if row["trained"] == "yes":
        out, err, status = run("output/b", "new", "--eval-only", "--model-dir", "output/a", "--load-epoch", "1")
        row["new classes"] = "yes" if status == 0 and "Loaded spotlighter" in out else one_line(err)
    execute(copy, *CALL, "attach", ".", "--detach")
    row["detached"] = "yes" if contents(copy) == before else "no"
    return row


def add_trainer(checkout: Path, copy: Path) -> None:
    """Put a repository's one file among a fork's trainers, as its README says."""
    (file,) = checkout.glob("*.py")
    shutil.copy(file, copy / "trainers" / file.name)
    script = (copy / "train.py").read_text()
    line = "import trainers.coop\n"
    (copy / "train.py").write_text(script.replace(line, f"{line}import trainers.{file.stem}\n"))


def try_script(own: str, checkout: Path) -> dict[str, str]:
    """The row of a repository whose CLIP is wrapped in Python."""
    out, err, status = execute(checkout, "-c", SCRIPT.format(own=own))
    found = re.search(r"differ by (\S+) of their scale", out)
    whole = "yes" if status == 0 and "done" in out else one_line(err)
    return dict(zip(COLUMNS, ("yes", "yes" if found else "", found[1] if found else "", "", whole, whole), strict=True))


@torch.no_grad()
def libraries(names):
    """Rows of the libraries' models with random weights, each built by its own library, by name; all without names."""
    import clip.model

    from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
    from spotlighter_plugin.hosts import adapter_for
    from spotlighter_plugin.hosts.open_clip import OpenCLIPAdapter
    from spotlighter_plugin.hosts.transformers import TransformersAdapter

    def ids(length):
        return lambda texts: torch.tensor([[len(text) + i + 1 for i in range(length)] for text in texts])

    def openai():
        return adapter_for(clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12), ["cat", "dog"])

    def of_open_clip(name):
        import open_clip

        siglip = {"tokenizer": ids(64)} if "SigLIP" in name else {}
        model = open_clip.create_model(name)
        return OpenCLIPAdapter(model, ["cat", "dog"], **siglip)

    def of_transformers(name):
        import transformers

        siglip = {"tokenizer": ids(64)} if name == "Siglip" else {}
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())
        return TransformersAdapter(model, ["cat", "dog"], **siglip)

    made = {"OpenAI's clip ViT-B/16": openai}
    for name in ("ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP"):
        made[f"open_clip {name}"] = lambda name=name: of_open_clip(name)
    for name in ("CLIP", "Siglip"):
        made[f"transformers {name}Model"] = lambda name=name: of_transformers(name)
    for name, make in made.items():
        if names and not {name, "libraries"} & set(names):
            continue
        torch.manual_seed(0)
        adapter = make()
        model, images = adapter.model.eval(), torch.randn(2, 3, *adapter.layout.image_size)
        state, before = {k: v.clone() for k, v in model.state_dict().items()}, adapter.encode_image(images)
        wrapper = SpotlighterWrapper(model, SpotlighterConfig(top_k=32), adapter)
        wrapper.remember([(images, torch.arange(2))])
        classifies = wrapper(images).shape == (2, 2)
        wrapper.detach()
        same = torch.equal(adapter.encode_image(images), before)
        same = same and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        known = type(adapter_for(model, ["cat"]) if "Sig" not in name else adapter) is type(adapter)
        yield (
            name,
            dict(
                zip(
                    COLUMNS,
                    (
                        "yes" if known else "no",
                        "yes",
                        f"{wrapper.invariance:.1e}",
                        "",
                        "yes" if classifies else "no",
                        "yes" if same else "no",
                    ),
                    strict=True,
                )
            ),
        )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but what runs write."""
    written = ("output", "__pycache__", "cache", "datasets_cache", "~")
    files = (path for path in folder.rglob("*") if path.is_file() and not set(path.parts) & set(written))
    return {str(path): path.read_bytes() for path in files}


def one_line(err: str) -> str:
    """The last line of what went wrong."""
    lines = [line for line in err.strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")[:300] if lines else "no message"


def main(names: list[str]) -> None:
    """Print a row as soon as it is known."""
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)

    def show(name, row):
        print(f"| {name} | {' | '.join(row[column] for column in COLUMNS)} |", flush=True)

    for name, row in libraries(names):
        show(name, row)
    for name, repository in REPOSITORIES.items():
        if (UPSTREAM / repository.folder).is_dir() and (not names or name in names):
            with tempfile.TemporaryDirectory() as folder:
                show(name, try_repository(repository, Path(folder)))
    for name, own in SCRIPTS.items():
        if (UPSTREAM / name).is_dir() and (not names or name in names):
            show(name, try_script(own, UPSTREAM / name))


if __name__ == "__main__":
    main(sys.argv[1:])
