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
    radius, slope = _outlines()
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, size, size, dtype=torch.bool)
    step = max(1, 2**20 // size**2)  # keep the working set in the cache
    for i in range(0, count, step):
        part = slice(i, i + step)
        images[part], masks[part] = _paint(draws[part], labels[part], size, radius, slope)
    return images, labels, masks


def _outlines(angles: int = 720) -> tuple[Tensor, Tensor]:
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
        "ring": np.full(angles, 0.9),  # with a hole, see `_paint`
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
    column = iter(draws.unbind(dim=1))

    def vary(low, high):
        return (low + (high - low) * next(column))[:, None, None]  # (N, 1, 1)

    x, y = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="xy")  # (S, S) in [-1, 1]
    extent, tilt = vary(0.5, 0.75), vary(-0.3, 0.3)
    x0, y0 = vary(-0.28, 0.28), vary(-0.28, 0.28)

    def inside(dx, dy, softness):  # share of each pixel that the shape covers, with soft edges for the shadow
        u = ((x - x0 - dx) * tilt.cos() + (y - y0 - dy) * tilt.sin()) / extent
        v = ((y - y0 - dy) * tilt.cos() - (x - x0 - dx) * tilt.sin()) / extent  # (N, S, S), v points down
        distance = (u * u + v * v).sqrt().clamp_min(1e-3)
        bins = radius.shape[1]
        at = (torch.atan2(-u, -v) * (bins / (2 * math.pi))).round().long() % bins + bins * labels[:, None, None]
        edge, lean = radius.flatten()[at], (slope.flatten()[at] / distance).clamp(-1.5, 1.5)
        depth = (edge - distance) * torch.rsqrt(1 + lean * lean)  # distance to the outline, to first order
        hole = (labels == SHAPES.index("ring"))[:, None, None]
        depth = torch.where(hole, torch.minimum(depth, distance - 0.45), depth)
        return (0.5 + depth * extent * size / 2 / softness).clamp(0, 1), u, v

    def colour():  # hue, saturation and value -> (N, 3, 1, 1)
        hue, saturation, value = vary(0, 1), vary(0.35, 1), vary(0.3, 1)
        wheel = (hue + torch.tensor([0, 2 / 3, 1 / 3]).view(3, 1, 1, 1)) * 6 % 6  # of red, green and blue
        rgb = value * (1 - saturation * (1 - ((wheel - 3).abs() - 1).clamp(0, 1)))  # (3, N, 1, 1)
        return rgb.transpose(0, 1)

    def waves(a, b):  # soft stripes of any direction, in [-1, 1]
        direction, phase = vary(0, math.pi), vary(0, 2 * math.pi)
        frequency = vary(2, 9)
        return torch.sin((a * direction.cos() + b * direction.sin()) * frequency + phase)

    body, u, v = inside(0, 0, 1.0)
    shadow, _, _ = inside(0.07, 0.1, 0.16 * size)
    back, front = colour(), colour()
    # Keep object and background apart in brightness, so that there is something to see.
    weights = torch.tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)
    contrast = ((front - back) * weights).sum(dim=1, keepdim=True)
    push = (0.3 - contrast.abs()).clamp_min(0) * torch.where(contrast < 0, -1.0, 1.0)
    front, back = front + push / 2, back - push / 2
    back = back * (1 + vary(0, 0.18) * waves(x, y))[:, None] + (vary(-0.15, 0.15) * x + vary(-0.15, 0.15) * y)[:, None]
    front = front * (1 + vary(0, 0.22) * waves(2 * u, 2 * v) - 0.16 * (u + v))[:, None]  # lit from the upper left
    image = back * (1 - 0.45 * shadow)[:, None]
    image = image + (front - image) * body[:, None]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), body > 0.5
