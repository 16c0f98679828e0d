"""A small EmojiScenes, so that tests on the bundled backbone take seconds."""

from datasets import emoji_render, emoji_scenes


def fewer_scenes(monkeypatch, concepts=6, validation=1, test=2):
    """Let EmojiScenes have this many concepts, and this many validation and test scenes of each."""
    monkeypatch.setattr(emoji_scenes, "concepts", lambda: emoji_render.concepts()[:concepts])
    monkeypatch.setattr(emoji_scenes, "VAL_SCENES", validation)
    monkeypatch.setattr(emoji_scenes, "TEST_SCENES", test)
