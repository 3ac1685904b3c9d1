"""From the raw outputs for one image to instances in the output frame."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.profiler import record_function

from solo_d2.layers.box_nms import cross_class_fast_nms, fast_nms, traditional_nms
from solo_d2.layers.masks import upsample_to_binary

from ..options import check_at_least, check_choice, check_fractions
from .anchors import decode
from .head import MaskRater, YOLACTOutputs, assemble_masks, inside_boxes, scale_boxes

NMS_TYPES = ("fast", "cross_class", "traditional")
CROPS = ("output", "prototype", "none")
BOX_ROUNDINGS = ("int", "float")


class Candidates(NamedTuple):
    """m candidate anchors of one image."""

    boxes: Tensor  # (m, 4) x1, y1, x2, y2, relative, not clipped
    scores: Tensor  # (C, m) probabilities of all classes
    anchors: Tensor  # (m,) int64, ascending


class BoxDetections(NamedTuple):
    """M detections of one image without masks, by descending score."""

    boxes: Tensor  # (M, 4) x1, y1, x2, y2, relative, not clipped
    scores: Tensor  # (M,)
    classes: Tensor  # (M,) int64, without background
    anchors: Tensor  # (M,) int64 index of the anchor


@dataclass(kw_only=True)
class YOLACTDetector:
    """Score threshold, non-maximum suppression (see ``layers.box_nms``), masks, output boxes.

    Attributes:
        score_threshold: anchors whose best class has a higher probability are candidates; in
            traditional NMS, each class has its own candidates.
        nms_type: "fast" (Fast NMS within each class), "cross_class" (Fast NMS across classes, each
            candidate under its best) or "traditional" (greedy NMS within each class).
        nms_threshold: IoU of two detections above which the worse one is dropped.
        top_k: in both kinds of Fast NMS, the number of best candidates (of each class) that take
            part.
        max_detections: limit for all classes together; as published, not for "cross_class".
        crop, box_rounding: one of CROPS, one of BOX_ROUNDINGS; see config.py.

    Raises:
        ValueError: an option has an unsupported value.
    """

    score_threshold: float = 0.05
    nms_type: str = "fast"
    nms_threshold: float = 0.5
    top_k: int = 200
    max_detections: int = 100
    crop: str = "output"
    box_rounding: str = "int"

    def __post_init__(self) -> None:
        check_choice("nms_type", self.nms_type, NMS_TYPES)
        check_choice("crop", self.crop, CROPS)
        check_choice("box_rounding", self.box_rounding, BOX_ROUNDINGS)
        check_at_least(1, top_k=self.top_k, max_detections=self.max_detections)
        check_fractions(score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)

    def __call__(
        self,
        outputs: YOLACTOutputs,
        image: int,
        image_size: tuple[int, int],
        padded_size: tuple[int, int],
        mask_rater: MaskRater | None = None,
    ) -> Instances:
        """One image's instances in the frame of the input, with soft masks.

        Args:
            outputs, image: outputs of the network, and index of the image in the batch.
            image_size, padded_size: height and width of the input without and with padding.
            mask_rater: for YOLACT++ only; adds ``mask_scores``.
        """
        offsets, logits = outputs.box_offsets[image], outputs.class_logits[image]
        with record_function("solo_d2.nms"):
            candidates = self.candidates(offsets, logits, outputs.anchors)
            found = self.suppress_boxes(candidates, unit=max(padded_size))
        boxes = found.boxes * max(padded_size)
        result = Instances(image_size, pred_boxes=Boxes(boxes))
        result.scores, result.pred_classes = found.scores, found.classes
        prototypes = outputs.prototypes[image]
        coefficients = outputs.coefficients[image][found.anchors]
        with record_function("solo_d2.masks"):
            result.pred_masks, ious = self.soft_masks(
                boxes, found.classes, prototypes, coefficients, padded_size, mask_rater
            )
        if ious is not None:
            result.mask_scores = result.scores * ious
        return result

    def candidates(self, offsets: Tensor, logits: Tensor, anchors: Tensor) -> Candidates:
        """The anchors whose best class exceeds the score threshold.

        Args:
            offsets: (P, 4).
            logits: (P, C + 1), background first.
            anchors: (P, 4).
        """
        scores = logits.softmax(dim=1)[:, 1:]
        boxes = decode(offsets, anchors)
        # NaN is never above the threshold
        chosen = (scores.amax(dim=1) > self.score_threshold) & boxes.isfinite().all(dim=1)
        index = chosen.nonzero()[:, 0]
        return Candidates(boxes[index], scores[index].T, index)

    def suppress_boxes(self, found: Candidates, *, unit: int) -> BoxDetections:
        """Non-maximum suppression; ``unit`` is the number of pixels per unit of the boxes."""
        boxes, scores = found.boxes, found.scores
        limits: dict[str, Any] = {
            "iou_threshold": self.nms_threshold,
            "max_detections": self.max_detections,
        }
        if self.nms_type == "fast":
            kept = fast_nms(boxes, scores, top_k=self.top_k, **limits)
        elif self.nms_type == "cross_class":
            kept = cross_class_fast_nms(
                boxes, scores, top_k=self.top_k, iou_threshold=self.nms_threshold
            )
        else:
            kept = traditional_nms(
                boxes * unit, scores, score_threshold=self.score_threshold, **limits
            )
        index = kept.index
        return BoxDetections(found.boxes[index], kept.scores, kept.classes, found.anchors[index])

    def soft_masks(
        self,
        boxes: Tensor,
        classes: Tensor,
        prototypes: Tensor,
        coefficients: Tensor,
        padded_size: tuple[int, int],
        mask_rater: MaskRater | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Soft masks at the size of the prototypes, and the IoU that the mask rater predicts.

        With crop "output" the masks are not cropped yet, but the mask rater sees them cropped.

        Args:
            boxes: (M, 4) in pixels of the padded input.
            classes: (M,).
            prototypes: (h, w, K).
            coefficients: (M, K).
            padded_size, mask_rater: see ``__call__``.

        Returns:
            (M, h, w) in 0 to 1, and (M,) or, without a mask rater, None.
        """
        with torch.autocast(boxes.device.type, enabled=False):
            masks = assemble_masks(prototypes, coefficients)
            cropped = masks
            if self.crop == "prototype" or (self.crop == "output" and mask_rater is not None):
                size = (prototypes.shape[0], prototypes.shape[1])
                cropped = masks * inside_boxes(scale_boxes(boxes, padded_size, size), size)
            soft = masks if self.crop == "output" else cropped
            if mask_rater is None:
                return soft, None
            return soft, mask_rater(cropped).gather(1, classes[:, None])[:, 0]

    def postprocess(
        self,
        instances: Instances,
        output_size: tuple[int, int],
        padded_size: tuple[int, int],
        mask_threshold: float,
    ) -> Instances:
        """Bring the result of a call to the output frame and drop instances with an empty box."""
        boxes = output_boxes(
            instances.pred_boxes.tensor,
            instances.image_size,
            output_size,
            rounding=self.box_rounding,
        )
        # the original drops boxes without area from its COCO json; comparing sides also drops
        # boxes with two negative sides
        visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
        instances, boxes = instances[visible], boxes[visible]
        masks = upsample_to_binary(
            instances.pred_masks,
            padded_size=padded_size,
            image_size=instances.image_size,
            output_size=output_size,
            threshold=mask_threshold,
            direct=True,
            windows=pixel_windows(boxes) if self.crop == "output" else None,
        )
        result = Instances(output_size, **instances.get_fields())
        result.pred_masks = masks
        result.pred_boxes = Boxes(boxes)
        return result


def output_boxes(
    boxes: Tensor, image_size: tuple[int, int], output_size: tuple[int, int], *, rounding: str
) -> Tensor:
    """Boxes in the output frame, as published.

    Each side is clipped at one end only, so the ends of a box outside the image are swapped.

    Args:
        boxes: (M, 4) in pixels of the network's input; ends in any order.
        image_size: height and width of the input without padding.
        output_size: height and width of the output.
        rounding: "int" drops fractions, "float" keeps them.

    Returns:
        (M, 4) float32 in pixels of the output.
    """
    x = boxes[:, 0::2] / image_size[1] * output_size[1]
    y = boxes[:, 1::2] / image_size[0] * output_size[0]
    x1, y1 = x.amin(dim=1).clamp(min=0), y.amin(dim=1).clamp(min=0)
    x2, y2 = x.amax(dim=1).clamp(max=output_size[1]), y.amax(dim=1).clamp(max=output_size[0])
    result = torch.stack([x1, y1, x2, y2], dim=1)
    return result.trunc() if rounding == "int" else result


def pixel_windows(boxes: Tensor) -> Tensor:
    """(M, 4) boxes -> int64 x1, y1, x2, y2 of the pixels whose centers lie inside."""
    return (boxes - 0.5).ceil().long()
