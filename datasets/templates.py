"""The hand-written prompt of each data set (Table IX), by the name under which the data set is registered."""

from spotlighter_plugin.towers import GENERAL

PLAIN = "a photo of a {}."
ICON_SCENES = [f"IconScenes{domain}" for domain in ("", "Inverted", "Colour", "Pixel", "Dark")]

TEMPLATES = {
    "ImageNet": PLAIN,
    "ImageNetV2": PLAIN,
    "ImageNetSketch": PLAIN,
    "ImageNetA": PLAIN,
    "ImageNetR": PLAIN,
    "Caltech101": PLAIN,
    "StanfordCars": PLAIN,
    "SUN397": PLAIN,
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
    **dict.fromkeys(ICON_SCENES, PLAIN),
}

# Data sets may have templates of their own; others take those that OpenAI gives for CLIP.
ICONS = (
    "a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "a image of a {}.", "a photo of a medium {}.",
    "a drawing of a large outline {}.", "a picture of a small solid {}.", "a photo of a {} in the middle.",
    "a drawing of a {} on the left on a striped background.", "on a plain background a picture of a {}.",
    "at the top a drawing of a solid {}.", "a image of a medium outline {} on a cloudy background.",
)  # as the bundled towers' captions say it  # fmt: skip
ENSEMBLES = dict.fromkeys(ICON_SCENES, ICONS)


def prompt(dataset: str) -> str:
    """The hand-written prompt of a data set; a plain one where nobody wrote any."""
    return TEMPLATES.get(dataset, PLAIN)


def ensemble(dataset: str) -> tuple[str, ...]:
    """The templates of a data set, its hand-written prompt among them."""
    return tuple(dict.fromkeys((prompt(dataset), *ENSEMBLES.get(dataset, GENERAL))))
