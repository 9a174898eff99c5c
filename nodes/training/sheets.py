"""Sheets of pictures with words and marks on them: a dataset's thumbnails, pairs, grids."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ...blip3o_core.images import fit_size

BACKGROUND, CARD, TEXT, FAINT = "#1d2433", "#2a3347", "#e8ecf4", "#9aa6bd"
RED, YELLOW = "#e5484d", "#f2b705"
GAP = 8
THUMBNAIL = 160
COLUMNS = 6
FONT = 13
CAPTION_LINES = 2
LETTERS_PER_LINE = 24
BADGE = 22


@dataclass(frozen=True)
class Thumbnail:
    """One picture of a sheet.

    Attributes:
        picture: None = it cannot be opened.
        badge: colour of the mark in the corner, or None.
    """

    picture: Image.Image | None
    title: str
    caption: str = ""
    badge: str | None = None


def sheet(thumbnails: Sequence[Thumbnail], columns: int = COLUMNS) -> Image.Image:
    """Thumbnails in rows, each with its name, the beginning of its caption, and its badge."""
    columns = max(1, min(columns, len(thumbnails)))
    height = THUMBNAIL + (1 + CAPTION_LINES) * (FONT + 4) + GAP
    rows = math.ceil(len(thumbnails) / columns) or 1
    canvas = Image.new("RGB", (columns * (THUMBNAIL + GAP) + GAP, rows * (height + GAP) + GAP), BACKGROUND)
    for index, thumbnail in enumerate(thumbnails):
        left = GAP + index % columns * (THUMBNAIL + GAP)
        top = GAP + index // columns * (height + GAP)
        _draw_card(canvas, thumbnail, left, top, height)
    return canvas


def _draw_card(canvas: Image.Image, thumbnail: Thumbnail, left: int, top: int, height: int) -> None:
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    draw.rectangle((left, top, left + THUMBNAIL, top + height), fill=CARD)
    if thumbnail.picture is None:
        draw.line((left, top, left + THUMBNAIL, top + THUMBNAIL), fill=RED, width=3)
        draw.line((left + THUMBNAIL, top, left, top + THUMBNAIL), fill=RED, width=3)
    else:
        canvas.paste(fit_size(thumbnail.picture, THUMBNAIL, THUMBNAIL), (left, top))
    if thumbnail.badge is not None:
        box = (left + 4, top + 4, left + 4 + BADGE, top + 4 + BADGE)
        draw.ellipse(box, fill=thumbnail.badge, outline=BACKGROUND, width=2)
        middle = (left + 4 + BADGE / 2, top + 4 + BADGE / 2)
        draw.text(middle, "!", font=ImageFont.load_default(FONT + 3), fill=BACKGROUND, anchor="mm")
    line = top + THUMBNAIL + 4
    draw.text((left + 4, line), _shorten(thumbnail.title), font=font, fill=TEXT)
    for text in textwrap.wrap(thumbnail.caption, LETTERS_PER_LINE)[:CAPTION_LINES]:
        line += FONT + 4
        draw.text((left + 4, line), text, font=font, fill=FAINT)


def grid(
    rows: Sequence[Sequence[Image.Image]], row_titles: Sequence[str], column_titles: Sequence[str]
) -> Image.Image:
    """Pictures of one size in a table, with a word above each column and a line of words above each row."""
    width, height = rows[0][0].size
    band = FONT + 10
    size = len(column_titles) * (width + GAP) + GAP, band + len(rows) * (height + band + GAP) + GAP
    canvas = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    for column, title in enumerate(column_titles):
        middle = (GAP + column * (width + GAP) + width / 2, band / 2 + 2)
        draw.text(middle, title, font=font, fill=TEXT, anchor="mm")
    letters = max(LETTERS_PER_LINE, size[0] // (FONT // 2 + 1))
    for row, (pictures, title) in enumerate(zip(rows, row_titles, strict=True)):
        top = band + row * (height + band + GAP)
        draw.text((GAP, top + 2), _shorten(title, letters), font=font, fill=FAINT)
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (GAP + column * (width + GAP), top + band))
    return canvas


def _shorten(text: str, letters: int = LETTERS_PER_LINE) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
