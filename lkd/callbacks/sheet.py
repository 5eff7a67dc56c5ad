"""Functions that draw visualizations as one image, with one row per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lkd.tasks.visualization import Color, Visualization

Row: TypeAlias = Mapping[str, Visualization]
"""Visualizations of one sample, by column title."""

_CELL, _GAP, _LINE, _SIZE = 140, 6, 22, 18
"""Width of a cell, gap between cells, height of a line of text and font size, in pixels."""


def sheet(rows: Sequence[Row]) -> Tensor:
    """Draw visualizations as a table with one row per sample.

    Args:
        rows: Visualizations of each sample, with the same columns.

    Returns:
        Image `(3, H, W)`, uint8.
    """
    titles = list(rows[0])
    legend = {name: color for row in rows for cell in row.values() for name, color in cell.legend.items()}
    heights = [max(map(_height, row.values())) for row in rows]
    width = _GAP + len(titles) * (_CELL + _GAP)
    lines = _wrapped(legend, width)
    height = _LINE + _GAP + sum(height + _GAP for height in heights) + _LINE * len(lines) + _GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = _GAP // 2
    for column, title in enumerate(titles):
        _write(draw, _left(column), top, title)
    top += _LINE + _GAP // 2
    for row, high in zip(rows, heights, strict=True):
        for column, title in enumerate(titles):
            _paste(canvas, draw, row[title], _left(column), top)
        top += high + _GAP
    for line in lines:
        _draw_legend(draw, line, top)
        top += _LINE
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _left(column: int) -> int:
    return _GAP + column * (_CELL + _GAP)


def _scaled(image: Tensor) -> Image.Image:
    """Scale an image to the width of a cell: small images by repeating pixels, large ones by averaging."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    size = _CELL, max(1, round(_CELL * picture.height / picture.width))
    return picture.resize(size, Image.Resampling.NEAREST if picture.width <= _CELL else Image.Resampling.BOX)


def _height(cell: Visualization) -> int:
    text = _LINE * len(cell.text.splitlines())
    return text + (0 if cell.image is None else _scaled(cell.image).height)


def _paste(canvas: Image.Image, draw: ImageDraw.ImageDraw, cell: Visualization, left: int, top: int) -> None:
    if cell.image is not None:
        picture = _scaled(cell.image)
        canvas.paste(picture, (left, top))
        top += picture.height
    for line in cell.text.splitlines():
        _write(draw, left, top, line)
        top += _LINE


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, text: str) -> None:
    """Write a line of text, shortened to the width of a cell."""
    font, shown = ImageFont.load_default(_SIZE), text
    while shown and draw.textlength(shown, font) > _CELL:
        shown = shown.removesuffix("...")[:-1] + "..."
    draw.text((left, top), shown, "black", font)


def _wrapped(legend: Mapping[str, Color], width: int) -> list[list[tuple[str, Color]]]:
    """Split the entries of a legend into lines."""
    per_line = max(1, (width - _GAP) // (_CELL + _GAP))
    entries = list(legend.items())
    return [entries[start : start + per_line] for start in range(0, len(entries), per_line)]


def _draw_legend(draw: ImageDraw.ImageDraw, line: Sequence[tuple[str, Color]], top: int) -> None:
    for column, (name, color) in enumerate(line):
        left = _left(column)
        draw.rectangle((left, top + 2, left + _SIZE, top + 2 + _SIZE), color, "gray")
        _write(draw, left + _SIZE + 6, top, name)
