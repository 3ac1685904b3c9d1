"""Rods that cover each other ("toy"), and bent tubes with ellipses ("toy v2"), with exact masks.

Frames: x to the right, y down, pixel (0, 0) covers [0, 1) x [0, 1). All randomness comes from the
generator that is passed in.
"""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .scenes import DrawnObject, Scene, noise, to_uint8

# An object with fewer visible pixels is drawn but not listed.
MIN_PIXELS = 20
_SEGMENTS = 10  # of the polyline that approximates a curve

# Values at the pixels of a window of the picture, which may be empty, and its corner y, x. Depths
# (h, w) are distances from the pixels' centers to an outline, negative outside.
_Depth = tuple[NDArray, tuple[int, int]]


class _Canvas:
    """A picture and the index of the topmost object at each pixel, -1 for none."""

    def __init__(self, image: NDArray):
        self.image = image  # (H, W, 3) float32 in [0, 255]
        self.top = np.full(image.shape[:2], -1)
        self.count = 0

    def add(self, depth: NDArray, corner: tuple[int, int], color: NDArray, opacity: float) -> None:
        """Draw an object of a color (h, w, 3); opacity 1 hides everything below."""
        h, w = depth.shape
        window = np.s_[corner[0] : corner[0] + h, corner[1] : corner[1] + w]
        alpha = opacity * np.clip(depth + 0.5, 0, 1)[..., None]
        self.image[window] += alpha * (color - self.image[window])
        self.top[window][depth >= 0] = self.count
        self.count += 1

    def objects(self) -> list[DrawnObject]:
        """The visible part of each object, from bottom to top."""
        masks = [self.top == index for index in range(self.count)]
        return [DrawnObject(0, mask) for mask in masks if mask.sum() >= MIN_PIXELS]


def draw_rods(rng: Generator, height: int, width: int) -> Scene:
    """Straight rods with round ends, red with a blue rim, on white; later ones cover earlier ones.

    8 to 25 of them in 96 x 96 pixels, and as many per area in other sizes. Every second picture
    is blurred, and every second one gets noise.
    """
    canvas = _Canvas(np.full((height, width, 3), 255, np.float32))
    for _ in range(_number(rng, 8, 25, height * width / 96**2)):
        center = rng.uniform(0, 1, 2) * (width, height)
        angle = rng.uniform(0, np.pi)
        radius = rng.uniform(3.0, 4.5)
        half = rng.uniform(15, 37) / 2 - radius
        step = half * np.array([np.cos(angle), np.sin(angle)])
        points = np.stack([center - step, center + step])
        depth, corner = _stroke_depth(points, np.full(2, radius), (height, width))
        rim = rng.uniform(1.0, 1.5)
        fill = np.array([rng.uniform(200, 240), rng.uniform(20, 50), rng.uniform(20, 50)])
        blue = np.array([20, 20, rng.uniform(170, 220)])
        inner = np.clip(depth - rim + 0.5, 0, 1)[..., None]
        canvas.add(depth, corner, blue + inner * (fill - blue), opacity=1)
    image = canvas.image
    if rng.uniform() < 0.5:
        side = int(rng.integers(2, 5))
        image = cv2.blur(image, (side, side))
    if rng.uniform() < 0.5:
        image = image + rng.uniform(10, 40) * rng.standard_normal(image.shape, np.float32)
    return to_uint8(image), canvas.objects()


def draw_tubes(rng: Generator, height: int, width: int) -> Scene:
    """Bent, tapered tubes and some ellipses, blue, with a dark soft rim, slightly transparent.

    12 to 52 of them in 128 x 128 pixels, and as many per area in other sizes, on pale blue. Pixels
    of an object seen through a transparent one belong to the transparent one.
    """
    size = (height, width)
    mottle = noise(rng, size, cells=max(size) / 12)[..., None]
    canvas = _Canvas(np.array([200, 215, 240], np.float32) + 7 * mottle)
    for _ in range(_number(rng, 12, 52, height * width / 128**2)):
        center = rng.uniform(0, 1, 2) * (width, height)
        angle = rng.uniform(0, 2 * np.pi)
        if rng.uniform() < 0.75:
            points, radii = _bent_tube(rng, center, angle)
            depth, corner = _stroke_depth(points, radii, size)
        else:
            depth, corner = _ellipse_depth(center, rng.uniform(4, 10, 2), angle, size)
        color = np.array([70, 110, 200]) + rng.uniform(-25, 25, 3)
        darkness = 0.55 * np.clip(1 - depth / 2.5, 0, 1)[..., None]
        canvas.add(depth, corner, color * (1 - darkness), opacity=rng.uniform(0.65, 0.85))
    image = canvas.image + 3 * rng.standard_normal((*size, 3), np.float32)
    return to_uint8(image), canvas.objects()


def _number(rng: Generator, low: int, high: int, scale: float) -> int:
    """Objects in a picture ``scale`` times as large as the published ones; at least 1."""
    return max(1, round(int(rng.integers(low, high + 1)) * scale))


def _bent_tube(rng: Generator, center: NDArray, angle: float) -> tuple[NDArray, NDArray]:
    """Points (n, 2) along a quadratic Bezier curve, and the radius at each."""
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    half = rng.uniform(10, 20)
    ends = center - half * along, center + half * along
    middle = center + rng.uniform(-1, 1) * 1.3 * half * across
    t = np.linspace(0, 1, _SEGMENTS + 1)[:, None]
    points = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * middle + t**2 * ends[1]
    thick, thin = rng.uniform(3.5, 4.5), rng.uniform(2.5, 3.5)
    return points, (thick + t * (thin - thick))[:, 0]


def _stroke_depth(points: NDArray, radii: NDArray, size: tuple[int, int]) -> _Depth:
    """Depth within a thick polyline in a picture of that height and width.

    ``points`` (n, 2) are x, y; ``radii`` (n,) are in pixels and linear between the points.
    """
    reach = radii.max() + 1
    xy, corner = _window(points.min(0) - reach, points.max(0) + reach, size)
    starts, steps = points[:-1], np.diff(points, axis=0)
    offsets = xy[..., None, :] - starts  # (h, w, segments, 2)
    lengths = np.maximum((steps**2).sum(1), 1e-9)
    t = np.clip((offsets * steps).sum(-1) / lengths, 0, 1)
    distance = np.linalg.norm(offsets - t[..., None] * steps, axis=-1)
    return (radii[:-1] + t * np.diff(radii) - distance).max(-1), corner


def _ellipse_depth(center: NDArray, radii: NDArray, angle: float, size: tuple[int, int]) -> _Depth:
    """Depth within a filled ellipse, exact at its outline."""
    reach = radii.max() + 1
    xy, corner = _window(center - reach, center + reach, size)
    cos, sin = np.cos(angle), np.sin(angle)
    local = (xy - center) @ np.array([[cos, -sin], [sin, cos]]) / radii
    return (1 - np.linalg.norm(local, axis=-1)) * radii.min(), corner


def _window(low: NDArray, high: NDArray, size: tuple[int, int]) -> _Depth:
    """(h, w, 2) x, y of the centers of the picture's pixels between two corners x, y."""
    sides = size[::-1]
    left, top = np.clip(np.floor(low).astype(int), 0, sides).tolist()
    right, bottom = np.clip(np.ceil(high).astype(int), 0, sides).tolist()
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    return np.stack([x, y], -1), (top, left)
