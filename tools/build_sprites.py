"""Render the EmojiScenes sprites from the nine ``@iconify-json`` packages on npm.

    pip install resvg-py && python tools/build_sprites.py --packages DIR --out DIR

``DIR/<vendor>`` holds an unpacked ``@iconify-json/<vendor>`` package (``npm pack @iconify-json/noto`` and so on; with
``--download`` the script calls npm itself). Every concept that all nine vendors drew becomes a class, less the ones
that no picture can name (flags, keycaps, clock faces, plain buttons), the expressions of the yellow face, heads
beside a whole animal and names of more than two words. One lossless WebP sheet is written for each vendor, with the
concepts in the order of ``concepts.json``.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

VENDORS = (
    "noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "emojione",
    "emojione-v1",
)  # fmt: skip
SPRITE = 64  # px
COLUMNS = 32  # sprites in a row of a sheet

# Signs whose drawing is a word, a number, a colour or an arrow; variants that differ by skin tone, sex or phase alone.
UNNAMEABLE = re.compile(
    r"(^flag|flag$|keycap|oclock|thirty|button|arrow|square|circle|diamond|heart-suit|symbol|sign$|skin|"
    r"input|japanese|chart-|^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces)|"  # noqa: E501
    r"ophiuchus|mark$|medium|^heavy|^(black|white)-|wavy|curly|moon-face|gibbous|waning|waxing|quarter|"
    r"^(man|woman|men|women|person|people)-|-(man|woman|men|women)$|couple|family|kiss-|bars|trident|currency|"
    r"copyright|registered|trade|infinity|recycl|biohazard|radioactive|cyclone-|signal|vibration|mobile-phone-|no-|"
    r"prohibited|underage|heart-with|(green|blue|yellow|purple|orange|brown|beating|growing|broken|sparkling|revolving)-heart|"  # noqa: E501
    r"hearts$|right$|left$|dotted|part-|multipl|divide|plus|minus|record|reverse|fast-|play|pause|stop-|eject|repeat|shuffle|"  # noqa: E501
    r"number|latin|top-|soon|-on$|back-|end-|^on|^up-|^down-|regional|hundred|zzz|index|backhand|ok-hand|-speaker|-volume|"  # noqa: E501
    r"heart-decoration|bullseye-|transport-|litter|water-closet|restroom|customs|baggage-claim|left-luggage|passport-|atm|"  # noqa: E501
    r"mens-room|womens-room|baby-symbol|wheelchair|potable|children-crossing|non-|do-not|place-of|double-|triangular|"
    r"part|exclamation|question|om$|star-of|wheel-of|yin|cross$|peace|menorah|six-pointed|khanda)"
)

EXPRESSION = re.compile(
    r"-face(-|$)|^face-|^eyes$|^sparkle$|^tram-car$|^(blue|green|orange)-book$|^round-pushpin$|^old-key$"
)  # noqa: E501


def read_package(folder: Path) -> dict[str, str]:
    """``{name without hyphens: (hyphenated name, svg)}`` of one unpacked @iconify-json package, aliases included."""
    data = json.loads((folder / "icons.json").read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    icons = {}

    def add(name, icon):
        w, h = icon.get("width", width), icon.get("height", height)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{icon["body"]}</svg>'
        icons.setdefault(name.replace("-", ""), (name, svg))

    for name, icon in data["icons"].items():
        add(name, icon)
    for name, alias in data.get("aliases", {}).items():
        parent = data["icons"].get(alias["parent"])
        if parent is not None:
            add(name, {**parent, **alias})
    return icons


def choose_concepts(packages: dict[str, dict], at_least: int) -> tuple[list[str], dict[str, str]]:
    """Keys drawn by ``at_least`` vendors, one per drawing: where two keys share a drawing anywhere the shorter stays."""  # noqa: E501
    count = Counter(key for icons in packages.values() for key in icons)
    hyphenated = defaultdict(Counter)
    for icons in packages.values():
        for key, (name, _) in icons.items():
            hyphenated[key][name] += 1
    names = {}
    for key, n in count.items():
        # the spelling with most hyphens that two vendors agree on, else the most common
        spellings = sorted(hyphenated[key].items(), key=lambda kv: (kv[1] >= 2, kv[0].count("-"), kv[1]))
        name = spellings[-1][0]
        if n < at_least or UNNAMEABLE.search(name) or EXPRESSION.search(name) or name.count("-") > 1:
            continue
        if not any(c.isdigit() for c in name):
            names[key] = name
    taken, kept = set(), []
    for key in sorted(names, key=lambda k: (names[k].count("-"), len(k), k)):
        drawings = {(v, icons[key][1]) for v, icons in packages.items() if key in icons}
        if not drawings & taken:
            kept.append(key)
            taken |= drawings
    return sorted(kept, key=names.get), names


def render(svg: str) -> Image.Image:
    """One SVG as a ``SPRITE`` × ``SPRITE`` RGBA picture, trimmed to its drawing and scaled to fill it."""
    import resvg_py

    def draw(size):
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
        return Image.open(io.BytesIO(png)).convert("RGBA")

    big = draw(4 * SPRITE)
    box = big.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError("an empty drawing")
    big = big.crop(box)
    scale = SPRITE / max(big.size)
    size = (max(1, round(big.width * scale)), max(1, round(big.height * scale)))
    sprite = Image.new("RGBA", (SPRITE, SPRITE))
    sprite.paste(big.resize(size, Image.LANCZOS), ((SPRITE - size[0]) // 2, (SPRITE - size[1]) // 2))
    return sprite


def download(vendor: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "pack", "--silent", f"@iconify-json/{vendor}"],
        cwd=folder,
        check=True,
        text=True,
        stdout=subprocess.PIPE,  # noqa: E501
    )
    with tarfile.open(folder / done.stdout.split()[-1]) as tar:
        for name in ("icons.json", "info.json"):
            (folder / name).write_bytes(tar.extractfile(f"package/{name}").read())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked packages, one per vendor")
    parser.add_argument("--out", type=Path, required=True, help="where sheets and concepts.json go")
    parser.add_argument("--vendors", nargs="+", default=VENDORS, choices=VENDORS, help="sheets to render")
    parser.add_argument("--at-least", type=int, default=9, help="vendors that must have drawn a concept")
    parser.add_argument("--download", action="store_true", help="fetch missing packages with npm")
    args = parser.parse_args()
    for vendor in VENDORS:
        if args.download and not (args.packages / vendor / "icons.json").exists():
            download(vendor, args.packages / vendor)
    packages = {vendor: read_package(args.packages / vendor) for vendor in VENDORS}
    keys, names = choose_concepts(packages, args.at_least)
    args.out.mkdir(parents=True, exist_ok=True)
    missing = defaultdict(list)
    for vendor in args.vendors:
        sheet = Image.new("RGBA", (COLUMNS * SPRITE, -(-len(keys) // COLUMNS) * SPRITE))
        for i, key in enumerate(keys):
            try:
                sprite = render(packages[vendor][key][1])
            except (KeyError, ValueError):
                missing[vendor].append(names[key])
                continue
            sheet.paste(sprite, (i % COLUMNS * SPRITE, i // COLUMNS * SPRITE))
        sheet.save(args.out / f"{vendor}.webp", lossless=True, quality=100, method=6)
        print(f"{vendor}: {len(keys) - len(missing[vendor])} of {len(keys)} sprites", flush=True)
    record = {"sprite": SPRITE, "columns": COLUMNS, "concepts": [names[k] for k in keys], "missing": missing}
    (args.out / "concepts.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
