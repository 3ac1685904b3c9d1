"""CenterMask and FCOS as graphs."""

import math
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from solo_d2.errors import UserError
from solo_d2.modeling import CenterMaskROIHeads, FCOSProposalGenerator
from solo_d2.modeling.centermask.head import FCOSOutputs
from solo_d2.modeling.centermask.inference import SelectedBoxes, boxes_at, logit
from solo_d2.modeling.centermask.pooler import MAX_REACH, assign_by_ratio

from .graph import Graph, best_first


class CenterMaskGraph(Graph):
    """Eager and graph agree unless boxes beyond the limit have the last one's score."""

    input_names = ("image", "image_size")
    architecture = "CenterMask"
    model: GeneralizedRCNN

    def __init__(self, model: GeneralizedRCNN):
        """
        Raises:
            UserError: the model is none of FCOS and CenterMask, or has a part that cannot be
                exported.
        """
        detector, heads = model.proposal_generator, model.roi_heads
        for part, known in ((detector, FCOSProposalGenerator), (heads, CenterMaskROIHeads)):
            if not isinstance(part, known):
                raise UserError(
                    f"a GeneralizedRCNN with {type(part).__name__} cannot be exported here: only "
                    f"CenterMask and FCOS, with {known.__name__}, can; for Detectron2's own models "
                    "see its tools/deploy/export_model.py"
                )
        if isinstance(model, PanopticFPN) or heads.keypoint_branch is not None:
            raise UserError(
                "panoptic segmentation and keypoints cannot be exported: only boxes and masks can"
            )
        if heads.mask_on and (heads.mask_pooler is None or not heads.has_class_logits):
            raise UserError(
                f"the mask head {type(heads.mask_head).__name__} cannot be exported; set "
                "MODEL.ROI_MASK_HEAD.NAME to 'SpatialAttentionMaskHead'"
            )
        if not detector.max_detections:
            raise UserError("TEST.DETECTIONS_PER_IMAGE must be positive for an export, not 0")
        super().__init__(model)
        self.detector, self.heads = detector, heads
        self.limit = min(detector.max_detections, detector.pre_nms_topk * len(detector.strides))
        names = ["boxes", "scores", "classes", "locations", "valid"]
        if heads.mask_on:
            names.append("masks")
            if heads.mask_iou_head is not None:
                names.append("mask_scores")
        self.output_names = tuple(names)

    def options(self) -> dict[str, Any]:
        return {"candidates": self.detector.pre_nms_topk}

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: see ``Graph``.
            image_size: (2,) int64 height and width without padding.

        Returns:
            boxes (D, 4) in input pixels, scores (D,), classes (D,), locations (D, 2), valid (D,)
            bool and, if the model has masks, soft masks in the boxes (D, 2 S, 2 S) and, if it rates
            them, mask scores (D,).
        """
        features = self.model.backbone(self.normalized(image))
        found, valid = self.detect(self.detector.dense(features))
        results = [*found, valid]
        if self.heads.mask_on:
            results += self.masks(features, found, image_size)
        return tuple(results)

    def detect(self, outputs: FCOSOutputs) -> tuple[SelectedBoxes, Tensor]:
        """``select_boxes`` with a fixed number of results, and which of them are valid."""
        levels = [
            self.best_of_level(logits[0], distances[0], centerness[0], stride)
            for logits, distances, centerness, stride in zip(*outputs, self.detector.strides)
        ]
        found = SelectedBoxes(*map(torch.cat, zip(*(level for level, _ in levels))))
        valid = torch.cat([valid for _, valid in levels])
        if self.detector.nms_threshold > 0:
            keep, valid = self.suppress(found, valid)
        else:
            keep = best_first(found.scores, valid, self.limit)
            valid = valid[keep]
        return SelectedBoxes(*(field[keep] for field in found)), valid

    def best_of_level(
        self, class_logits: Tensor, distances: Tensor, centerness: Tensor, stride: int
    ) -> tuple[SelectedBoxes, Tensor]:
        """The best pairs of location and class, in the order of their indices as eager's."""
        threshold, topk = self.detector.score_threshold_test, self.detector.pre_nms_topk
        classes, height, width = class_logits.shape
        logits = class_logits.flatten(1).T  # (locations, C)
        product = logits.float().sigmoid() * centerness.flatten()[:, None].float().sigmoid()
        above = logits > logit(threshold)
        if self.detector.threshold_with_centerness:
            above = above & (product > threshold)
        scores = product.where(above, -1).flatten()
        # a level may have fewer pairs
        pair = F.pad(scores, (0, topk), value=-1.0).topk(topk).indices.sort().values
        pair = pair.clamp(max=height * width * classes - 1)
        scores = F.pad(scores, (0, topk), value=-1.0)[pair]
        valid = scores >= 0
        boxes, points = boxes_at(pair // classes, distances, width=width, stride=stride)
        boxes = boxes.where(valid[:, None], boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
        return SelectedBoxes(boxes, scores.clamp(min=0).sqrt(), pair % classes, points), valid

    def suppress(self, found: SelectedBoxes, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(D,) indices of the boxes that NMS keeps, best first, and (D,) which are valid.

        Each class is moved to a field of its own in a square of fields, which rounds less than
        fields in a row. So is what is not valid, together, and D boxes that do not overlap, worse
        than all others: there are always D results.
        """
        side = math.ceil(math.sqrt(self.detector.num_classes + 2))
        size = found.boxes.max() - found.boxes.min() + 1
        field = found.classes.where(valid, self.detector.num_classes)
        offset = torch.stack([field % side, field // side], dim=1) * size
        last = size * side + 2 * torch.arange(self.limit, device=size.device)
        extra = torch.stack([last, last, last + 1, last + 1], dim=1)
        boxes = torch.cat([found.boxes + offset.repeat(1, 2), extra])
        scores = torch.cat([found.scores.where(valid, -1), extra.new_full((self.limit,), -2)])
        keep = nms(boxes, scores, self.detector.nms_threshold)
        torch._check(keep.shape[0] >= self.limit)
        keep = keep[: self.limit]
        valid = F.pad(valid, (0, self.limit))[keep]
        return keep.clamp(max=len(found.scores) - 1), valid

    def masks(
        self, features: dict[str, Tensor], found: SelectedBoxes, image_size: Tensor
    ) -> list[Tensor]:
        """As ``CenterMaskROIHeads.forward_with_given_boxes``."""
        pooled = self.pool(features, found.boxes, image_size)
        probs = self.heads.mask_head.class_logits(pooled, found.classes).float().sigmoid()
        if self.heads.mask_iou_head is None:
            return [probs]
        ious = self.heads.mask_iou_head(pooled, probs).float()
        return [probs, found.scores * ious.gather(1, found.classes[:, None])[:, 0]]

    def pool(self, features: dict[str, Tensor], boxes: Tensor, image_size: Tensor) -> Tensor:
        """(D, channels, S, S): from every level for all boxes, then the right ones."""
        pooler = self.heads.mask_pooler
        limit = (MAX_REACH * image_size.max()).to(boxes.dtype)
        boxes = boxes.clamp(-limit, limit)
        if pooler.criterion == "area":
            level_of = pooler.assign([Boxes(boxes)], [])
        else:
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            level_of = assign_by_ratio(
                areas,
                image_size.prod().expand(len(areas)),
                min_level=pooler.min_level,
                max_level=pooler.max_level,
            )
        rois = F.pad(boxes, (1, 0))  # all of image 0
        pooled = boxes.new_zeros(())
        for level, (name, align) in enumerate(zip(self.heads.mask_in_features, pooler.aligns)):
            of_level = (level_of == level)[:, None, None, None]
            pooled = torch.where(of_level, align(features[name].float(), rois), pooled)
        return pooled
