"""Train and evaluate: train.py --trainer CoOpSpotlighter --dataset-config-file configs/datasets/icon_scenes.yaml"""

import sys

from spotlighter_plugin.workbench.training.train import main

if __name__ == "__main__":
    sys.exit(main())
