"""The hand-written prompt of each data set (Table IX), by the name under which the data set is registered."""

PLAIN = "a photo of a {}."

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
    "EmojiScenes": PLAIN,
    "EmojiScenesPixel": PLAIN,
    "EmojiScenesDark": PLAIN,
    "EmojiScenesSwap": PLAIN,
    "EmojiScenesShift": PLAIN,
}
