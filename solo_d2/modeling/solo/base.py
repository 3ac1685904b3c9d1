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

import numpy as np
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
from solo_d2.layers.masks import downsample_masks, downsample_unpadded_masks
from solo_d2.layers.nms import point_nms
from solo_d2.layers.resample import resize

from ..num_classes import resolve_num_classes
from ..options import check_at_least, check_choice
from ..segmentor import GroundTruth, InstanceSegmentor
from .head import CategoryHead
from .inference import Candidates, Detector, ScoredMasks
from .targets import CellAssigner, CellTargets, level_offsets

Size = tuple[int, int] | None
Levels = Sequence[Tensor | None]  # features; None where no mask of the level is needed


class GridOutputs(Protocol):
    """Raw outputs of a head of the family; each architecture adds its own fields."""

    category_logits: list[Tensor]  # per level (N, C, S, S)


class SOLOFamily(InstanceSegmentor):
    """Targets, losses and inference of the family.

    A subclass implements two methods, which training and inference both call: ``predict_masks``
    computes what masks are made from, and ``soft_masks`` makes those of chosen cells.
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
        head_in_features: Sequence[str],
        strides: Sequence[int],
        assigner: CellAssigner,
        pad_before_downsampling: bool = True,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        category_loss_weight: float = 1.0,
        mask_loss_type: str = "dice",
        mask_loss_weight: float = 3.0,
        detector: Detector,
    ):
        """
        Args:
            backbone, pixel_mean, pixel_std, freeze_bn_stats: see ``InstanceSegmentor``.
            head: predicts category logits and the inputs of the masks, per level.
            mask_branch: makes the mask feature; SOLOv2 only.
            head_in_features, strides: one entry per level: a backbone feature, and the stride in
                input pixels that it is resized to.
            assigner: chooses each instance's cells in training.
            pad_before_downsampling: downsample mask targets after padding, which is exact; False:
                before, as AdelaiDet does.
            focal_loss_alpha, focal_loss_gamma: parameters of the category loss.
            category_loss_weight, mask_loss_weight: factors of the losses.
            mask_loss_type: one of ``layers.losses.MASK_LOSSES``.
            detector: chooses the instances in inference.

        Raises:
            ValueError: an argument has an unsupported value, or arguments do not fit together.
        """
        check_choice("mask_loss_type", mask_loss_type, tuple(MASK_LOSSES))
        check_at_least(0, focal_loss_gamma=focal_loss_gamma, mask_loss_weight=mask_loss_weight)
        check_at_least(0, category_loss_weight=category_loss_weight)
        self._check_levels(backbone, head, head_in_features, strides, assigner)
        self._check_mask_branch(mask_branch)
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            freeze_bn_stats=freeze_bn_stats,
            mask_threshold=detector.mask_threshold,
            num_classes=assigner.num_classes,
        )
        self.head, self.mask_branch = head, mask_branch
        self.assigner, self.detector = assigner, detector
        self.head_in_features = list(head_in_features)
        self.strides = list(strides)
        self.num_grids = head.num_grids
        self.level_offsets = level_offsets(self.num_grids)
        self.pad_before_downsampling = pad_before_downsampling
        self.focal_loss = {"alpha": focal_loss_alpha, "gamma": focal_loss_gamma}
        self.category_loss_weight = category_loss_weight
        self.mask_distance = MASK_LOSSES[mask_loss_type]
        self.mask_loss_weight = mask_loss_weight

    def _check_mask_branch(self, mask_branch: nn.Module | None) -> None:
        if (mask_branch is not None) != self.has_mask_branch:
            needed = "needs a" if self.has_mask_branch else "has no"
            raise ValueError(f"{type(self).__name__} {needed} mask_branch")

    @staticmethod
    def _check_levels(backbone, head, head_in_features, strides, assigner) -> None:
        lengths = {
            "num_grids": len(head.num_grids),
            "head_in_features": len(head_in_features),
            "strides": len(strides),
            "scale_ranges": len(assigner.scale_ranges),
        }
        if len(set(lengths.values())) != 1 or not strides:
            numbers = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            raise ValueError(f"each level needs one entry in every list, but {numbers}")
        for name, its, heads in (
            ("num_grids", list(assigner.num_grids), head.num_grids),
            ("num_classes", assigner.num_classes, head.num_classes),
        ):
            if its != heads:
                raise ValueError(f"{name} of the assigner is {its}, that of the head {heads}")
        multiple = backbone.size_divisibility
        if any(stride < 2 or stride % 2 or multiple % stride for stride in strides):
            raise ValueError(
                f"strides must be even and divide {multiple}, the multiple that the backbone pads "
                f"images to, not {list(strides)}"
            )

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        solo = cfg.MODEL.SOLO
        assigner = CellAssigner(
            num_classes=resolve_num_classes(cfg, cls.num_classes_key),
            num_grids=solo.NUM_GRIDS,
            scale_ranges=solo.SCALE_RANGES,
            center_sigma=solo.CENTER_SIGMA,
            max_positives=solo.MAX_POSITIVES,
        )
        return {
            **super().from_config(cfg),
            "head_in_features": solo.IN_FEATURES,
            "strides": solo.STRIDES,
            "assigner": assigner,
            "pad_before_downsampling": solo.PAD_BEFORE_DOWNSAMPLING,
            "mask_loss_type": solo.MASK_LOSS_TYPE,
            "mask_loss_weight": solo.MASK_LOSS_WEIGHT,
            "detector": Detector.from_config(cfg),
        }

    @property
    def mask_strides(self) -> list[int]:
        """Strides of each level's soft masks in training; at inference all have the finest one."""
        return [stride // 2 for stride in self.strides]

    @abstractmethod
    def predict_masks(
        self, category_logits: list[Tensor], levels: Levels, features: dict[str, Tensor]
    ) -> GridOutputs:
        """Raw outputs of the head.

        Args:
            category_logits: per level (N, C, S, S), a part of the result.
            levels: per level the feature (N, channels, h, w) at the level's stride; None if no
                mask of this level is needed.
            features: the backbone's features.
        """

    @abstractmethod
    def soft_masks(
        self, outputs: Any, image: int, level: int, cells: np.ndarray, size: Size = None
    ) -> Tensor:
        """Soft masks (n, H, W) in [0, 1], float32, of chosen cells; n = 0 stays connected.

        Args:
            outputs: result of ``predict``.
            image, level: index of the image and of the level.
            cells: (n,) row-major indices in that grid, int64 on the host.
            size: height and width to resize to; by default at the level's ``mask_strides``.
        """

    def dense(self, images: Tensor) -> GridOutputs:
        """Raw outputs for normalized, padded images (N, 3, H, W); what an exported graph runs."""
        return self.predict(self.backbone(images), (images.shape[-2], images.shape[-1]))

    def predict(self, features: dict[str, Tensor], input_size: tuple[int, int]) -> GridOutputs:
        """Raw outputs for the backbone's features of a padded input of this size."""
        levels = self.resize_levels(features, input_size)
        return self.predict_masks(self.head(levels), levels, features)

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
        levels = self.resize_levels(features, (height, width))
        logits = self.head(levels)
        candidates = [self.detector.find(x) for x in self.category_scores(logits).cpu()]
        # what only makes the masks of levels without candidates is not computed
        cells = np.concatenate([found.cells for found in candidates])
        counts, _ = np.histogram(cells, self.level_offsets)
        chosen = [level if n else None for level, n in zip(levels, counts)]
        outputs = self.predict_masks(logits, chosen, features)
        stride = min(self.mask_strides)
        mask_size = (height // stride, width // stride)
        results = []
        for i, image_size in enumerate(images.image_sizes):
            found = self.detector.suppress(self.rank(outputs, candidates[i], i, mask_size))
            result = Instances(image_size)
            result.scores, result.pred_classes, result.pred_masks = found
            results.append(result)
        return results

    @staticmethod
    def category_scores(category_logits: list[Tensor]) -> Tensor:
        """(N, cells of all levels, C) scores after point NMS."""
        return _join_levels([point_nms(x.float().sigmoid()) for x in category_logits])

    def rank(
        self, outputs: GridOutputs, candidates: Candidates, image: int, mask_size: tuple[int, int]
    ) -> ScoredMasks:
        """The best candidates of one image, before suppression; see ``Detector.rank``."""
        return self.detector.rank(
            candidates,
            lambda level, cells: self.soft_masks(outputs, image, level, cells, mask_size),
            mask_size,
            self.device,
            level_offsets=self.level_offsets,
            strides=self.strides,
        )

    def assign(self, gt: GroundTruth, input_size: tuple[int, int]) -> CellTargets:
        """Targets of one image in a padded input of the given size."""
        return self.assigner(gt, input_size, one_mask_per_cell=self.one_mask_per_cell)

    def category_loss(self, outputs: GridOutputs, targets: list[CellTargets]) -> Tensor:
        """Focal loss over all cells, divided by the number of positive cells + 1."""
        logits = _join_levels(outputs.category_logits)
        labels = torch.stack([t.categories for t in targets])
        num_positive = (labels < self.num_classes).sum()
        one_hot = F.one_hot(labels, self.num_classes + 1)[..., :-1]
        loss = sigmoid_focal_loss(
            logits,
            one_hot.to(logits.dtype),
            **self.focal_loss,
            reduction="sum",
        )
        return self.category_loss_weight * loss / normalizer(num_positive, plus=1)

    def mask_loss(
        self, outputs: GridOutputs, targets: list[CellTargets], ground_truth: list[GroundTruth]
    ) -> Tensor:
        """Mean distance over all positive (instance, cell) pairs of the batch."""
        total = self.pixel_mean.new_zeros(())
        # the only synchronization: which cells there are, ordered by level in each image
        columns = [torch.stack([target.level, target.cell]) for target in targets]
        on_host = torch.cat(columns, dim=1).cpu().numpy()
        ends = np.cumsum([len(target.cell) for target in targets])
        for i, (target, gt) in enumerate(zip(targets, ground_truth)):
            level_of, cells = on_host[:, ends[i] - len(target.cell) : ends[i]]
            bounds = np.searchsorted(level_of, range(len(self.strides) + 1))
            small = {stride: self.downsample(gt, stride) for stride in set(self.mask_strides)}
            for level, stride in enumerate(self.mask_strides):
                pairs = slice(bounds[level], bounds[level + 1])
                masks = self.soft_masks(outputs, i, level, cells[pairs])
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
