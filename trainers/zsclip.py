"""Zero-shot CLIP: each class is the hand-written prompt of the data set, nothing is trained."""

from dassl.engine import TRAINER_REGISTRY, TrainerX

from datasets.templates import prompt
from spotlighter_plugin.towers.clip import encode_prompts
from spotlighter_plugin.towers.prompts import normalize

from .host import hand_written, load_backbone


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(TrainerX):
    """CLIP with one hand-written prompt."""

    def build_model(self):
        self.clip_model = load_backbone(self.cfg).to(self.device)
        prompts = hand_written(self.cfg, self.dm.dataset.classnames)
        print(f"Prompt: {prompt(self.cfg.DATASET.NAME)}")
        self.text_features = encode_prompts(self.clip_model, prompts)  # (C, d)

    def model_inference(self, images):
        features = normalize(self.clip_model.encode_image(images))  # (B, d)
        return self.clip_model.logit_scale.exp() * features @ self.text_features.t()
