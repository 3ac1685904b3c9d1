"""The network of YOLACT beyond the backbone: pyramid, prediction head, prototypes, mask rating."""

import math
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from solo_d2.layers.resample import resize, upsample2x
from solo_d2.layers.symbolic import larger

from ..options import check_at_least, check_channels


class YOLACTOutputs(NamedTuple):
    """Raw outputs, float32."""

    box_offsets: Tensor  # (N, P, 4), see ``anchors.encode``
    class_logits: Tensor  # (N, P, C + 1), background first
    coefficients: Tensor  # (N, P, K) in -1 to 1
    prototypes: Tensor  # (N, h, w, K), not negative, over the padded input
    anchors: Tensor  # (P, 4), see ``AnchorGenerator``
    finest: Tensor  # (N, channels, h / 2, w / 2), the pyramid's first level


def xavier_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    relu: bool = False,
    gain: float = 1.0,
    norm: str = "",
) -> Conv2d:
    """A convolution initialized like all of YOLACT's own: Xavier-uniform weights, zero bias.

    ``padding`` is half of the kernel by default; ``gain`` is a factor on the weights; ``norm``
    replaces the bias.
    """
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2 if padding is None else padding,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU(inplace=True) if relu else None,
    )
    nn.init.xavier_uniform_(conv.weight, gain)
    if not norm:
        nn.init.zeros_(conv.bias)
    return conv


class YOLACTPyramid(nn.Module):
    """P3 to P7 from C3 to C5.

    Unlike in Detectron2's ``FPN``, a coarser map is resized to the exact size of the finer one,
    P3 to P5 are followed by ReLUs, and there is no ReLU between P5, P6 and P7.
    """

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: list[str],
        out_channels: int = 256,
        num_levels: int = 5,
        norm: str = "",
    ):
        """
        Args:
            input_shape: shapes of the backbone's features.
            in_features: names of the inputs, finest first, with strides that double.
            out_channels: channels of all levels.
            num_levels: levels beyond ``in_features`` are strided convolutions of the previous one.
            norm: after each convolution; see ``detectron2.layers.get_norm``.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        missing = [name for name in in_features if name not in input_shape]
        if missing or not in_features:
            raise ValueError(f"in_features must be some of {[*input_shape]}, not {[*in_features]}")
        strides = [input_shape[name].stride for name in in_features]
        if strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ValueError(
                f"in_features must have strides that double, but {[*in_features]} have {strides}"
            )
        if num_levels < len(in_features):
            raise ValueError(
                f"num_levels must be at least {len(in_features)}, the number of in_features, "
                f"not {num_levels}"
            )
        check_channels(norm, out_channels=out_channels)
        self.in_features = list(in_features)
        self.num_levels = num_levels
        first = int(math.log2(strides[0]))
        self.laterals, self.outputs, self.downsamples = [], [], []
        for k, name in enumerate(in_features, first):
            self.laterals.append(f"lateral{k}")
            self.outputs.append(f"output{k}")
            channels = input_shape[name].channels
            self.add_module(f"lateral{k}", xavier_conv(channels, out_channels, 1, norm=norm))
            output = xavier_conv(out_channels, out_channels, 3, relu=True, norm=norm)
            self.add_module(f"output{k}", output)
        for k in range(first + len(in_features), first + num_levels):
            self.downsamples.append(f"downsample{k}")
            downsample = xavier_conv(out_channels, out_channels, 3, stride=2, norm=norm)
            self.add_module(f"downsample{k}", downsample)

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Features of the backbone -> (N, out_channels, h, w) per level, finest first."""
        maps: list[Tensor] = []
        for name, lateral in zip(reversed(self.in_features), reversed(self.laterals)):
            x = getattr(self, lateral)(features[name])
            if maps:
                x = x + resize(maps[0], x.shape[-2:])
            maps.insert(0, x)
        levels = [getattr(self, output)(x) for output, x in zip(self.outputs, maps)]
        for downsample in self.downsamples:
            levels.append(getattr(self, downsample)(levels[-1]))
        return levels


class YOLACTHead(nn.Module):
    """Box, classes and mask coefficients of each anchor; all levels share the weights."""

    def __init__(
        self,
        *,
        in_channels: int = 256,
        num_anchors: int,
        num_classes: int,
        num_prototypes: int = 32,
        predictor_gain: float = 1.0,
        norm: str = "",
    ):
        """
        Args:
            in_channels: channels of every level.
            num_anchors: A.
            num_classes: C.
            num_prototypes: K.
            predictor_gain: factor on the initial weights of the three outputs.
            norm: norm of the shared convolution.
        """
        super().__init__()
        check_at_least(1, num_prototypes=num_prototypes)
        check_at_least(0, predictor_gain=predictor_gain)
        self.num_anchors = num_anchors
        self.num_classes = num_classes
        self.shared = xavier_conv(in_channels, in_channels, 3, relu=True, norm=norm)
        outputs = (4, num_classes + 1, num_prototypes)
        self.box_pred, self.class_logits, self.coefficient_pred = (
            xavier_conv(in_channels, num_anchors * channels, 3, gain=predictor_gain)
            for channels in outputs
        )

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            levels: maps (N, in_channels, h, w).

        Returns:
            In the order level, row, column, anchor, all in float32: box offsets (N, P, 4), class
            logits (N, P, C + 1) with background first, mask coefficients (N, P, K) in -1 to 1.
        """
        shared = [self.shared(level) for level in levels]
        offsets, logits, coefficients = (
            torch.cat([self._per_anchor(pred(x)) for x in shared], dim=1).float()
            for pred in (self.box_pred, self.class_logits, self.coefficient_pred)
        )
        return offsets, logits, coefficients.tanh()

    def _per_anchor(self, x: Tensor) -> Tensor:
        """(N, A * D, h, w) -> (N, h * w * A, D)."""
        n, channels = x.shape[:2]
        return x.permute(0, 2, 3, 1).reshape(n, -1, channels // self.num_anchors)


class Protonet(nn.Module):
    """Prototypes of an image at twice the size of the finest level (YOLACT, section 3.1)."""

    def __init__(self, *, in_channels: int = 256, num_prototypes: int = 32, norm: str = ""):
        """
        Args:
            in_channels: channels of the finest level.
            num_prototypes: K.
            norm: norm of all convolutions but the last.
        """
        super().__init__()
        self.conv0, self.conv1, self.conv2, self.conv3 = (
            xavier_conv(in_channels, in_channels, 3, relu=True, norm=norm) for _ in range(4)
        )
        self.predictor = xavier_conv(in_channels, num_prototypes, 1, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, 2h, 2w, K) float32, not negative."""
        x = upsample2x(self.conv2(self.conv1(self.conv0(x))))
        return self.predictor(self.conv3(x)).permute(0, 2, 3, 1).float()


class MaskRater(nn.Module):
    """Predicts a soft mask's IoU with its object, for each possible class (YOLACT++, 4.1)."""

    WIDTHS = (8, 16, 32, 64, 128)
    # the five strided convolutions, which do not pad, reduce this size to one pixel
    MIN_SIZE = 2 ** (len(WIDTHS) + 1) - 1

    def __init__(self, *, num_classes: int):
        """
        Args:
            num_classes: C.
        """
        super().__init__()
        for i, (before, after) in enumerate(zip((1, *self.WIDTHS), self.WIDTHS)):
            conv = xavier_conv(before, after, 3, stride=2, padding=0, relu=True)
            self.add_module(f"conv{i}", conv)
        self.predictor = xavier_conv(self.WIDTHS[-1], num_classes, 1, relu=True)

    def forward(self, masks: Tensor) -> Tensor:
        """Soft masks (M, h, w), cropped but not thresholded -> (M, C), not negative."""
        h, w = masks.shape[-2:]
        # small inputs are padded with zeros at the right and bottom, like cropped pixels
        right, bottom = (larger(0, self.MIN_SIZE - length) for length in (w, h))
        padding = (0, right, 0, bottom)
        x = F.pad(masks[:, None], padding)
        for i in range(len(self.WIDTHS)):
            x = getattr(self, f"conv{i}")(x)
        return self.predictor(x).amax(dim=(2, 3))


def assemble_masks(prototypes: Tensor, coefficients: Tensor) -> Tensor:
    """Soft masks of one image: combinations of its prototypes (YOLACT, section 3.2).

    Args:
        prototypes: (h, w, K).
        coefficients: (M, K); with M = 0 the result stays connected to both.

    Returns:
        (M, h, w) in 0 to 1; one half where all prototypes are zero.
    """
    h, w, k = prototypes.shape
    logits = coefficients @ prototypes.reshape(-1, k).T
    return logits.view(-1, h, w).sigmoid()


def inside_boxes(boxes: Tensor, size: tuple[int, int], *, padding: float = 1.0) -> Tensor:
    """The pixels of a raster that the published crop keeps.

    Column c is kept if x1 - padding <= c < x2 + padding, in pixels, so the index is compared and
    not the center of the pixel. Rows likewise.

    Args:
        boxes: (M, 4) x1, y1, x2, y2 in pixels of the raster; ends in any order.
        size: height and width of the raster.
        padding: in pixels of the raster.

    Returns:
        (M, *size) bool.
    """
    low = torch.minimum(boxes[:, :2], boxes[:, 2:]) - padding
    high = torch.maximum(boxes[:, :2], boxes[:, 2:]) + padding
    inside = []
    for axis, length in ((1, size[0]), (0, size[1])):
        index = torch.arange(length, device=boxes.device)
        inside.append((low[:, axis, None] <= index) & (index < high[:, axis, None]))
    rows, columns = inside
    return rows[:, :, None] & columns[:, None, :]


def scale_boxes(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """(M, 4) boxes in pixels of one raster -> in pixels of a raster of another size."""
    y, x = new_size[0] / size[0], new_size[1] / size[1]
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([x1 * x, y1 * y, x2 * x, y2 * y], dim=1)
