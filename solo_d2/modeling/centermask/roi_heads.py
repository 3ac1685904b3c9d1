"""CenterMask's second half: masks, and how good they are, for the boxes of FCOS."""

from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import ROIHeads, build_mask_head, select_foreground_proposals
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from solo_d2.layers.distributed import normalizer

from ..num_classes import resolve_num_classes
from .mask_head import class_mask_logits
from .mask_iou import MaskIoUHead, crop_masks, mask_iou_targets, visible_share
from .pooler import AdaptiveROIPooler


@ROI_HEADS_REGISTRY.register()
class CenterMaskROIHeads(ROIHeads):
    """Masks for the detections of ``FCOSProposalGenerator``, which stay as they are.

    There is no box head. Without a mask head the detections are passed through.
    """

    @configurable
    def __init__(
        self,
        *,
        mask_in_features: list[str],
        mask_pooler: AdaptiveROIPooler | None = None,
        mask_head: nn.Module | None = None,
        mask_iou_head: nn.Module | None = None,
        mask_iou_loss_weight: float = 1.0,
        clip_boxes: bool = False,
        **options,
    ):
        """
        Args:
            mask_in_features: features that are pooled from.
            mask_pooler, mask_head: any of Detectron2's mask heads; None for boxes alone.
            mask_iou_head: predicts how good masks are; None for no such scores.
            mask_iou_loss_weight: a factor.
            clip_boxes: clip boxes to the image first.
            options: see ``ROIHeads``.
        """
        super().__init__(**options)
        # test-time augmentation turns it off while it looks for boxes
        self.mask_on = mask_head is not None
        self.mask_in_features = mask_in_features
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.mask_iou_head = mask_iou_head
        self.mask_iou_loss_weight = mask_iou_loss_weight
        self.clip_boxes = clip_boxes

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes = _num_classes(cfg)
        options = {
            **super().from_config(cfg),
            "mask_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "clip_boxes": cfg.MODEL.CENTERMASK.CLIP_BOXES,
            "mask_iou_loss_weight": cfg.MODEL.CENTERMASK.MASK_IOU_LOSS_WEIGHT,
        }
        if not cfg.MODEL.MASK_ON:
            return options
        for name in options["mask_in_features"]:
            if name not in input_shape:
                raise ValueError(f"the backbone has no feature {name!r}, only {[*input_shape]}")
        shapes = [input_shape[name] for name in options["mask_in_features"]]
        channels, size = shapes[0].channels, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        options["mask_pooler"] = AdaptiveROIPooler(
            criterion=cfg.MODEL.CENTERMASK.ASSIGN_CRITERION,
            output_size=size,
            scales=[1 / shape.stride for shape in shapes],
            sampling_ratio=cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
            pooler_type=cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE,
        )
        options["mask_head"] = build_mask_head(
            cfg, ShapeSpec(channels=channels, width=size, height=size)
        )
        if cfg.MODEL.CENTERMASK.MASK_IOU_ON:
            options["mask_iou_head"] = MaskIoUHead(
                in_channels=channels,
                in_size=size,
                num_classes=num_classes,
                num_conv=cfg.MODEL.CENTERMASK.MASK_IOU_NUM_CONV,
                conv_dim=cfg.MODEL.CENTERMASK.MASK_IOU_CONV_DIM,
                fc_dim=cfg.MODEL.CENTERMASK.MASK_IOU_FC_DIM,
            )
        return options

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: not used.
            features: of the backbone.
            proposals: results of ``FCOSProposalGenerator``, per image.
            targets: for training, with ``gt_boxes``, ``gt_classes`` and ``gt_masks`` (PolygonMasks
                or BitMasks; an image without objects has none).

        Returns:
            Training: the proposals that were sampled, and the losses of the masks. Inference: see
            ``forward_with_given_boxes``, and no losses.
        """
        if not self.training:
            return self.forward_with_given_boxes(features, proposals), {}
        if not self.mask_on:
            return proposals, {}
        if self.clip_boxes:
            proposals = [_clipped(x, "proposal_boxes") for x in proposals]
        proposals = self.label_and_sample_proposals(proposals, targets)
        return proposals, self.mask_losses(features, proposals, targets)

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Add masks to boxes, for instance those that test-time augmentation has merged.

        Args:
            features: of the backbone.
            instances: with ``pred_boxes`` in input pixels and ``pred_classes``.

        Returns:
            The same with soft ``pred_masks`` (n, 1, s, s) in the boxes and, if they have ``scores``
            and the IoU of masks is predicted, ``mask_scores``: what masks are ranked by.
        """
        if not self.mask_on:
            return instances
        if self.clip_boxes:
            instances = [_clipped(x, "pred_boxes") for x in instances]
        boxes = [x.pred_boxes for x in instances]
        pooled = self.pool(features, boxes, instances)
        classes = torch.cat([x.pred_classes for x in instances])
        probs = class_mask_logits(self.mask_head, pooled, classes).float().sigmoid()
        counts = [len(x) for x in instances]
        results = [Instances(x.image_size, **x.get_fields()) for x in instances]
        for result, image_probs in zip(results, probs.split(counts)):
            result.pred_masks = image_probs[:, None]
        if self.mask_iou_head is not None:
            ious = _of_class(self.mask_iou_head(pooled, probs), classes)
            for result, image_ious in zip(results, ious.split(counts)):
                if result.has("scores"):
                    result.mask_scores = result.scores * image_ious
        return results

    def pool(
        self, features: dict[str, Tensor], boxes: list[Boxes], instances: list[Instances]
    ) -> Tensor:
        """(n, C, s, s) features of the boxes of all images."""
        levels = [features[name] for name in self.mask_in_features]
        return self.mask_pooler(levels, boxes, [x.image_size for x in instances])

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """As Detectron2's, but of masks only the number is given to a proposal, as ``gt_index``."""
        without_masks = [
            Instances(
                x.image_size,
                gt_boxes=x.gt_boxes,
                gt_classes=x.gt_classes,
                gt_index=torch.arange(len(x), device=x.gt_classes.device),
            )
            for x in targets
        ]
        return super().label_and_sample_proposals(proposals, without_masks)

    def mask_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses of the masks and of their predicted IoU, over the foreground of the batch."""
        proposals, _ = select_foreground_proposals(proposals, self.num_classes)
        pooled = self.pool(features, [x.proposal_boxes for x in proposals], proposals)
        classes = torch.cat([x.gt_classes for x in proposals])
        logits = class_mask_logits(self.mask_head, pooled, classes).float()
        with torch.no_grad(), record_function("solo_d2.mask_targets"):
            masks, visible = self.mask_targets(proposals, targets, logits.shape[-1])
        # of no mask at all this is a zero that still reaches every parameter
        loss = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="sum")
        num_pixels = normalizer(torch.tensor(masks.numel(), device=logits.device))
        losses = {"loss_mask": self.mask_head.loss_weight * loss / num_pixels}
        if self.mask_iou_head is None:
            return losses

        iou = mask_iou_targets(logits > 0, masks, visible)
        predicted = _of_class(self.mask_iou_head(pooled, logits.sigmoid()), classes)
        positive = iou > 0
        loss = (0.5 * (predicted - iou) ** 2 * positive).sum() / normalizer(positive.sum())
        losses["loss_maskiou"] = self.mask_iou_loss_weight * loss
        if has_event_storage() and len(iou):
            get_event_storage().put_scalar("centermask/mask_iou", iou.mean().item())
        return losses

    def mask_targets(
        self, proposals: list[Instances], targets: list[Instances], size: int
    ) -> tuple[Tensor, Tensor]:
        """Objects in their boxes (n, size, size) bool, and the share of each that is in (n,).

        Raises:
            ValueError: an image has objects without masks.
        """
        boxes = [x.proposal_boxes.tensor for x in proposals]
        masks = [boxes[0].new_zeros((0, size, size), dtype=torch.bool)]
        visible = [boxes[0].new_zeros(0)]
        for proposal, target, box in zip(proposals, targets, boxes):
            if len(proposal) == 0:
                continue
            if not target.has("gt_masks"):
                raise ValueError("training masks needs instances with 'gt_masks'")
            masks.append(crop_masks(target.gt_masks, proposal.gt_index, box, size))
            visible.append(visible_share(target.gt_masks, proposal.gt_index, box))
        return torch.cat(masks), torch.cat(visible)


def _num_classes(cfg) -> int:
    """What FCOS has.

    Raises:
        ValueError: MODEL.ROI_HEADS.NUM_CLASSES is another number.
    """
    num_classes = resolve_num_classes(cfg, "MODEL.FCOS.NUM_CLASSES")
    configured = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if configured not in (-1, num_classes):
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {configured}, but FCOS has {num_classes} classes; "
            "set it to -1 to take that number over"
        )
    return num_classes


def _clipped(instances: Instances, field: str) -> Instances:
    """The same with boxes clipped to the image."""
    boxes = instances.get(field).clone()
    boxes.clip(instances.image_size)
    return Instances(instances.image_size, **{**instances.get_fields(), field: boxes})


def _of_class(predictions: Tensor, classes: Tensor) -> Tensor:
    """(n, C) -> (n,) float32."""
    return predictions.float().gather(1, classes[:, None])[:, 0]
