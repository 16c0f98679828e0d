"""Train the bundled CLIPs' text tower anew, on frozen image features, with captions that say much.

    python tools/build_sprites.py --packages DIR --out SPRITES --download
    python tools/pretrain_text_tower.py --sprites SPRITES --work DIR --towers spotlighter_plugin/weights/{tiny,micro}_*

Features are the first file's; the new text tower is written into each. Loss: in-batch contrast alone, two scenes of
each class in a batch, so that the words about domain, style, size, light, place and background decide between them.
No class name is ever taught by itself and no caption is as short as "a photo of a moon.", as none but a few are for
CLIP: a context can then say more than the hand-written template does. A killed run goes on from ``DIR``.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import pretrain_tiny_clip as pretraining
import safetensors
import torch
import torch.nn.functional as F
from rich.progress import track

import clip.model  # isort: skip  (after the project's fixes, which pretrain_tiny_clip imports)
from datasets.emoji_render import DOMAINS, concepts, render_scene
from spotlighter_plugin.towers.clip import load_clip, save_compact

NORMAL = 0.3  # share of the scenes that no domain distorts
CHUNK = 64


def caption(scene, name: str, vendor: str, rng) -> str:
    """``on a gray spotted background at the top a dark photo of a small flat moon.``, one part of four left out."""
    left_out = int(rng.random() * 4)
    medium = pretraining.MEDIA[int(rng.random() * len(pretraining.MEDIA))]
    if left_out != 0 and scene.domain != "normal":
        medium = f"{scene.domain} {medium}"
    look = f"{scene.size} {scene.tint} {pretraining.STYLES[vendor]}" if left_out != 1 else pretraining.STYLES[vendor]
    parts = [f"a {medium}", *([scene.place] if left_out != 2 else [])]
    parts += [f"on a {scene.background} background"] if left_out != 3 else []
    parts = [parts[i] for i in rng.permutation(len(parts))]
    order = rng.random()
    if order < 0.6:
        words = [*parts, f"of a {look} {name}"]
    elif order < 0.8:
        words = [f"{look} {name}", *parts]
    else:
        words = [parts[0], f"a {look} {name}", *parts[1:]]
    return " ".join(" ".join(words).split()) + "."


class Scenes:
    """Features (n, d) of scenes of every class and pre-training vendor, and what a caption can say of them."""

    def __init__(self, model, folder: Path, work: Path, number: int, seed: int):
        self.names, vendors = concepts(folder), list(pretraining.STYLES)
        rng = np.random.default_rng(seed)
        every = [(c, v, i) for c in range(len(self.names)) for v in vendors for i in range(number)]
        domains = np.where(rng.random(len(every)) < NORMAL, 0, rng.integers(1, len(DOMAINS), len(every)))
        self.scenes, features, self.of_class = [], [], np.arange(len(every)).reshape(len(self.names), -1)
        self.vendors = [vendor for _, vendor, _ in every]
        part = number * len(vendors)
        for label in track(range(len(self.names)), "image features"):
            kept, here = work / f"features-{label}.pt", slice(label * part, (label + 1) * part)
            drawn = [render_scene(seed, c, v, i, DOMAINS[d], folder)
                     for (c, v, i), d in zip(every[here], domains[here], strict=True)]  # fmt: skip
            if not kept.exists():
                images = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2)
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                    pretraining.save(
                        torch.cat([pretraining.encode_image(model, few, None) for few in images.split(CHUNK)]), kept
                    )
            features.append(torch.load(kept, weights_only=True))
            for scene in drawn:
                scene.image = None
            self.scenes += drawn
        self.features = torch.cat(features)

    def batch(self, size: int, rng) -> tuple[torch.Tensor, list[str]]:
        """Features (B, d) of two scenes of each of B/2 classes, and their captions."""
        labels = rng.permutation(len(self.names))[: size // 2].repeat(2)
        chosen = self.of_class[labels, rng.integers(0, self.of_class.shape[1], len(labels))]
        texts = [caption(self.scenes[i], self.names[c], self.vendors[i], rng)
                 for i, c in zip(chosen, labels, strict=True)]  # fmt: skip
        return self.features[chosen], texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True, help="folder made by build_sprites.py, all nine vendors")
    parser.add_argument("--work", type=Path, required=True, help="folder for features and the resumable state")
    parser.add_argument("--towers", type=Path, nargs="+", required=True, help="files that get the new text tower")
    parser.add_argument("--scenes", type=int, default=30, help="of each class by each vendor")
    parser.add_argument("--steps", type=int, default=700, help="more fit the drawings of the vendors they see")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW, for all but the blocks' matrices")
    parser.add_argument("--muon-lr", type=float, default=0.012, help="of Muon, for the blocks' matrices")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=200, help="steps between states kept")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    scenes = Scenes(load_clip(str(args.towers[0])), args.sprites, args.work, args.scenes, args.seed)
    torch.manual_seed(args.seed)
    vocabulary = pretraining.Vocabulary(scenes.names)
    model = clip.model.CLIP(vocab_size=len(vocabulary.ids), **pretraining.MODEL).float()
    text = {name: p for name, p in model.named_parameters() if not name.startswith("visual.")}
    hidden = [p for name, p in text.items() if name.startswith("transformer.") and p.ndim == 2]
    others = [p for p in text.values() if all(p is not h for h in hidden)]
    optimizers = (
        torch.optim.Muon(hidden, lr=args.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    first, last = 0, args.work / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["text"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
        print(f"resumed at step {first}", flush=True)

    running, started, target = None, time.time(), torch.arange(args.batch)
    for step in track(range(first, args.steps), "captions"):
        rate = min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for optimizer, full in zip(optimizers, (args.muon_lr, args.lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * full
        image, texts = scenes.batch(args.batch, np.random.default_rng([args.seed, step]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = pretraining.encode_text(model, *vocabulary(texts))  # (B, d)
        similarity = model.logit_scale.exp() * image @ features.T
        loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower --lr; {last} is intact")
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(text.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        running = loss.item() if running is None else 0.97 * running + 0.03 * loss.item()
        if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
            seconds = time.time() - started
            print(f"step {step + 1}/{args.steps} loss {running:.3f} {seconds:.0f} s: {texts[0]}", flush=True)
            state = {"text": {name: p.detach() for name, p in text.items()}, "step": step + 1}
            pretraining.save({**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, last)

    recipe = f"--scenes {args.scenes} --steps {args.steps} --batch {args.batch} --lr {args.lr} --muon-lr {args.muon_lr}"
    for path in args.towers:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        weights = {**load_clip(str(path)).state_dict(), **{name: p.detach() for name, p in text.items()}}
        model.visual = load_clip(str(path)).visual
        accuracy = pretraining.zero_shot(model, vocabulary, scenes.names, args.sprites, "all", number_of=1)
        metadata |= {"accuracy": str(accuracy), "text recipe": f"{recipe} --seed {args.seed}"}
        save_compact(weights, path, rows=vocabulary.ids, half=True, metadata=metadata)
        print(f"wrote {path}: {accuracy}")


if __name__ == "__main__":
    main()
