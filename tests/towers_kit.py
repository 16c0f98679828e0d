"""Miniature towers in the manner of public hosts, written anew, and other libraries' CLIPs with random weights."""

import importlib.util

import torch
from method_kit import CLASS_NAMES, SIZE, WIDTH, random_clip
from torch import nn

HAS = {name: importlib.util.find_spec(name) is not None for name in ("open_clip", "transformers")}


class Miniature(nn.Module):
    """A vision transformer on OpenAI's blocks; ``run`` says how prompts and further arguments reach them."""

    def __init__(self, seed=0):
        super().__init__()
        vision = random_clip(seed).visual
        for name in ("conv1", "class_embedding", "positional_embedding", "ln_pre", "ln_post", "proj"):
            setattr(self, name, getattr(vision, name))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            self.block(each, i) for i, each in enumerate(vision.transformer.resblocks)
        )
        torch.manual_seed(seed)
        self.prompts = nn.Parameter(torch.randn(len(self.transformer.resblocks), 2, WIDTH))

    def block(self, block, index):
        return block

    def embedded(self, images):
        x = self.conv1(images).flatten(2).permute(2, 0, 1)  # (N, B, w)
        x = torch.cat([self.class_embedding.expand(1, x.shape[1], -1), x]) + self.positional_embedding.unsqueeze(1)
        return self.ln_pre(x)

    def prompt(self, index, x):
        return self.prompts[index].unsqueeze(1).expand(-1, x.shape[1], -1)

    def run(self, x):
        for block in self.transformer.resblocks:
            x = block(x)
        return x

    def forward(self, images):
        return self.ln_post(self.run(self.embedded(images))[0]) @ self.proj


class BehindLikeMaPLe(Miniature):
    """Prompts behind the patches, replaced in each block, in a list that travels through the blocks."""

    class Block(nn.Module):
        def __init__(self, block, index):
            super().__init__()
            self.own, self.attn, self.ln_1, self.ln_2, self.index = block, block.attn, block.ln_1, block.ln_2, index

        def forward(self, stream):
            x, prompts, counter = stream
            if self.index:
                x = torch.cat([x[:-2], prompts(counter, x)])
            return [self.own(x), prompts, counter + 1]

    def block(self, block, index):
        return self.Block(block, index)

    def run(self, x):
        stream = [torch.cat([x, self.prompt(0, x)]), self.prompt, 0]
        for block in self.transformer.resblocks:
            stream = block(stream)
        return stream[0]


class BetweenLikeMMRL(Miniature):
    """Tokens between CLS and the patches: they come in before a later block and are replaced in those after it."""

    start = 1

    class Block(nn.Module):
        def __init__(self, block, index, start):
            super().__init__()
            self.own, self.attn, self.ln_1, self.ln_2, self.index, self.start = (
                block,
                block.attn,
                block.ln_1,
                block.ln_2,
                index,
                start,
            )

        def forward(self, inputs):
            x, prompts = inputs
            if self.index >= self.start:
                x = torch.cat([x[:1], prompts(self.index, x), x[1 if self.index == self.start else 3 :]])
            return [self.own(x), prompts]

    def block(self, block, index):
        return self.Block(block, index, self.start)

    def run(self, x):
        stream = [x, self.prompt]
        for block in self.transformer.resblocks:
            stream = block(stream)
        return stream[0]


class BetweenFromTheStart(BetweenLikeMMRL):
    """Tokens between CLS and the patches that are there before the first block and never replaced."""

    start = 99

    def run(self, x):
        return super().run(torch.cat([x[:1], self.prompt(0, x), x[1:]]))


class MaskedLikeRPO(Miniature):
    """A tower that loops over its blocks itself and calls each with a mask: nobody looks at the prompts."""

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.attn, self.ln_1, self.ln_2, self.mlp = block.attn, block.ln_1, block.ln_2, block.mlp

        def forward(self, x, mask):
            normed = self.ln_1(x)
            x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    def block(self, block, index):
        return self.Block(block)

    def mask(self, length):
        mask = torch.zeros(length, length)
        mask[:, -2:] = -torch.inf
        return mask

    def run(self, x):
        x = torch.cat([x, self.prompt(0, x)])
        mask = self.mask(len(x))
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return x


class MaskedByNameLikeTAC(MaskedLikeRPO):
    """The mask is a keyword, prompts are replaced in each block, and patches alone do not look at some of them."""

    class Block(MaskedLikeRPO.Block):
        def forward(self, x, topk=None, visual_mask=None):
            if topk is not None:
                x = torch.cat([x[: -len(topk)], topk.unsqueeze(1).expand(-1, x.shape[1], -1)])
            return super().forward(x, visual_mask)

    def mask(self, length):
        mask = torch.zeros(length, length)
        mask[1:-2, -2:-1] = -torch.inf
        return mask

    def run(self, x):
        x = torch.cat([x, self.prompt(0, x)])
        mask = self.mask(len(x))
        for block in self.transformer.resblocks:
            x = block(x, topk=self.prompts[0], visual_mask=mask)
        return x


class SeveralLikePLOT(Miniature):
    """Each image goes through with each of several prompts, as one large batch: (M, B, d) comes out."""

    def run(self, x):
        views = [torch.cat([x, self.prompt(i, x)]) for i in range(2)]
        return super().run(torch.cat(views, dim=1))

    def forward(self, images):
        return super().forward(images).unflatten(0, (2, len(images)))


class MaskedByPlace(MaskedLikeRPO):
    """A mask that tells patch tokens apart: each looks at earlier ones only."""

    def mask(self, length):
        return torch.full((length, length), -torch.inf).triu(1)


class BatchFirst(Miniature):
    """Blocks that take the batch first, with q, k and v apart and a linear projection behind."""

    class Attention(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.num_heads, self.out_proj = attention.num_heads, attention.out_proj
            parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
            for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                setattr(self, name, nn.Linear(WIDTH, WIDTH))
                getattr(self, name).weight.data, getattr(self, name).bias.data = (
                    weight.detach().clone(),
                    bias.detach().clone(),
                )

        def forward(self, x):
            q, k, v = (
                getattr(self, name)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            seen = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out_proj(seen.transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.self_attn = BatchFirst.Attention(block.attn)
            self.layer_norm1, self.layer_norm2, self.mlp = block.ln_1, block.ln_2, block.mlp

        def forward(self, x):
            x = x + self.self_attn(self.layer_norm1(x))
            return (x + self.mlp(self.layer_norm2(x)), "further")

    def __init__(self, seed=0):
        super().__init__(seed)
        matrix = self.proj.detach()
        del self.proj
        self.proj = nn.Linear(*matrix.shape, bias=False)
        self.proj.weight.data = matrix.T.contiguous()

    def block(self, block, index):
        return self.Block(block)

    def forward(self, images):
        x = self.embedded(images).transpose(0, 1)
        for block in self.transformer.resblocks:
            x = block(x)[0]
        return self.proj(self.ln_post(x[:, 0]))


class WithLoRA(BatchFirst):
    """Low-rank layers around the query's and the value's projections."""

    class Layer(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.base_layer, self.in_features = linear, linear.in_features
            self.down, self.up = nn.Parameter(torch.randn(2, WIDTH) * 0.1), nn.Parameter(torch.randn(WIDTH, 2) * 0.1)

        def forward(self, x):
            return self.base_layer(x) + x @ self.down.T @ self.up.T

    def __init__(self, seed=0):
        super().__init__(seed)
        for block in self.transformer.resblocks:
            for name in ("q_proj", "v_proj"):
                setattr(block.self_attn, name, self.Layer(getattr(block.self_attn, name)))


class OwnGELU(Miniature):
    """Blocks with the plain GELU in their MLP's place of OpenAI's quick one."""

    def block(self, block, index):
        block.mlp.gelu = nn.GELU()
        return block


class MeanOfPatches(Miniature):
    """No CLS; the image is the mean of its patch tokens."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.positional_embedding = nn.Parameter(self.positional_embedding.detach()[1:])
        del self.class_embedding

    def embedded(self, images):
        x = self.conv1(images).flatten(2).permute(2, 0, 1)
        return self.ln_pre(x + self.positional_embedding.unsqueeze(1))

    def forward(self, images):
        return self.ln_post(self.run(self.embedded(images))).mean(0) @ self.proj


LAYOUTS = (
    *(Miniature, BehindLikeMaPLe, BetweenLikeMMRL, BetweenFromTheStart, MaskedLikeRPO, MaskedByNameLikeTAC),
    *(BatchFirst, WithLoRA, OwnGELU, MeanOfPatches),
)


class Host(nn.Module):
    """A tower and a text encoder that a forward of its own joins, as hundreds of prompt-tuning hosts have them."""

    def __init__(self, tower, noise=0.0):
        super().__init__()
        self.image_encoder, self.text_encoder = tower, nn.Linear(8, 64, bias=False)
        self.logit_scale, self.noise = nn.Parameter(torch.tensor(3.0)), noise
        self.register_buffer("classes", torch.randn(len(CLASS_NAMES), 8))

    def forward(self, images):
        image, text = self.image_encoder(images), self.text_encoder(self.classes)
        image, text = (nn.functional.normalize(x, dim=-1) for x in (image, text))
        logits = self.logit_scale.exp() * image @ text.T
        return logits, 1 - text.mean()


def open_clip_model(kind="clip"):
    """A small model of open_clip's own classes: a CLIP, or a SigLIP on timm's tower."""
    from open_clip import CLIP, CustomTextCLIP

    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    if kind == "clip":
        vision = {"layers": 3, "width": 128, "patch_size": 8, "image_size": SIZE, "head_width": 64}
        return CLIP(64, vision, text).eval()
    vision = {
        "timm_model_name": "vit_tiny_patch16_224.augreg_in21k",
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 64,
    }
    model = CustomTextCLIP(192, vision, text, init_logit_bias=-10.0).eval()
    model.visual.set_input_size(64)  # open_clip leaves timm's at 224
    return model


def transformers_model(kind="clip", text=None, vision=None):
    """A small model of transformers' own classes; text, vision: other settings of its towers."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**size, "vocab_size": 49408, **(text or {})}
    vision = {**size, "image_size": SIZE, "patch_size": 8, **(vision or {})}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
        return transformers.CLIPModel(config).eval()
    text |= {"vocab_size": 99, "max_position_embeddings": 16}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()
