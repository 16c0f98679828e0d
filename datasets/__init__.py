"""Data sets, registered in Dassl's DATASET_REGISTRY when this package is imported."""

import spotlighter_plugin  # noqa: F401  (makes dassl importable)

from . import benchmarks, icon_scenes  # noqa: F401
