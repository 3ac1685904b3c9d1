"""The heads of AdaptIS. In most of their layers, ReLU comes before the norm."""

from collections.abc import Sequence
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

# The two published sets of heads.
VARIANTS = ("toy", "cityscapes")


class ConvReLUNorm(nn.Conv2d):
    """Convolution, ReLU, norm; the size of the map is kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *, norm: str):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = get_norm(norm, out_channels)

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
    """Depthwise 3x3 convolution, pointwise convolution, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str):
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = get_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(self.pointwise(self.depthwise(x))))


class MapController(nn.Module):
    """Control vectors from a map: 1x1 convolutions everywhere, then read at the points."""

    def __init__(self, in_channels: int, dim: int, *, norm: str, num_layers: int = 3):
        """
        Args:
            in_channels: channels of the feature.
            dim: length of the control vector.
            norm: norm of the layers; in training it sees all cells, not only those of the points.
            num_layers: number of 1x1 convolutions.
        """
        super().__init__()
        widths = [in_channels] + num_layers * [dim]
        self.layers = nn.Sequential(
            *(ConvReLUNorm(a, b, 1, norm=norm) for a, b in zip(widths, widths[1:]))
        )

    def prepare(self, feature: Tensor) -> Tensor:
        """The part that does not depend on points: (N, in_channels, h, w) -> (N, dim, h, w)."""
        return self.layers(feature)

    def forward(self, prepared: Tensor, points: Tensor, scale: float) -> Tensor:
        """See ``read_at_points``: (N * P, dim)."""
        return read_at_points(prepared, points, scale)


class VectorController(nn.Module):
    """Control vectors from the features at the points: linear layers."""

    def __init__(self, in_channels: int, dim: int, *, num_layers: int = 3):
        """
        Args:
            in_channels: channels of the feature.
            dim: length of the control vector.
            num_layers: number of linear layers.
        """
        super().__init__()
        widths = [in_channels] + num_layers * [dim]
        self.layers = nn.Sequential(*(LinearReLUNorm(a, b) for a, b in zip(widths, widths[1:])))

    def prepare(self, feature: Tensor) -> Tensor:
        """Return the feature: nothing can be computed before the points are known."""
        return feature

    def forward(self, prepared: Tensor, points: Tensor, scale: float) -> Tensor:
        """See ``read_at_points``: (N * P, dim)."""
        return self.layers(read_at_points(prepared, points, scale))


class SelectionHead(nn.Module):
    """The mask of the object under a point, from the feature map and the point's control vector.

    The input of the first convolution is the coordinates relative to the point, then the feature.
    It is linear, so the feature is convolved once per image and the coordinates once per point.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        variant: str = "toy",
        norm: str = "BN",
        norm_radius: float = 42.0,
        append_distance: bool = True,
        adain_after: Sequence[int] = (3,),
        adain_eps: float = 1e-5,
        adain_bias_plus_one: bool = True,
        rescale: tuple[float, float] = (0.2, -1.7),
    ):
        """
        Args:
            in_channels: channels of the feature.
            dim: channels of the first layers, and length of the control vector.
            variant: "toy" (plain 3x3 convolutions) or "cityscapes" (depthwise separable ones).
            norm: norm of the layers.
            norm_radius: unit of the relative coordinates, in image pixels.
            append_distance: add the distance from the point as a third coordinate.
            adain_after: numbers of the layers that AdaIN follows; several in the paper's figure,
                but only the third in all published configurations.
            adain_eps, adain_bias_plus_one: see ``AdaIN``.
            rescale: factor and offset of the logits, so that training starts with low, flat
                probabilities.

        Raises:
            ValueError: ``variant`` or ``adain_after`` has an unsupported value.
        """
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        self.num_coordinates = 3 if append_distance else 2
        if not norm_radius > 0:
            raise ValueError(f"norm_radius must be positive, not {norm_radius!r}")
        self.norm_radius = norm_radius
        self.adain_after = list(adain_after)
        self.rescale = tuple(rescale)
        first = in_channels + self.num_coordinates
        layers: list[nn.Module]
        if variant == "toy":
            widths = [first, dim, dim, dim, dim // 2]
            layers = [ConvReLUNorm(a, b, norm=norm) for a, b in zip(widths, widths[1:])]
        else:
            widths = [first, dim, dim, dim, dim, dim // 2, dim // 4]
            layers = [SeparableConv(a, b, norm=norm) for a, b in zip(widths, widths[1:])]
            layers[0] = ConvReLUNorm(first, dim, norm=norm)
            layers[2] = Conv2d(dim, dim, 1, activation=nn.LeakyReLU(0.2))
        if not all(0 < i <= len(layers) for i in self.adain_after):
            raise ValueError(
                f"adain_after must be numbers from 1 to {len(layers)}, not {self.adain_after}"
            )
        self.convs = nn.ModuleList(layers)
        self.adain = nn.ModuleList(
            AdaIN(dim, widths[i], eps=adain_eps, bias_plus_one=adain_bias_plus_one)
            for i in self.adain_after
        )
        self.predictor = nn.Conv2d(widths[-1], 1, 1)

    def prepare(self, feature: Tensor) -> Tensor:
        """The part that does not depend on points: (N, in_channels, h, w) -> (N, dim, h, w)."""
        first = self.convs[0]
        weight = first.weight[:, self.num_coordinates :]
        return F.conv2d(feature, weight, first.bias, padding=1)

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
        coordinates = relative_coordinates(
            points.flatten(0, 1),
            (prepared.shape[-2], prepared.shape[-1]),
            radius=self.norm_radius,
            scale=scale,
            append_distance=self.num_coordinates == 3,
        )
        if prepared.is_contiguous(memory_format=torch.channels_last):
            coordinates = coordinates.contiguous(memory_format=torch.channels_last)
        weight = self.convs[0].weight[:, : self.num_coordinates]
        x = F.conv2d(coordinates, weight, padding=1)
        x = x + (prepared if len(prepared) == 1 else prepared.repeat_interleave(num_points, dim=0))
        x = self.convs[0].activate(x)
        if valid is not None and len(valid) > 1:
            valid = valid.repeat_interleave(num_points, dim=0)
        adain = dict(zip(self.adain_after, self.adain))
        for number, conv in enumerate(self.convs, start=1):
            if number > 1:
                x = conv(x)
            if number in adain:
                x = adain[number](x, control, valid)
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
        norm: str = "BN",
        dropout: float = 0.0,
    ):
        """
        Args:
            in_channels: channels of the feature.
            dim: channels of the layers.
            num_outputs: channels of the logits.
            num_convs: number of layers before the last.
            separable: depthwise separable layers instead of plain 3x3 convolutions.
            norm: norm of the layers.
            dropout: dropout rate after the first layer.
        """
        super().__init__()
        block = SeparableConv if separable else ConvReLUNorm
        widths = [in_channels] + num_convs * [dim]
        self.convs = nn.ModuleList(block(a, b, norm=norm) for a, b in zip(widths, widths[1:]))
        self.dropout = dropout
        self.predictor = nn.Conv2d(dim, num_outputs, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, num_outputs, h, w)."""
        x = feature
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i == 0:
                x = F.dropout(x, self.dropout, self.training)
        return self.predictor(x)


class Heads(NamedTuple):
    """The heads on AdaptIS's feature map."""

    controller: MapController | VectorController
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

    The variants differ in layers, computation of the control vector, AdaIN and scale of logits.

    Args:
        variant: "toy" or "cityscapes".
        in_channels: channels of the feature map.
        num_classes: number of semantic classes, stuff and things.
        conv_dim: channels of the selection head, and length of the control vector.
        semantic_dim: channels of the semantic head.
        proposal_dim: channels of the proposal head; None for the first stage, which has none.
        norm_radius: see ``SelectionHead``.

    Raises:
        ValueError: ``variant`` has an unsupported value.
    """
    check_choice("variant", variant, VARIANTS)
    check_at_least(2, conv_dim=conv_dim)
    check_at_least(1, semantic_dim=semantic_dim, proposal_dim=proposal_dim or 1)
    toy = variant == "toy"
    heads = Heads(
        MapController(in_channels, conv_dim, norm="BN")
        if toy
        else VectorController(in_channels, conv_dim),
        SelectionHead(
            in_channels,
            conv_dim,
            variant=variant,
            norm_radius=norm_radius,
            adain_bias_plus_one=toy,
            rescale=(0.2, -1.7) if toy else (1.0, 0.0),
        ),
        DenseHead(
            in_channels, semantic_dim, num_classes, num_convs=3 if toy else 2, separable=not toy
        ),
        None,
    )
    for head in heads[:3]:
        init_weights(head, gain=1.0 if toy else 2.0**0.5)
    if proposal_dim is None:
        return heads
    proposal = DenseHead(
        in_channels,
        proposal_dim,
        1,
        num_convs=2,
        separable=not toy,
        dropout=0.0 if toy else 0.5,
    )
    if not toy:  # the toy models' proposal head keeps PyTorch's own initialization
        init_uniform(proposal)
    return heads._replace(proposal=proposal)


class FeatureFusion(nn.Module):
    """Fuses levels of a feature pyramid into one map, as in Semantic FPN (arXiv 1901.02446).

    Each level is convolved and upsampled by 2 until it has the finest stride; then all are summed.
    """

    def __init__(
        self, in_channels: Sequence[int], strides: Sequence[int], dim: int, *, norm: str = "BN"
    ):
        """
        Args:
            in_channels, strides: channels and strides of the levels, finest first.
            dim: channels of the result.
            norm: norm of the convolutions.
        """
        super().__init__()
        check_at_least(1, dim=dim)
        self.levels = nn.ModuleList()
        for channels, stride in zip(in_channels, strides):
            doublings = (stride // strides[0]).bit_length() - 1
            widths = [channels] + max(1, doublings) * [dim]
            self.levels.append(
                nn.Sequential(
                    *(
                        Conv2d(
                            a,
                            b,
                            3,
                            padding=1,
                            bias=not norm,
                            norm=get_norm(norm, b),
                            activation=F.relu_,
                        )
                        for a, b in zip(widths, widths[1:])
                    )
                )
            )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps of the levels, finest first -> (N, dim, h, w) at the finest stride."""
        size = (features[0].shape[-2], features[0].shape[-1])
        fused = self.levels[0](features[0])
        for level, x in zip(self.levels[1:], features[1:]):
            for conv in level:
                x = conv(x)
                x = resize_corners(x, (2 * x.shape[-2], 2 * x.shape[-1]))
            fused = fused + resize_corners(x, size)
        return fused


def resize_corners(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (N, C, h, w) with aligned corners, as everywhere in AdaptIS."""
    if same_size(x.shape[-2:], size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def init_weights(module: nn.Module, gain: float = 1.0) -> None:
    """Initialize all convolutions and linear layers: Xavier, Gaussian, with zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in module.modules():
        if isinstance(layer, AdaIN):
            layer.init_weights(gain)


def init_uniform(module: nn.Module) -> None:
    """Initialize all convolutions: Xavier, uniform, with zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def valid_cells(
    image_sizes: Tensor,
    map_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """(N, 1, h, w) bool: cells whose position lies in the image, not in the padding.

    Args:
        image_sizes: (N, 2) heights and widths without padding.
        map_size: h and w.
        scale: cells per image pixel.
    """
    rows, columns = (torch.arange(n, device=image_sizes.device) / scale for n in map_size)
    in_row, in_column = rows < image_sizes[:, :1], columns < image_sizes[:, 1:]
    inside = in_row[:, :, None] & in_column[:, None, :]
    return inside[:, None]
