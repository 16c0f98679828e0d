"""PromptKD with Spotlighter: the distillation loss is taken on Spotlighter's logits, the bank files images by the
teacher's labels."""

from dassl.engine import TRAINER_REGISTRY, TrainerX

from spotlighter_plugin.hosts.promptkd import PromptKDAdapter, classes_of_split
from spotlighter_plugin.trainer import SpotlighterTrainerMixin


@TRAINER_REGISTRY.register()
class PromptKDSpotlighter(SpotlighterTrainerMixin, TRAINER_REGISTRY.get("PromptKD")):
    adapter = PromptKDAdapter
    split = "test"

    def __init__(self, cfg):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TRAINER.NAME = "PromptKD"  # the fork's data sets and prompts look at it
        cfg.freeze()
        super().__init__(cfg)

    def make_adapter(self, host, class_names):
        options = self.cfg.TRAINER.PROMPTKD
        return PromptKDAdapter(host, class_names, self.model_teacher, options.KD_WEIGHT, options.TEMPERATURE)

    def _has_validation(self):
        return self.cfg.TRAINER.MODAL != "base2novel" and super()._has_validation()  # val holds test images there

    def test(self, split=None):
        self.split = split or self.cfg.TEST.SPLIT
        return TrainerX.test(self, split)  # the fork's own asks the teacher about every test image

    def model_inference(self, images):
        logits = super().model_inference(images)  # (B, C)
        return logits[:, classes_of_split(self.cfg.TRAINER.MODAL, logits.shape[1], self.split)]
