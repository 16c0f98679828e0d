"""A trainer that nobody foresaw: trained by its own step, bit for bit as ever, Spotlighter attached to the result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dassl.engine import TRAINER_REGISTRY
from hosts_kit import batch_of, make_trainer
from method_kit import N_TOKENS

import trainers.promptsrc  # noqa: F401
from spotlighter_plugin.trainer import SpotlighterAttachedMixin

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    *("TRAINER.PROMPTSRC.PREC", "fp32", "TRAINER.PROMPTSRC.GPA_MEAN", 1, "OPTIM.MAX_EPOCH", 2),
    *("TRAINER.SPOTLIGHTER.TOP_K", 6),
)

if "PromptSRCSpotlighter" not in TRAINER_REGISTRY.registered_names():

    @TRAINER_REGISTRY.register()
    class PromptSRCSpotlighter(SpotlighterAttachedMixin, TRAINER_REGISTRY.get("PromptSRC")):
        pass

    class OwnTest(TRAINER_REGISTRY.get("PromptSRC")):
        """Its test makes other logits of its model's than its model does (MMRL, TextRefiner), and leaves a file."""

        def test(self, split=None):
            self.set_model_mode("eval")
            for batch in self.test_loader:
                images, labels = self.parse_batch_test(batch)
                self.evaluator.process(-2 * self.model_inference(images), labels)
            (Path(self.output_dir) / "results.json").write_text(str(self.evaluator.evaluate()))

    @TRAINER_REGISTRY.register()
    class OwnTestSpotlighter(SpotlighterAttachedMixin, OwnTest):
        pass


def made(folder, trainer, *options):
    return make_trainer(folder, trainer, "promptsrc", *OPTIONS, *options)


def test_the_host_is_trained_bit_for_bit_as_without_spotlighter(tmp_path):
    states = []
    for name in ("PromptSRC", "PromptSRCSpotlighter"):
        (tmp_path / name).mkdir()
        trainer = made(tmp_path / name, name)
        trainer.train()
        states.append(trainer._models["VLPromptLearner"].state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_result_is_cut_remembers_the_shots_and_is_loaded_with_its_memory(tmp_path, capsys):
    trainer = made(tmp_path, "PromptSRCSpotlighter")
    trainer.train()
    said = capsys.readouterr().out
    assert "attached to PromptSRC, which is trained by its own step" in said and "With every token kept" in said
    assert "Memory of 24 shots" in said
    assert trainer.cfg.TRAINER.NAME == "PromptSRC"
    images = batch_of(trainer)["img"]
    trainer.set_model_mode("eval")
    with torch.no_grad():
        logits = trainer.model_inference(images)
    assert trainer.spotlighter.kept.shape == (len(images), 6)
    assert trainer.spotlighter.plugin.memory.is_ready
    again = made(tmp_path, "PromptSRCSpotlighter")
    again.load_model(str(tmp_path / "out"), epoch=2)
    again.set_model_mode("eval")
    with torch.no_grad():
        torch.testing.assert_close(again.model_inference(images), logits)


def test_with_every_token_and_nothing_remembered_its_logits_are_the_hosts(tmp_path):
    keep_all = ("TRAINER.SPOTLIGHTER.TOP_K", N_TOKENS, "TRAINER.SPOTLIGHTER.STAGES", ())
    trainer = made(tmp_path, "PromptSRCSpotlighter", *keep_all)
    trainer.set_model_mode("eval")
    images = batch_of(trainer)["img"]
    with torch.no_grad():
        torch.testing.assert_close(trainer.model_inference(images), trainer.model(images), atol=1e-4, rtol=1e-4)


def test_what_a_hosts_own_test_hands_its_evaluator_is_its_answer_and_nothing_else_of_that_test_is_done(tmp_path):
    keep_all = ("TRAINER.SPOTLIGHTER.TOP_K", N_TOKENS, "TRAINER.SPOTLIGHTER.STAGES", ())
    trainer = made(tmp_path, "OwnTestSpotlighter", *keep_all)
    assert any(module.training for module in trainer._models["VLPromptLearner"].modules())
    trainer.set_model_mode("eval")
    images, before = batch_of(trainer)["img"], trainer.test_loader
    with torch.no_grad():
        torch.testing.assert_close(trainer.model_inference(images), -2 * trainer.model(images), atol=1e-4, rtol=1e-4)
    assert trainer.test_loader is before and not list(tmp_path.rglob("results.json"))


def test_a_mapping_that_would_have_to_be_trained_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="take PRESET default"):
        make_trainer(tmp_path, "PromptSRCSpotlighter", "promptsrc", "TRAINER.SPOTLIGHTER.PRESET", "paper")


SCRIPT = """import sys

from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY, TrainerX

if "register" in sys.argv:
    @TRAINER_REGISTRY.register()
    class Fresh(TrainerX):
        pass

names = TRAINER_REGISTRY.registered_names()
made = [name for name in names if name in ("FreshSpotlighter", "CoOpSpotlighter")]
if "--trainer" in sys.argv:
    told = sys.argv[sys.argv.index("--trainer") + 1]
    print(told, TRAINER_REGISTRY.get(told).__name__)
bases = [base.__name__ for name in made for base in TRAINER_REGISTRY.get(name).__bases__]
print(made, bases, get_cfg_default().TRAINER.SPOTLIGHTER.PRESET)
"""


@pytest.mark.parametrize("registers", (True, False))
def test_run_offers_a_spotlighter_for_every_trainer_that_any_script_registers(tmp_path, registers):
    (tmp_path / "anything.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "spotlighter_plugin.forks.run", "anything.py", "register" * registers]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fresh = "['FreshSpotlighter'] ['SpotlighterAttachedMixin', 'Fresh'] default\n"
    assert done.stdout == (fresh if registers else "[] [] default\n")


def test_a_scripts_own_code_is_told_the_hosts_name_and_given_ours(tmp_path):
    (tmp_path / "anything.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "spotlighter_plugin.forks.run", "anything.py", "register"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command += ["--trainer", "FreshSpotlighter"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[0] == "Fresh FreshSpotlighter", done.stderr
