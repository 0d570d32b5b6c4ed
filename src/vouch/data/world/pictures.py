"""Pictures of the goods, drawn from their attributes: shape by category, colour, a mark for the brand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Colour = tuple[int, int, int]
SCALE = 3
"""Pictures are drawn this much larger and scaled down, for smooth edges."""


def shade(colour: Colour, factor: float) -> Colour:
    """Darker below 1, lighter above."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(255 - (255 - c) / factor) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws on a unit square: coordinates run from 0 to 100."""

    def __init__(self, draw: Any, size: int) -> None:
        self._draw, self._unit = draw, size / 100

    def _at(self, *numbers: float) -> list[float]:
        return [number * self._unit for number in numbers]

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0) -> None:
        """A rectangle with round corners."""
        self._draw.rounded_rectangle(self._at(x0, y0, x1, y1), radius * self._unit, fill=fill)

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """An ellipse."""
        self._draw.ellipse(self._at(x0, y0, x1, y1), fill=fill)

    def ring(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, width: float) -> None:
        """The outline of an ellipse."""
        self._draw.ellipse(self._at(x0, y0, x1, y1), outline=colour, width=max(1, round(width * self._unit)))

    def shape(self, points: list[tuple[float, float]], fill: Colour) -> None:
        """A polygon."""
        self._draw.polygon([tuple(self._at(x, y)) for x, y in points], fill=fill)

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        """A line with round joints."""
        self._draw.line([tuple(self._at(x, y)) for x, y in points], colour, max(1, round(width * self._unit)), "curve")

    def arc(
        self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, colour: Colour, width: float
    ) -> None:
        """A part of an ellipse's outline, degrees clockwise from three o'clock."""
        self._draw.arc(self._at(x0, y0, x1, y1), start, end, colour, max(1, round(width * self._unit)))


def _mug(pen: Pen, c: Colour, v: int) -> None:
    pen.ring(60, 40, 84, 66, shade(c, 0.8), 6)
    pen.box(26, 30, 68, 78, c, 8)
    pen.oval(26, 25, 68, 36, shade(c, 1.7))
    pen.oval(30, 27, 64, 34, shade(c, 0.55))
    pen.box(26, 56 - 4 * (v % 3), 68, 61 - 4 * (v % 3), shade(c, 1.5))


def _lamp(pen: Pen, c: Colour, v: int) -> None:
    pen.box(47, 46, 53, 78, shade(c, 0.6), 2)
    pen.oval(33, 74, 67, 84, shade(c, 0.6))
    spread = 4 * (v % 3)
    pen.shape([(40 - spread / 2, 20), (60 + spread / 2, 20), (76, 54), (24, 54)], c)
    pen.shape([(40 - spread / 2, 20), (46, 20), (38, 54), (24, 54)], shade(c, 1.5))


def _chair(pen: Pen, c: Colour, v: int) -> None:
    wood = (146, 106, 72)
    for x in (31, 66):
        pen.line([(x, 62), (x - 3 if x < 50 else x + 3, 86)], wood, 4)
    pen.box(30, 20 + 3 * (v % 3), 70, 58, c, 10)
    pen.box(26, 54, 74, 66, shade(c, 0.8), 6)
    pen.box(36, 28, 64, 32, shade(c, 1.4), 2)


def _plant(pen: Pen, c: Colour, v: int) -> None:
    green = (84, 140, 92)
    for k in range(5 + v % 3):
        angle = math.radians(-150 + k * 120 / (4 + v % 3))
        x, y = 50 + 26 * math.cos(angle), 56 + 34 * math.sin(angle)
        pen.line([(50, 60), (x, y)], shade(green, 0.8), 2.5)
        pen.oval(x - 8, y - 8, x + 8, y + 8, shade(green, 1 + 0.15 * (k % 3)))
    pen.shape([(33, 58), (67, 58), (61, 84), (39, 84)], c)
    pen.box(31, 54, 69, 62, shade(c, 0.85), 2)


def _candle(pen: Pen, c: Colour, v: int) -> None:
    top = 40 + 4 * (v % 3)
    pen.box(35, top, 65, 82, c, 4)
    pen.oval(35, top - 4, 65, top + 5, shade(c, 1.6))
    pen.line([(50, top), (50, top - 8)], (70, 60, 50), 1.8)
    pen.shape([(50, top - 24), (55, top - 12), (50, top - 6), (45, top - 12)], (246, 178, 74))
    pen.oval(47.5, top - 14, 52.5, top - 7, (255, 232, 170))


def _vase(pen: Pen, c: Colour, v: int) -> None:
    pen.line([(50, 40), (44, 14)], (110, 140, 96), 2)
    pen.line([(50, 40), (58, 18)], (110, 140, 96), 2)
    pen.oval(38, 8, 50, 20, (238, 198, 122))
    pen.oval(53, 12, 63, 22, (226, 140, 130))
    wide = 3 * (v % 3)
    pen.oval(30 - wide, 44, 70 + wide, 84, c)
    pen.shape([(43, 34), (57, 34), (60, 54), (40, 54)], c)
    pen.box(41, 31, 59, 36, shade(c, 0.8), 2)
    pen.oval(37, 52, 46, 68, shade(c, 1.45))


def _shirt(pen: Pen, c: Colour, v: int) -> None:
    pen.shape([(36, 24), (14, 40), (22, 54), (34, 46)], shade(c, 0.88))
    pen.shape([(64, 24), (86, 40), (78, 54), (66, 46)], shade(c, 0.88))
    pen.box(32, 24, 68, 82, c, 4)
    pen.oval(42, 18, 58, 31, shade(c, 0.6))
    if v % 3:
        for y in range(44, 80, 12 // (v % 3)):
            pen.box(32, y, 68, y + 2.5, shade(c, 1.5))


def _shoe(pen: Pen, c: Colour, v: int) -> None:
    pen.shape([(18, 44), (38, 40), (52, 54), (78, 60), (86, 70), (86, 74), (18, 74)], c)
    pen.box(16, 72, 88, 79, (244, 240, 232), 3)
    pen.shape([(18, 44), (38, 40), (41, 43), (20, 50)], shade(c, 0.65))
    for k in range(3):
        pen.line([(42 + 6 * k, 50 + 3.5 * k), (48 + 6 * k, 46 + 3.5 * k)], (250, 248, 244), 1.8)
    if v % 2:
        pen.shape([(24, 58), (50, 64), (50, 67), (24, 62)], shade(c, 1.6))


def _bag(pen: Pen, c: Colour, v: int) -> None:
    pen.arc(34, 16, 66, 64, 180, 360, shade(c, 0.65), 4)
    pen.shape([(24, 40), (76, 40), (82, 82), (18, 82)], c)
    pen.shape([(24, 40), (76, 40), (73, 56), (27, 56)] if v % 2 else [(24, 40), (76, 40), (50, 62)], shade(c, 0.8))
    pen.oval(47, 54, 53, 60, (232, 204, 128))


def _hat(pen: Pen, c: Colour, v: int) -> None:
    pen.oval(12, 56, 88, 76, shade(c, 0.85))
    pen.box(32, 30 + 3 * (v % 3), 68, 66, c, 14)
    pen.box(32, 56, 68, 63, shade(c, 0.5))


def _watch(pen: Pen, c: Colour, v: int) -> None:
    pen.box(40, 12, 60, 88, c, 5)
    pen.oval(28, 28, 72, 72, shade(c, 0.55))
    pen.oval(32, 32, 68, 68, (248, 246, 240))
    hour = math.radians(30 * v)
    pen.line([(50, 50), (50 + 9 * math.cos(hour), 50 + 9 * math.sin(hour))], (60, 60, 66), 2.4)
    pen.line([(50, 50), (50, 36)], (60, 60, 66), 1.6)


def _socks(pen: Pen, c: Colour, v: int) -> None:
    for shift, tone in ((14, 0.8), (0, 1.0)):
        colour = shade(c, tone)
        pen.box(30 + shift, 18, 50 + shift, 68, colour, 3)
        pen.box(30 + shift, 54, 70 + shift, 76, colour, 10)
        pen.box(30 + shift, 18, 50 + shift, 25, shade(colour, 1.6), 2)
        for k in range(v % 3 + 1):
            pen.box(30 + shift, 32 + 8 * k, 50 + shift, 35 + 8 * k, shade(colour, 1.5))


SHAPES: dict[str, Callable[[Pen, Colour, int], None]] = {
    "mug": _mug, "lamp": _lamp, "chair": _chair, "plant": _plant, "candle": _candle, "vase": _vase,
    "shirt": _shirt, "shoe": _shoe, "bag": _bag, "hat": _hat, "watch": _watch, "socks": _socks,
}  # fmt: skip


def draw(category: str, colour: Colour, brand: int, variant: int, size: int = 128) -> Any:
    """A product picture, `size` by `size`: soft background, shadow, the thing, and the brand's mark in a corner."""
    from PIL import Image, ImageDraw, ImageFilter

    large = size * SCALE
    back = shade(colour, 7.0)
    image = Image.new("RGB", (large, large), back)
    pen = Pen(ImageDraw.Draw(image), large)
    pen.oval(8, 8, 92, 92, shade(colour, 12.0))
    shadow = Image.new("L", (large, large), 0)
    ImageDraw.Draw(shadow).ellipse([0.2 * large, 0.78 * large, 0.8 * large, 0.9 * large], fill=70)
    shadow = shadow.filter(ImageFilter.GaussianBlur(large / 40))
    image.paste(shade(colour, 0.45), (0, 0), shadow)
    SHAPES[category](Pen(ImageDraw.Draw(image), large), colour, variant % 12)
    for k in range(3):  # the brand in three dots, each on or off
        if (brand >> k) & 1:
            pen.oval(84 + 0 * k, 6 + 6 * k, 88, 10 + 6 * k, shade(colour, 0.6))
    return image.resize((size, size), Image.Resampling.LANCZOS)
