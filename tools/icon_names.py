"""What an icon is called: variants off its name, synonyms merged, what is no object left out (``icon_choice.json``)."""

import json
import re
from functools import lru_cache
from pathlib import Path

CHOICE = Path(__file__).with_name("icon_choice.json")

# Words that name a variant in every set, and those that do so in some sets alone ("traffic-light" is none).
VARIANT = (
    "outline|outlined|filled|fill|solid|duotone|twotone|two-tone|rounded|linear|alt|alternate|variant|simple|expressive|"
    "remix|glyph|stroke|v|compact|icon"
)
VARIANT_OF_SET = {
    "lets-icons": "light|line|duotone-line",
    "stash": "light",
    "majesticons": "line",
    "clarity": "line",
    "mono-icons": "o",
    "fa": "o",
    "el": "alt",
    "vaadin": "o",
    "jam": "f",
    "pixelarticons": "sharp",
    "mage": "a|b|c|d|e",
    "icon-park": "one|two|three|four",
    "icon-park-outline": "one|two|three|four",
    "icon-park-solid": "one|two|three|four",
    "icon-park-twotone": "one|two|three|four",
    "ix": "small|large",
    "mdi": "box",
    "fluent": "color",
    "octicon": "fill",
}
CATEGORY = (
    "emoji|animal|animals|pet-animals|pet|food|food-drinks?|nature|nature-ecology|weather|ios|md|bxs?|travel-wayfinding|"
    "transportation|vehicle|device|musical-instrument|tool|travel|furniture|interface-essential|building-real-eastate|"
    "business-products|entertainment-events-hobbies|shopping-shipping|health|school-science|photography|music|sports?|"
    "ecology|romance|money-payments|internet-network|logo|other-ui|generic-device|content-files|logistics|meteor"
)
STYLE_OR_SIZE = (
    "outline|outlined|filled|fill|solid|duotone|duo|twotone|two-tone|rounded|round|sharp|linear|line|bold|light|thin|"
    "regular|broken|remix|flat|color|print|expressive|stroke|alt|f|o|16|20|24|28|32|48|24px|12|15|11|10"
)
STYLE = (
    ("duotone", r"duo|duotone|two-?tone"),
    ("solid", r"fill|filled|solid|bold(?=$|-)"),
)


@lru_cache
def choice() -> dict:
    """The choice by hand: licences, sets, families, names, synonyms, concepts, each omission with its reason."""
    return json.loads(CHOICE.read_text(encoding="utf-8"))


@lru_cache
def _tables():
    c = choice()
    family = {s: f for f, sets in c["families"].items() for s in sets}
    synonym = {s: name for name, others in c.get("synonyms", {}).items() for s in others}
    out = {reason: re.compile(pattern) for reason, pattern in c.get("names left out", {}).items()}
    return family, synonym, out


def family(prefix: str) -> str:
    """The family a set belongs to: sets of one author that draw the same things again."""
    return _tables()[0].get(prefix, prefix)


def normal(prefix: str, name: str, suffixes: tuple = (), prefixes: tuple = ()) -> str:
    """The name less its variant, synonyms merged: ``fluent`` "animal-dog-24-filled" and ``ph`` "dog-thin" are "dog"."""
    n = name.lower()
    for p in prefixes:
        if p and n.startswith(p + "-"):
            n = n[len(p) + 1 :]
            break
    for s in sorted(suffixes, key=len, reverse=True):
        if s and n.endswith("-" + s):
            n = n[: -len(s) - 1]
            break
    of_set = VARIANT_OF_SET.get(prefix)
    ends = re.compile(rf"(-({VARIANT}{'|' + of_set if of_set else ''})|-?\d+(px|x)?)$")
    before = None
    while before != n:
        before, n = n, ends.sub("", n)
    n = re.sub(rf"^({CATEGORY})-(?=[a-z])", "", n)
    return _tables()[1].get(n, n)


def base(prefix: str, name: str) -> str:
    """A drawing's name less its style and size, so that one thing's variants within a family of sets share it."""
    n = re.sub(r"^(baseline|outline|round|sharp|twotone|ios|md|bxs?)-", "", name.lower())
    before = None
    while before != n:
        before, n = n, re.sub(rf"-({STYLE_OR_SIZE})$", "", n)
    return n


def left_out(n: str) -> str:
    """Why no drawing of this name is used, or an empty string."""
    if not 3 <= len(n) <= 28 or re.search(r"\d", n) or n.count("-") > 3:
        return "letters, digits, captions"
    return next((reason for reason, pattern in _tables()[2].items() if pattern.search(n)), "")


def prompt(n: str) -> str:
    """The name as one would prompt it."""
    return choice().get("prompts", {}).get(n, n.replace("-", " "))


def style(name: str, palette: bool) -> str:
    """Outline, solid, duotone or palette, as far as the name tells."""
    if palette:
        return "palette"
    return next((s for s, words in STYLE if re.search(rf"(^|-)({words})(-|$)", name)), "outline")
