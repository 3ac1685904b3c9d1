"""Random scenes of flat shapes with exact masks.

Frames: x to the right, y down, pixel (0, 0) covers [0, 1) x [0, 1). Images are float32 in [0, 255]
until the end. All randomness comes from the generator that is passed in.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

# Samples per image pixel and axis when a shape is drawn, for anti-aliased edges.
_SUPERSAMPLING = 4
# At least this fraction of a shape's area, and at least this many pixels, stay visible.
MIN_VISIBLE = 0.5
MIN_PIXELS = 40
# Square root of the area of the smallest shape, in pixels, and of the largest, in image sides.
_SMALLEST = 16.0
_LARGEST = 0.95
# Largest rotation in radians. Upright shapes are learned in minutes, freely rotated ones in hours.
_TILT = 0.35

Contours = list[NDArray[np.float64]]


class DrawnObject(NamedTuple):
    """One object, or one crowd: many tiny objects of a class, not annotated separately."""

    category: int  # index into the set's classes
    mask: NDArray[np.bool_]  # (H, W), the visible part
    is_crowd: bool = False


# (H, W, 3) uint8 RGB image, and its objects from bottom to top
Scene = tuple[NDArray[np.uint8], list[DrawnObject]]


class _Layer(NamedTuple):
    alpha: NDArray  # (H, W) coverage in [0, 1]
    area: float  # pixels, including those outside the image

    @property
    def mask(self) -> NDArray[np.bool_]:
        return self.alpha >= 0.5


# --- outlines: contours inside the unit circle; a point is inside where an odd number encloses it


def _circle(radius: float = 1.0) -> NDArray[np.float64]:
    angles = np.linspace(0, 2 * np.pi, 64)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)


def _star(points: int, inner: float) -> NDArray[np.float64]:
    angles = np.pi * np.arange(2 * points) / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _cross(arm: float) -> NDArray[np.float64]:
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]])  # arm: half its width
    turn = np.array([[0, 1], [-1, 0]])
    turns = [quarter @ np.linalg.matrix_power(turn, k) for k in range(4)]
    return np.concatenate(turns) / np.hypot(1, arm)


_OUTLINES: dict[str, Callable[[Generator], Contours]] = {
    "disc": lambda rng: [_circle()],
    "square": lambda rng: [_star(2, 1.0)],
    "triangle": lambda rng: [_star(3, 0.5)],
    "ring": lambda rng: [_circle(), _circle(rng.uniform(0.5, 0.6))],
    "cross": lambda rng: [_cross(rng.uniform(0.26, 0.34))],
}
CLASSES = tuple(_OUTLINES)


def _layer(
    rng: Generator, category: int, extent: float, center: NDArray[np.float64], size: tuple[int, int]
) -> _Layer:
    """A shape of a class with an area of ``extent ** 2``, random proportions and tilt."""
    contours = _OUTLINES[CLASSES[category]](rng)
    angle = rng.uniform(-_TILT, _TILT)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    proportions = np.array([1.0, rng.uniform(0.8, 1.0)])
    outer, *holes = [_polygon_area(contour * proportions) for contour in contours]
    scale = proportions * extent / np.sqrt(outer - sum(holes))
    contours = [(contour * scale) @ rotation + center for contour in contours]
    return _Layer(_rasterize(contours, size), extent**2)


def _polygon_area(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _rasterize(contours: Contours, size: tuple[int, int]) -> NDArray:
    """(H, W) coverage of each pixel."""
    canvas = np.zeros((size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING), np.uint8)
    # in cv2, whole numbers are the centers of pixels, not their corners
    points = [np.round((c * _SUPERSAMPLING - 0.5) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(canvas, points, 255, shift=4)
    alpha = cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA)
    return alpha.astype(np.float32) / 255


# --- colors and textures


def noise(rng: Generator, size: tuple[int, int], cells: float, octaves: int = 3) -> NDArray:
    """(H, W) smooth noise with values around 0; the coarsest octave has ``cells`` cells a side."""
    total = np.zeros(size, np.float32)
    for octave in range(octaves):
        grid = max(2, int(cells * 2**octave) + 1)
        values = rng.standard_normal((grid, grid)).astype(np.float32)
        total += 0.5**octave * cv2.resize(values, size[::-1], interpolation=cv2.INTER_CUBIC)
    return total / (total.std() + 1e-6)


def _stripes(rng: Generator, size: tuple[int, int], low: float, high: float) -> NDArray:
    """(H, W) waves in [-1, 1] across a random direction; wavelength in [low, high] pixels."""
    angle, wavelength = rng.uniform(0, np.pi), rng.uniform(low, high)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    phase = (x * np.cos(angle) + y * np.sin(angle)) / wavelength + rng.uniform()
    wave = np.sin(2 * np.pi * phase)
    return np.clip(3 * wave, -1, 1) if rng.uniform() < 0.5 else wave


def _gradient(rng: Generator, size: tuple[int, int]) -> NDArray:
    """(H, W) ramp from -1 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    return 2 * (ramp - ramp.min()) / (np.ptp(ramp) + 1e-6) - 1


def _texture(rng: Generator, size: tuple[int, int], color: NDArray, spread: float) -> NDArray:
    """(H, W, 3) a random pattern around a color."""
    kind = rng.integers(4)
    if kind == 0:
        pattern: NDArray = np.zeros(size, np.float32)
    elif kind == 1:
        pattern = _gradient(rng, size)
    elif kind == 2:
        pattern = _stripes(rng, size, 5, 16)
    else:
        pattern = 0.7 * noise(rng, size, cells=max(size) / 24)
    return color + pattern[..., None] * rng.uniform(-spread, spread, 3).astype(np.float32)


def _contrasting_color(rng: Generator, surrounding: NDArray, distance: float) -> NDArray:
    """A random color at least ``distance`` away from the surrounding one."""
    while True:
        color = rng.uniform(15, 240, 3)
        if np.linalg.norm(color - surrounding) >= distance:
            return color.astype(np.float32)


def _blend(image: NDArray, alpha: NDArray, texture: NDArray) -> NDArray:
    return image + alpha[..., None] * (texture - image)


def _background(rng: Generator, size: tuple[int, int]) -> NDArray:
    """(H, W, 3) noise, ramps, stripes, and clutter that belongs to no class."""
    base = rng.uniform(40, 215, 3).astype(np.float32)
    image = np.tile(base, (*size, 1))
    for pattern, strength in (
        (noise(rng, size, rng.uniform(2, 8)), 12),
        (_gradient(rng, size), 25),
        (_stripes(rng, size, 10, 50), 14 if rng.uniform() < 0.4 else 0),
    ):
        image += pattern[..., None] * rng.uniform(-strength, strength, 3).astype(np.float32)
    # soft blobs: the peaks of a noise field, without sharp edges or distinct shapes
    for _ in range(rng.integers(0, 3)):
        alpha = np.clip(noise(rng, size, rng.uniform(3, 6), octaves=1) - 1.2, 0, 1)
        image = _blend(image, 0.6 * alpha, base + rng.uniform(-60, 60, 3).astype(np.float32))
    # lines and open curves, too thin to be mistaken for rings
    for _ in range(rng.integers(0, 6)):
        steps = rng.normal(0, 1, (8, 2)) * rng.choice([0.0, 0.6]) + rng.normal(0, 1, 2)
        points = rng.uniform(0, 1, 2) * size[::-1] + np.cumsum(steps, 0) * max(size) / 14
        alpha = np.zeros(size, np.uint8)
        curve, thickness = np.round(points * 16).astype(np.int32), int(rng.integers(1, 3))
        cv2.polylines(alpha, [curve], False, 255, thickness, cv2.LINE_AA, shift=4)
        color = _contrasting_color(rng, base, 50)
        image = _blend(image, alpha.astype(np.float32) / 255, color)
    return image


# --- scenes


def _crowd_layers(rng: Generator, category: int, size: tuple[int, int]) -> list[_Layer]:
    """Tiny shapes side by side in an elliptic region."""
    diameter = rng.uniform(9, 12)
    radii = rng.uniform(22, 40, 2)
    center = rng.uniform(0.2, 0.8, 2) * size[::-1]
    grid = np.stack(np.meshgrid(*[np.arange(-6, 7)] * 2), -1).reshape(-1, 2) * diameter * 1.1
    grid = grid[np.sum((grid / radii) ** 2, 1) <= 1]
    grid += center + rng.uniform(-1, 1, grid.shape) * diameter * 0.15
    points = grid[np.all((grid > 0) & (grid < np.array(size[::-1])), 1)]
    return [_layer(rng, category, diameter * rng.uniform(0.6, 0.75), p, size) for p in points]


def _crowd_region(layers: list[_Layer], size: tuple[int, int]) -> NDArray[np.bool_]:
    union = np.zeros(size, np.uint8)
    for layer in layers:
        union |= layer.mask
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    padded = cv2.copyMakeBorder(union, 9, 9, 9, 9, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)
    return closed[9:-9, 9:-9].astype(bool)


def _paint(rng: Generator, image: NDArray, layer: _Layer) -> None:
    """Blend a layer into the image, in place, with a texture that contrasts with what it covers."""
    y, x, h, w = cv2.boundingRect((layer.alpha.T > 0).astype(np.uint8))
    window = np.s_[y : y + h, x : x + w]
    alpha, behind = layer.alpha[window], image[window]
    surrounding = (alpha[..., None] * behind).sum((0, 1)) / alpha.sum()
    color = _contrasting_color(rng, surrounding, 110 if rng.uniform() < 0.85 else 65)
    image[window] = _blend(behind, alpha, _texture(rng, (h, w), color, spread=20))


def draw_scene(rng: Generator, height: int, width: int) -> Scene:
    """One random scene.

    Later shapes cover earlier ones. A shape that would hide too much of another one, or that lies
    too far outside the image, is placed again or omitted. So every drawn shape is listed.
    """
    size = (height, width)
    image = _background(rng, size)
    count = 0 if rng.uniform() < 0.03 else int(rng.integers(3, 8))

    shapes: list[DrawnObject] = []
    whole_areas: list[float] = []
    layers: list[_Layer] = []
    if count and rng.uniform() < 0.08:
        category = int(rng.integers(len(CLASSES)))
        tiny = _crowd_layers(rng, category, size)
        region = _crowd_region(tiny, size)
        if region.sum() >= MIN_PIXELS:
            layers += tiny
            shapes.append(DrawnObject(category, region, True))
            whole_areas.append(float(region.sum()))

    smallest, largest = np.log([_SMALLEST, max(_SMALLEST, _LARGEST * min(size))])
    extents = np.exp(rng.uniform(smallest, largest, count))
    if rng.uniform() < 0.5:  # in the other half a large shape often finds no room
        extents = np.sort(extents)[::-1]
    for extent in extents:
        category = int(rng.integers(len(CLASSES)))
        for _attempt in range(8):
            center = rng.uniform(0, 1, 2) * size[::-1]
            layer = _layer(rng, category, extent, center, size)
            mask = layer.mask
            # most overlaps are slight, some hide half
            least = rng.choice([MIN_VISIBLE, 0.85], p=[0.2, 0.8])
            visible = [shape.mask & ~mask for shape in shapes]
            if mask.sum() >= max(MIN_PIXELS, 0.7 * layer.area) and all(
                v.sum() >= max(MIN_PIXELS, least * area) for v, area in zip(visible, whole_areas)
            ):
                shapes = [shape._replace(mask=v) for shape, v in zip(shapes, visible)]
                shapes.append(DrawnObject(category, mask, False))
                whole_areas.append(layer.area)
                layers.append(layer)
                break

    for layer in layers:
        _paint(rng, image, layer)
    image += rng.uniform(2, 6) * rng.standard_normal(image.shape, np.float32)
    return to_uint8(image), shapes


def to_uint8(image: NDArray) -> NDArray[np.uint8]:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
