"""Pre-train the bundled CLIPs of 12 blocks on IconScenes' scenes, of drawings and names that the benchmark holds back.

    python tools/build_icons.py …                                  # makes the pack of drawings
    python tools/pretrain_clip.py --pack PACK --work DIR/tiny --minutes 5.4 --out tiny_clip.safetensors
    python tools/pretrain_clip.py --pack PACK --work DIR/micro --minutes 1.4 --out micro_clip.safetensors \
        --width 64 --distil tiny_clip.safetensors

Scenes are drawn where the model trains, on a GPU in bfloat16 or on a CPU; the schedule follows the clock, and a killed
run goes on from ``DIR/last.pt``. Stages: a window of 6 x 6 patches around one icon, dark on a plain ground and in the
middle at first, for 6 blocks; 12 blocks, each second one of them new and at first without effect, and a window of
8 x 8; half of the patches of whole scenes; all patches. Losses: a linear classifier over all names that is thrown away,
and soon contrast of captions that say domain, size, style, place and ground.

At last the text tower is trained anew on the frozen image features, on captions alone: no class name by itself is ever
taught, so a context can say more than the hand-written template. ``--distil`` learns another CLIP's image features
instead, for its text tower. Looked at on validation drawings; the file's metadata has the accuracy on test drawings.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import icon_captions  # noqa: E402
from icon_pack import load_pack  # noqa: E402

from datasets import icon_drawings, icon_render  # noqa: E402

PATCH, GRID = 8, 14
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
EMBED, BLOCKS = 128, 12
STAGES = ((0.22, "window", 6), (0.4, "window", 8), (0.78, "part", 98), (1.0, "all", 196))  # end, kind, patches
SIDES = {6: (36, 44), 8: (40, 60)}  # px of the icon; elsewhere the benchmark's
ALL_DOMAINS_FROM, CAPTIONS_FROM = 0.22, 0.05
POOL = 2**22  # draws that are made at once
CHUNK = 128  # scenes drawn and encoded at once where nothing is trained
SOURCE = 0.8  # share of scenes of the source domain
EVALUATED = 0.35  # share of scenes of the benchmark's concepts


# ------------------------------------------------------------------------------------------------------------ the model


def build(vocabulary: int, blocks: int, width: int) -> nn.Module:
    """OpenAI's CLIP with sine and cosine positions; without them monochrome shapes are not learned."""
    from clip.model import CLIP

    model = CLIP(
        embed_dim=EMBED, image_resolution=icon_render.SIZE, vision_layers=blocks, vision_width=width,
        vision_patch_size=PATCH, context_length=77, vocab_size=vocabulary, transformer_width=128, transformer_heads=2,
        transformer_layers=4,
    ).float()  # fmt: skip
    frequency = 0.5 * 24.0 ** (-torch.arange(width // 4) / (width // 4 - 1)) * math.pi
    angle = torch.arange(GRID)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], 1)  # (14, w/2)
    both = torch.cat([one[:, None].expand(-1, GRID, -1), one[None].expand(GRID, -1, -1)], 2)
    model.visual.positional_embedding.data[1:] = 0.7 * both.reshape(GRID * GRID, width)
    nn.init.trunc_normal_(model.visual.positional_embedding.data[:1], std=0.1)
    return model


def grow(model: nn.Module, vocabulary: int, width: int) -> nn.Module:
    """Twice the blocks: behind each one its copy, whose output starts at zero."""
    big = build(vocabulary, 2 * len(model.visual.transformer.resblocks), width)
    rest = {name: value for name, value in model.state_dict().items() if "visual.transformer" not in name}
    big.load_state_dict(rest, strict=False)
    for i, block in enumerate(model.visual.transformer.resblocks):
        old, new = big.visual.transformer.resblocks[2 * i : 2 * i + 2]
        old.load_state_dict(block.state_dict())
        new.load_state_dict(block.state_dict())
        for last in (new.attn.out_proj, new.mlp.c_proj):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    return big


def run_blocks(transformer: nn.Module, x: Tensor, causal: bool) -> Tensor:
    """OpenAI's residual attention blocks on (B, T, w), all of it in the precision of x."""
    b, t, w = x.shape

    def at(parameter):
        return parameter.to(x.dtype)

    def norm(layer, y):
        return F.layer_norm(y, (w,), at(layer.weight), at(layer.bias), layer.eps)

    for block in transformer.resblocks:
        attn = block.attn
        qkv = F.linear(norm(block.ln_1, x), at(attn.in_proj_weight), at(attn.in_proj_bias))
        q, k, v = qkv.view(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(b, t, w)
        x = x + F.linear(y, at(attn.out_proj.weight), at(attn.out_proj.bias))
        h = F.silu(F.linear(norm(block.ln_2, x), at(block.mlp.c_fc.weight) * 1.702, at(block.mlp.c_fc.bias) * 1.702))
        x = x + F.linear(h, at(block.mlp.c_proj.weight) / 1.702, at(block.mlp.c_proj.bias))  # QuickGELU
    return x


def encode_image(model: nn.Module, images: Tensor, patches: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Images (B, 3, 112, 112) uint8 → (B, d) unit length, from patches (B, n) at their true positions."""
    v = model.visual
    mean, std = (torch.tensor(a, device=images.device).view(1, 3, 1, 1) * 255 for a in (MEAN, STD))
    x = ((images.float() - mean) / std).to(dtype)
    x = x.unflatten(2, (GRID, PATCH)).unflatten(4, (GRID, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    position = v.positional_embedding[1:].to(dtype).expand(len(x), -1, -1)
    if patches is not None:
        x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[-1]))
        position = v.positional_embedding[1:].to(dtype)[patches]
    x = x @ v.conv1.weight.flatten(1).T.to(dtype) + position
    cls = (v.class_embedding + v.positional_embedding[0]).to(dtype).expand(len(x), 1, -1)
    x = torch.cat([cls, x], 1)
    x = F.layer_norm(x, x.shape[-1:], v.ln_pre.weight.to(dtype), v.ln_pre.bias.to(dtype), v.ln_pre.eps)
    x = run_blocks(v.transformer, x, causal=False)[:, 0].float()
    return F.normalize(F.layer_norm(x, x.shape[-1:], v.ln_post.weight, v.ln_post.bias, v.ln_post.eps) @ v.proj, dim=-1)


def encode_text(model: nn.Module, rows: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (B, T) of the compact vocabulary, ``end`` (B,) → (B, d) unit length."""
    x = (model.token_embedding(rows) + model.positional_embedding[: rows.shape[1]]).to(dtype)
    x = run_blocks(model.transformer, x, causal=True)[torch.arange(len(x), device=x.device), end].float()
    norm = model.ln_final
    return F.normalize(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps) @ model.text_projection, dim=-1)


class Muon:
    """Muon for a model's matrices, those of one shape at once: a step of orthogonal directions."""

    def __init__(self, matrices: list[Tensor], decay: float = 0.02, momentum: float = 0.95):
        shapes = dict.fromkeys(tuple(matrix.shape) for matrix in matrices)
        self.groups = [[matrix for matrix in matrices if tuple(matrix.shape) == shape] for shape in shapes]
        self.speeds = [torch.zeros_like(torch.stack(list(group)).detach()) for group in self.groups]
        self.decay, self.momentum = decay, momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, speed in zip(self.groups, self.speeds, strict=True):
            gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            speed.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(speed, self.momentum)  # Nesterov
            flip = x.shape[1] > x.shape[2]
            x = x.transpose(1, 2) if flip else x
            x = x.to(torch.bfloat16 if x.is_cuda else x.dtype) / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
            for _ in range(5):  # Newton-Schulz, the coefficients of Jordan et al.
                square = x @ x.transpose(1, 2)
                x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
            x = (x.transpose(1, 2) if flip else x).float() * max(1, x.shape[1] / x.shape[2]) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.decay)
            torch._foreach_sub_(group, list(lr * x))


# ----------------------------------------------------------------------------------------------------------- the scenes


class Scenes:
    """Draws batches on ``device`` from the pack's drawings."""

    def __init__(self, pack: dict, device: torch.device):
        self.device = device
        as_tensor = lambda name: torch.from_numpy(np.ascontiguousarray(pack[name])).to(device)  # noqa: E731
        self.ink, self.label, self.style = as_tensor("ink"), as_tensor("name").long(), as_tensor("style").long()
        self.colour, self.palette = as_tensor("colour"), as_tensor("palette")
        self.colour_row = as_tensor("colour_row").long()
        self.concept = torch.full((len(pack["names"]),), -1, device=device)  # of each name, the benchmark's or -1
        self.concept[self.label] = as_tensor("eval").long()
        count = torch.bincount(self.label, minlength=len(self.concept)).float()
        weight = (1 / count.clamp(min=1).sqrt())[self.label]  # a name as often as the root of its drawings
        evaluated = self.concept[self.label] >= 0
        weights = [torch.where(mask, weight, 0) for mask in (evaluated, ~evaluated)]
        self.pools = [torch.multinomial(each, POOL, replacement=True) for each in weights]
        self.prior = torch.zeros(len(self.concept), device=device)
        for pool, share in zip(self.pools, (EVALUATED, 1 - EVALUATED), strict=True):
            self.prior += share * torch.bincount(self.label[pool], minlength=len(self.prior)).float() / len(pool)

    def batch(self, n: int, share: float, stage: str, size: int) -> tuple[Tensor, Tensor, icon_render.Plan, Tensor]:
        """n scenes of a stage after a share of the time, the first EVALUATED of them of the benchmark's concepts.

        Returns images (n, 3, 112, 112) uint8, drawings (n,), the plan and domains (n,).
        """
        device = self.device
        first = round(n * EVALUATED)
        pick = lambda pool, k: pool[torch.randint(len(pool), (k,), device=device)]  # noqa: E731
        main = torch.cat([pick(self.pools[0], first), pick(self.pools[1], n - first)])
        others = pick(self.pools[1], n * icon_render.DISTRACTORS).view(n, -1)
        numbers = torch.randint(icon_render.RANGE, (n, icon_render.NUMBERS), device=device)
        if stage == "window" and size == 6:  # from the middle and a plain ground to anywhere on any
            free = min(1.0, 2 * share / STAGES[0][0])
            numbers[:, 1:3] = (32768 + (numbers[:, 1:3] - 32768) * free).long()
            numbers[:, 3] *= torch.rand(n, device=device) < free
        scene = icon_render.plan(numbers, *SIDES.get(size, (icon_render.SMALLEST, icon_render.LARGEST)))
        domain = torch.randint(1, len(icon_render.DOMAINS), (n,), device=device)
        domain[torch.rand(n, device=device) < (SOURCE if share >= ALL_DOMAINS_FROM else 1.0)] = 0
        row = self.colour_row[main]
        coloured = (row >= 0) & (domain == icon_render.DOMAINS.index("colour"))
        own = self._rgba(row.clamp(min=0)) * coloured[:, None, None, None]
        planes = distort(torch.cat([self.ink[main][:, None], own], 1).float())
        ink = torch.cat([planes[:, :1], self.ink[others]], 1)
        images = icon_render.draw(numbers, scene, ink, domain, planes[:, 1:])
        return images, main, scene, domain

    def _rgba(self, row: Tensor) -> Tensor:
        """The drawings' own colours and where they are: (n,) → (n, 4, 64, 64)."""
        which = self.colour[row].long()  # (n, 64, 64)
        rgb = self.palette[row].gather(1, which.flatten(1)[..., None].expand(-1, -1, 3)).transpose(1, 2)
        return torch.cat([rgb.unflatten(2, which.shape[1:]), 255 * (which > 0).byte()[:, None]], 1)


def distort(planes: Tensor) -> Tensor:
    """Drawings (B, 1 + n, 64, 64) turned, sheared, stretched, mirrored, the first thickened or thinned, cut: uint8."""
    n, device = len(planes), planes.device
    rand = lambda: torch.rand(n, device=device)  # noqa: E731
    angle, shear = (rand() - 0.5) * 0.6, (rand() - 0.5) * 0.4
    wide, high = 0.82 + 0.36 * rand(), 0.82 + 0.36 * rand()
    mirror = torch.where(rand() < 0.25, -1.0, 1.0)
    c, s = angle.cos(), angle.sin()
    zero = torch.zeros_like(c)
    rows = (mirror * c / wide, s / wide + shear, zero), (-s / high, c / high, zero)
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, planes.shape, align_corners=False)
    planes = F.grid_sample(planes, grid, align_corners=False)
    ink, kind = planes[:, :1], rand()[:, None, None, None]
    thick, thin = F.max_pool2d(ink, 3, 1, 1), -F.max_pool2d(-ink, 3, 1, 1)
    thin = torch.where(thin.mean((1, 2, 3), keepdim=True) > 0.5 * ink.mean((1, 2, 3), keepdim=True), thin, ink)
    ink = torch.where(kind < 0.2, thick, torch.where(kind > 0.88, thin, ink))
    at = torch.arange(64, device=device)
    x, y, side = rand()[:, None] * 64, rand()[:, None] * 64, 8 + 12 * rand()[:, None]
    hole = ((at - x).abs() < side / 2)[:, None, :] & ((at - y).abs() < side / 2)[:, :, None]
    hole = hole & (rand() < 0.3)[:, None, None]
    return torch.cat([ink, planes[:, 1:]], 1).mul(~hole[:, None]).round().clamp(0, 255).to(torch.uint8)


def patches_of(scene: icon_render.Plan, stage: str, size: int) -> Tensor | None:
    """Which patches (B, n) a stage looks at; None for all."""
    if stage == "all":
        return None
    device = scene.side.device
    if stage == "window":
        corner = lambda start: ((start + scene.side / 2) / PATCH - size / 2).round().long().clamp(0, GRID - size)  # noqa: E731
        offset = torch.arange(size, device=device)
        rows = (corner(scene.top)[:, None] + offset)[:, :, None] * GRID
        return (rows + (corner(scene.left)[:, None] + offset)[:, None, :]).flatten(1)
    at = torch.arange(GRID, device=device) * PATCH + PATCH / 2
    inside = lambda start: (at > start[:, None] - 4) & (at < (start + scene.side)[:, None] + 4)  # noqa: E731
    near = (inside(scene.top)[:, :, None] & inside(scene.left)[:, None, :]).flatten(1)
    return (torch.rand(near.shape, device=device) + 0.4 * near).topk(size, dim=1).indices


# ------------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def zero_shot(model, words, split: str, scenes_each: int, stage: str, size: int, device, dtype) -> dict[str, float]:
    """Accuracy in percent of "a photo of a {}." on the benchmark's drawings of ``split``, by domain."""
    ink, colour = (torch.from_numpy(a).flatten(0, 1) for a in icon_drawings.drawings(split))
    colour = colour.permute(0, 3, 1, 2)
    names = icon_drawings.concepts()
    per_class = len(ink) // len(names)
    text = encode_text(model, *words.prompts(names, device), dtype)
    which = torch.arange(len(ink)).repeat_interleave(scenes_each)
    rng = np.random.default_rng(7)
    numbers = torch.from_numpy(rng.integers(0, icon_render.RANGE, (len(which), icon_render.NUMBERS)))
    others = torch.from_numpy(rng.integers(0, len(ink), (len(which), icon_render.DISTRACTORS)))
    result = {}
    for number, domain in enumerate(icon_render.DOMAINS if size != 6 else icon_render.DOMAINS[:1]):
        right = 0
        for few in torch.arange(len(which)).split(512):
            some = numbers[few].to(device)
            scene = icon_render.plan(some, *SIDES.get(size, (icon_render.SMALLEST, icon_render.LARGEST)))
            drawings = torch.cat([ink[which[few]][:, None], ink[others[few]]], 1).to(device)
            own = colour[which[few]].to(device)
            images = icon_render.draw(some, scene, drawings, torch.full_like(scene.side, number), own)
            features = encode_image(model, images, patches_of(scene, stage, size), dtype)
            right += ((features @ text.T).argmax(1).cpu() == which[few] // per_class).sum().item()
        result[domain] = round(100 * right / len(which), 1)
    return result


def save(state: dict, path: Path) -> None:
    """Write aside, then rename."""
    aside = path.with_suffix(".part")
    torch.save(state, aside)
    os.replace(aside, path)


def optimizers_of(parameters: list[tuple[str, Tensor]]) -> tuple[Muon, torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    hidden = [p for name, p in parameters if p.ndim == 2 and ".resblocks." in name]
    rest = [p for name, p in parameters if not (p.ndim == 2 and ".resblocks." in name)]
    return Muon(hidden), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)


def descend(loss: Tensor, parameters: list[tuple[str, Tensor]], optimizers, share: float, step: int, args) -> None:
    """One step at the schedule's rate: 100 steps of warm-up, then half a cosine."""
    rate = min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1))))
    for _, parameter in parameters:
        parameter.grad = None
    loss.backward()
    nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
    muon, adam = optimizers
    muon.step(args.muon_lr * rate)
    adam.param_groups[0]["lr"] = args.lr * rate
    adam.step()


def contrast(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's symmetric loss of n pairs (n, d) of unit length."""
    similarity = log_scale.clamp(max=math.log(100)).exp() * image @ text.T
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def train_image_tower(args, scenes: Scenes, words, teacher, device, dtype) -> nn.Module:
    """The image tower, and a text tower beside it that is not kept; resumable, by the clock."""
    names, vocabulary = len(scenes.concept), len(words.ids)
    last, spent, step, seen, state = args.work / "last.pt", 0.0, 0, 0, None
    if last.exists():
        state = torch.load(last, weights_only=True, map_location="cpu")
        spent, step, seen = state["spent"], state["step"], state["seen"]
        print(f"resumed after {spent / 60:.1f} minutes", flush=True)
    blocks = BLOCKS if state and state["blocks"] == BLOCKS else BLOCKS // 2
    model, classifier = build(vocabulary, blocks, args.width), nn.Linear(EMBED, names)
    classifier.bias.data = scenes.prior.clamp(min=1e-8).log().cpu()
    if state:
        model.load_state_dict(state["model"])
        classifier.load_state_dict(state["classifier"])
    model, classifier = model.to(device), classifier.to(device)
    first, evaluated = round(args.batch * EVALUATED), (scenes.concept >= 0).nonzero()[:, 0]

    def trained():
        parts = (*model.named_parameters(), *classifier.named_parameters("classifier"))
        return [(n, p) for n, p in parts if teacher is None or n.startswith("visual.")]

    parameters = trained()
    optimizers = optimizers_of(parameters)
    if teacher is not None:
        with torch.no_grad():
            said = encode_text(teacher, *words.prompts(words.names, device), dtype)  # (C, d)
    running, started, spoken, budget = {}, time.time() - spent, time.time(), 60 * args.minutes
    while (share := (time.time() - started) / budget) < 1:
        _, stage, size = next(entry for entry in STAGES if share < entry[0])
        if share >= STAGES[0][0] and len(model.visual.transformer.resblocks) < BLOCKS:
            model = grow(model.cpu(), vocabulary, args.width).to(device)
            parameters = trained()
            optimizers, step = optimizers_of(parameters), 0
        images, main, scene, domain = scenes.batch(args.batch, share, stage, size)
        patches, labels = patches_of(scene, stage, size), scenes.label[main]
        image = encode_image(model, images, patches, dtype)
        if teacher is None:
            guess = classifier(16 * image)
            among, concept = guess[:first, evaluated], scenes.concept[labels[:first]]
            losses = {"names": F.cross_entropy(guess, labels, label_smoothing=0.1),
                      "concepts": F.cross_entropy(among, concept, label_smoothing=0.1)}  # fmt: skip
            loss = (1 if share < 0.5 else 0.5) * (0.5 * losses["names"] + losses["concepts"])
            if share > CAPTIONS_FROM:
                some = torch.cat([torch.arange(0, first, 2), torch.arange(first, args.batch, 3)]).to(device)
                text = encode_text(model, *words.captions(scenes, main, scene, domain, some), dtype)
                losses["captions"] = contrast(image[some], text, model.logit_scale)
                loss = loss + losses["captions"]
        else:
            with torch.no_grad():
                target = encode_image(teacher, images, patches, dtype)
            scale = teacher.logit_scale.exp()
            mine, meant = (F.log_softmax(scale * features @ said.T, 1) for features in (image, target))
            losses = {"names": F.kl_div(mine, meant, reduction="batchmean", log_target=True),
                      "features": 1 - (image * target).sum(1).mean()}  # fmt: skip
            loss = losses["names"] + 5 * losses["features"]
        descend(loss, parameters, optimizers, share, step, args)
        step, seen = step + 1, seen + args.batch
        if step % 10 == 0:
            for key, value in losses.items():
                running[key] = value.item() if key not in running else 0.8 * running[key] + 0.2 * value.item()
        if time.time() - spoken > args.check_every:
            if not all(map(math.isfinite, running.values())):
                raise FloatingPointError(f"losses {running} at step {step}: lower --lr and --muon-lr; {last} is intact")
            held = model if teacher is None else with_text(model, teacher)
            accuracy = zero_shot(held, words, "val", 2, stage, size, device, dtype)
            line = " ".join(f"{key} {value:.2f}" for key, value in running.items())
            print(f"{share * args.minutes:.1f} min {seen:,} {stage} {size} {line} val {accuracy}", flush=True)
            save({"model": model.state_dict(), "classifier": classifier.state_dict(), "spent": time.time() - started,
                  "step": step, "seen": seen, "blocks": len(model.visual.transformer.resblocks)}, last)  # fmt: skip
            spoken = time.time()
    print(f"{seen:,} scenes seen", flush=True)
    args.scenes_seen = seen
    return model if teacher is None else with_text(model, teacher)


def with_text(model: nn.Module, other: nn.Module) -> nn.Module:
    """``model`` with the other's text tower and temperature."""
    text = {name: value for name, value in other.state_dict().items() if not name.startswith("visual.")}
    model.load_state_dict(text, strict=False)
    return model


def train_text_tower(args, model: nn.Module, scenes: Scenes, words, device, dtype) -> None:
    """The text tower anew, on captions alone, in contrast with frozen features of scenes.

    Names come as often as they have drawings. Short and of few scenes on purpose: a CLIP's texts know less of a class
    than its image features do.
    """
    torch.manual_seed(args.text_seed)
    scenes.pools = [torch.arange(len(scenes.label), device=device)] * 2
    drawn, features = [], []
    with torch.no_grad():
        for _ in track(range(0, args.text_scenes, CHUNK), "features of captioned scenes"):
            images, main, scene, domain = scenes.batch(CHUNK, 1.0, "all", 196)
            features.append(encode_image(model, images, None, dtype))
            drawn.append((main, *vars(scene).values(), domain))
    features = torch.cat(features)
    main, *plan, domain = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    with_text(model, build(len(words.ids), 1, args.width).to(device))
    parameters = [(n, p) for n, p in model.named_parameters() if not n.startswith("visual.")]
    optimizers, running = optimizers_of(parameters), None
    for step in range(args.text_steps):
        some = torch.randint(len(features), (args.text_batch,), device=device)
        rows, end = words.captions(scenes, main, icon_render.Plan(*plan), domain, some, every_part=True)
        loss = contrast(features[some], encode_text(model, rows, end, dtype), model.logit_scale)
        descend(loss, parameters, optimizers, step / args.text_steps, step, args)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"text, step {step + 1}/{args.text_steps}, loss {running:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="drawings for pre-training, made by build_icons.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable state")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write at the end")
    parser.add_argument("--distil", type=Path, help="learn this CLIP's image features, for its text tower")
    parser.add_argument("--width", type=int, default=128, help="of the image tower, 64 a head")
    parser.add_argument("--minutes", type=float, default=7.0, help="of training the image tower")
    parser.add_argument("--text-scenes", type=int, default=12_288, help="scenes whose captions the text tower learns")
    parser.add_argument("--text-steps", type=int, default=150, help="of training the text tower anew")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--text-batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW, for all but the blocks' matrices")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="of Muon, for the blocks' matrices")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text-seed", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check-every", type=float, default=25, help="seconds between looks at validation drawings")
    args = parser.parse_args()

    from spotlighter_plugin.towers.clip import load_clip, save_compact

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    args.work.mkdir(parents=True, exist_ok=True)
    pack = load_pack(args.pack)
    words, scenes = icon_captions.Words(pack["names"], pack["styles"], device), Scenes(pack, device)
    teacher = None
    if args.distil:
        teacher = build(len(words.ids), BLOCKS, load_clip(str(args.distil)).visual.conv1.out_channels)
        weights = load_clip(str(args.distil)).state_dict()
        weights["token_embedding.weight"] = weights["token_embedding.weight"][words.ids]
        teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
        teacher = teacher.to(device).requires_grad_(False)
    model = train_image_tower(args, scenes, words, teacher, device, dtype)
    if teacher is None:
        save({"model": model.state_dict()}, args.work / "before_text.pt")
        train_text_tower(args, model, scenes, words, device, dtype)
    accuracy = zero_shot(model, words, "test", 3, "all", 196, device, dtype)
    recipe = {key: value for key, value in vars(args).items() if key not in ("pack", "work", "out", "check_every")}
    recipe |= {"distil": args.distil and args.distil.stem, "device": f"{device.type}, {dtype}".replace("torch.", "")}
    metadata = {"recipe": json.dumps(recipe), "zero-shot on test drawings": json.dumps(accuracy)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_compact(model.state_dict(), args.out, rows=words.ids, half=True, metadata=metadata)
    print(f"wrote {args.out}: {accuracy}", flush=True)


if __name__ == "__main__":
    main()
