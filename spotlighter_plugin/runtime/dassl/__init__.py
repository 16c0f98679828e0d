"""The part of Dassl's interface that prompt-tuning trainers and data sets use, as one small library.

Names, configuration keys, random-number order, log lines and checkpoint layout are those of Dassl 0.6.3, so that a
trainer written for either runs on both. It is imported as `dassl` only where the real toolbox is not installed
(see spotlighter_plugin/compat.py). Left out: Dassl's own methods and benchmarks for domain adaptation, domain
generalisation and semi-supervised learning, and its CNN backbones.
"""

__version__ = "0.6.3+spotlighter"
