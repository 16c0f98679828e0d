"""Texts that begin alike: embeddings and gradients are those of each text alone, in every host and precision."""

from types import SimpleNamespace

import pytest
import torch
from dassl.config import get_cfg_default
from method_kit import random_clip
from torch import nn

import trainers.clipfit as clipfit
import trainers.coop as coop
import trainers.maple as maple
from spotlighter_plugin.towers.clip import apply_precision, encode_tokens, tokenize
from spotlighter_plugin.towers.packing import Packing, common_prefix, packed
from spotlighter_plugin.towers.prompts import PromptLearner, normalize
from spotlighter_plugin.workbench.speed.stopwatch import operations

NAMES = [
    "red",
    "sea shell",
    "old, grey, stone bridge",
    "pomegranate juice",
    "cat",
    "dog",
    "a",
    "hot air balloon",
    "bee",
]


def host(kind, precision="fp32", **options):
    torch.manual_seed(0)
    clip_model = apply_precision(random_clip(text=128).requires_grad_(False), precision)
    if kind == "clipfit":
        return clipfit.CustomCLIP([f"a photo of a {name}." for name in NAMES], clip_model)
    cfg, module = get_cfg_default(), {"coop": coop, "maple": maple}[kind]
    module.extend_cfg(cfg)
    cfg.TRAINER[kind.upper()].update(options)
    return module.CustomCLIP(cfg, NAMES, clip_model)


def plain(tower, prompts, tokenized):
    """OpenAI's own way through the text tower: every text on all its 77 positions."""
    x = prompts + tower.positional_embedding.type(prompts.dtype)
    x = tower.ln_final(tower.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)).type(prompts.dtype)
    return x[torch.arange(len(x)), tokenized.argmax(-1)] @ tower.text_projection


def texts_and_gradients(encode, model):
    model.zero_grad()
    texts = normalize(encode().float())
    (texts * torch.randn(texts.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return texts.detach(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(gradients, theirs, share=1e-5):
    """As far from theirs as a share of the largest."""
    assert gradients.keys() == theirs.keys() and gradients
    for name, own in gradients.items():
        assert (own - theirs[name]).abs().max() <= share * theirs[name].abs().max(), name


def one_by_one(model, kind):
    if kind == "clipfit":
        towers = model.prompt_learner
        return lambda: plain(towers.text_encoder, towers.clip_prompt, towers.clip_tokenized_prompt)
    prompts = lambda: PromptLearner.forward(model.prompt_learner)  # noqa: E731
    return lambda: plain(model.text_encoder, prompts(), model.tokenized_prompts)


@pytest.mark.parametrize("kind", ["coop", "maple", "clipfit"])
@pytest.mark.parametrize("precision, text, gradient", [("fp32", 1e-6, 1e-5), ("amp", 2e-2, 1e-1), ("fp16", 4e-3, 3e-2)])
def test_packed_texts_and_their_gradients_are_those_of_each_text_alone(kind, precision, text, gradient):
    model = host(kind, precision)
    with torch.autocast("cpu", enabled=precision == "amp"):
        texts, gradients = texts_and_gradients(model.encode_text, model)
        expected, theirs = texts_and_gradients(one_by_one(model, kind), model)
    assert (texts - expected).abs().max() <= text
    assert_same(gradients, theirs, gradient)


@pytest.mark.parametrize(
    "options", [{"CSC": True}, {"CLASS_TOKEN_POSITION": "middle"}, {"CLASS_TOKEN_POSITION": "front"}]
)
def test_contexts_of_each_class_and_names_within_the_context_keep_their_gradients(options):
    model = host("coop", **options)
    if "CSC" in options:
        model.prompt_learner.ctx.data[:] = model.prompt_learner.ctx.data[:1]  # alike in value, each class's own
    texts, gradients = texts_and_gradients(model.encode_text, model)
    expected, theirs = texts_and_gradients(one_by_one(model, "coop"), model)
    torch.testing.assert_close(texts, expected, atol=1e-6, rtol=0)
    assert_same(gradients, theirs)


def test_a_hundred_classes_cost_less_than_a_third_of_the_operations():
    cfg = get_cfg_default()
    coop.extend_cfg(cfg)
    names = [f"{name} {other}" for name in NAMES for other in NAMES + ["yes", "no"]]
    model = coop.CustomCLIP(cfg, names, random_clip(text=128).requires_grad_(False))
    prompts, ids = model.prompt_learner(), model.tokenized_prompts
    assert model.prompt_learner.shared == 17
    cost = operations(lambda: encode_tokens(model.text_encoder, prompts, ids, 17))
    assert cost < 0.35 * operations(lambda: encode_tokens(model.text_encoder, prompts, ids))


def test_each_position_sees_the_beginning_and_its_own_text_up_to_itself():
    ids = tokenize([f"a photo of a {name}." for name in NAMES])
    packing = Packing(ids, common_prefix(ids), 8)
    assert common_prefix(ids) == 5 and 1 < packing.sequences < len(NAMES)
    x = torch.arange(ids.numel()).view(len(NAMES), 77, 1).float()  # each position's own number
    rows = packing.pack(x)[..., 0].long()  # (T, n)
    for column in rows.T:
        for place, seen in zip(column, packing.mask == 0, strict=True):
            text, position = divmod(int(place), 77)
            expected = (
                [*range(5), *(77 * text + p for p in range(5, position + 1))] if position >= 5 else range(position + 1)
            )
            assert sorted(column[seen].tolist()) == sorted(expected)
    assert packing.unpack(packing.pack(x))[0, :, 0].tolist() == (torch.arange(9) * 77 + ids.argmax(-1)).tolist()


class TheirEncoder(nn.Module):
    """A fork's text encoder, deep prompts handed through a list as MaPLe's upstream does."""

    def __init__(self, clip_model, deep):
        super().__init__()
        for name in ("transformer", "positional_embedding", "ln_final", "text_projection"):
            setattr(self, name, getattr(clip_model, name))
        if deep:
            for i, block in enumerate(self.transformer.resblocks):
                block.forward = self._block(block.forward, i)
        self.deep = deep

    @staticmethod
    def _block(own, i):
        def forward(stream):
            x, deep = stream
            if i:
                prompt = deep[i - 1].expand(x.shape[1], -1, -1).permute(1, 0, 2)
                x = torch.cat([x[:1], prompt, x[1 + len(prompt) :]])
            return [own(x), deep]

        return forward

    def forward(self, prompts, tokenized, deep=None):
        x = (prompts + self.positional_embedding).permute(1, 0, 2)
        x = self.transformer([x, deep])[0] if self.deep else self.transformer(x)
        x = self.ln_final(x.permute(1, 0, 2))
        return x[torch.arange(len(x)), tokenized.argmax(-1)] @ self.text_projection


@pytest.mark.parametrize("deep", [False, True])
def test_a_forks_own_text_encoder_runs_packed_and_gives_its_own_texts_and_gradients(deep):
    clip_model = random_clip(text=128).requires_grad_(False)
    learner = PromptLearner(NAMES, clip_model, 4)
    learner.compound_prompts_text = nn.ParameterList(nn.Parameter(torch.randn(4, 128)) for _ in range(2))
    encoder, ids, seen = TheirEncoder(clip_model, deep), learner.tokenized_prompts, []
    encoder.transformer.resblocks[0].register_forward_pre_hook(
        lambda module, args: seen.append((args[0][0] if deep else args[0]).shape)
    )
    encode = lambda: encoder(learner(), ids, learner.compound_prompts_text)  # noqa: E731
    expected, theirs = texts_and_gradients(encode, learner)
    with packed(encoder, ids, learner, {"ctx", "compound_prompts_text"}):
        texts, gradients = texts_and_gradients(encode, learner)
    torch.testing.assert_close(texts, expected, atol=1e-6, rtol=0)
    assert_same(gradients, theirs)
    assert seen[0] == (77, 9, 128) and seen[1][0] * seen[1][1] < 0.3 * 77 * 9
    assert encoder.transformer.resblocks[0].attn_mask.shape == (77, 77) and "forward" not in vars(encoder.transformer)


def test_a_fork_whose_beginnings_may_differ_runs_as_it_is():
    clip_model = random_clip(text=128)
    learner, encoder = PromptLearner(NAMES, clip_model, 4), TheirEncoder(clip_model, False)
    seen, ids = [], learner.tokenized_prompts
    encoder.transformer.resblocks[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    prompts = learner().detach()
    per_class = PromptLearner(NAMES, clip_model, 4, per_class=True)
    for known, beginnings in (({"ctx"}, prompts + torch.randn(9, 77, 1)), (set(), prompts)):
        with packed(encoder, ids, learner, known):
            encoder(beginnings, ids)
    with packed(encoder, ids, per_class, {"ctx"}), packed(SimpleNamespace(), ids, learner, {"ctx"}):
        encoder(prompts, ids)
    assert seen == [77, 77, 77]
