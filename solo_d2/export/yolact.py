"""YOLACT and YOLACT++ as graphs."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from solo_d2.errors import UserError
from solo_d2.layers.box_nms import Kept, not_overlapped
from solo_d2.layers.resample import resize
from solo_d2.layers.symbolic import larger
from solo_d2.modeling import YOLACT
from solo_d2.modeling.yolact.anchors import decode

from .graph import Graph, best_first


class YOLACTGraph(Graph):
    """Where the model resizes its own input, the graph does: it takes images of any size."""

    architecture = "YOLACT"
    model: YOLACT

    def __init__(self, model: YOLACT):
        """
        Raises:
            UserError: the model has a part that cannot be exported.
        """
        detector = model.detector
        if detector.nms_type == "traditional":
            raise UserError(
                "MODEL.YOLACT.NMS_TYPE 'traditional' cannot be exported: greedy NMS of each class "
                "has no fixed number of boxes; set it to 'fast' or 'cross_class'"
            )
        super().__init__(model)
        self.top_k = detector.top_k
        limit = detector.max_detections
        if detector.nms_type == "cross_class":
            limit = self.top_k
        else:
            limit = min(limit, self.top_k * model.head.num_classes)
        self.limit = limit
        self.padding = -model.input_size % max(1, model.backbone.size_divisibility)
        names = ("boxes", "scores", "classes", "masks", "valid")
        self.output_names = names if model.mask_iou_head is None else (*names, "mask_scores")

    @property
    def divisibility(self) -> int:
        return 1 if self.model.input_size else super().divisibility

    def options(self) -> dict[str, Any]:
        return {
            "input_size": self.model.input_size,
            "padded_side": self.model.input_size + self.padding,
            "mask_threshold": self.model.mask_threshold,
            "crop": self.model.detector.crop,
            "box_rounding": self.model.detector.box_rounding,
            "candidates": self.top_k,
        }

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Returns:
            boxes (D, 4) in pixels of the network's padded input, scores (D,), classes (D,), soft
            masks (D, h, w), valid (D,) bool and, in YOLACT++, mask scores (D,).
        """
        model, detector = self.model, self.model.detector
        x = self.network_input(image)
        outputs = model.dense(x)
        size = (x.shape[-2], x.shape[-1])
        scores = outputs.class_logits[0].softmax(dim=1)[:, 1:]
        boxes = decode(outputs.box_offsets[0], outputs.anchors)
        candidate = (scores.amax(dim=1) > detector.score_threshold) & boxes.isfinite().all(dim=1)
        boxes = boxes.where(candidate[:, None], 0)
        found = self.suppress(boxes, scores.T.where(candidate, -1))
        boxes = boxes[found.index] * larger(*size)
        masks, ious = detector.soft_masks(
            boxes,
            found.classes,
            outputs.prototypes[0],
            outputs.coefficients[0][found.index],
            size,
            model.mask_iou_head,
        )
        valid = found.scores >= 0
        results = [boxes, found.scores, found.classes, masks, valid]
        if ious is not None:
            results.append(found.scores * ious)
        return tuple(results)

    def network_input(self, image: Tensor) -> Tensor:
        """As ``YOLACT.preprocess_image``."""
        side = self.model.input_size
        if not side:
            return self.normalized(image)
        x = self.normalized(resize(image, (side, side)))
        return F.pad(x, (0, self.padding, 0, self.padding)) if self.padding else x

    def suppress(self, boxes: Tensor, scores: Tensor) -> Kept:
        """``fast_nms`` or ``cross_class_fast_nms`` with a fixed number of results.

        Args:
            boxes: (anchors, 4).
            scores: (C, anchors), negative for what is no candidate.

        Returns:
            D entries; those that are no detections have a score of -1.
        """
        detector = self.model.detector
        cross_class = detector.nms_type == "cross_class"
        labels = scores.argmax(dim=0)
        ranked = scores.amax(dim=0, keepdim=True) if cross_class else scores
        # there may be fewer anchors than top_k
        top, index = F.pad(ranked, (0, self.top_k), value=-1.0).topk(self.top_k, dim=1)
        index = index.clamp(max=boxes.shape[0] - 1)
        keep = not_overlapped(boxes, index, detector.nms_threshold) & (top >= 0)
        top, index = top.where(keep, -1).flatten(), index.flatten()
        best = best_first(top, top >= 0, self.limit)
        index = index[best]
        return Kept(index, labels[index] if cross_class else best // self.top_k, top[best])
