"""Captions of IconScenes' scenes, put together as rows of a compact vocabulary on the device where scenes are drawn.

A caption is a row of phrases, "a dark photo of a", "small", "outlined", "umbrella", "at the top", "on a striped
background": byte pairs never cross a blank, so the tokens of the whole are those of its phrases one behind the other.
"""

import torch
from torch import Tensor

from datasets import icon_render

MEDIA = ("photo", "picture", "drawing", "image")
ADJECTIVES = {"source": "", "inverted": "negative", "colour": "colourful", "pixel": "pixelated", "dark": "dark"}
SIZES = ("small", "medium", "large")
PLACES = (
    "in the top left corner", "at the top", "in the top right corner", "on the left", "in the middle", "on the right",
    "in the bottom left corner", "at the bottom", "in the bottom right corner",
)  # fmt: skip
START, END = 49406, 49407  # OpenAI's marks around a text


class Words:
    """OpenAI's token ids ↔ rows of the compact vocabulary, and the phrases of captions as such rows.

    names: every name that a drawing of the pack has; styles: the word for each style, "" for none.
    """

    def __init__(self, names: list[str], styles: list[str], device: torch.device):
        import clip

        self.tokenize, self.names, self.device = clip.tokenize, list(names), device
        adjectives = [f"a {adjective}".strip() for adjective in ADJECTIVES.values()]
        media = [f"{adjective} {medium} of a" for adjective in adjectives for medium in MEDIA]
        grounds = [f"on a {ground} background" for ground in icon_render.GROUNDS]
        self.tables, start = {}, 1  # phrase 0 says nothing
        parts = {"medium": media, "size": SIZES, "style": styles, "place": PLACES, "ground": grounds, "name": names}
        phrases = [""]
        for part, texts in parts.items():
            self.tables[part], start = start, start + len(texts)
            phrases += texts
        phrases.append(".")
        self.phrases = phrases
        tokens = [row[1 : int(row.argmax())] for row in self.tokenize(phrases)]
        extra = self.tokenize(["X", "a", "the", "itap this that"])
        self.ids = torch.cat([torch.tensor([0, START, END]), *tokens, extra.flatten()]).unique()
        self.row = torch.zeros(49408, dtype=torch.long)
        self.row[self.ids] = torch.arange(len(self.ids))
        self.length = torch.tensor([len(row) for row in tokens], device=device)
        table = torch.zeros(len(tokens), int(self.length.max()), dtype=torch.long)
        for i, row in enumerate(tokens):
            table[i, : len(row)] = self.row[row]
        self.table = table.to(device)

    def prompts(self, names: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """ "a photo of a {}." of each name: rows (C, T) and the ends of the texts (C,)."""
        tokens = self.tokenize([f"a photo of a {name}." for name in names])
        end = tokens.argmax(1)
        return self.row[tokens[:, : int(end.max()) + 1]].to(device), end.to(device)

    def captions(
        self, scenes, main: Tensor, scene: icon_render.Plan, domain: Tensor, some: Tensor, every_part: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Captions of the scenes ``some`` (n,) among B: rows (n, T) and ends (n,).

        scenes: whose drawings ``main`` (B,) are, with their names and styles; domain: (B,). Each part is left out half
        of the time; with ``every_part`` just one, so that no caption is as short as a hand-written prompt.
        """
        n, device, side = len(some), main.device, scene.side[some]
        third = lambda start: (3 * start[some] // (icon_render.SIZE - side + 1)).clamp(0, 2)  # noqa: E731
        size = (side - icon_render.SMALLEST) * 3 // (icon_render.LARGEST - icon_render.SMALLEST + 1)
        medium = torch.randint(len(MEDIA), (n,), device=device)
        if every_part:
            kept = torch.ones(n, 5, dtype=torch.bool, device=device)
            kept.scatter_(1, torch.randint(5, (n, 1), device=device), False)
        else:
            kept = torch.rand(n, 5, device=device) < 0.5
        adjective = torch.where(kept[:, 4], domain[some], 0)
        parts = {
            "medium": adjective * len(MEDIA) + medium,
            "size": size.clamp(0, 2),
            "style": scenes.style[main[some]],
            "place": third(scene.top) * 3 + third(scene.left),
            "ground": scene.ground[some],
            "name": scenes.label[main[some]],
        }
        parts = {part: self.tables[part] + value for part, value in parts.items()}
        for column, part in enumerate(("size", "style", "place", "ground")):
            parts[part] = parts[part] * kept[:, column]
        subject = [parts[part] for part in ("medium", "size", "style", "name")]
        orders = torch.stack(
            [
                torch.stack([*subject, parts["place"], parts["ground"]], 1),
                torch.stack([parts["ground"], parts["place"], *subject], 1),
                torch.stack([parts["place"], *subject, parts["ground"]], 1),
            ]
        )  # (3, n, 6)
        order = torch.randint(3, (n,), device=device)
        phrases = orders[order, torch.arange(n, device=device)]
        stop = torch.full((n, 1), len(self.table) - 1, device=device)
        return self._rows(torch.cat([phrases, stop], 1))

    def _rows(self, phrases: Tensor) -> tuple[Tensor, Tensor]:
        """Phrases (n, p) one behind the other between START and END."""
        n, widest = len(phrases), self.table.shape[1]
        there = torch.arange(widest, device=phrases.device) < self.length[phrases][..., None]  # (n, p, widest)
        rows, there = self.table[phrases].flatten(1), there.flatten(1)
        rows = rows.gather(1, (~there).byte().argsort(dim=1, stable=True))
        count = there.sum(1)
        rows = rows[:, : int(count.max())] * (torch.arange(int(count.max()), device=rows.device) < count[:, None])
        edge = lambda mark: torch.full((n, 1), int(self.row[mark]), device=rows.device)  # noqa: E731
        rows = torch.cat([edge(START), rows, torch.zeros_like(rows[:, :1])], 1)
        return rows.scatter(1, count[:, None] + 1, int(self.row[END])), count + 1
