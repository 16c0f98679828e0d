"""Shared by all tests: `dassl` and `clip` are importable, one thread a process."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import spotlighter_plugin  # noqa: F401

torch.set_num_threads(1)
