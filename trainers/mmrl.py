"""MMRL: representation tokens in the upper blocks of both towers (Guo and Gu, "MMRL: Multi-Modal Representation
Learning for Vision-Language Models", CVPR 2025).

An image is read out twice, from CLS (class features) and from the mean of its representation tokens through their own
projection (representation features). On the classes that were trained both decide, on others class features alone.
"""

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from torch import nn
from yacs.config import CfgNode

from spotlighter_plugin.towers.clip import encode_tokens, tokenize
from spotlighter_plugin.towers.packing import Packing, common_prefix
from spotlighter_plugin.towers.prompts import CLIPClassifier, TextEncoder, normalize
from spotlighter_plugin.trainer import SpotlighterAttachedMixin

from .host import HostTrainer, hand_written

WEIGHTS = {  # λ by data set, as its authors have it; 1 for others
    "StanfordCars": 7.0, "FGVCAircraft": 6.0, "SUN397": 6.0, "DescribableTextures": 6.0, "Food101": 5.0,
    "OxfordFlowers": 4.0, "UCF101": 3.0, "ImageNet": 0.5, "Caltech101": 0.5, "OxfordPets": 0.2, "EuroSAT": 0.01,
}  # fmt: skip


def extend_cfg(cfg):
    """Add the options of MMRL."""
    cfg.TRAINER.MMRL = CfgNode()
    cfg.TRAINER.MMRL.ALPHA = 0.7  # α, weight of the class features beside the representation features
    cfg.TRAINER.MMRL.REG_WEIGHT = -1.0  # λ, weight of the distances to frozen CLIP; below 0: the data set's
    cfg.TRAINER.MMRL.N_REP_TOKENS = 5  # representation tokens
    cfg.TRAINER.MMRL.REP_LAYERS = []  # blocks that they enter, from 1; none named: the upper half, 6 to 12 of 12
    cfg.TRAINER.MMRL.REP_DIM = 512  # width of the space that both towers' tokens come from (the paper's EuroSAT: 2048)
    cfg.TRAINER.MMRL.PREC = "amp"  # fp16, bf16, fp32, amp


def blocks_with_tokens(layers, n_blocks):
    """The blocks of a tower, from 0, that REP_LAYERS names."""
    named = sorted(layers) or range(n_blocks // 2, n_blocks + 1)
    found = [layer - 1 for layer in named if 1 <= layer <= n_blocks]
    if not found:
        raise ValueError(f"TRAINER.MMRL.REP_LAYERS {list(layers)}: the tower has blocks 1 to {n_blocks}: name some")
    return found


def through_blocks(blocks, x, tokens, first=0, entered=0):
    """A sequence through blocks first, first + 1, …; tokens stand behind its first position, anew in each of theirs.

    x: (S, B, w); tokens: {block: (R, w)}; entered: how many positions there are theirs already.
    """
    for i, block in enumerate(blocks[first:], first):
        if i in tokens:
            new = tokens[i].type(x.dtype).unsqueeze(1).expand(-1, x.shape[1], -1)  # (R, B, w)
            x, entered = torch.cat([x[:1], new, x[1 + entered :]]), len(new)
        x = block(x)
    return x


class RepresentationLearner(nn.Module):
    """Tokens that both towers share, and their projections into each block that they enter."""

    def __init__(self, n_tokens, dim, vision, text):
        """vision, text: the width and the blocks of each tower."""
        super().__init__()
        self.compound_rep_tokens = nn.Parameter(torch.randn(n_tokens, dim) * 0.02)
        self.compound_rep_tokens_r2vproj, self.vision_blocks = self._projections(dim, *vision)
        self.compound_rep_tokens_r2tproj, self.text_blocks = self._projections(dim, *text)

    @staticmethod
    def _projections(dim, width, blocks):
        layers = nn.ModuleList(nn.Linear(dim, width) for _ in blocks)
        for layer in layers[1:]:  # all start alike
            layer.load_state_dict(layers[0].state_dict())
        return layers, blocks

    def vision(self):
        """{block: (R, w)} of the image tower."""
        return self._projected(self.compound_rep_tokens_r2vproj, self.vision_blocks)

    def text(self):
        """{block: (R, w)} of the text tower."""
        return self._projected(self.compound_rep_tokens_r2tproj, self.text_blocks)

    def _projected(self, layers, blocks):
        return {block: layer(self.compound_rep_tokens) for block, layer in zip(blocks, layers, strict=True)}


class RepresentationTower(nn.Module):
    """CLIP's image tower, its parts by their names, with a projection for representation tokens."""

    def __init__(self, visual):
        super().__init__()
        self.input_resolution, self.output_dim = visual.input_resolution, visual.output_dim
        for name, part in (*visual.named_children(), *visual.named_parameters(recurse=False)):
            setattr(self, name, part)
        width, dim = self.proj.shape
        self.proj_rep = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, images, tokens=None):
        """(B, 3, H, W), {block: (R, w)} -> what CLS and what the tokens say, (B, d) both; None for no tokens."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, N, w)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype))
        x = through_blocks(self.transformer.resblocks, x.transpose(0, 1), tokens or {})  # (1+R+N, B, w)
        image = self.ln_post(x[0]) @ self.proj
        if not tokens:
            return image, None
        n_tokens = len(next(iter(tokens.values())))
        return image, self.ln_post(x[1 : 1 + n_tokens]).mean(0) @ self.proj_rep.type(x.dtype)


class RepresentationTexts(TextEncoder):
    """The text tower on prompts that stay as they are, so that it begins where tokens enter.

    prompts: (C, 77, w); tokenized: (C, 77); first: the first block that tokens enter; n_tokens: R.
    """

    def __init__(self, clip_model, prompts, tokenized, first, n_tokens):
        super().__init__(clip_model)
        self.first, self.n_tokens = first, n_tokens
        start, rest = tokenized[:, :1], tokenized[:, 1:]
        ids = torch.cat([start.expand(-1, 1 + n_tokens), rest], dim=1)  # (C, 77+R), as if start tokens held their place
        self.packing = Packing(ids, common_prefix(tokenized) + n_tokens, prompts.shape[-1])
        with torch.no_grad():
            x = self._below(prompts, tokenized)  # (C, T, w)
            x = torch.cat([x[:, :1].expand(-1, 1 + n_tokens, -1), x[:, 1:]], dim=1)
            self.register_buffer("entering", self.packing.pack(x), persistent=False)  # (T+R, n, w)

    def _below(self, prompts, tokenized):
        plain = Packing(tokenized, 1, prompts.shape[-1])
        length = len(plain.mask)
        x = (prompts + self.positional_embedding.type(prompts.dtype))[:, :length].transpose(0, 1)  # (T, C, w)
        with plain.masking(self.transformer, x):
            for block in self.transformer.resblocks[: self.first]:
                x = block(x)
        return x.transpose(0, 1)

    def forward(self, tokens):
        """{block: (R, w)} -> (C, d)."""
        x = self.entering
        with self.packing.masking(self.transformer, x):
            x = through_blocks(self.transformer.resblocks, x, tokens, self.first, self.n_tokens)
        return self.ln_final(self.packing.unpack(x)[0]) @ self.text_projection


class CustomCLIP(CLIPClassifier):
    """CLIP with representation tokens in both towers.

    fuses: whether representation features have a say, too. A state that is loaded decides: it holds the prompts of the
    classes that were trained.
    """

    def __init__(self, cfg, class_names, clip_model):
        super().__init__()
        options, texts = cfg.TRAINER.MMRL, hand_written(cfg, class_names)
        towers = (clip_model.visual.transformer, clip_model.transformer)
        places = [(tower.width, blocks_with_tokens(options.REP_LAYERS, tower.layers)) for tower in towers]
        self.alpha, self.fuses = options.ALPHA, True
        self.representation_learner = RepresentationLearner(options.N_REP_TOKENS, options.REP_DIM, *places)
        self.tokenized_prompts = ids = tokenize(texts)  # (C, 77)
        with torch.no_grad():
            prompts = clip_model.token_embedding(ids.to(clip_model.token_embedding.weight.device))
            prompts = prompts.type(clip_model.dtype)
            frozen = normalize(encode_tokens(clip_model, prompts, ids, common_prefix(ids)))
        self.register_buffer("prompt_embeddings", prompts)  # (C, 77, w)
        self.register_buffer("text_without", frozen, persistent=False)  # (C, d)
        self.image_encoder = RepresentationTower(clip_model.visual)
        self.text_encoder = RepresentationTexts(clip_model, prompts, ids, places[1][1][0], options.N_REP_TOKENS)
        self.logit_scale = clip_model.logit_scale

    def encode_image(self, image):
        return self._see(image)[0]

    def encode_text(self):
        return self.text_encoder(self.representation_learner.text())

    def _see(self, images):
        return self.image_encoder(images.type(self.dtype), self.representation_learner.vision())

    def both(self, images):
        """(B, 3, H, W) -> logits by class features and by representation features (B, C), and of unit length class
        features (B, d) and texts (C, d)."""
        image, representation = map(normalize, self._see(images))
        text = self.text_features()
        scaled = self.logit_scale.exp() * text.t()  # (d, C)
        return image @ scaled, representation @ scaled, image, text

    def forward(self, images):
        logits, by_representation, *_ = self.both(images)
        return self.fused(logits, by_representation) if self.fuses else logits

    def fused(self, logits, by_representation):
        return self.alpha * logits + (1 - self.alpha) * by_representation

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own, key = self.prompt_embeddings, f"{prefix}prompt_embeddings"
        theirs = state_dict.get(key, own)
        self.fuses = theirs.shape == own.shape and torch.allclose(theirs.to(own), own, atol=1e-3)
        super()._load_from_state_dict({**state_dict, key: own}, prefix, *args)


@TRAINER_REGISTRY.register()
class MMRL(HostTrainer):
    """Multi-modal representation learning."""

    options = "MMRL"
    checkpoint = "MultiModalRepresentationLearner"
    needs_vision_transformer = True

    def make_model(self, clip_model, class_names):
        return CustomCLIP(self.cfg, class_names, clip_model)

    def before_train(self):
        super().before_train()
        self.model.fuses = True

    def objective(self, images, labels):
        model, given, alpha = self.model, self.host_options.REG_WEIGHT, self.model.alpha
        weight = given if given >= 0 else WEIGHTS.get(self.cfg.DATASET.NAME, 1.0)
        with torch.no_grad():
            image_without, _ = model.image_encoder(images.type(model.dtype))  # (B, d)
        logits, by_representation, image, text = model.both(images)
        pairs = (image, image_without), (text, model.text_without)
        away = sum(1 - F.cosine_similarity(*pair).mean() for pair in pairs)
        views = alpha * F.cross_entropy(logits, labels) + (1 - alpha) * F.cross_entropy(by_representation, labels)
        loss = views + weight * away
        return loss, {"acc": compute_accuracy(model.fused(logits, by_representation), labels)[0].item()}


@TRAINER_REGISTRY.register()
class MMRLSpotlighter(SpotlighterAttachedMixin, MMRL):
    """MMRL with Spotlighter: tokens are chosen among the patches, representation tokens always go on."""
