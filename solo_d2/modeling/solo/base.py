"""What SOLO, Decoupled SOLO and SOLOv2 share: all but how the mask of a cell is made."""

import math
from abc import abstractmethod
from typing import Any, Protocol

import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.layers.distributed import normalizer
from solo_d2.layers.losses import MASK_LOSSES
from solo_d2.layers.masks import downsample_masks, downsample_unpadded_masks, mass_centers
from solo_d2.layers.nms import point_nms
from solo_d2.layers.resample import ALIGNMENTS, align_to_grid, resize

from ..num_classes import resolve_num_classes
from ..segmentor import GroundTruth, InstanceSegmentor
from .inference import Detections, detect, suppress
from .targets import CellTargets, assign_cells, last_claims, level_offsets


class GridOutputs(Protocol):
    """Raw outputs of a head of the family; the rest is the architecture's own."""

    category_logits: list[Tensor]  # per level (N, C, S, S)


class SOLOFamily(InstanceSegmentor):
    """Targets, losses and inference of the family.

    The seam: a subclass predicts the raw outputs of its head (``predict``) and makes from them
    the soft masks of chosen cells (``soft_masks``). Training and inference call the same two.
    """

    num_classes_key = "MODEL.SOLO.NUM_CLASSES"

    # Where several instances claim a cell: train its mask for each of them, as SOLOv2 does, or for
    # the one that gives the cell its category.
    one_mask_per_cell = False

    def __init__(
        self,
        *,
        head: nn.Module,
        head_in_features: list[str],
        strides: list[int],
        mask_stride: int,
        num_classes: int,
        assignment: dict[str, Any],
        pad_before_reduction: bool = True,
        max_positives: int = 0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        category_loss_weight: float = 1.0,
        mask_loss_type: str = "dice",
        mask_loss_weight: float = 3.0,
        detection: dict[str, Any],
        suppression: dict[str, Any],
        **kwargs,
    ):
        """
        Args:
            head: predicts category logits, and what masks are made of, per level.
            head_in_features: one backbone feature per level.
            strides: of the levels, in input pixels.
            mask_stride: of the soft masks at inference.
            num_classes: C.
            assignment: keywords of ``targets.assign_cells``: num_grids, scale_ranges, ...
            pad_before_reduction: shrink mask targets after padding (exact) or before (AdelaiDet).
            max_positives: (instance, cell) pairs per image in the mask loss, 0 for all.
            focal_loss_alpha, focal_loss_gamma: of the category loss.
            category_loss_weight, mask_loss_weight: factors.
            mask_loss_type: one of ``layers.losses.MASK_LOSSES``.
            detection, suppression: thresholds and limits, keywords of ``inference.detect`` and
                ``inference.suppress``.
            kwargs: see ``InstanceSegmentor``.

        Raises:
            ValueError: there is no such mask loss.
        """
        if mask_loss_type not in MASK_LOSSES:
            raise ValueError(
                f"MODEL.SOLO.MASK_LOSS_TYPE must be one of {', '.join(MASK_LOSSES)}, "
                f"not {mask_loss_type!r}"
            )
        super().__init__(**kwargs)
        self.head = head
        self.head_in_features = head_in_features
        self.strides = strides
        self.mask_stride = mask_stride
        self.num_classes = num_classes
        self.assignment = assignment
        self.level_offsets = level_offsets(assignment["num_grids"])
        self.pad_before_reduction = pad_before_reduction
        self.max_positives = max_positives
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.category_loss_weight = category_loss_weight
        self.distance = MASK_LOSSES[mask_loss_type]
        self.mask_loss_weight = mask_loss_weight
        self.detection = detection
        self.suppression = suppression

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        solo = cfg.MODEL.SOLO
        per_level = ("IN_FEATURES", "STRIDES", "NUM_GRIDS", "SCALE_RANGES")
        if len({len(solo[key]) for key in per_level}) != 1:
            lengths = ", ".join(f"{key}: {len(solo[key])}" for key in per_level)
            raise ValueError(f"MODEL.SOLO needs one entry per level in each of {lengths}")
        return {
            **super().from_config(cfg),
            "head_in_features": solo.IN_FEATURES,
            "strides": solo.STRIDES,
            "num_classes": resolve_num_classes(cfg, "MODEL.SOLO.NUM_CLASSES"),
            "assignment": {
                "num_grids": solo.NUM_GRIDS,
                "scale_ranges": solo.SCALE_RANGES,
                "sigma": solo.CENTER_SIGMA,
                "inclusive_boxes": solo.INCLUSIVE_BOXES,
            },
            "pad_before_reduction": solo.PAD_BEFORE_REDUCTION,
            "max_positives": solo.MAX_POSITIVES,
            "focal_loss_alpha": solo.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": solo.FOCAL_LOSS_GAMMA,
            "category_loss_weight": solo.CATEGORY_LOSS_WEIGHT,
            "mask_loss_type": solo.MASK_LOSS_TYPE,
            "mask_loss_weight": solo.MASK_LOSS_WEIGHT,
            "mask_threshold": solo.MASK_THRESH_TEST,
            "detection": {
                "score_threshold": solo.SCORE_THRESH_TEST,
                "max_candidates": solo.MAX_CANDIDATES_TEST,
                "topk_candidates": solo.TOPK_CANDIDATES_TEST,
            },
            "suppression": {
                "nms_type": solo.NMS_TYPE,
                "nms_kernel": solo.NMS_KERNEL,
                "nms_sigma": solo.NMS_SIGMA,
                "nms_finite": solo.NMS_FINITE,
                "nms_threshold": solo.NMS_THRESH_TEST,
                "update_threshold": solo.UPDATE_THRESH_TEST,
                "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            },
        }

    @abstractmethod
    def predict(self, levels: list[Tensor], features: dict[str, Tensor]) -> GridOutputs:
        """Raw outputs of the head.

        Args:
            levels: per level the feature (N, C, h, w) at the level's stride.
            features: of the backbone.
        """

    @abstractmethod
    def soft_masks(
        self,
        outputs: Any,
        image: int,
        level: int,
        cells: Tensor,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Soft masks (n, H, W) in [0, 1], float32, of chosen cells; n = 0 stays connected.

        Args:
            outputs: of ``predict``.
            image, level: which grid.
            cells: (n,) row-major indices in that grid.
            size: height and width to resize to; by default the level's own.
        """

    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        height, width = images.tensor.shape[-2:]
        outputs = self.predict(self.resize_levels(features, (height, width)), features)
        with torch.no_grad(), record_function("solo_d2.assign"):
            targets = [self.assign(gt, (height, width)) for gt in ground_truth]
        # a feature that no level takes (an ablation) is connected too: processes that train
        # together must have a gradient for every parameter
        idle = [x[:0].sum() for name, x in features.items() if name not in self.head_in_features]
        return {
            "loss_category": self.category_loss(outputs, targets) + sum(idle),
            "loss_mask": self.mask_loss(outputs, targets, ground_truth),
        }

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        height, width = images.tensor.shape[-2:]
        outputs = self.predict(self.resize_levels(features, (height, width)), features)
        scores = self.category_scores(outputs)
        mask_size = (height // self.mask_stride, width // self.mask_stride)
        results = []
        for i, image_size in enumerate(images.image_sizes):
            found = self.detect(outputs, scores[i], i, mask_size)
            found = suppress(found, mask_threshold=self.mask_threshold, **self.suppression)
            result = Instances(image_size)
            result.scores, result.pred_classes, result.pred_masks = found
            results.append(result)
        return results

    def category_scores(self, outputs: GridOutputs) -> Tensor:
        """(N, cells of all levels, C) scores after point NMS."""
        return _join_levels([point_nms(x.float().sigmoid()) for x in outputs.category_logits])

    def detect(
        self, outputs: GridOutputs, scores: Tensor, image: int, mask_size: tuple[int, int]
    ) -> Detections:
        """The best candidates of one image, before suppression; see ``inference.detect``."""
        return detect(
            scores,
            lambda level, cells: self.soft_masks(outputs, image, level, cells, mask_size),
            mask_size,
            level_offsets=self.level_offsets,
            strides=self.strides,
            mask_threshold=self.mask_threshold,
            **self.detection,
        )

    def resize_levels(
        self, features: dict[str, Tensor], image_size: tuple[int, int]
    ) -> list[Tensor]:
        """Bring every feature to its level's stride (P2 shrinks, P6 grows; SOLO, section 3.2)."""
        levels = []
        for name, stride in zip(self.head_in_features, self.strides):
            size = (image_size[0] // stride, image_size[1] // stride)
            levels.append(resize(features[name], size))
        return levels

    def assign(self, gt: GroundTruth, extent: tuple[int, int]) -> CellTargets:
        """Targets of one image; ``extent`` is the padded size."""
        centers, areas = mass_centers(gt.masks)
        targets = assign_cells(
            gt.boxes,
            gt.classes,
            centers,
            areas,
            extent,
            num_classes=self.num_classes,
            **self.assignment,
        )
        if self.one_mask_per_cell:
            targets = last_claims(targets, self.assignment["num_grids"])
        if self.max_positives and len(targets.cell) > self.max_positives:
            chosen = torch.randperm(len(targets.cell), device=targets.cell.device)
            chosen = chosen[: self.max_positives].sort().values
            pairs = (x[chosen] for x in targets[1:])
            targets = CellTargets(targets.categories, *pairs)
        return targets

    def category_loss(self, outputs: GridOutputs, targets: list[CellTargets]) -> Tensor:
        """Focal loss over all cells, divided by the number of positive cells + 1."""
        logits = _join_levels(outputs.category_logits)
        labels = torch.stack([t.categories for t in targets])
        num_positive = (labels < self.num_classes).sum()
        if has_event_storage():
            get_event_storage().put_scalar("solo/positive_cells", num_positive.item())
        one_hot = F.one_hot(labels, self.num_classes + 1)[..., :-1]
        loss = sigmoid_focal_loss(
            logits,
            one_hot.to(logits.dtype),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )
        return self.category_loss_weight * loss / normalizer(num_positive, plus=1)

    def mask_loss(
        self, outputs: GridOutputs, targets: list[CellTargets], ground_truth: list[GroundTruth]
    ) -> Tensor:
        """Mean distance over all positive (instance, cell) pairs of the batch."""
        total, count = self.pixel_mean.new_zeros(()), self.pixel_mean.new_zeros(())
        for i, (target, gt) in enumerate(zip(targets, ground_truth)):
            reduced: dict[int, Tensor] = {}
            for level in range(len(self.strides)):
                pairs = target.level == level
                masks = self.soft_masks(outputs, i, level, target.cell[pairs])
                stride = gt.masks.shape[-1] // masks.shape[-1]
                if stride not in reduced:
                    reduced[stride] = self.reduce(gt, stride)
                # summing over no pairs gives a zero that still reaches every parameter
                total = total + self.distance(masks, reduced[stride][target.instance[pairs]]).sum()
            count = count + len(target.cell)
        return self.mask_loss_weight * total / normalizer(count)

    def reduce(self, gt: GroundTruth, stride: int) -> Tensor:
        """Mask targets (N, H / stride, W / stride) bool."""
        with record_function("solo_d2.reduce"):
            if self.pad_before_reduction:
                return downsample_masks(gt.masks, stride)
            padded_size = (gt.masks.shape[-2], gt.masks.shape[-1])
            return downsample_unpadded_masks(gt.masks, stride, gt.image_size, padded_size)


class CategoryHead(nn.Module):
    """The category branch of the family: a tower and an output conv, shared by all levels.

    A subclass adds the branch that its masks are made of.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_grids: list[int],
        num_convs: int,
        conv_dim: int,
        norm: str,
        deform: str = "none",
        deform_modulated: bool = False,
        category_align: str = "interpolate",
        coord_conv: bool = True,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            in_channels: of every level's feature.
            num_classes, num_grids: the output is (N, num_classes, S, S) per level.
            num_convs, conv_dim, norm, deform, deform_modulated: see ``build_tower``.
            category_align: see ``align_to_grid``.
            coord_conv: give coordinates to the other branch.
            prior_prob: probability of each class before training.

        Raises:
            ValueError: an option is none of those that there are.
        """
        super().__init__()
        if category_align not in ALIGNMENTS:
            raise ValueError(
                f"MODEL.SOLO.CATEGORY_ALIGN must be one of {', '.join(ALIGNMENTS)}, "
                f"not {category_align!r}"
            )
        self.in_channels = in_channels
        self.num_grids = num_grids
        self.category_align = category_align
        self.coord_conv = coord_conv
        self.tower_options = {
            "num_convs": num_convs,
            "conv_dim": conv_dim,
            "norm": norm,
            "deform": deform,
            "deform_modulated": deform_modulated,
        }
        self.category_tower = build_tower(in_channels, **self.tower_options)
        self.prior_bias = -math.log((1 - prior_prob) / prior_prob)
        self.category_pred = output_conv(conv_dim, num_classes, bias=self.prior_bias)

    @classmethod
    def options(cls, cfg, input_shape, num_classes: int) -> dict[str, Any]:
        """Keyword arguments from a config and the backbone's output shapes."""
        solo = cfg.MODEL.SOLO
        return {
            "in_channels": single_channels(input_shape, solo.IN_FEATURES),
            "num_classes": num_classes,
            "num_grids": solo.NUM_GRIDS,
            "num_convs": solo.NUM_CONVS,
            "conv_dim": solo.CONV_DIM,
            "norm": solo.NORM,
            "deform": solo.DEFORM,
            "deform_modulated": solo.DEFORM_MODULATED,
            "category_align": solo.CATEGORY_ALIGN,
            "coord_conv": solo.COORD_CONV,
            "prior_prob": solo.PRIOR_PROB,
        }

    def classify(self, levels: list[Tensor]) -> list[Tensor]:
        """Features (N, in_channels, h, w) -> category logits (N, C, S, S), per level."""
        cells = [
            align_to_grid(feature, grid, self.category_align)
            for feature, grid in zip(levels, self.num_grids)
        ]
        return [self.category_pred(self.category_tower(x)) for x in cells]


def build_tower(
    in_channels: int,
    *,
    num_convs: int,
    conv_dim: int,
    norm: str,
    deform: str = "none",
    deform_modulated: bool = False,
) -> nn.Sequential:
    """``num_convs`` times 3x3 conv, norm, ReLU.

    Args:
        deform: which convs are deformable: "none", "last" or "all".
        deform_modulated: DCNv2 instead of v1.

    Raises:
        ValueError: ``deform`` is none of the three, or there are no convs.
    """
    if num_convs < 1:
        raise ValueError(f"MODEL.SOLO.NUM_CONVS must be at least 1, not {num_convs}")
    if deform not in ("none", "last", "all"):
        raise ValueError(f"MODEL.SOLO.DEFORM must be 'none', 'last' or 'all', not {deform!r}")
    convs = []
    for i in range(num_convs):
        deformable = deform == "all" or (deform == "last" and i == num_convs - 1)
        convs.append(
            conv_norm_relu(
                in_channels if i == 0 else conv_dim,
                conv_dim,
                norm=norm,
                deformable=deformable,
                modulated=deform_modulated,
            )
        )
    return nn.Sequential(*convs)


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    norm: str,
    deformable: bool = False,
    modulated: bool = False,
) -> nn.Module:
    """A conv with weights from normal(0, 0.01) and a bias only where there is no norm."""
    options = {
        "kernel_size": kernel_size,
        "padding": kernel_size // 2,
        "bias": not norm,
        "norm": get_norm(norm, out_channels),
        "activation": nn.ReLU(inplace=True),
    }
    if deformable:
        conv = DeformConv2d(in_channels, out_channels, modulated=modulated, **options)
    else:
        conv = Conv2d(in_channels, out_channels, **options)
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def output_conv(in_channels: int, out_channels: int, *, bias: float = 0.0) -> Conv2d:
    """A 3x3 conv without activation."""
    conv = Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    return init_output(conv, bias)


def init_output(conv: Conv2d, bias: float) -> Conv2d:
    """Weights of a conv without activation from normal(0, 0.01), in place."""
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


def single_channels(input_shape, names: list[str]) -> int:
    """The channel count that all named features share.

    Raises:
        ValueError: a feature is missing, or they differ.
    """
    missing = [name for name in names if name not in input_shape]
    if missing:
        raise ValueError(f"the backbone has no feature {missing[0]!r}, only {sorted(input_shape)}")
    channels = {name: input_shape[name].channels for name in names}
    if len(set(channels.values())) != 1:
        raise ValueError(f"the head's features must have the same number of channels: {channels}")
    return channels[names[0]]


def _join_levels(per_level: list[Tensor]) -> Tensor:
    """Per level (N, C, S, S) -> (N, cells of all levels, C)."""
    return torch.cat([x.flatten(2) for x in per_level], dim=2).transpose(1, 2)
