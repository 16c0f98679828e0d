"""Run in a process of its own, because a fork has its own `clip` and `trainers`: upstream_host.py FORK HOST FOLDER.

Builds the fork's model for HOST from FOLDER/student.pt and teacher.pt, and writes to FOLDER/HOST.pt its state and its
logits on FOLDER/images.pt, with Spotlighter's logits when every token is kept; of hosts whose training step is here
also the loss of that step. Imported, it says with which classes and options the forks' models and ours are compared.
"""

import sys
from types import SimpleNamespace

CLASS_NAMES = ["red", "dark_grey", "sea shell", "a very long class name indeed"]
LABELS = [2, 0, 3]
FILES = {"CoOp": "coop", "MaPLe": "maple", "PromptSRC": "promptsrc", "PromptKD": "promptkd", "CLIPFit": "ClipFit"}
FILES |= {"CoCoOp": "cocoop", "KgCoOp": "kgcoop", "MMRL": "mmrl"}


def settings(host):
    """The host's nodes of options under TRAINER: {node: options}."""
    words = {"CTX_INIT": "a photo of a", "PREC": "fp32"}
    independent = {"N_CTX_VISION": 4, "N_CTX_TEXT": 4, "PROMPT_DEPTH_VISION": 3, "PROMPT_DEPTH_TEXT": 3, **words}
    ends = {"CSC": False, "CLASS_TOKEN_POSITION": "end"}
    tokens = {"ALPHA": 0.7, "REG_WEIGHT": 0.5, "N_REP_TOKENS": 3, "REP_LAYERS": [2, 3, 4], "REP_DIM": 32}
    return {
        "CoOp": {"COOP": {"N_CTX": 5, "CTX_INIT": "", "PREC": "fp32", "CSC": True, "CLASS_TOKEN_POSITION": "middle"}},
        "MaPLe": {"MAPLE": {"N_CTX": 2, "PROMPT_DEPTH": 3, **words}},
        "PromptSRC": {"PROMPTSRC": independent},
        "PromptKD": {"PROMPTKD": independent},
        "CLIPFit": {"COOP": {"PREC": "fp32"}, "CLIPFIT": {"PREC": "fp32"}},
        "CoCoOp": {"COCOOP": {"N_CTX": 4, **words}},
        "KgCoOp": {"COOP": {"N_CTX": 4, "W": 8.0, **words, **ends}, "COCOOP": {"PREC": "fp32"}},
        "MMRL": {"MMRL": {"PREC": "fp32", **tokens}},
    }[host]


def main(fork, host, folder):
    """Everything of the fork is imported here."""
    sys.path.insert(0, fork)

    import torch

    from spotlighter_plugin import SpotlighterConfig, SpotlighterWrapper
    from spotlighter_plugin.hosts import adapter_for
    from spotlighter_plugin.hosts.promptkd import PromptKDAdapter

    for kind in (torch.Tensor, torch.nn.Module):  # the forks are written for half precision on a GPU
        kind.cuda = kind.half = lambda self, *args, **kwargs: self

    from clip import clip as fork_clip
    from clip.model import build_model
    from dassl.config import get_cfg_default
    from yacs.config import CfgNode

    trainer = __import__(f"trainers.{FILES[host]}", fromlist=["CustomCLIP"])
    states = {name: torch.load(f"{folder}/{name}.pt") for name in ("student", "teacher")}
    images, labels = torch.load(f"{folder}/images.pt"), torch.tensor(LABELS)

    cfg = get_cfg_default()
    cfg.INPUT.SIZE, cfg.DATASET.NAME, cfg.TRAINER.NAME, cfg.TRAINER.MODAL = (32, 32), "OxfordPets", host, "base2novel"
    for node, values in settings(host).items():
        cfg.TRAINER[node] = CfgNode(values)

    def build(which="student", prompts=True):
        """A CLIP of the fork, with the prompts that the fork's towers carry."""
        if host == "MMRL":
            options = cfg.TRAINER.MMRL
            design = {"model": "MMRL" if prompts else "CLIP", "n_rep_tokens": options.N_REP_TOKENS}
            design["rep_tokens_layers"] = options.REP_LAYERS
            return fork_clip.build_model_MMRL(dict(states[which]), design).float()
        depth, n = (3, 4) if prompts else (0, 0)
        design = {"vision_depth": depth, "language_depth": depth, "vision_ctx": n, "language_ctx": n}
        design |= {"trainer": "MaPLe" if host == "MaPLe" else "IVLP", "maple_length": 2}
        arguments = (design,) if host in ("MaPLe", "PromptSRC", "PromptKD") else ()
        return build_model(dict(states[which]), *arguments).float()

    def loss_of(model):
        """What the fork's own training step says."""
        step = object.__new__(getattr(trainer, host))
        step.cfg, step.model, step.device, step.scaler = cfg, model, "cpu", None
        step.batch_idx, step.num_batches, step.dtype, step.num_classes = 0, 2, torch.float, len(CLASS_NAMES)
        step.optim = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
        step.model_backward_and_update = lambda loss: None
        if host == "KgCoOp":
            step.w = cfg.TRAINER.COOP.W
        if host == "MMRL":
            plain = build(prompts=False)
            texts = trainer._get_text_base_features_zero_shot(cfg, CLASS_NAMES, plain, trainer.TextEncoder_CLIP(plain))
            step.text_features_clip = texts / texts.norm(dim=-1, keepdim=True)
            step.image_encoder_clip, options = plain.visual, cfg.TRAINER.MMRL
            step.criterion = trainer.MMRL_Loss(reg_weight=options.REG_WEIGHT, alpha=options.ALPHA)
        return step.forward_backward({"img": images, "label": labels})["loss"]

    trainer.load_clip_to_cpu = lambda cfg, plain=False: build(prompts=not plain)
    trainer.IMAGENET_TEMPLATES = ["a photo of a {}."]
    trainer.convert_weights = lambda module: None
    with torch.no_grad():
        torch.manual_seed(0)
        model = trainer.CustomCLIP(cfg, CLASS_NAMES, build()).eval()
        if host == "PromptKD":
            teacher = trainer.CustomCLIP_teacher(cfg, CLASS_NAMES, build("teacher")).eval()
            (features, scale), (_, texts, teacher_logits) = model(images), teacher(images)
            logits, adapter = scale * features @ texts.t(), PromptKDAdapter(model, CLASS_NAMES, teacher)
            result = {"teacher_state": teacher.state_dict(), "teacher_logits": teacher_logits}
        else:
            for name, parameter in model.named_parameters():  # what CLIPFit trains starts at CLIP
                moved = "bias" in name and (host != "MMRL" or "representation" in name)
                parameter.add_(0.02 * torch.randn_like(parameter) if moved else 0)
            logits, adapter, result = model(images), adapter_for(model, CLASS_NAMES), {}
        if isinstance(logits, tuple):  # MMRL's by class features, by the others and by both; KgCoOp's and its distance
            logits, result = logits[0], {"fused": logits[2]} if host == "MMRL" else {}
        wrapper = SpotlighterWrapper(model, SpotlighterConfig(top_k=4, select_block=1), adapter).eval()
        result |= {"state": model.state_dict(), "logits": logits, "spotlighter": wrapper(images)}
        result["adapter"] = adapter.name
        wrapper.detach()
    if host in ("CoCoOp", "KgCoOp", "MMRL"):
        result["loss"] = loss_of(model.train())
    torch.save(result, f"{folder}/{host}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
