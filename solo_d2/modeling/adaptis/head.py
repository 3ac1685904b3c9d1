"""The heads of AdaptIS. In most of their layers, ReLU comes before the norm."""

from typing import NamedTuple

import torch
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from solo_d2.layers.adain import AdaIN
from solo_d2.layers.points import read_at_points, relative_coordinates
from solo_d2.layers.symbolic import same_size

from ..options import check_at_least, check_choice

# The published sets of heads: for the toy tasks, and for Cityscapes and COCO.
VARIANTS = ("toy", "cityscapes")
# Row, column and distance; the paper's figure has no distance.
_COORDINATES = 3
# Gain of the Gaussian that initializes the Cityscapes models.
CITYSCAPES_GAIN = 2.0**0.5


class ConvReLUNorm(nn.Conv2d):
    """Convolution, ReLU, batch norm; the size of the map is kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = get_norm("BN", out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(super().forward(x))

    def activate(self, x: Tensor) -> Tensor:
        """ReLU and norm; ``x`` may be overwritten."""
        x = F.relu_(x)
        norm = self.norm
        trained = torch.is_grad_enabled() and (x.requires_grad or norm.weight.requires_grad)
        if norm.training or trained or not isinstance(norm, _BatchNorm):
            return norm(x)
        # the same in place, because allocating each map takes longer than the arithmetic
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        return x.mul_(scale[:, None, None]).add_(shift[:, None, None])


class LinearReLUNorm(nn.Linear):
    """Linear layer, ReLU, batch norm over the vectors."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.norm = nn.BatchNorm1d(out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(super().forward(x))
        norm = self.norm
        if norm.training and len(x) == 1:  # one vector has no variance
            return F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        return norm(x)


class SeparableConv(nn.Module):
    """Depthwise 3x3 convolution, pointwise convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = get_norm("BN", out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(self.pointwise(self.depthwise(x))))


class Controller(nn.Module):
    """Control vectors of points.

    "toy": 1x1 convolutions everywhere, then read at the points; in training, their norms see all
    cells. "cityscapes": the feature is read at the points, then linear layers.
    """

    def __init__(self, in_channels: int, dim: int, *, variant: str):
        """
        Args:
            in_channels: channels of the feature.
            dim: length of the control vector.
            variant: one of ``VARIANTS``.
        """
        super().__init__()
        self.on_map = variant == "toy"
        widths = [(in_channels, dim), (dim, dim), (dim, dim)]
        self.layers = nn.Sequential(
            *(ConvReLUNorm(a, b, 1) if self.on_map else LinearReLUNorm(a, b) for a, b in widths)
        )

    def prepare(self, feature: Tensor) -> Tensor:
        """The part that does not depend on points: (N, in_channels, h, w) -> (N, ., h, w)."""
        return self.layers(feature) if self.on_map else feature

    def forward(self, prepared: Tensor, points: Tensor, scale: float) -> Tensor:
        """See ``read_at_points``: (N * P, dim)."""
        vectors = read_at_points(prepared, points, scale)
        return vectors if self.on_map else self.layers(vectors)


class SelectionHead(nn.Module):
    """The mask of the object under a point, from the feature map and the point's control vector.

    The input of the first convolution is the coordinates relative to the point, then the feature.
    It is linear, so the feature is convolved once per image and the coordinates once per point.
    AdaIN follows the third layer, as in all published configurations; the paper draws several.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        variant: str = "toy",
        norm_radius: float = 42.0,
        bias_plus_one: bool | None = None,
    ):
        """
        Args:
            in_channels: channels of the feature.
            dim: channels of the first layers, and length of the control vector.
            variant: "toy" (plain 3x3 convolutions; logits scaled so that training starts with low,
                flat probabilities) or "cityscapes" (depthwise separable ones).
            norm_radius: unit of the relative coordinates, in image pixels.
            bias_plus_one: see ``AdaIN``; by default as published for the variant.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        if not norm_radius > 0:
            raise ValueError(f"norm_radius must be positive, not {norm_radius!r}")
        self.norm_radius = norm_radius
        toy = variant == "toy"
        # factor and offset of the logits
        self.rescale = (0.2, -1.7) if toy else (1.0, 0.0)
        first = in_channels + _COORDINATES
        layers: list[nn.Module]
        if toy:
            widths = [first, dim, dim, dim, dim // 2]
            layers = [ConvReLUNorm(a, b) for a, b in zip(widths, widths[1:])]
        else:
            widths = [dim, dim, dim // 2, dim // 4]
            layers = [
                ConvReLUNorm(first, dim),
                SeparableConv(dim, dim),
                Conv2d(dim, dim, 1, activation=nn.LeakyReLU(0.2)),
                *(SeparableConv(a, b) for a, b in zip(widths, widths[1:])),
            ]
        self.convs = nn.ModuleList(layers)
        if bias_plus_one is None:
            bias_plus_one = toy
        # a list, as in checkpoints
        self.adain = nn.ModuleList([AdaIN(dim, dim, bias_plus_one=bias_plus_one)])
        self.predictor = nn.Conv2d(widths[-1], 1, 1)

    def prepare(self, feature: Tensor) -> Tensor:
        """The part that does not depend on points: (N, in_channels, h, w) -> (N, dim, h, w)."""
        first = self.convs[0]
        return F.conv2d(feature, first.weight[:, _COORDINATES:], first.bias, padding=1)

    def forward(
        self,
        prepared: Tensor,
        points: Tensor,
        control: Tensor,
        scale: float,
        valid: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            prepared: result of ``prepare``.
            points: (N, P, 2) rows and columns in image pixels.
            control: (N * P, dim), ordered by image.
            scale: cells of the map per image pixel.
            valid: (N, 1, h, w) bool, the cells that are not padding; None for all.

        Returns:
            (N * P, 1, h, w) logits, ordered by image.
        """
        num_points = points.shape[1]
        size = (prepared.shape[-2], prepared.shape[-1])
        coordinates = relative_coordinates(
            points.flatten(0, 1), size, radius=self.norm_radius, scale=scale
        )
        if prepared.is_contiguous(memory_format=torch.channels_last):
            coordinates = coordinates.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(coordinates, self.convs[0].weight[:, :_COORDINATES], padding=1)
        x = x + (prepared if len(prepared) == 1 else prepared.repeat_interleave(num_points, dim=0))
        x = self.convs[0].activate(x)
        if valid is not None and len(valid) > 1:
            valid = valid.repeat_interleave(num_points, dim=0)
        for conv in self.convs[1:3]:
            x = conv(x)
        x = self.adain[0](x, control, valid)
        for conv in self.convs[3:]:
            x = conv(x)
        factor, offset = self.rescale
        return self.predictor(x) * factor + offset


class DenseHead(nn.Module):
    """Logits at every cell; used for the semantic head and the proposal head."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        num_outputs: int,
        *,
        num_convs: int,
        separable: bool = False,
        dropout: float = 0.0,
    ):
        """
        Args:
            in_channels: channels of the feature.
            dim: channels of the layers.
            num_outputs: channels of the logits.
            num_convs: number of layers before the last.
            separable: depthwise separable layers instead of plain 3x3 convolutions.
            dropout: dropout rate after the first layer.
        """
        super().__init__()
        block = SeparableConv if separable else ConvReLUNorm
        widths = [in_channels] + num_convs * [dim]
        self.convs = nn.ModuleList(block(a, b) for a, b in zip(widths, widths[1:]))
        self.dropout = dropout
        self.predictor = nn.Conv2d(dim, num_outputs, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, num_outputs, h, w)."""
        x = F.dropout(self.convs[0](feature), self.dropout, self.training)
        for conv in self.convs[1:]:
            x = conv(x)
        return self.predictor(x)


class Heads(NamedTuple):
    """The heads on AdaptIS's feature map."""

    controller: Controller
    selection: SelectionHead
    semantic: DenseHead
    proposal: DenseHead | None


def build_heads(
    variant: str,
    in_channels: int,
    num_classes: int,
    *,
    conv_dim: int,
    semantic_dim: int,
    proposal_dim: int | None,
    norm_radius: float,
) -> Heads:
    """Heads as published, with the published initialization.

    Args:
        variant: "toy" or "cityscapes".
        in_channels: channels of the feature map.
        num_classes: number of semantic classes, stuff and things.
        conv_dim: channels of the selection head, and length of the control vector.
        semantic_dim: channels of the semantic head.
        proposal_dim: channels of the proposal head; None for the first stage, which has none.
        norm_radius: see ``SelectionHead``.

    Raises:
        ValueError: an option has an unsupported value.
    """
    check_choice("variant", variant, VARIANTS)
    check_at_least(2, conv_dim=conv_dim)
    check_at_least(1, semantic_dim=semantic_dim, proposal_dim=proposal_dim or 1)
    toy = variant == "toy"
    controller = Controller(in_channels, conv_dim, variant=variant)
    selection = SelectionHead(in_channels, conv_dim, variant=variant, norm_radius=norm_radius)
    semantic = DenseHead(
        in_channels, semantic_dim, num_classes, num_convs=3 if toy else 2, separable=not toy
    )
    for head in (controller, selection, semantic):
        init_weights(head, gain=1.0 if toy else CITYSCAPES_GAIN)
    proposal = None
    if proposal_dim is not None:
        dropout = 0.0 if toy else 0.5
        proposal = DenseHead(
            in_channels, proposal_dim, 1, num_convs=2, separable=not toy, dropout=dropout
        )
        if not toy:  # the toy models' proposal head keeps PyTorch's own initialization
            init_weights(proposal, gain=None)
    return Heads(controller, selection, semantic, proposal)


def init_weights(module: nn.Module, gain: float | None) -> None:
    """Initialize all convolutions and linear layers: Xavier, with zero biases.

    Args:
        module: any.
        gain: of a Gaussian; None for the uniform distribution.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if gain is None:
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.xavier_normal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in module.modules():
        if isinstance(layer, AdaIN) and gain is not None:
            layer.init_weights(gain)


def resize_corners(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (N, C, h, w) with aligned corners, as everywhere in AdaptIS."""
    if same_size(x.shape[-2:], size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def valid_cells(image_sizes: Tensor, map_size: tuple[int, int], scale: float) -> Tensor:
    """(N, 1, h, w) bool: cells whose position lies in the image, not in the padding.

    Args:
        image_sizes: (N, 2) heights and widths without padding.
        map_size: h and w.
        scale: cells per image pixel.
    """
    rows, columns = (torch.arange(n, device=image_sizes.device) / scale for n in map_size)
    in_row, in_column = rows < image_sizes[:, :1], columns < image_sizes[:, 1:]
    return (in_row[:, :, None] & in_column[:, None, :])[:, None]
