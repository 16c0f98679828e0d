"""tools/slack.py on a handful of scenes."""

import sys
from pathlib import Path

from scenes_kit import fewer_scenes

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import slack  # noqa: E402


def test_more_slack_weighs_the_match_no_more_and_every_domain_is_looked_at(tmp_path, monkeypatch, capsys):
    fewer_scenes(monkeypatch, concepts=8, validation=4, test=1)
    monkeypatch.setattr(slack, "SLACKS", (0.0, 0.9))
    monkeypatch.setattr(sys, "argv", ["slack.py", "--root", str(tmp_path)])
    slack.main()
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["no match", "0", "0.9"]
    assert len(rows[0]) == 3 + 5
    none, tight, loose = (float(row[2]) for row in rows)
    assert none == 0 and loose <= tight
