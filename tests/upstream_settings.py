"""Classes and options that the forks' models and ours are compared with."""

CLASS_NAMES = ["red", "dark_grey", "sea shell", "a very long class name indeed"]


def settings(host):
    """The host's nodes of options under TRAINER: {node: options}."""
    words = {"CTX_INIT": "a photo of a", "PREC": "fp32"}
    independent = {"N_CTX_VISION": 4, "N_CTX_TEXT": 4, "PROMPT_DEPTH_VISION": 3, "PROMPT_DEPTH_TEXT": 3, **words}
    return {
        "CoOp": {"COOP": {"N_CTX": 5, "CTX_INIT": "", "PREC": "fp32", "CSC": True, "CLASS_TOKEN_POSITION": "middle"}},
        "MaPLe": {"MAPLE": {"N_CTX": 2, "PROMPT_DEPTH": 3, **words}},
        "PromptSRC": {"PROMPTSRC": independent},
        "PromptKD": {"PROMPTKD": independent},
        "CLIPFit": {"COOP": {"PREC": "fp32"}, "CLIPFIT": {"PREC": "fp32"}},
    }[host]
