"""CLIP by name or file, and the prompts of the hosts."""

GENERAL = (  # the seven templates that OpenAI gives for CLIP
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip
