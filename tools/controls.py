"""The control rows of the evidence table: what simple means without token selection reach. Registered on import."""

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from torch import nn

from spotlighter_plugin.hosts.promptkd import classes_of_split
from spotlighter_plugin.method.losses import text_regularisation
from spotlighter_plugin.towers.prompts import normalize
from spotlighter_plugin.trainer import hand_written_texts
from trainers.clipfit import CLIPFit
from trainers.clipfit_spotlighter import CLIPFitSpotlighter
from trainers.coop import CoOp
from trainers.maple import MaPLe
from trainers.maple_spotlighter import MaPLeSpotlighter
from trainers.promptkd import PromptKD
from trainers.promptkd_spotlighter import PromptKDSpotlighter


class ResidualTexts:
    """In front of a host's model: a residual d × d on its text embeddings, Eq. 11 without any token."""

    alpha = 0.2

    def encode_text(self):
        text = normalize(super().encode_text())  # (C, d)
        return text + self.alpha * self.prompt_learner.residual(text)


class TextResidual:
    """A host with a trained residual on its text embeddings, which starts at zero."""

    def make_model(self, clip_model, class_names):
        model = super().make_model(clip_model, class_names)
        dim = clip_model.text_projection.shape[1]
        model.prompt_learner.residual = nn.Linear(dim, dim)  # saved with the prompts
        nn.init.zeros_(model.prompt_learner.residual.weight)
        nn.init.zeros_(model.prompt_learner.residual.bias)
        model.__class__ = type("ResidualCLIP", (ResidualTexts, type(model)), {})
        return model


class TextRegularised:
    """A host with L_reg_text of Eq. 14 as Spotlighter weighs it, and nothing else."""

    weight = 20.0

    def before_train(self):
        self.reference = hand_written_texts(self.cfg, self.dm.dataset.classnames, self.device)  # t⁰ (C, d)
        super().before_train()

    def objective(self, images, labels):
        loss, summary = super().objective(images, labels)
        return loss + self.weight * text_regularisation(self.model.text_features(), self.reference), summary


class ClsCache:
    """A few-shot cache of CLS features (Tip-Adapter) in front of a host: the shots' features vote for their classes.

    Weight and sharpness are chosen on the validation split. The cache lives as long as the trainer; a model for other
    classes has none and keeps the host's logits.
    """

    cache = None
    weights = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    sharpnesses = (1.0, 3.0, 5.5, 10.0, 20.0)

    @torch.no_grad()
    def after_train(self):
        super().after_train()
        self.set_model_mode("eval")
        self._remember(self._all_features(self.train_loader_x), self._all_features(self.val_loader))

    def _remember(self, shots, held_out):
        """Keep the shots, with the weight that suits what is held out; each is features (n, d) and classes (n,)."""
        keys, votes = shots[0], F.one_hot(shots[1], self.num_classes).float()  # (n, d), (n, C)
        values, labels = held_out
        logits, best = self._logits(values), -1.0
        for sharpness in self.sharpnesses:
            match = (-sharpness * (1 - values @ keys.T)).exp() @ votes  # (n of val, C)
            for weight in self.weights:
                accuracy = (logits + weight * match).argmax(1).eq(labels).float().mean().item()
                if accuracy > best:
                    best, self.cache = accuracy, (keys, votes, weight, sharpness)

    def _all_features(self, loader):
        """Features (n, d) and classes (n,) of a loader's images."""
        seen = [self._features(*self.parse_batch_test(batch)) for batch in loader]
        return [torch.cat(part) for part in zip(*seen, strict=True)]

    def _features(self, images, labels):
        return normalize(self.model.encode_image(images)), labels

    def _logits(self, features):
        return self.model.logit_scale.exp() * features @ self.model.text_features().T

    def model_inference(self, images):
        features = normalize(self.model.encode_image(images))  # (B, d)
        logits = self._logits(features)
        if self.cache is None:
            return logits
        keys, votes, weight, sharpness = self.cache
        return logits + weight * (-sharpness * (1 - features @ keys.T)).exp() @ votes


class TaughtCache(ClsCache):
    """The same for PromptKD: images are filed under the teacher's labels, and every second one weighs the others.

    Weighed as Spotlighter weighs its memory there, a cache of CLS falls below the host: this serves it better.
    """

    def _features(self, images, labels):
        return super()._features(images, self.model_teacher(images).argmax(1))

    def _remember(self, shots, held_out):
        super()._remember([part[::2] for part in shots], [part[1::2] for part in shots])
        _, _, weight, sharpness = self.cache
        self.cache = shots[0], F.one_hot(shots[1], self.num_classes).float(), weight, sharpness

    def model_inference(self, images):
        kept = classes_of_split(self.cfg.TRAINER.MODAL, self.num_texts, self.split)
        return super().model_inference(images)[:, kept]


class Attached:
    """Spotlighter put on a host that was trained without it, whose checkpoints lie in the output folder.

    Nothing more is trained: the shots are remembered, and the match with them is weighed on the validation split.
    """

    def train(self):
        self.load_model(self.output_dir, epoch=self.max_epoch)
        self._remember()


def register(name, *parts):
    """Register the trainer of this name that is made of these parts."""
    TRAINER_REGISTRY.register()(type(name, parts, {}))


for host in (CoOp, MaPLe, CLIPFit):
    register(f"{host.__name__}TextResidual", TextResidual, host)
    register(f"{host.__name__}TextRegularised", TextRegularised, host)
    register(f"{host.__name__}Cache", ClsCache, host)
register("PromptKDCache", TaughtCache, PromptKD)

for kind in (MaPLeSpotlighter, CLIPFitSpotlighter, PromptKDSpotlighter):
    register(kind.__name__.replace("Spotlighter", "Attached"), Attached, kind)
