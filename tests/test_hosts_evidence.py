"""The hosts' table on a handful of scenes: every row runs, is kept, and is printed without running again."""

import sys
from pathlib import Path

import pytest
from scenes_kit import fewer_scenes

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import hosts_evidence  # noqa: E402


def evidence(monkeypatch, folder, *flags):
    argv = ["hosts_evidence.py", "--out", str(folder / "out"), "--root", str(folder / "data"), "--seeds", "1", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    hosts_evidence.main()


@pytest.mark.parametrize("host", ["CLIPFit", "PromptKD"])
def test_every_row_of_a_host_runs_once_and_is_printed(tmp_path, monkeypatch, capsys, host):
    fewer_scenes(monkeypatch, concepts=6, validation=1, test=4)
    monkeypatch.setitem(hosts_evidence.COMMON, "DATASET.NUM_SHOTS", 4)
    monkeypatch.setitem(hosts_evidence.HOSTS[host], "OPTIM.MAX_EPOCH", 1)
    chosen = ["--hosts", host, "--datasets", "configs/datasets/emoji_scenes.yaml"]
    evidence(monkeypatch, tmp_path, *chosen)
    cells = sorted((tmp_path / "out").glob("*.npz"))
    printed = capsys.readouterr().out
    for method in hosts_evidence.rows(host, {}):
        assert method.name in printed
    assert f"{host} + Spotlighter minus {host}:" in printed and "not there yet" not in printed

    written = [cell.stat().st_mtime_ns for cell in cells]
    cells[-1].unlink()  # zero-shot CLIP, the last by name
    evidence(monkeypatch, tmp_path, *chosen, "--show")
    assert "1 of 1 data sets; not there yet: zero-shot CLIP" in capsys.readouterr().out
    assert [cell.stat().st_mtime_ns for cell in cells[:-1]] == written[:-1]
