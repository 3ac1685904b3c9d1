"""The losses of YOLACT and YOLACT++, in float32."""

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
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


class YOLACTCriterion(nn.Module):
    """Matches anchors with objects and computes the losses of a batch."""

    def __init__(
        self,
        *,
        num_classes: int,
        iou_thresholds: tuple[float, float] = (0.4, 0.5),
        crowd_threshold: float = 0.7,
        neg_pos_ratio: float = 3.0,
        masks_to_train: int = 100,
        crop_masks: bool = True,
        mask_iou_min_area: float = 25.0,
        mask_iou_detach: bool = False,
        box_loss_weight: float = 1.5,
        class_loss_weight: float = 1.0,
        mask_loss_weight: float = 6.125,
        semantic_loss_weight: float = 1.0,
        mask_iou_loss_weight: float = 25.0,
    ):
        """
        Args:
            num_classes: C.
            iou_thresholds, crowd_threshold: see ``targets.match``.
            neg_pos_ratio: hard negatives of the class loss per positive anchor of the same image.
            masks_to_train: maximum number of positive anchors of an image, chosen at random, in the
                mask losses; 0: all.
            crop_masks: crop predicted masks to the objects' boxes.
            mask_iou_min_area: only objects with more pixels, at the size of the prototypes, train
                the mask IoU.
            mask_iou_detach: block the gradient from the mask IoU's loss to the masks. The published
                code does not.
            box_loss_weight, class_loss_weight, mask_loss_weight, semantic_loss_weight,
                mask_iou_loss_weight: factors.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        check_at_least(0, box_loss_weight=box_loss_weight, class_loss_weight=class_loss_weight)
        check_at_least(
            0, mask_loss_weight=mask_loss_weight, semantic_loss_weight=semantic_loss_weight
        )
        low, high = iou_thresholds
        if not 0 <= low <= high <= 1:
            raise ValueError(f"iou_thresholds must ascend within 0 to 1, not {(low, high)}")
        check_at_least(0, masks_to_train=masks_to_train)
        self.num_classes = num_classes
        self.iou_thresholds = (low, high)
        self.crowd_threshold = crowd_threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.masks_to_train = masks_to_train
        self.crop_masks = crop_masks
        self.mask_iou_min_area = mask_iou_min_area
        self.mask_iou_detach = mask_iou_detach
        self.box_loss_weight = box_loss_weight
        self.class_loss_weight = class_loss_weight
        self.mask_loss_weight = mask_loss_weight
        self.semantic_loss_weight = semantic_loss_weight
        self.mask_iou_loss_weight = mask_iou_loss_weight

    def forward(
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
            # these two lines synchronize with the device, as do ``force_match`` and ``class_loss``
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
                "loss_class": self.class_loss_weight * hard / scale,
                "loss_box": self.box_loss_weight * box / scale,
                "loss_mask": self.mask_loss_weight * mask / scale,
                "loss_semantic": self.semantic_loss_weight * semantic / len(ground_truth),
            }
            if mask_rater is not None:
                named["loss_mask_iou"] = self.mask_iou_loss_weight * iou / scale
        return named

    def match(self, gt: GroundTruth, anchors: Tensor) -> Matches:
        """Match the anchors with one image's objects."""
        unit = _unit(gt)
        return match(
            gt.boxes / unit,
            gt.classes,
            gt.crowd_boxes / unit,
            anchors,
            iou_thresholds=self.iou_thresholds,
            crowd_threshold=self.crowd_threshold,
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
        predicted = mask_rater(masks.detach() if self.mask_iou_detach else masks)
        predicted = predicted.gather(1, gt.classes[objects, None])[:, 0]
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


def hard_negatives(logits: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """The background anchors of each image that look least like background.

    All anchors are ranked by -log p(background), and the background anchors among the first n are
    taken. Positive and ignored anchors count as 0 but still occupy ranks; n is ``ratio`` times the
    number of positive anchors of the image.

    Args:
        logits: (N, P, C + 1), background first.
        labels: (N, P) as in ``targets.Matches``.
        ratio: negatives per positive.

    Returns:
        (N, P) bool.
    """
    with torch.no_grad():
        difficulty = logits.logsumexp(dim=2) - logits[:, :, BACKGROUND]
        difficulty = difficulty.masked_fill(labels != BACKGROUND, 0)
        order = difficulty.argsort(dim=1, descending=True)
        count = (ratio * (labels > BACKGROUND).sum(dim=1)).clamp(max=labels.shape[1] - 1)
        rank = torch.arange(labels.shape[1], device=labels.device)
        hard = torch.zeros_like(labels, dtype=torch.bool)
        hard.scatter_(1, order, rank < count[:, None])
        return hard & (labels == BACKGROUND)


def class_loss(logits: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """Cross-entropy over positive anchors and hard negatives; see ``hard_negatives`` for args."""
    chosen = (labels > BACKGROUND) | hard_negatives(logits, labels, ratio)
    return F.cross_entropy(logits[chosen], labels[chosen], reduction="sum")


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
