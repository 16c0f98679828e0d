"""Accuracy of logits against labels."""

from torch import Tensor


def compute_accuracy(output, target, topk=(1,)) -> list[Tensor]:
    """Top-k accuracies in percent.

    Args:
        output: logits (B, C), or a tuple whose first entry they are.
        target: labels (B,).
        topk: which k.
    Returns: a list of tensors of shape (1,), one a k.
    """
    if isinstance(output, (tuple, list)):
        output = output[0]
    ranked = output.topk(max(topk), dim=1).indices  # (B, max k), best first
    hits = ranked.eq(target.view(-1, 1))  # (B, max k)
    return [hits[:, :k].any(dim=1).float().mean().mul(100.0).view(1) for k in topk]
