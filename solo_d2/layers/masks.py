"""Operations on stacks of N masks."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .upload import upload

# Masks are handled in chunks of this size on the CPU; a single mask may be larger.
CHUNK_BYTES = 64 * 1024**2


def chunk_length(numel: int, device: torch.device | None = None) -> int:
    """How many items of ``numel`` float32 elements to handle at a time; at least 1.

    On a GPU they take a quarter of its free memory, elsewhere CHUNK_BYTES.
    """
    budget = CHUNK_BYTES
    if device is not None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = (torch.cuda.mem_get_info(device)[0] + cached) // 4
    return max(1, budget // max(1, numel * 4))


def tight_boxes(masks: Tensor) -> Tensor:
    """Smallest box around each mask, right and bottom exclusive; zeros for an empty mask.

    Like ``BitMasks.get_bounding_boxes``, but without a loop over masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32, x1, y1, x2, y2 in pixels.
    """

    def extent(hit: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.arange(1, hit.shape[1] + 1, device=hit.device)
        last = (hit * index).amax(dim=1)
        first = hit.shape[1] - (hit * index.flip(0)).amax(dim=1)
        return torch.where(last > 0, first, 0), last

    if masks.numel() == 0:
        return torch.zeros((len(masks), 4), device=masks.device)
    # the maximum is several times faster than any()
    (x1, x2), (y1, y2) = extent(masks.amax(dim=1)), extent(masks.amax(dim=2))
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def mass_centers(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Center of mass of each mask in pixel indices, and its area.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 2) float32, mean column and mean row (no half pixel added; 0 for an empty mask), and
        (N,) int64 areas.
    """
    n, h, w = masks.shape
    in_column, in_row = _axis_counts(masks)
    area = in_row.sum(dim=1)
    sum_x = (in_column * torch.arange(w, device=masks.device)).sum(dim=1)
    sum_y = (in_row * torch.arange(h, device=masks.device)).sum(dim=1)
    centers = torch.stack([sum_x, sum_y], dim=1).float() / area.clamp(min=1)[:, None].float()
    return centers, area


def _axis_counts(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in each column (N, W) and in each row (N, H), int64.

    Summing bools would first convert each to an eight-byte integer. Here eight pixels are viewed as
    one integer, whose bytes are summed side by side; 255 terms cannot overflow a byte.
    """
    n, h, w = masks.shape
    if w % 8:  # not so for a padded batch
        masks = F.pad(masks.view(torch.uint8), (0, -w % 8))
    words = masks.reshape(-1).view(torch.int64).view(n, h, -(-w // 8))

    def byte_sums(dim: int) -> Tensor:
        parts = [block.sum(dim=dim) for block in words.split(255, dim=dim)]
        return torch.stack([part.view(torch.uint8) for part in parts]).sum(dim=0)

    return byte_sums(1)[:, :w], byte_sums(2).view(n, h, 8).sum(dim=2)


def downsample_masks(masks: Tensor, stride: int) -> Tensor:
    """Shrink masks by an even factor: bilinear resize, then "at least one half".

    The sample point of a block lies in the middle of its four central pixels, so the result is 1
    where at least two of these are set. Equals the 8-bit OpenCV resize of the published code
    wherever that divides exactly.

    Args:
        masks: (N, H, W) bool; H and W are multiples of ``stride``.
        stride: an even number.

    Returns:
        (N, H / stride, W / stride) bool.
    """
    a, b = stride // 2 - 1, stride // 2
    central = [masks[:, i::stride, j::stride] for i in (a, b) for j in (a, b)]
    count = central[0].to(torch.uint8)
    for pixels in central[1:]:
        count = count + pixels
    return count >= 2


def downsample_unpadded_masks(
    masks: Tensor, stride: int, image_size: tuple[int, int], padded_size: tuple[int, int]
) -> Tensor:
    """Shrink masks as AdelaiDet does: from the unpadded image to a rounded size.

    When a side of the image is not a multiple of ``stride``, the factor is slightly off ``stride``.
    Needed only to reproduce AdelaiDet's targets; ``downsample_masks`` is exact.

    Args:
        masks: (N, H, W) bool, at least as large as ``image_size``.
        stride: the factor.
        image_size: height and width before padding.
        padded_size: height and width of the batch.

    Returns:
        (N, padded H / stride, padded W / stride) bool.
    """
    h, w = image_size
    rows, columns = int(h / stride + 0.5), int(w / stride + 0.5)
    out = masks.new_zeros((len(masks), padded_size[0] // stride, padded_size[1] // stride))
    y0, y1, wy0, wy1 = (upload(x, masks.device) for x in _opencv_taps(h, rows))
    x0, x1, wx0, wx1 = (upload(x, masks.device) for x in _opencv_taps(w, columns))

    def blend(y: Tensor, weight: Tensor) -> Tensor:
        """One of the two rows of each target row; only the pixels that are needed become int."""
        row = masks[:, y]
        along_x = (row[:, :, x0].int() * wx0 + row[:, :, x1].int() * wx1) >> 4
        # OpenCV's 8-bit arithmetic drops bits between the two passes, which moves the threshold
        return (along_x * weight[:, None]) >> 16

    upper, lower = blend(y0, wy0), blend(y1, wy1)
    small = ((upper + lower + 2) >> 2) > 0
    rows, columns = min(rows, out.shape[1]), min(columns, out.shape[2])
    out[:, :rows, :columns] = small[:, :rows, :columns]
    return out


@lru_cache(maxsize=16)
def _opencv_taps(source: int, target: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both neighbors of each target pixel and their weights in units of 1 / 2048, on the CPU."""
    position = (torch.arange(target).double() + 0.5) * (source / max(target, 1))
    position = position.float() - 0.5
    first = position.floor().clamp(0, source - 1)
    fraction = torch.where(first == source - 1, 0, (position - first).clamp(min=0))
    first = first.long()
    second = (first + 1).clamp(max=source - 1)
    return first, second, ((1 - fraction) * 2048).round().int(), (fraction * 2048).round().int()


def upsample_to_binary(
    soft_masks: Tensor,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    threshold: float,
    direct: bool = False,
    windows: Tensor | None = None,
) -> Tensor:
    """Bring soft masks to the output size and threshold them, in bounded memory.

    Resize to ``padded_size``, crop to ``image_size``, resize to ``output_size``, compare; both
    resizes are bilinear.

    Args:
        soft_masks: (N, h, w) in [0, 1].
        padded_size: height and width of the network's input.
        image_size: the same without padding.
        output_size: height and width of the result.
        threshold: a pixel is set where the soft value exceeds this.
        direct: one bilinear step from the soft masks to ``output_size``, as YOLACT does.
        windows: (N, 4) int64 x1, y1, x2, y2, right and bottom exclusive; pixels of the result
            outside of their mask's window are not set.

    Returns:
        (N, *output_size) bool.
    """
    soft_masks = soft_masks.detach()
    n, *size = soft_masks.shape
    device = soft_masks.device
    out = torch.zeros((n, *output_size), dtype=torch.bool, device=device)
    if n == 0:
        return out
    rows, columns = (
        _Resize(*axis, direct=direct) for axis in zip(size, padded_size, image_size, output_size)
    )
    if device.type == "cpu" and torch.get_float32_matmul_precision() == "highest":
        _upsample_near_values(out, soft_masks, rows, columns, threshold, windows)
        return out
    # a matrix product of lower precision would move the edges, and windows cost a synchronization
    length = chunk_length(3 * max(padded_size[0], output_size[0]) * output_size[1], device)
    for start in range(0, n, length):
        chunk = slice(start, start + length)
        soft = columns(soft_masks[chunk].float())
        torch.gt(rows(soft.mT).mT, threshold, out=out[chunk])
        if windows is not None:
            out[chunk] &= _inside(windows[chunk], output_size)
    return out


class _Resize(NamedTuple):
    """The resizes of ``upsample_to_binary`` along one axis."""

    size: int
    padded: int
    image: int
    output: int
    direct: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(N, A, size) -> (N, A, output)."""
        x, a = x[:, None], x.shape[1]
        if not self.direct:
            x = F.interpolate(x, size=(a, self.padded), mode="bilinear")[..., : self.image]
        elif self.padded != self.image:
            # the exact scale determines the sample positions; rounded sizes would shift them
            scale = (1.0, self.padded * self.output / (self.image * self.size))
            x = F.interpolate(x, None, scale, mode="bilinear", recompute_scale_factor=False)
            return x[:, 0, :, : self.output]
        return F.interpolate(x, size=(a, self.output), mode="bilinear")[:, 0]


def _upsample_near_values(
    out: Tensor,
    soft_masks: Tensor,
    rows: _Resize,
    columns: _Resize,
    threshold: float,
    windows: Tensor | None,
) -> None:
    """Set pixels of ``out``; arguments as in ``upsample_to_binary``.

    Each output pixel is a weighted mean of a few soft values, so it can exceed ``threshold`` only
    near a soft value that does. Therefore only the boxes around such values are computed, as
    products with the weights of both axes.
    """
    (y_weights, y_first, y_last), (x_weights, x_first, x_last) = _taps(rows), _taps(columns)
    x1, y1, x2, y2 = tight_boxes(soft_masks > threshold).numpy().T
    low = np.searchsorted(x_last, x1), np.searchsorted(y_last, y1)
    high = np.searchsorted(x_first, x2), np.searchsorted(y_first, y2)
    bounds = np.stack([*low, *high], axis=1)
    if windows is not None:
        limits = windows.numpy()
        bounds = np.concatenate(
            [np.maximum(bounds[:, :2], limits[:, :2]), np.minimum(bounds[:, 2:], limits[:, 2:])], 1
        )
    for mask, soft, (x1, y1, x2, y2) in zip(out, soft_masks, bounds):
        if x1 < x2 and y1 < y2:
            y_in, x_in = (
                slice(a[i], b[j - 1] + 1)
                for a, i, b, j in ((y_first, y1, y_last, y2), (x_first, x1, x_last, x2))
            )
            with torch.autocast("cpu", enabled=False):
                part = y_weights[y_in, y1:y2].T @ soft[y_in, x_in].float()
                part = part @ x_weights[x_in, x1:x2]
            torch.gt(part, threshold, out=mask[y1:y2, x1:x2])


@lru_cache(maxsize=4)
def _taps(resize: _Resize) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Weights (inputs, outputs), and the first and last input of each output, both ascending."""
    weights = resize(torch.eye(resize.size)[None])[0].contiguous()
    used = weights.numpy() > 0
    return weights, used.argmax(axis=0), resize.size - 1 - used[::-1].argmax(axis=0)


def _inside(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, *size) bool: whether a pixel lies in the window of each mask."""
    rows, columns = (torch.arange(length, device=windows.device) for length in size)
    low_x, low_y, high_x, high_y = windows[:, :, None].unbind(1)
    in_row = (low_y <= rows) & (rows < high_y)
    in_column = (low_x <= columns) & (columns < high_x)
    return in_row[:, :, None] & in_column[:, None, :]
