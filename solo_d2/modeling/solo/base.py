"""The common part of SOLO, Decoupled SOLO and SOLOv2: everything but how a cell's mask is made.

Shape shorthand of this folder:
    N: images
    M: instances or detections of one image
    P: positive (instance, cell) pairs of one image
    L: levels
    S: cells of a level's grid along each axis
    C: classes
    D, E: channels of mask features, see each model
    H, W: height and width of the padded input, or of masks at a stride
    h, w: height and width of a level's feature
    n: chosen cells of one level
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from detectron2.config import configurable
from detectron2.modeling import Backbone
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from solo_d2.layers.distributed import normalizer
from solo_d2.layers.losses import MASK_LOSSES
from solo_d2.layers.masks import downsample_masks, downsample_unpadded_masks, mass_centers
from solo_d2.layers.nms import MATRIX_NMS_KERNELS, point_nms
from solo_d2.layers.resample import resize

from ..num_classes import resolve_num_classes
from ..options import check_at_least, check_choice, check_fractions
from ..segmentor import GroundTruth, InstanceSegmentor
from .head import CategoryHead
from .inference import NMS_TYPES, ScoredMasks, detect_masks, suppress_masks
from .targets import CellTargets, assign_cells, last_claims, level_offsets


class GridOutputs(Protocol):
    """Raw outputs of a head of the family; each architecture adds its own fields."""

    category_logits: list[Tensor]  # per level (N, C, S, S)


class SOLOFamily(InstanceSegmentor):
    """Targets, losses and inference of the family.

    A subclass implements two methods, which training and inference both call: ``predict_levels``
    computes the raw outputs of its head, and ``soft_masks`` makes the soft masks of chosen cells
    from them.
    """

    num_classes_key = "MODEL.SOLO.NUM_CLASSES"
    num_classes: int

    # If several instances claim a cell: train its mask only on the one that gives the cell its
    # category. False: on each of them, as SOLOv2 does.
    one_mask_per_cell = False
    # Whether masks are made from one mask feature for all levels.
    has_mask_branch = False

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: CategoryHead,
        mask_branch: nn.Module | None = None,
        pixel_mean: list[float],
        pixel_std: list[float],
        freeze_bn_stats: bool = False,
        num_classes: int,
        head_in_features: Sequence[str],
        strides: Sequence[int],
        scale_ranges: Sequence[Sequence[float]],
        center_sigma: float = 0.2,
        inclusive_boxes: bool = False,
        pad_before_downsampling: bool = True,
        max_positives: int = 0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        category_loss_weight: float = 1.0,
        mask_loss_type: str = "dice",
        mask_loss_weight: float = 3.0,
        score_threshold: float = 0.1,
        max_candidates: int = 0,
        topk_candidates: int = 500,
        mask_threshold: float = 0.5,
        nms_type: str = "matrix",
        nms_kernel: str = "gaussian",
        nms_sigma: float = 2.0,
        nms_finite: bool = False,
        update_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ):
        """
        Args:
            backbone, pixel_mean, pixel_std, freeze_bn_stats: see ``InstanceSegmentor``.
            head: predicts category logits and the inputs of the masks, per level.
            mask_branch: makes the mask feature; SOLOv2 only.
            num_classes: C.
            head_in_features, strides, scale_ranges: one entry per level, as the head's
                ``num_grids``: a backbone feature, the stride in input pixels that it is resized to,
                and the range (low, high) of sqrt(box area), see ``assign_cells``.
            center_sigma: side of the center region in box sides.
            inclusive_boxes: take x2 - x1 - 1 as the width of a box, as mmdetection v1 did.
            pad_before_downsampling: downsample mask targets after padding, which is exact; False:
                before, as AdelaiDet does.
            max_positives: limit on the (instance, cell) pairs per image in the mask loss, which
                are chosen at random; 0: all.
            focal_loss_alpha, focal_loss_gamma: parameters of the category loss.
            category_loss_weight, mask_loss_weight: factors of the losses.
            mask_loss_type: one of ``layers.losses.MASK_LOSSES``.
            score_threshold, max_candidates, topk_candidates: see ``inference.detect_masks``.
            mask_threshold: a pixel belongs to a mask where its soft value exceeds this.
            nms_type, nms_kernel, nms_sigma, nms_finite, update_threshold, nms_threshold,
                max_detections: see ``inference.suppress_masks``.

        Raises:
            ValueError: an argument has an unsupported value, or arguments do not fit together.
        """
        check_choice("mask_loss_type", mask_loss_type, tuple(MASK_LOSSES))
        check_choice("nms_type", nms_type, NMS_TYPES)
        check_choice("nms_kernel", nms_kernel, MATRIX_NMS_KERNELS)
        check_at_least(0, max_positives=max_positives, max_candidates=max_candidates)
        check_at_least(0, topk_candidates=topk_candidates, max_detections=max_detections)
        check_at_least(0, center_sigma=center_sigma, focal_loss_gamma=focal_loss_gamma)
        check_at_least(
            0, category_loss_weight=category_loss_weight, mask_loss_weight=mask_loss_weight
        )
        check_fractions(score_threshold=score_threshold, mask_threshold=mask_threshold)
        check_fractions(update_threshold=update_threshold, nms_threshold=nms_threshold)
        if not nms_sigma > 0:
            raise ValueError(f"nms_sigma must be positive, not {nms_sigma!r}")
        self._check_levels(backbone, head, head_in_features, strides, scale_ranges)
        if (mask_branch is not None) != self.has_mask_branch:
            needed = "needs a" if self.has_mask_branch else "has no"
            raise ValueError(f"{type(self).__name__} {needed} mask_branch")
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            freeze_bn_stats=freeze_bn_stats,
            mask_threshold=mask_threshold,
            num_classes=num_classes,
        )
        self.head = head
        self.mask_branch = mask_branch
        self.head_in_features = list(head_in_features)
        self.strides = list(strides)
        self.num_grids = head.num_grids
        self.level_offsets = level_offsets(self.num_grids)
        self.scale_ranges = [tuple(bounds) for bounds in scale_ranges]
        self.center_sigma = center_sigma
        self.inclusive_boxes = inclusive_boxes
        self.pad_before_downsampling = pad_before_downsampling
        self.max_positives = max_positives
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.category_loss_weight = category_loss_weight
        self.mask_distance = MASK_LOSSES[mask_loss_type]
        self.mask_loss_weight = mask_loss_weight
        self.score_threshold = score_threshold
        self.max_candidates = max_candidates
        self.topk_candidates = topk_candidates
        self.nms_type = nms_type
        self.nms_kernel = nms_kernel
        self.nms_sigma = nms_sigma
        self.nms_finite = nms_finite
        self.update_threshold = update_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    @staticmethod
    def _check_levels(backbone, head, head_in_features, strides, scale_ranges) -> None:
        lengths = {
            "num_grids": len(head.num_grids),
            "head_in_features": len(head_in_features),
            "strides": len(strides),
            "scale_ranges": len(scale_ranges),
        }
        if len(set(lengths.values())) != 1 or not strides:
            numbers = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            raise ValueError(f"each level needs one entry in every list, but {numbers}")
        multiple = backbone.size_divisibility
        if any(stride < 2 or stride % 2 or multiple % stride for stride in strides):
            raise ValueError(
                f"strides must be even and divide {multiple}, the multiple that the backbone pads "
                f"images to, not {list(strides)}"
            )

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        solo = cfg.MODEL.SOLO
        return {
            **super().from_config(cfg),
            "num_classes": resolve_num_classes(cfg, cls.num_classes_key),
            "head_in_features": solo.IN_FEATURES,
            "strides": solo.STRIDES,
            "scale_ranges": solo.SCALE_RANGES,
            "center_sigma": solo.CENTER_SIGMA,
            "pad_before_downsampling": solo.PAD_BEFORE_DOWNSAMPLING,
            "max_positives": solo.MAX_POSITIVES,
            "mask_loss_type": solo.MASK_LOSS_TYPE,
            "mask_loss_weight": solo.MASK_LOSS_WEIGHT,
            "score_threshold": solo.SCORE_THRESH_TEST,
            "max_candidates": solo.MAX_CANDIDATES_TEST,
            "topk_candidates": solo.TOPK_CANDIDATES_TEST,
            "mask_threshold": solo.MASK_THRESH_TEST,
            "nms_type": solo.NMS_TYPE,
            "nms_kernel": solo.NMS_KERNEL,
            "nms_sigma": solo.NMS_SIGMA,
            "update_threshold": solo.UPDATE_THRESH_TEST,
            "nms_threshold": solo.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def mask_strides(self) -> list[int]:
        """Strides of each level's soft masks in training; at inference all have the finest one."""
        return [stride // 2 for stride in self.strides]

    @abstractmethod
    def predict_levels(self, levels: list[Tensor], features: dict[str, Tensor]) -> GridOutputs:
        """Raw outputs of the head.

        Args:
            levels: per level the feature (N, channels, h, w) at the level's stride.
            features: the backbone's features.
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
            outputs: result of ``predict``.
            image, level: index of the image and of the level.
            cells: (n,) row-major indices in that grid.
            size: height and width to resize to; by default at the level's ``mask_strides``.
        """

    def dense(self, images: Tensor) -> GridOutputs:
        """Raw outputs for normalized, padded images (N, 3, H, W); what an exported graph runs."""
        return self.predict(self.backbone(images), (images.shape[-2], images.shape[-1]))

    def predict(self, features: dict[str, Tensor], input_size: tuple[int, int]) -> GridOutputs:
        """Raw outputs for the backbone's features of a padded input of this size."""
        levels = self.resize_levels(features, input_size)
        return self.predict_levels(levels, features)

    def resize_levels(
        self, features: dict[str, Tensor], input_size: tuple[int, int]
    ) -> list[Tensor]:
        """Resize features to their levels' strides (P2 shrinks, P6 grows; SOLO, section 3.2)."""
        levels = []
        for name, stride in zip(self.head_in_features, self.strides):
            size = (input_size[0] // stride, input_size[1] // stride)
            levels.append(resize(features[name], size))
        return levels

    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        input_size = (images.tensor.shape[-2], images.tensor.shape[-1])
        outputs = self.predict(features, input_size)
        with torch.no_grad(), record_function("solo_d2.assign"):
            targets = [self.assign(gt, input_size) for gt in ground_truth]
        if has_event_storage():
            positive = sum(len(target.cell) for target in targets)
            get_event_storage().put_scalar("solo/positive_pairs", positive)
        # Connect the features that no level uses: under DistributedDataParallel every parameter
        # needs a gradient.
        unused = [x[:0].sum() for name, x in features.items() if name not in self.head_in_features]
        return {
            "loss_category": self.category_loss(outputs, targets) + sum(unused),
            "loss_mask": self.mask_loss(outputs, targets, ground_truth),
        }

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        height, width = images.tensor.shape[-2:]
        outputs = self.predict(features, (height, width))
        scores = self.category_scores(outputs)
        stride = min(self.mask_strides)
        mask_size = (height // stride, width // stride)
        results = []
        for i, image_size in enumerate(images.image_sizes):
            found = self.suppress(self.detect(outputs, scores[i], i, mask_size))
            result = Instances(image_size)
            result.scores, result.pred_classes, result.pred_masks = found
            results.append(result)
        return results

    def category_scores(self, outputs: GridOutputs) -> Tensor:
        """(N, cells of all levels, C) scores after point NMS."""
        return _join_levels([point_nms(x.float().sigmoid()) for x in outputs.category_logits])

    def detect(
        self, outputs: GridOutputs, scores: Tensor, image: int, mask_size: tuple[int, int]
    ) -> ScoredMasks:
        """The best candidates of one image, before suppression; see ``inference.detect_masks``."""
        return detect_masks(
            scores,
            lambda level, cells: self.soft_masks(outputs, image, level, cells, mask_size),
            mask_size,
            level_offsets=self.level_offsets,
            strides=self.strides,
            score_threshold=self.score_threshold,
            mask_threshold=self.mask_threshold,
            max_candidates=self.max_candidates,
            topk_candidates=self.topk_candidates,
        )

    def suppress(self, candidates: ScoredMasks) -> ScoredMasks:
        """The detections among one image's candidates; see ``inference.suppress_masks``."""
        return suppress_masks(
            candidates,
            mask_threshold=self.mask_threshold,
            nms_type=self.nms_type,
            nms_kernel=self.nms_kernel,
            nms_sigma=self.nms_sigma,
            nms_finite=self.nms_finite,
            nms_threshold=self.nms_threshold,
            update_threshold=self.update_threshold,
            max_detections=self.max_detections,
        )

    def assign(self, gt: GroundTruth, input_size: tuple[int, int]) -> CellTargets:
        """Targets of one image in a padded input of the given size."""
        centers, areas = mass_centers(gt.masks)
        targets = assign_cells(
            gt.boxes,
            gt.classes,
            centers,
            areas,
            input_size,
            num_classes=self.num_classes,
            num_grids=self.num_grids,
            scale_ranges=self.scale_ranges,
            sigma=self.center_sigma,
            inclusive_boxes=self.inclusive_boxes,
        )
        if self.one_mask_per_cell:
            targets = last_claims(targets, self.num_grids)
        if self.max_positives and len(targets.cell) > self.max_positives:
            # chosen on the CPU, so that a seed gives the same pairs on every device
            chosen = torch.randperm(len(targets.cell))[: self.max_positives].sort().values
            chosen = chosen.to(targets.cell.device)
            targets = CellTargets(targets.categories, *(x[chosen] for x in targets[1:]))
        return targets

    def category_loss(self, outputs: GridOutputs, targets: list[CellTargets]) -> Tensor:
        """Focal loss over all cells, divided by the number of positive cells + 1."""
        logits = _join_levels(outputs.category_logits)
        labels = torch.stack([t.categories for t in targets])
        num_positive = (labels < self.num_classes).sum()
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
        total = self.pixel_mean.new_zeros(())
        edges = torch.arange(len(self.strides) + 1, device=self.device)
        # pairs are ordered by level: bounds of all levels and images, with one synchronization
        bounds = torch.stack(
            [torch.searchsorted(t.level.contiguous(), edges) for t in targets]
        ).tolist()
        for i, (target, gt) in enumerate(zip(targets, ground_truth)):
            small = {stride: self.downsample(gt, stride) for stride in set(self.mask_strides)}
            for level, stride in enumerate(self.mask_strides):
                pairs = slice(bounds[i][level], bounds[i][level + 1])
                masks = self.soft_masks(outputs, i, level, target.cell[pairs])
                distances = self.mask_distance(masks, small[stride][target.instance[pairs]])
                # the sum over no pairs is a zero that stays connected to every parameter
                total = total + distances.sum()
        count = total.new_full((), sum(len(target.cell) for target in targets))
        return self.mask_loss_weight * total / normalizer(count)

    def downsample(self, gt: GroundTruth, stride: int) -> Tensor:
        """Mask targets (M, H / stride, W / stride) bool."""
        with record_function("solo_d2.reduce"):
            if self.pad_before_downsampling:
                return downsample_masks(gt.masks, stride)
            padded_size = (gt.masks.shape[-2], gt.masks.shape[-1])
            return downsample_unpadded_masks(gt.masks, stride, gt.image_size, padded_size)


def _join_levels(per_level: list[Tensor]) -> Tensor:
    """Per level (N, C, S, S) -> (N, cells of all levels, C)."""
    return torch.cat([x.flatten(2) for x in per_level], dim=2).transpose(1, 2)
