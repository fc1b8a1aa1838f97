"""The built-in pictures: ten shapes in any colour, light, place and rotation."""

import math

import numpy as np
import torch
from torch import Tensor

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "arrow", "flower", "drop")


def render_shapes(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` pictures of ten shapes -> uint8 (N, 3, size, size), labels (N,), bool object masks (N, size, size).

    Only the outline tells the class. Colours, light, texture, place, scale and rotation of the shape and the background
    behind it vary. Picture i depends on (seed, i) alone, whatever the count.
    """
    draws = np.random.Generator(np.random.Philox(seed)).random((count, 24))  # filled row by row: rows never change
    draws = torch.from_numpy(draws).float()
    labels = torch.arange(count) % len(SHAPES)
    radius, slope = outlines()
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, size, size, dtype=torch.bool)
    step = max(1, 2**20 // size**2)  # keep the working set in the cache
    for i in range(0, count, step):
        part = slice(i, i + step)
        images[part], masks[part] = _paint(draws[part], labels[part], size, radius, slope)
    return images, labels, masks


def outlines(angles: int = 720) -> tuple[Tensor, Tensor]:
    """Each shape as the distance of its outline from its centre, by angle (0 = up): radius and slope (10, angles)."""
    angle = np.arange(angles) * 2 * np.pi / angles
    turn = 2 * np.pi

    def polygon(*corners):  # (right, up) pairs, anticlockwise, every point in sight of the centre
        distance = np.full(angles, np.inf)
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy = -np.sin(angle), np.cos(angle)
            cross = dx * (y2 - y1) - dy * (x2 - x1)
            with np.errstate(divide="ignore", invalid="ignore"):
                along = (x1 * (y2 - y1) - y1 * (x2 - x1)) / cross
                share = (x1 * dy - y1 * dx) / cross
            hit = (along > 0) & (share >= -1e-9) & (share <= 1 + 1e-9)
            distance = np.where(hit & (along < distance), along, distance)
        return distance

    def spikes(count, inner):  # outer corners at radius 1, inner ones between them
        at = [(1.0 if i % 2 == 0 else inner, i * np.pi / count) for i in range(2 * count)]
        return polygon(*[(-r * np.sin(a), r * np.cos(a)) for r, a in at])

    bar = np.minimum(0.34 / np.abs(np.sin(angle)).clip(1e-6), 1 / np.abs(np.cos(angle)).clip(1e-6))
    beam = np.minimum(1 / np.abs(np.sin(angle)).clip(1e-6), 0.34 / np.abs(np.cos(angle)).clip(1e-6))
    away = np.minimum(angle, turn - angle)  # angle from "up", 0 to pi
    t = -angle[::10]
    heart = list(zip(np.sin(t) ** 3, (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16))
    outlines = {
        "circle": np.full(angles, 0.8),
        "ring": np.full(angles, 0.9),  # with a hole, see `Brush.inside`
        "square": polygon((0.75, 0.75), (-0.75, 0.75), (-0.75, -0.75), (0.75, -0.75)),
        "triangle": spikes(3, 0.5),
        "star": spikes(5, 0.42),
        "cross": np.maximum(bar, beam),
        "heart": polygon(*heart),
        "arrow": polygon((0, 1), (-0.8, 0.2), (-0.3, 0.2), (-0.3, -0.9), (0.3, -0.9), (0.3, 0.2), (0.8, 0.2)),
        "flower": 0.72 + 0.24 * np.cos(6 * angle),
        "drop": 0.62 + 0.45 * np.exp(-((away / 0.42) ** 2)),
    }
    radius = torch.from_numpy(np.stack([outlines[name] for name in SHAPES])).float()
    slope = (radius.roll(-1, 1) - radius.roll(1, 1)) / (2 * turn / angles)
    return radius, slope


def _paint(draws: Tensor, labels: Tensor, size: int, radius: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Render one part of `render_shapes`: draws (N, 24), labels (N,) -> uint8 (N, 3, S, S), bool (N, S, S)."""
    brush = Brush(draws, size, radius, slope)
    vary = brush.vary
    place = vary(0.5, 0.75), vary(-0.3, 0.3), vary(-0.28, 0.28), vary(-0.28, 0.28)
    body, u, v = brush.inside(labels, *place)
    shadow = brush.shadow(labels, *place)
    back, front = brush.colour(), brush.colour()
    push = contrast_push(back, front)
    front, back = front + push / 2, back - push / 2
    image = brush.backdrop(back)
    front = brush.lit(front, u, v)
    image = image * (1 - 0.45 * shadow)[:, None]
    image = image + (front - image) * body[:, None]
    return to_bytes(image), body > 0.5


class Brush:
    """What pictures are painted with, from random numbers (N, K) in [0, 1): each call takes the next columns of them.

    Values are (N, 1, 1), maps (N, S, S), colours (N, 3, 1, 1) and images (N, 3, S, S), in [0, 1] but for overshoot.
    Places lie in [-1, 1], x to the right and y down.
    """

    def __init__(self, draws: Tensor, size: int, radius: Tensor, slope: Tensor):
        self.column, self.size, self.radius, self.slope = iter(draws.unbind(dim=1)), size, radius, slope
        self.x, self.y = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="xy")  # (S, S)

    def vary(self, low: float, high: float) -> Tensor:
        return (low + (high - low) * next(self.column))[:, None, None]  # (N, 1, 1)

    def inside(self, labels: Tensor, extent: Tensor, tilt: Tensor, x0: Tensor, y0: Tensor, dx=0, dy=0, softness=1.0):
        """Share of each pixel that shapes of these labels (N,) cover, with soft edges for a shadow; and their own axes.

        The latter, u to the right and v down, are 1 where the outline's radius is.
        """
        x, y, radius = self.x, self.y, self.radius
        u = ((x - x0 - dx) * tilt.cos() + (y - y0 - dy) * tilt.sin()) / extent
        v = ((y - y0 - dy) * tilt.cos() - (x - x0 - dx) * tilt.sin()) / extent  # (N, S, S), v points down
        distance = (u * u + v * v).sqrt().clamp_min(1e-3)
        bins = radius.shape[1]
        at = (torch.atan2(-u, -v) * (bins / (2 * math.pi))).round().long() % bins + bins * labels[:, None, None]
        edge, lean = radius.flatten()[at], (self.slope.flatten()[at] / distance).clamp(-1.5, 1.5)
        depth = (edge - distance) * torch.rsqrt(1 + lean * lean)  # distance to the outline, to first order
        hole = (labels == SHAPES.index("ring"))[:, None, None]
        depth = torch.where(hole, torch.minimum(depth, distance - 0.45), depth)
        return (0.5 + depth * extent * self.size / 2 / softness).clamp(0, 1), u, v

    def shadow(self, labels: Tensor, *place: Tensor) -> Tensor:
        """What a light from the upper left leaves dark behind a shape, whose place is as in `inside`."""
        return self.inside(labels, *place, 0.07, 0.1, 0.16 * self.size)[0]

    def colour(self) -> Tensor:
        hue, saturation, value = self.vary(0, 1), self.vary(0.35, 1), self.vary(0.3, 1)
        wheel = (hue + torch.tensor([0, 2 / 3, 1 / 3]).view(3, 1, 1, 1)) * 6 % 6  # of red, green and blue
        rgb = value * (1 - saturation * (1 - ((wheel - 3).abs() - 1).clamp(0, 1)))  # (3, N, 1, 1)
        return rgb.transpose(0, 1)

    def waves(self, a: Tensor, b: Tensor) -> Tensor:
        """Soft stripes of any direction, in [-1, 1]."""
        direction, phase = self.vary(0, math.pi), self.vary(0, 2 * math.pi)
        frequency = self.vary(2, 9)
        return torch.sin((a * direction.cos() + b * direction.sin()) * frequency + phase)

    def backdrop(self, colour: Tensor) -> Tensor:
        x, y = self.x, self.y
        image = colour * (1 + self.vary(0, 0.18) * self.waves(x, y))[:, None]
        return image + (self.vary(-0.15, 0.15) * x + self.vary(-0.15, 0.15) * y)[:, None]

    def lit(self, colour: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """A shape's own colour, striped, and lit from the upper left; u and v are its axes."""
        return colour * (1 + self.vary(0, 0.22) * self.waves(2 * u, 2 * v) - 0.16 * (u + v))[:, None]


def contrast_push(back: Tensor, front: Tensor) -> Tensor:
    """What takes two colours apart in brightness, half of it each, so that there is something to see."""
    weights = torch.tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)
    contrast = ((front - back) * weights).sum(dim=1, keepdim=True)
    return (0.3 - contrast.abs()).clamp_min(0) * torch.where(contrast < 0, -1.0, 1.0)


def to_bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
