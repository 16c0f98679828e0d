"""KgCoOp: CoOp whose texts stay near those of hand-written prompts (Yao et al., "Visual-Language Prompt Tuning with
Knowledge-guided Context Optimization", CVPR 2023).

Its distance is half the squared one of unit vectors, 1 - cos, as in the authors' code.
"""

from dassl.engine import TRAINER_REGISTRY

from spotlighter_plugin.hosts.coop import KgCoOpAdapter
from spotlighter_plugin.towers.clip import encode_prompts
from spotlighter_plugin.trainer import SpotlighterTrainerMixin

from . import coop
from .host import hand_written, held_near


def extend_cfg(cfg):
    """Add the options of KgCoOp: CoOp's, as in its fork, and one more."""
    coop.extend_cfg(cfg)
    cfg.TRAINER.COOP.W = 8.0  # KgCoOp's λ, weight of the distance to the hand-written prompts' texts


class CustomCLIP(coop.CustomCLIP):
    """CoOp's, with the embedding of each class's hand-written prompt."""

    def __init__(self, cfg, class_names, clip_model):
        super().__init__(cfg, class_names, clip_model)
        frozen = encode_prompts(clip_model, hand_written(cfg, class_names))  # (C, d)
        self.prompt_learner.register_buffer("text_features", frozen, persistent=False)


@TRAINER_REGISTRY.register()
class KgCoOp(coop.CoOp):
    """Knowledge-guided context optimization."""

    def make_model(self, clip_model, class_names):
        return CustomCLIP(self.cfg, class_names, clip_model)

    def objective(self, images, labels):
        return held_near(self.model, self.model.prompt_learner.text_features, self.host_options.W, images, labels)


@TRAINER_REGISTRY.register()
class KgCoOpSpotlighter(SpotlighterTrainerMixin, KgCoOp):
    """KgCoOp with Spotlighter."""

    adapter = KgCoOpAdapter

    def make_adapter(self, host, class_names):
        return KgCoOpAdapter(host, class_names, self.host_options.W)
