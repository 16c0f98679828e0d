"""The table of ways to cut compares each with all tokens."""

import sys
from pathlib import Path

import pytest
from scenes_kit import fewer_scenes

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import agreement  # noqa: E402


def test_shares_become_options_of_the_tower_at_hand():
    cuts = ((-2, 0.75), (-1, 0.25))
    assert agreement.options(cuts, 144) == {"STAGES": ((-2, 108),), "SELECT_BLOCK": -1, "TOP_K": 36}
    assert agreement.limit(cuts) == pytest.approx(12 / (10 + 149 / 197 + 51 / 197))


def test_all_tokens_agree_with_the_host_and_three_tokens_do_not(monkeypatch, tmp_path, capsys):
    fewer_scenes(monkeypatch, concepts=24, validation=2, test=1)
    monkeypatch.setattr(agreement, "CUTS", (agreement.ALL, ((-2, 0.02),)))
    argv = ["agreement.py", "--root", str(tmp_path), "--datasets", "configs/datasets/emoji_scenes.yaml"]
    monkeypatch.setattr(sys, "argv", argv)
    agreement.main()
    shares = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│ L")]
    assert shares[0] == "100.00" and float(shares[1]) < 100
