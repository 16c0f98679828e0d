"""Where a vision transformer has its parts, under one set of names, whichever library made it.

A vision transformer comes in; what the method asks of it goes out: its blocks, who looks at the tokens that enter one,
and how hidden states are read out. Hidden states are (S, B, w) here, in whatever order the blocks take them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedule import Tower

# OpenAI and open_clip; transformers; timm (open_clip's SigLIP); a host that took the tower apart (RPO)
_BLOCKS = ("transformer.resblocks", "encoder.layers", "trunk.blocks", "blocks", "img_transformer.resblocks")
_NORM = ("ln_post", "post_layernorm", "trunk.norm", "norm", "img_post_ln")
_PROJECTION = ("proj", "visual_projection", "img_proj")
_POSITIONS = ("positional_embedding", "embeddings.position_embedding.weight", "trunk.pos_embed", "img_pos_embedding")
_CLS = ("class_embedding", "embeddings.class_embedding", "trunk.cls_token", "img_cls_embedding")
_PATCHES = ("conv1", "embeddings.patch_embedding", "trunk.patch_embed.proj", "img_patch_embedding")
_SIZE = ("input_resolution", "config.image_size", "image_size")
_POOL = ("trunk.attn_pool", "attn_pool", "head")
_QUERY = ("probe", "latent")


class Attention:
    """The projections of a self-attention: one matrix, three, or layers that wrap them, as LoRA does.

    Raises:
        ValueError: they are not where they are known to be.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.heads = _first(module, ("num_heads", "base_layer.num_heads"))
        self._parts, self._out = _projections(module), _first(module, ("out_proj", "proj", "base_layer.out_proj"))
        if self.heads is None or self._parts is None or self._out is None:
            raise ValueError(f"a {type(module).__name__} is no attention whose projections (q, k, v, out) are known")
        if any(not isinstance(getattr(module, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm")):
            raise ValueError(f"a {type(module).__name__} normalises queries and keys, which is not known here")

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """(W, b) of query, key and value: (w, w) and (w,) each."""
        if not isinstance(self._parts, nn.MultiheadAttention):
            pairs = [affine(part) for part in self._parts]
            if len(pairs) == 3:
                return pairs
            weight, bias = (torch.cat(each) for each in zip(*pairs, strict=True))  # (3w, w), (3w,)
        else:
            weight, bias = self._parts.in_proj_weight, self._parts.in_proj_bias
            bias = weight.new_zeros(len(weight)) if bias is None else bias
        return list(zip(weight.chunk(3), bias.chunk(3), strict=True))

    def __call__(self, query: Tensor, memory: Tensor) -> Tensor:
        """What normalized states (Q, B, w) see in others (S, B, w): (Q, B, w)."""
        q, k, v = (
            F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)
            for x, (weight, bias) in zip((query, memory, memory), self.projections(), strict=True)
        )  # (B, H, Q or S, w/H)
        seen = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)  # (Q, B, w)
        weight, bias = affine(self._out)
        return F.linear(seen, weight.to(seen.dtype), bias.to(seen.dtype))


class Gaze:
    """Who looks at tokens, with all that stays the same worked in, in the weights' precision.

    Args:
        norm: what normalizes the tokens (S, B, w); its weight, bias and 1/√(w/H) go into the projections.
        attention: whose queries and keys are taken.
        query_of: gives of the tokens, normalized without weight and bias, who looks: (S, B, w) → (B, w).
        is_normed: whether that is normalized, too; if not, it is a query's input as it is.

    Attributes:
        asking: (W, b) of the query, (w, w) and (w,).
        asked: W of the keys, (H, w/H, w); softmax does not see their bias.
        mean_key: (W, b) of the mean over heads of the keys, (w/H, w) and (w/H,).
    """

    def __init__(self, norm: nn.LayerNorm, attention: Attention, query_of, is_normed: bool = True):
        (query, query_bias), (key, key_bias), _ = attention.projections()
        heads, gain, shift = attention.heads, norm.weight.float(), norm.bias.float()
        root, dtype = (len(key) // heads) ** 0.5, key.dtype
        self.eps, self.query_of = norm.eps, query_of
        own, bias = query.float(), query_bias.float()
        if is_normed:
            own, bias = own * gain, bias + own @ shift
        self.asking = (own / root).to(dtype), (bias / root).to(dtype)
        self.asked = (key.float() * gain).to(dtype).unflatten(0, (heads, -1))
        key, key_bias = (part.float().unflatten(0, (heads, -1)).mean(0) for part in (key, key_bias))
        self.mean_key = (key * gain).to(dtype), (key_bias + key @ shift).to(dtype)

    def plain(self, hidden: Tensor) -> Tensor:
        """Hidden states normalized without weight and bias: (S, B, w)."""
        return F.layer_norm(hidden.to(self.asked.dtype), hidden.shape[-1:], eps=self.eps)


class Layout:
    """A vision transformer whose CLS is the image.

    Args:
        vision: OpenAI's, open_clip's, transformers' or timm's, or one with their names.
        projection: matrix (w, d) or module behind it, where the tower has none of its own.
        prompts_first: whether the host's prompts stand between CLS and the patches instead of behind them.

    Attributes:
        blocks: its L blocks.
        n_lead: positions in front of patches and prompts: 1 with CLS, 0 without.
        n_tokens: N, patch tokens of an image.
        batch_first: whether the blocks take (B, S, w).

    Raises:
        ValueError: it is no vision transformer whose parts are known.
    """

    def __init__(self, vision: nn.Module, projection=None, prompts_first: bool = False):
        self.vision, self.prompts_first = vision, prompts_first
        blocks, self.norm, self._positions = (_first(vision, names) for names in (_BLOCKS, _NORM, _POSITIONS))
        if blocks is None or self.norm is None or self._positions is None:
            raise ValueError(
                f"the image encoder is a {type(vision).__name__}, not a vision transformer, and has no tokens to "
                "select; choose a ViT backbone, for example MODEL.BACKBONE.NAME ViT-B/16, or say in an adapter where a "
                "tower has its parts (docs/your_own_host.md)"
            )
        self.blocks = list(blocks)
        self.projection = _first(vision, _PROJECTION) if projection is None else projection
        self.n_lead = int(_first(vision, _CLS) is not None)
        self.width = self._positions.shape[-1]
        self.n_tokens = self._positions.shape[-2] - self.n_lead
        self.attentions = [Attention(_first(block, ("attn", "self_attn"))) for block in self.blocks]
        self.heads = self.attentions[0].heads
        self.batch_first = getattr(self.attentions[0].module, "batch_first", True)

    @property
    def device(self) -> torch.device:
        return self._positions.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that an image meets first."""
        return _first(self.vision, _PATCHES).weight.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        size = _first(self.vision, _SIZE) or round(self.n_tokens**0.5) * _first(self.vision, _PATCHES).kernel_size[0]
        return (size, size) if isinstance(size, int) else tuple(size)

    def tower(self, dim: int) -> Tower:
        """What operations are counted by; dim: width of the space that it is read out to."""
        patch = round((self.image_size[0] * self.image_size[1] / self.n_tokens) ** 0.5)
        return Tower(self.n_tokens, len(self.blocks), self.width, self.heads, dim, patch)

    def blank_state(self) -> Tensor:
        """A hidden state of zeros, (1, w)."""
        return torch.zeros(1, self.width, device=self.device)

    def ln_1(self, block: int, hidden: Tensor) -> Tensor:
        """A block's normalization in front of its attention: (…, w) → (…, w)."""
        return _normalised(self.norm_1(block), hidden)

    def ln_2(self, block: int, hidden: Tensor) -> Tensor:
        """A block's normalization in front of its MLP: (…, w) → (…, w)."""
        return _normalised(_first(self.blocks[block], ("ln_2", "layer_norm2", "norm2")), hidden)

    def norm_1(self, block: int) -> nn.LayerNorm:
        """The module that normalizes in front of a block's attention."""
        return _first(self.blocks[block], ("ln_1", "layer_norm1", "norm1"))

    def gaze(self, block: int) -> "Gaze":
        """Who looks at the tokens that enter a block: what stands for the image, by the block's own attention."""
        return Gaze(self.norm_1(block), self.attentions[block], self.summary)

    def summary(self, hidden: Tensor) -> Tensor:
        """The state that stands for the image among those that enter any block: (S, B, w) → (B, w)."""
        return hidden[0]

    def state(self, output: Tensor) -> Tensor:
        """What stands for the image behind the last block, normalized, unprojected: (S, B, w) → (B, w)."""
        return _normalised(self.norm, self.summary(output))

    def image(self, output: Tensor) -> Tensor:
        """The image embedding from what the last block gave: (S, B, w) → (B, d)."""
        return _projected(self.projection, self.state(output))

    def read_out(self, hidden: Tensor) -> Tensor:
        """π: hidden states (…, w) seen in the tower's joint space (…, d)."""
        return _projected(self.projection, _normalised(self.norm, hidden))


class MeanLayout(Layout):
    """A vision transformer whose patch tokens' mean is the image; a CLS, if there is one, is looked past."""

    def summary(self, hidden) -> Tensor:
        return hidden[self.n_lead :].mean(0)

    def state(self, output) -> Tensor:
        if getattr(self.vision, "final_ln_after_pool", False):
            return super().state(output)
        return self.summary(_normalised(self.norm, output))


class PooledLayout(Layout):
    """A vision transformer whose image is what a learned query sees in its patch tokens (SigLIP)."""

    def __init__(self, vision, projection=None, prompts_first=False):
        super().__init__(vision, projection, prompts_first)
        self.pool = _first(vision, _POOL)
        self.pooling = Attention(_first(self.pool, ("attention",)) or self.pool)

    def gaze(self, block) -> "Gaze":
        query = _first(self.pool, _QUERY)[0].squeeze(0)  # (w,)
        return Gaze(self.norm, self.pooling, lambda plain: query.to(plain.dtype).expand(plain.shape[1], -1), False)

    def summary(self, hidden) -> Tensor:
        return hidden.mean(0)

    def state(self, output) -> Tensor:
        return self.pool(_normalised(self.norm, output).transpose(0, 1))

    def read_out(self, hidden) -> Tensor:
        """π: each hidden state (…, w) as if the query saw it alone: (…, d)."""
        return self.image(hidden.reshape(1, -1, self.width)).unflatten(0, hidden.shape[:-1])


def layout_of(vision: nn.Module, projection=None, prompts_first: bool = False) -> Layout:
    """The layout of ``vision`` by what it has.

    Raises:
        ValueError: it is no vision transformer whose parts are known.
    """
    kind, pool = Layout, _first(vision, _POOL)
    if pool is not None and _first(pool, _QUERY) is not None:
        kind = PooledLayout
    elif _first(vision, ("attn_pool",)) is not None and _first(vision, _BLOCKS) is not None:
        raise ValueError(f"the image encoder pools by a {type(pool).__name__}, which is not known here")
    elif _first(vision, ("pool_type", "trunk.global_pool")) == "avg" or _first(vision, _CLS) is None:
        kind = MeanLayout
    behind = [_first(vision, (name,)) for name in ("trunk.fc_norm", "trunk.head", "head")]
    if _first(vision, ("trunk",)) is not None and projection is None:
        projection = nn.Sequential(*behind)
    return kind(vision, projection, prompts_first)


def affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(W, b) that a linear layer applies in the end; a layer that wraps one, as LoRA's does, is asked."""
    if type(layer).__module__.startswith("torch."):
        weight, bias = layer.weight, layer.bias
    else:
        weight = next(layer.parameters())
        eye = torch.eye(_first(layer, ("in_features",)) or weight.shape[-1], dtype=weight.dtype, device=weight.device)
        bias = layer(torch.zeros_like(eye[:1]))[0]
        weight = (layer(eye) - bias).T
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def _projections(attention):
    for names in (("q_proj", "k_proj", "v_proj"), ("qkv",), ("q", "kv")):
        if all(isinstance(getattr(attention, name, None), nn.Module) for name in names):
            return [getattr(attention, name) for name in names]
    attention = getattr(attention, "base_layer", attention)
    return attention if isinstance(attention, nn.MultiheadAttention) and attention._qkv_same_embed_dim else None


def _first(module, names):
    """What the first of the dotted names that leads somewhere leads to, or None."""
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


def _normalised(norm, hidden):
    weight = getattr(norm, "weight", hidden)
    return norm(hidden.to(weight.dtype)).to(hidden.dtype)


def _projected(projection, x):
    if projection is None:
        return x
    if isinstance(projection, Tensor):
        return x @ projection.to(x.dtype)
    like = next(projection.parameters(), x)
    return projection(x.to(like.dtype)).to(x.dtype)
