"""The hosts and their Spotlighter trainers; train.py imports every module here, and each registers itself."""

import spotlighter_plugin  # noqa: F401  (gives `dassl` and `clip` what they need before a trainer imports them)
