"""Pre-train the bundled tiny CLIP on EmojiScenes of the vendors that the benchmark never uses.

    python tools/build_sprites.py --packages DIR --out SPRITES --download
    python tools/pretrain_tiny_clip.py --sprites SPRITES --work DIR --out tiny_clip.safetensors

The result belongs to ``spotlighter_plugin/weights``. With ``--width 384`` it is a larger teacher for PromptKD instead,
to be tuned with ``--trainer PromptSRC --backbone FILE`` and named in ``TRAINER.PROMPTKD.TEACHER_NAME``. With
``--distil FILE`` the image tower learns another CLIP's image features instead, on the same patches, for that CLIP's own
text tower; the bundled micro CLIP is made of the tiny one so.

Scenes and captions are made on the fly. Three stages share one cosine schedule: a 6 x 6 window of patches around the
sprite, then 48 of the 144 patches of whole scenes, then all patches. Loss: a linear classifier that is thrown away,
and after the first quarter in-batch contrast over full captions (each batch holds two scenes of each of its classes,
so that the words about style, place, background and domain decide between them) and cross entropy over class names on
undistorted scenes. A killed run goes on from ``DIR/last.pt``.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import spotlighter_plugin  # noqa: E402, F401, I001  (first: what is imported below needs its fixes)
from datasets.emoji_render import (  # noqa: E402
    BACKGROUNDS, COLOURS, DOMAINS, PLACES, SIZE, TINTS, VENDORS, concepts, render_scene, sprite_sheet,
)  # fmt: skip

STYLES = {
    "noto": "soft", "openmoji": "outlined", "emojione": "bright", "emojione-v1": "old",
    "fluent-emoji-flat": "flat", "fxemoji": "plain",
}  # fmt: skip
PATCH = 8
GRID = SIZE // PATCH
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.", "{}.", "a photo of the {}.", "a drawing of a {}.")
MEDIA = ("photo", "picture", "drawing")
BATCH, CLASSES_IN_BATCH = 64, 32
STAGES = ((0.62, "window"), (0.92, "part"), (1.0, "all"))  # share of the images after which each stage ends
NORMAL_ONLY, WITHOUT_TEXT = 0.05, 0.25  # shares of the images before other domains come in, and before captions do
MODEL = {
    "embed_dim": 128, "image_resolution": SIZE, "vision_layers": 6, "vision_width": 192, "vision_patch_size": PATCH,
    "context_length": 77, "transformer_width": 128, "transformer_heads": 2, "transformer_layers": 4,
}  # fmt: skip


def caption(scene, name: str, vendor: str, rng) -> str:
    """``a dark photo of a small warm flat moon at the top on a blue cloudy background.``, parts half the time."""

    def perhaps(word):
        return f"{word} " if word and rng.random() < 0.5 else ""

    domain = "" if scene.domain == "normal" else scene.domain
    medium = MEDIA[int(rng.random() * len(MEDIA))]
    text = (
        f"a {perhaps(domain)}{medium} of a {perhaps(scene.size)}{perhaps(scene.tint)}{perhaps(STYLES[vendor])}{name} "
    )
    text += perhaps(scene.place)
    if rng.random() < 0.25:  # seldom, so that the image feature need not hold the background
        text += f"on a {scene.background} background"
    return text.strip() + "."


class Batches(torch.utils.data.IterableDataset):
    """Endless batches from batch ``start``: images (B, 3, 96, 96) uint8, captions, classes, normal?, boxes (B, 4)."""

    def __init__(self, folder: Path, seed: int, start: int, normal_until: int):
        self.folder, self.seed, self.start, self.normal_until = folder, seed, start, normal_until
        self.names = concepts(folder)

    def __iter__(self):
        torch.set_num_threads(1)
        vendors = list(STYLES)
        step = self.start
        while True:
            rng = np.random.default_rng([self.seed, step])
            labels = np.repeat(rng.permutation(len(self.names))[:CLASSES_IN_BATCH], BATCH // CLASSES_IN_BATCH)
            shared = DOMAINS[1 + int(rng.random() * (len(DOMAINS) - 1))] if rng.random() < 0.35 else None
            scenes, texts = [], []
            for i, label in enumerate(labels):
                domain = shared or ("normal" if rng.random() < 0.8 else DOMAINS[1 + int(rng.random() * 7)])
                if step < self.normal_until:
                    domain = "normal"
                vendor = vendors[int(rng.random() * len(vendors))]
                scene = render_scene(self.seed, int(label), vendor, step * BATCH + i, domain, self.folder)
                scenes.append(scene)
                texts.append(caption(scene, self.names[label], vendor, rng))
            yield (
                torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2),
                texts,
                torch.from_numpy(labels.astype(np.int64)),
                torch.tensor([s.domain == "normal" for s in scenes]),
                torch.tensor([s.box for s in scenes]),
            )
            step += 1


def choose_patches(boxes: torch.Tensor, stage: str, generator: torch.Generator) -> torch.Tensor | None:
    """Patch numbers (B, n) that this stage looks at; None for all of them."""
    if stage == "all":
        return None
    n = len(boxes)
    if stage == "window":
        centre = (boxes[:, :2] + boxes[:, 2:]) / (2 * PATCH) - 3 + torch.rand(n, 2, generator=generator) - 0.5
        corner = centre.round().long().clamp(0, GRID - 6)  # (B, 2) x, y
        offset = torch.arange(6)
        rows = (corner[:, 1, None] + offset)[:, :, None] * GRID  # (B, 6, 1)
        return (rows + (corner[:, 0, None] + offset)[:, None, :]).flatten(1)  # (B, 36)
    at = torch.arange(GRID) * PATCH + PATCH / 2
    inside_x = (at > boxes[:, :1]) & (at < boxes[:, 2:3])  # (B, 12)
    inside_y = (at > boxes[:, 1:2]) & (at < boxes[:, 3:])
    score = torch.rand(n, GRID * GRID, generator=generator) + 0.4 * (
        inside_y[:, :, None] & inside_x[:, None, :]
    ).flatten(1)
    return score.topk(48, dim=1).indices


def run_blocks(transformer: nn.Module, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """OpenAI's residual attention blocks on (B, T, w); the arithmetic is theirs.

    Attention is two batched products: on a CPU in bfloat16 they take a third of the time of the fused kernel.
    """
    b, t, w = x.shape
    mask = torch.full((t, t), -math.inf).triu(1) if causal else None
    for block in transformer.resblocks:
        attn = block.attn
        qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.view(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).reshape(3, b * attn.num_heads, t, -1)
        weights = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))  # (B·H, T, T)
        weights = (weights if mask is None else weights + mask).softmax(-1, dtype=q.dtype)
        y = torch.bmm(weights, v).view(b, attn.num_heads, t, -1).transpose(1, 2).reshape(b, t, w)
        x = x + attn.out_proj(y)
        h = F.silu(block.mlp.c_fc(block.ln_2(x)) * 1.702)  # QuickGELU(x) = silu(1.702 x) / 1.702
        x = x + F.linear(h, block.mlp.c_proj.weight / 1.702, block.mlp.c_proj.bias)
    return x


def encode_image(model, images: torch.Tensor, patches: torch.Tensor | None) -> torch.Tensor:
    """Images (B, 3, 96, 96) uint8 → (B, d) normalized, from the named patches with their true positions."""
    v = model.visual
    mean, std = (torch.tensor(a).view(1, 3, 1, 1) * 255 for a in (MEAN, STD))
    x = (images.float() - mean) / std
    x = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)  # (B, 144, 3*8*8)
    position = v.positional_embedding[1:].expand(len(x), -1, -1)
    if patches is not None:
        x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[-1]))
        position = v.positional_embedding[1:][patches]
    x = x @ v.conv1.weight.flatten(1).T + position
    cls = (v.class_embedding + v.positional_embedding[0]).expand(len(x), 1, -1)
    x = run_blocks(v.transformer, v.ln_pre(torch.cat([cls, x], 1)), causal=False)
    return F.normalize((v.ln_post(x[:, 0]) @ v.proj).float(), dim=-1)


class Vocabulary:
    """OpenAI's token ids ↔ rows of the compact embedding that training uses."""

    def __init__(self, names):
        import clip

        self.tokenize = clip.tokenize
        words = set("".join(TEMPLATES).replace("{}", " ").split()) | set(MEDIA) | set(STYLES.values()) | set(DOMAINS)
        words |= {*BACKGROUNDS, *COLOURS, *TINTS, "small medium large background and on a X . ,"}
        words |= {place for row in PLACES for place in row}
        ids = self.tokenize([f"a {w}." for w in sorted(words)] + sorted(words) + [f"{n}." for n in names])
        self.ids = ids.unique()  # row → token id; 0 is the padding
        self.row = torch.zeros(49408, dtype=torch.long)
        self.row[self.ids] = torch.arange(len(self.ids))
        self.known = torch.zeros(49408, dtype=torch.bool)
        self.known[self.ids] = True
        self.cache = {}

    def __call__(self, texts):
        """(n, longest) rows and the (n,) positions of the end-of-text token."""
        for text in texts:
            if text not in self.cache:
                self.cache[text] = self.tokenize([text])[0]
        tokens = torch.stack([self.cache[t] for t in texts])
        if len(self.cache) > 100_000:
            self.cache.clear()
        assert self.known[tokens].all(), f"a word outside the vocabulary in {texts[0]!r}"
        end = tokens.argmax(1)
        return self.row[tokens[:, : end.max() + 1]], end


def encode_text(model, rows: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    x = model.token_embedding(rows) + model.positional_embedding[: rows.shape[1]]
    x = run_blocks(model.transformer, x, causal=True)
    return F.normalize((model.ln_final(x[torch.arange(len(x)), end]) @ model.text_projection).float(), dim=-1)


@torch.no_grad()
def zero_shot(model, vocabulary, names, folder, stage, number_of=2) -> dict[str, float]:
    """Accuracy (%) of "a photo of a {}." on scenes of two vendors that are not trained on, per domain.

    The patches are those of ``stage``; every ``number_of``-th class is looked at with each vendor and number.
    """
    generator = torch.Generator().manual_seed(0)
    text = encode_text(model, *vocabulary([f"a photo of a {n}." for n in names]))
    result = {}
    for domain in ("normal", "pixelated", "dark", "swapped"):
        right = total = 0
        for vendor in ("twemoji", "noto-v1"):
            for number in range(number_of):
                labels = torch.arange(len(names))[number::number_of]
                scenes = [render_scene(4242, int(c), vendor, number, domain, folder) for c in labels]
                images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
                patches = choose_patches(torch.tensor([s.box for s in scenes]), stage, generator)
                right += ((encode_image(model, images, patches) @ text.T).argmax(1) == labels).sum().item()
                total += len(labels)
        result[domain] = round(100 * right / total, 1)
    return result


def teaching_losses(teacher, images, patches, image, text) -> dict[str, torch.Tensor]:
    """How far features (B, d) are from the teacher's, as such and in what they say of scaled texts (C, d)."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        target = encode_image(teacher, images, patches)  # (B, d)
    said, meant = (F.log_softmax(features @ text.T, 1) for features in (image, target))
    return {"names": F.kl_div(said, meant, reduction="batchmean", log_target=True),
            "features": 1 - (image * target).sum(1).mean()}  # fmt: skip


def save(state: dict, path: Path) -> None:
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    os.replace(aside, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True, help="folder made by build_sprites.py, all nine vendors")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable state")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write at the end")
    parser.add_argument("--init", type=Path, help="start from this file's weights instead of random ones")
    parser.add_argument("--distil", type=Path, help="learn this CLIP's image features, for its text tower")
    parser.add_argument("--width", type=int, default=MODEL["vision_width"], help="of the image tower, 64 a head")
    parser.add_argument("--images", type=int, default=190_000, help="scenes to train on")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW, for all but the blocks' matrices")
    parser.add_argument("--muon-lr", type=float, default=0.012, help="of Muon, for the blocks' matrices")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=300, help="steps between validation and state")
    args = parser.parse_args()

    import clip.model
    from rich.progress import Progress, TimeRemainingColumn

    from spotlighter_plugin.towers.clip import load_clip, save_compact

    torch.manual_seed(args.seed)
    names = concepts(args.sprites)
    for vendor in VENDORS:
        sprite_sheet(vendor, args.sprites)
    vocabulary = Vocabulary(names)
    model = clip.model.CLIP(vocab_size=len(vocabulary.ids), **{**MODEL, "vision_width": args.width}).float()
    nn.init.trunc_normal_(model.visual.positional_embedding, std=0.1)
    if args.init:
        weights = safetensors.torch.load_file(args.init)
        if not torch.equal(weights.pop("token_embedding.rows"), vocabulary.ids):
            raise ValueError(f"--init {args.init} has another vocabulary: its captions used other words")
        model.load_state_dict({name: weights[name].float() for name in model.state_dict()})
    teacher = None
    if args.distil:
        teacher = load_clip(str(args.distil))
        texts = teacher.state_dict() | {"token_embedding.weight": teacher.token_embedding.weight[vocabulary.ids]}
        model.load_state_dict({name: v for name, v in texts.items() if not name.startswith("visual.")}, strict=False)
        model.requires_grad_(False).visual.requires_grad_(True)
        with torch.no_grad():
            text = encode_text(model, *vocabulary([TEMPLATES[0].format(name) for name in names]))  # (C, d)
    classifier = nn.Linear(MODEL["embed_dim"], len(names)).requires_grad_(not args.distil)
    params = [p for p in (*model.parameters(), *classifier.parameters()) if p.requires_grad]
    blocks = (*model.visual.transformer.parameters(), *model.transformer.parameters())
    hidden = [p for p in blocks if p.ndim == 2 and p.requires_grad]
    others = [p for p in params if all(p is not h for h in hidden)]
    optimizers = (
        torch.optim.Muon(hidden, lr=args.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    steps = args.images // BATCH
    step, args.work = 0, args.work.expanduser()
    args.work.mkdir(parents=True, exist_ok=True)
    last = args.work / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        classifier.load_state_dict(state["classifier"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
        print(f"resumed at step {step}", flush=True)

    batches = iter(
        torch.utils.data.DataLoader(
            Batches(args.sprites, args.seed, step, int(NORMAL_ONLY * steps)),
            batch_size=None,
            num_workers=1,
            prefetch_factor=4,
        )
    )
    running = {}
    started, done = time.time(), 0
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("pre-training", total=steps, completed=step)
        while step < steps:
            images, texts, labels, normal, boxes = next(batches)
            share = step / steps
            stage = next(s for end, s in STAGES if share < end)
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            rate = min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            for optimizer, full in zip(optimizers, (args.muon_lr, args.lr), strict=True):
                optimizer.param_groups[0]["lr"] = rate * full

            with torch.autocast("cpu", dtype=torch.bfloat16):
                patches = choose_patches(boxes, stage, generator)
                image = encode_image(model, images, patches)  # (B, d)
            scale = model.logit_scale.exp()
            if teacher is None:
                losses = {"classes": F.cross_entropy(classifier(16 * image), labels)}
                loss = (1.0 if share < 0.4 else 0.3) * losses["classes"]
            else:
                losses = teaching_losses(teacher, images, patches, image, scale * text)
                loss = losses["names"] + 5 * losses["features"]
            if teacher is None and share >= WITHOUT_TEXT:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    text = encode_text(model, *vocabulary(texts))
                similarity = scale * image @ text.T
                target = torch.arange(BATCH)
                losses["captions"] = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
                loss = loss + losses["captions"]
            if teacher is None and share >= WITHOUT_TEXT and normal.any() and step % 2 == 0:
                present = labels.unique()
                rest = torch.randperm(len(names), generator=generator)
                rest = rest[~torch.isin(rest, present)][: len(names) // 3]
                chosen = torch.cat([present, rest])
                which = torch.randint(len(TEMPLATES), (len(chosen),), generator=generator)
                prompts = [TEMPLATES[i].format(names[c]) for i, c in zip(which, chosen, strict=True)]
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    text = encode_text(model, *vocabulary(prompts))
                logits = scale * image[normal] @ text.T
                losses["names"] = F.cross_entropy(logits, torch.searchsorted(present, labels[normal]))
                loss = loss + 2 * losses["names"]
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower --lr; {last} is intact")
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            for key, value in losses.items():
                running[key] = 0.95 * running.get(key, value.item()) + 0.05 * value.item()
            step, done = step + 1, done + 1
            progress.update(bar, completed=step)
            if step % 50 == 0:
                line = " ".join(f"{k} {v:.2f}" for k, v in running.items())
                speed = done * BATCH / (time.time() - started)
                print(f"step {step}/{steps} {stage} {line} scale {scale.item():.1f} {speed:.0f} img/s", flush=True)
            if step % args.check_every == 0 or step == steps:
                print("unseen vendors", zero_shot(model, vocabulary, names, args.sprites, stage), flush=True)
                save(
                    {"model": model.state_dict(), "classifier": classifier.state_dict(),
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers], "step": step}, last,
                )  # fmt: skip

    accuracy = zero_shot(model, vocabulary, names, args.sprites, "all", number_of=1)
    recipe = f"--width {args.width} --images {args.images} --lr {args.lr} --muon-lr {args.muon_lr} --seed {args.seed}"
    if args.distil:
        recipe = f"--distil {args.distil.name} {recipe}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_compact(
        model.state_dict(), args.out, rows=vocabulary.ids, half=True,
        metadata={"recipe": recipe, "accuracy": str(accuracy), "seed": str(args.seed), "vendors": " ".join(STYLES)},
    )  # fmt: skip
    print(f"wrote {args.out}: {accuracy}")


if __name__ == "__main__":
    main()
