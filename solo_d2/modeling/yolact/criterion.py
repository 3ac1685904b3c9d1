"""The losses of YOLACT and YOLACT++, in float32."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from solo_d2.layers.boxes import box_areas
from solo_d2.layers.distributed import normalizer

from ..options import check_at_least
from ..segmentor import GroundTruth
from .anchors import encode
from .head import MaskRater, YOLACTOutputs, assemble_masks, inside_boxes, scale_boxes
from .targets import BACKGROUND, Matches, have_area, match, semantic_target, shrink_masks

# Objects must be wider and higher than this, in pixels, to have finite targets.
_MIN_BOX_SIZE = 1e-2


@dataclass(kw_only=True, eq=False)
class YOLACTCriterion:
    """Matches anchors with objects and computes the losses of a batch.

    Attributes:
        num_classes: C.
        masks_to_train: maximum number of positive anchors of an image, chosen at random, in the
            mask losses; 0: all.
        crop_masks: crop predicted masks to the objects' boxes.

    Raises:
        ValueError: an option has an unsupported value.
    """

    num_classes: int
    masks_to_train: int = 100
    crop_masks: bool = True

    # hard negatives of the class loss per positive anchor of the same image
    neg_pos_ratio: ClassVar[float] = 3.0
    # only objects with more pixels, at the size of the prototypes, train the mask IoU
    mask_iou_min_area: ClassVar[float] = 25.0
    loss_weights: ClassVar[dict[str, float]] = {
        "loss_class": 1.0,
        "loss_box": 1.5,
        "loss_mask": 6.125,
        "loss_semantic": 1.0,
        "loss_mask_iou": 25.0,
    }

    def __post_init__(self) -> None:
        check_at_least(0, masks_to_train=self.masks_to_train)

    def __call__(
        self,
        outputs: YOLACTOutputs,
        semantic_logits: Tensor,
        ground_truth: list[GroundTruth],
        mask_rater: MaskRater | None = None,
    ) -> dict[str, Tensor]:
        """Named losses.

        Args:
            outputs: outputs of the network.
            semantic_logits: (N, C, h / 2, w / 2).
            ground_truth: N images.
            mask_rater: for YOLACT++ only.
        """
        with torch.no_grad(), record_function("solo_d2.assign"):
            matches = [self.match(gt, outputs.anchors) for gt in ground_truth]
            labels = torch.stack([found.labels for found in matches])
            positive = labels > BACKGROUND
            # these two lines wait for the device, as does ``force_match``
            counts = positive.sum(dim=1).tolist()
            positives = positive.nonzero()[:, 1].split(counts)
        if has_event_storage():
            get_event_storage().put_scalar("yolact/positive_anchors", sum(counts))
        box, mask, iou, semantic = outputs.prototypes.new_zeros(4).unbind()
        # float32 from here on, for areas, logarithms and probabilities near 0 and 1
        with torch.autocast(labels.device.type, enabled=False):
            for i, (gt, found, index) in enumerate(zip(ground_truth, matches, positives)):
                objects = found.objects[index]
                targets = encode(gt.boxes[objects] / _unit(gt), outputs.anchors[index])
                box = box + box_loss(outputs.box_offsets[i][index], targets)
                with torch.no_grad(), record_function("solo_d2.reduce"):
                    sizes = (outputs.prototypes.shape[1:3], semantic_logits.shape[-2:])
                    truth, semantic_truth = shrink_masks(gt.masks, *sizes)
                    usable = have_area(gt.boxes, _MIN_BOX_SIZE)
                    target = semantic_target(semantic_truth, gt.classes, usable, self.num_classes)
                semantic = semantic + semantic_loss(semantic_logits[i], target)
                losses = self._mask_losses(outputs, i, index, objects, gt, truth, mask_rater)
                mask, iou = mask + losses[0], iou + losses[1]
            hard = class_loss(outputs.class_logits, labels, self.neg_pos_ratio)
            scale = normalizer(positive.sum())
            named = {
                "loss_class": hard / scale,
                "loss_box": box / scale,
                "loss_mask": mask / scale,
                "loss_semantic": semantic / len(ground_truth),
            }
            if mask_rater is not None:
                named["loss_mask_iou"] = iou / scale
            return {name: self.loss_weights[name] * loss for name, loss in named.items()}

    def match(self, gt: GroundTruth, anchors: Tensor) -> Matches:
        """Match the anchors with one image's objects."""
        unit = _unit(gt)
        return match(
            gt.boxes / unit,
            gt.classes,
            gt.crowd_boxes / unit,
            anchors,
            min_size=_MIN_BOX_SIZE / unit,
        )

    def _mask_losses(
        self,
        outputs: YOLACTOutputs,
        image: int,
        index: Tensor,
        objects: Tensor,
        gt: GroundTruth,
        truth: Tensor,
        mask_rater: MaskRater | None,
    ) -> tuple[Tensor, Tensor]:
        """Losses of the masks and of their IoUs, summed over the positive anchors of one image.

        Args:
            outputs, image: outputs of the network, and index of the image in the batch.
            index, objects: (R,) the positive anchors and their objects.
            gt: the image's objects.
            truth: (M, h, w) bool, their masks at the size of the prototypes.
            mask_rater: for YOLACT++ only.
        """
        weight = 1.0
        if self.masks_to_train and len(index) > self.masks_to_train:
            # on the CPU, so that the choice is the same on every device
            chosen = torch.randperm(len(index))[: self.masks_to_train].to(index.device)
            weight = len(index) / self.masks_to_train
            index, objects = index[chosen], objects[chosen]
        size = tuple(truth.shape[-2:])
        boxes = scale_boxes(gt.boxes[objects], gt.masks.shape[-2:], size)
        masks = assemble_masks(outputs.prototypes[image], outputs.coefficients[image][index])
        if self.crop_masks:
            masks = masks * inside_boxes(boxes, size)
        truth = truth[objects]
        loss = weight * mask_loss(masks, truth, box_areas(boxes))
        if mask_rater is None:
            return loss, loss.new_zeros(())
        ious = mask_ious(masks, truth)
        predicted = mask_rater(masks).gather(1, gt.classes[objects, None])[:, 0]
        large = truth.sum(dim=(1, 2)) > self.mask_iou_min_area
        return loss, mask_iou_loss(predicted, ious, large)


def _unit(gt: GroundTruth) -> int:
    """Input pixels per unit of relative boxes."""
    return max(gt.masks.shape[-2:])


# Below: pure functions of predictions and targets. Each is a sum unless stated otherwise. If there
# is nothing to sum, they are zeros that stay connected to the predictions.


def box_loss(offsets: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 over the offsets (R, 4) of positive anchors."""
    return F.smooth_l1_loss(offsets, targets, reduction="sum")


def class_costs(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each anchor, (N, P); an ignored one counts as background.

    Args:
        logits: (N, P, C + 1), background first.
        labels: (N, P) as in ``targets.Matches``.
    """
    of_label = logits.gather(2, labels.clamp(min=BACKGROUND)[:, :, None])[:, :, 0]
    return logits.logsumexp(dim=2) - of_label


@torch.no_grad()
def hard_negatives(costs: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """The background anchors of each image that look least like background.

    All anchors are ranked by -log p(background), and the background anchors among the first n are
    taken. Positive and ignored anchors count as 0 but still occupy ranks; n is ``ratio`` times the
    number of positive anchors of the image.

    Args:
        costs: (N, P), see ``class_costs``.
        labels: (N, P) as in ``targets.Matches``.
        ratio: negatives per positive.

    Returns:
        (N, P) bool.
    """
    order = costs.masked_fill(labels != BACKGROUND, 0).argsort(dim=1, descending=True)
    count = (ratio * (labels > BACKGROUND).sum(dim=1)).clamp(max=labels.shape[1] - 1)
    rank = torch.arange(labels.shape[1], device=labels.device)
    hard = torch.zeros_like(labels, dtype=torch.bool)
    hard.scatter_(1, order, rank < count[:, None])
    return hard & (labels == BACKGROUND)


def class_loss(logits: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """Cross-entropy over positive anchors and hard negatives; see above for the arguments."""
    costs = class_costs(logits, labels)
    chosen = (labels > BACKGROUND) | hard_negatives(costs, labels, ratio)
    return costs.masked_fill(~chosen, 0).sum()


def mask_loss(masks: Tensor, targets: Tensor, areas: Tensor) -> Tensor:
    """Binary cross-entropy of soft masks, summed over the pixels of each and divided by its area.

    A pixel of the target that was cropped away adds 100 and has no gradient, as published.
    ``F.binary_cross_entropy`` is not used because it raises an error if a mask is NaN.

    Args:
        masks: (R, h, w) in 0 to 1.
        targets: (R, h, w) bool.
        areas: (R,) in pixels.
    """
    of_truth = torch.where(targets, masks, 1 - masks)
    cost = -of_truth.clamp(min=torch.finfo(masks.dtype).tiny).log()
    cost = cost.masked_fill(of_truth == 0, 100)
    return (cost.sum(dim=(1, 2)) / areas).sum()


def semantic_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, both (C, h, w): the sum over classes of means over pixels."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.mean(dim=(1, 2)).sum()


def mask_ious(masks: Tensor, targets: Tensor) -> Tensor:
    """(R,) IoU of soft masks (R, h, w), thresholded at one half, with bool masks."""
    binary = masks > 0.5
    shared = (binary & targets).sum(dim=(1, 2))
    either = (binary | targets).sum(dim=(1, 2))
    return shared / either.clamp(min=1)


def mask_iou_loss(predicted: Tensor, ious: Tensor, counts: Tensor) -> Tensor:
    """Smooth L1 between predicted and true IoUs, (R,) each, where ``counts`` (R,) is set."""
    return (F.smooth_l1_loss(predicted, ious, reduction="none") * counts).sum()
