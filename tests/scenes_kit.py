"""A small IconScenes, so that tests on the bundled backbone take seconds."""

from datasets import icon_drawings, icon_scenes


def few(concepts=6, validation=1, test=2):
    """What IconScenes' module is to hold to have this many concepts, and scenes of each for validation and testing."""
    n = {"shots": icon_scenes.SHOTS, "val": validation, "test": test}

    def drawings(split):
        return tuple(a[:, : n[split]] for a in icon_drawings.drawings(split))

    names = icon_drawings.concepts()[:concepts]
    return {"concepts": lambda: names, "drawings": drawings, "VAL_SCENES": 1, "TEST_SCENES": 1}


def fewer_scenes(monkeypatch, **counts):
    """Let IconScenes be this small."""
    for name, value in few(**counts).items():
        monkeypatch.setattr(icon_scenes, name, value)
