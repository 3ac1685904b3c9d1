"""Operations on stacks of N masks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Masks are handled in chunks of this size; a single mask may be larger.
CHUNK_BYTES = 64 * 1024**2


def chunk_length(numel: int, itemsize: int = 4) -> int:
    """How many items of ``numel`` elements fit into CHUNK_BYTES; at least 1."""
    return max(1, CHUNK_BYTES // max(1, numel * itemsize))


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
    padded = masks.new_zeros((n, h, w + -w % 8), dtype=torch.uint8)
    padded[:, :, :w] = masks
    words = padded.view(torch.int64)

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
    y0, y1, wy0, wy1 = _opencv_taps(h, rows, masks.device)
    x0, x1, wx0, wx1 = _opencv_taps(w, columns, masks.device)
    masks = masks[:, :h, :w].int()
    # OpenCV's 8-bit arithmetic drops bits between the two passes, which moves the threshold
    along_x = (masks[:, :, x0] * wx0 + masks[:, :, x1] * wx1) >> 4
    upper = (along_x[:, y0] * wy0[:, None]) >> 16
    lower = (along_x[:, y1] * wy1[:, None]) >> 16
    small = ((upper + lower + 2) >> 2) > 0
    rows, columns = min(rows, out.shape[1]), min(columns, out.shape[2])
    out[:, :rows, :columns] = small[:, :rows, :columns]
    return out


def _opencv_taps(
    source: int, target: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both neighbors of each target pixel and their weights in units of 1 / 2048."""
    position = (torch.arange(target, device=device).double() + 0.5) * (source / max(target, 1))
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
    resizes are bilinear. Each output pixel is a weighted mean of a few soft values, so it can
    exceed ``threshold`` only near a soft value that does. Therefore only the boxes around such
    values are computed, in chunks of masks.

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
    sizes = zip(size, padded_size, image_size, output_size)
    rows, columns = (_axis(*along_axis, direct=direct) for along_axis in sizes)
    length = _masks_at_once(device, output_size[0] * output_size[1])
    # the only synchronization with the device
    boxes = tight_boxes(soft_masks > threshold).long().cpu()
    bounds = _reached(boxes, rows, columns, length, windows)
    row_weights, column_weights = rows.weights.to(device), columns.weights.to(device)
    for i, (x1, y1, x2, y2) in enumerate(bounds.tolist()):
        if x1 >= x2 or y1 >= y2:
            continue
        chunk = slice(i * length, (i + 1) * length)
        y_in, x_in = rows.inputs(y1, y2), columns.inputs(x1, x2)
        with torch.autocast(device.type, enabled=False):
            soft = row_weights[y_in, y1:y2].T @ soft_masks[chunk, y_in, x_in].float()
            soft = soft @ column_weights[x_in, x1:x2]
        hit = out[chunk, y1:y2, x1:x2]
        torch.gt(soft, threshold, out=hit)
        if windows is not None and length > 1:
            hit &= _inside(windows[chunk], (x1, y1, x2, y2))
    return out


def _masks_at_once(device: torch.device, pixels: int) -> int:
    """On the CPU one mask at a time does the least work; on a GPU large chunks do."""
    return 1 if device.type == "cpu" else chunk_length(pixels)


class _Axis(NamedTuple):
    """A resize along one axis. It depends on sizes only, so it is computed on the CPU."""

    weights: Tensor  # (inputs, outputs)
    first: Tensor  # (outputs,) the first input that each output depends on; ascending
    last: Tensor  # (outputs,) the last one; ascending

    def inputs(self, start: int, stop: int) -> slice:
        """The inputs that the outputs from ``start`` to ``stop`` depend on."""
        return slice(int(self.first[start]), int(self.last[stop - 1]) + 1)


def _axis(size: int, padded: int, image: int, output: int, *, direct: bool) -> _Axis:
    matrix = _direct_resize_matrix if direct else _resize_matrix
    weights = matrix(size, padded, image, output)
    used = weights > 0
    index = torch.arange(size)[:, None]
    first = torch.where(used, index, size).amin(dim=0)
    return _Axis(weights, first, (used * index).amax(dim=0))


def _reached(
    boxes: Tensor, rows: _Axis, columns: _Axis, length: int, windows: Tensor | None
) -> Tensor:
    """The region of outputs that depend on the values in each chunk's boxes.

    Args:
        boxes: (N, 4) int64 around the soft values that exceed the threshold, on the CPU.
        rows, columns: the resize along each axis.
        length: masks per chunk.
        windows: see ``upsample_to_binary``.

    Returns:
        (chunks, 4) int64 x1, y1, x2, y2, right and bottom exclusive, on the CPU.
    """
    x1, y1, x2, y2 = boxes.T.contiguous()
    start = torch.searchsorted(columns.last, x1), torch.searchsorted(rows.last, y1)
    stop = torch.searchsorted(columns.first, x2), torch.searchsorted(rows.first, y2)
    low, high = torch.stack(start, dim=1), torch.stack(stop, dim=1)
    if windows is not None:
        windows = windows.cpu()
        low, high = low.maximum(windows[:, :2]), high.minimum(windows[:, 2:])
    chunks = zip(low.split(length), high.split(length))
    return torch.stack([torch.cat([a.amin(dim=0), b.amax(dim=0)]) for a, b in chunks])


def _inside(windows: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """(N, height, width) bool: whether a region's pixels lie in the window of each mask."""
    x1, y1, x2, y2 = region
    rows = torch.arange(y1, y2, device=windows.device)
    columns = torch.arange(x1, x2, device=windows.device)
    low_x, low_y, high_x, high_y = windows[:, :, None].unbind(1)
    in_row = (low_y <= rows) & (rows < high_y)
    in_column = (low_x <= columns) & (columns < high_x)
    return in_row[:, :, None] & in_column[:, None, :]


def _resize_matrix(size: int, padded: int, image: int, output: int) -> Tensor:
    """(size, output) weights of both resizes along one axis: the resized identity matrix."""
    identity = torch.eye(size)[None]
    upsampled = F.interpolate(identity, size=padded, mode="linear")[..., :image]
    return F.interpolate(upsampled, size=output, mode="linear")[0]


def _direct_resize_matrix(size: int, padded: int, image: int, output: int) -> Tensor:
    """The same for a single resize, after which the part without padding has ``output`` pixels."""
    identity = torch.eye(size)[None]
    if padded == image:
        return F.interpolate(identity, size=output, mode="linear")[0]
    scale = padded * output / (image * size)
    # the exact scale determines the sample positions; rounded sizes would shift them
    resized = F.interpolate(
        identity, scale_factor=scale, mode="linear", recompute_scale_factor=False
    )
    return resized[0, :, :output]
