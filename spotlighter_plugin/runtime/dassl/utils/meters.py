"""Running averages for the log line."""

from collections import defaultdict

import torch


class AverageMeter:
    """The last value and the mean so far; with `ema` an exponential moving average (0.9) instead of the mean."""

    def __init__(self, ema=False):
        self.ema = ema
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=1) -> None:
        self.val = val.item() if isinstance(val, torch.Tensor) else val
        self.sum += self.val * n
        self.count += n
        self.avg = 0.9 * self.avg + 0.1 * self.val if self.ema else self.sum / self.count


class MetricMeter:
    """One AverageMeter a name; prints as `loss 1.2345 (1.3456) acc 50.0000 (48.1234)`."""

    def __init__(self, delimiter=" "):
        self.meters = defaultdict(AverageMeter)
        self.delimiter = delimiter

    def update(self, input_dict) -> None:
        for name, value in (input_dict or {}).items():
            self.meters[name].update(value)

    def __str__(self):
        return self.delimiter.join(f"{name} {m.val:.4f} ({m.avg:.4f})" for name, m in self.meters.items())
