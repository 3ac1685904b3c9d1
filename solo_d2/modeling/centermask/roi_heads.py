"""CenterMask's second half: masks for the boxes of FCOS, and the quality of these masks."""

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROIHeads, build_mask_head
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.structures.boxes import pairwise_iou
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from solo_d2.layers.distributed import normalizer
from solo_d2.layers.upload import upload

from ..num_classes import resolve_num_classes, write_num_classes
from ..options import check_choice
from ..prepare import prepare
from .fcos import features_by_name
from .keypoints import KeypointBranch
from .mask_iou import MaskIoUHead, crop_masks, mask_iou_targets, visible_share
from .pooler import AdaptiveROIPooler


@ROI_HEADS_REGISTRY.register()
class CenterMaskROIHeads(ROIHeads):
    """Adds masks and keypoints to the detections of ``FCOSProposalGenerator``, which do not change.

    There is no box head. Without any head, the detections are passed through.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
        mask_in_features: list[str],
        mask_pooler: AdaptiveROIPooler | None = None,
        mask_head: nn.Module | None = None,
        mask_iou_head: nn.Module | None = None,
        keypoint_branch: KeypointBranch | None = None,
    ):
        """
        Args:
            num_classes: C.
            batch_size_per_image, positive_fraction, proposal_matcher, proposal_append_gt: the
                sampling of proposals, see ``ROIHeads``.
            mask_in_features: the features to pool from.
            mask_pooler: None for a mask head that takes the features themselves.
            mask_head: a mask head of Detectron2's kind; None for boxes only. If it has the method
                ``class_logits``, like ``SpatialAttentionMaskHead``, its loss is computed here;
                any other head computes its own.
            mask_iou_head: predicts the IoU of masks; None for no mask scores.
            keypoint_branch: None for no keypoints.

        Raises:
            ValueError: ``mask_iou_head`` is given and the mask head has no ``class_logits``.
        """
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_matcher=proposal_matcher,
            proposal_append_gt=proposal_append_gt,
        )
        self.has_class_logits = hasattr(mask_head, "class_logits")
        if mask_iou_head is not None and not self.has_class_logits:
            raise ValueError(
                "mask_iou_head needs a mask_head with the method class_logits, which "
                f"{type(mask_head).__name__} does not have; use SpatialAttentionMaskHead, or no "
                "mask_iou_head (MODEL.CENTERMASK.MASK_IOU_ON: False)"
            )
        # test-time augmentation turns it off while it looks for boxes
        self.mask_on = mask_head is not None
        self.mask_in_features = mask_in_features
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.mask_iou_head = mask_iou_head
        self.keypoint_branch = keypoint_branch
        prepare(self)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        num_classes = _num_classes(cfg)
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        options = {**super().from_config(cfg), "mask_in_features": names}
        if cfg.MODEL.KEYPOINT_ON:
            options["keypoint_branch"] = KeypointBranch.from_config(cfg, input_shape)
        if not cfg.MODEL.MASK_ON:
            return options
        shapes = features_by_name(input_shape, names, "MODEL.ROI_HEADS.IN_FEATURES")
        mask = cfg.MODEL.ROI_MASK_HEAD
        channels, size = shapes[0].channels, mask.POOLER_RESOLUTION
        check_choice("MODEL.ROI_MASK_HEAD.POOLER_TYPE", mask.POOLER_TYPE, ("ROIAlignV2", ""))
        if mask.POOLER_TYPE:
            options["mask_pooler"] = AdaptiveROIPooler(
                output_size=size,
                strides=[shape.stride for shape in shapes],
                criterion=cfg.MODEL.CENTERMASK.ASSIGN_CRITERION,
                sampling_ratio=mask.POOLER_SAMPLING_RATIO,
            )
            head_input = ShapeSpec(channels=channels, width=size, height=size)
        else:  # such as PointRend's head
            head_input = {name: input_shape[name] for name in names}
        options["mask_head"] = build_mask_head(cfg, head_input)
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
            features: the backbone's features.
            proposals: results of ``FCOSProposalGenerator``, per image.
            targets: for training, with ``gt_boxes``, ``gt_classes`` and what the heads learn:
                ``gt_masks`` (PolygonMasks or BitMasks), ``gt_keypoints``. An image without objects
                has neither.

        Returns:
            Training: the sampled proposals and the losses of the heads. Inference: the results of
            ``forward_with_given_boxes`` and no losses.
        """
        if not self.training:
            return self.forward_with_given_boxes(features, proposals), {}
        if not self.mask_on and self.keypoint_branch is None:
            return proposals, {}
        proposals = self.label_and_sample_proposals(proposals, targets)
        losses = self.mask_losses(features, proposals, targets) if self.mask_on else {}
        if self.keypoint_branch is not None:
            losses |= self.keypoint_branch.losses(features, proposals, targets)
        return proposals, losses

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Add masks and keypoints to boxes, such as those that test-time augmentation has merged.

        Args:
            features: the backbone's features.
            instances: with ``pred_boxes`` in input pixels and ``pred_classes``.

        Returns:
            The same with soft ``pred_masks`` (n, 1, 2 S, 2 S) in the boxes and, if they have
            ``scores`` and the IoU is predicted, ``mask_scores``, by which masks are ranked; and
            with ``pred_keypoints`` (n, K, 3).
        """
        if self.keypoint_branch is not None:
            instances = self.keypoint_branch(features, instances)
        if not self.mask_on:
            return instances
        pooled = self.pool(features, [x.pred_boxes for x in instances], instances)
        results = [Instances(x.image_size, **x.get_fields()) for x in instances]
        if not self.has_class_logits:
            return self.mask_head(pooled, results)
        classes = torch.cat([x.pred_classes for x in instances])
        probs = self.mask_head.class_logits(pooled, classes).float().sigmoid()
        counts = [len(x) for x in instances]
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
    ) -> Tensor | dict[str, Tensor]:
        """Input of the mask head: by default (R, channels, S, S) for the boxes of all images."""
        levels = {name: features[name] for name in self.mask_in_features}
        if self.mask_pooler is None:
            return levels
        return self.mask_pooler([*levels.values()], boxes, [x.image_size for x in instances])

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """The proposals that fit an object, of each image a limited number at random.

        Unlike Detectron2's, it omits the background, which no head learns, and waits for the device
        once, not several times per image. The matcher waits once more.

        Returns:
            Per image, with ``gt_classes`` and ``gt_index``, a list with the object of each.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        objects = Boxes.cat([x.gt_boxes for x in targets])
        boxes = Boxes.cat([x.proposal_boxes for x in proposals])
        blocks = [torch.ones(len(x), len(y)) for x, y in zip(targets, proposals)]
        same_image = upload(torch.block_diag(*blocks), boxes.device)
        owner, label = self.proposal_matcher(pairwise_iou(objects, boxes) * same_image)
        owner_of, label_of = torch.stack([owner, label.to(owner)]).tolist()
        pairs = [(p, o) for p, (o, fits) in enumerate(zip(owner_of, label_of)) if fits == 1]

        limit = int(self.batch_size_per_image * self.positive_fraction)
        sampled = []
        first = first_object = 0
        for found, target in zip(proposals, targets):
            ours = [(p - first, o - first_object) for p, o in pairs if 0 <= p - first < len(found)]
            if len(ours) > limit:
                ours = [ours[i] for i in torch.randperm(len(ours))[:limit]]
            first, first_object = first + len(found), first_object + len(target)
            # a list as an index would be uploaded for each field, and each time waited for
            rows = upload(torch.tensor(ours, dtype=torch.long).view(-1, 2), boxes.device)
            found = found[rows[:, 0]]
            found.gt_classes, found.gt_index = target.gt_classes[rows[:, 1]], [o for _, o in ours]
            sampled.append(found)
        if has_event_storage():
            mean = sum(map(len, sampled)) / len(sampled)
            get_event_storage().put_scalar("roi_head/num_fg_samples", mean)
        return sampled

    def mask_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses of the masks and of their predicted IoUs; all proposals are of objects."""
        pooled = self.pool(features, [x.proposal_boxes for x in proposals], proposals)
        if not self.has_class_logits:
            for proposal, masks in zip(proposals, _masks_of(proposals, targets)):
                if masks is not None:
                    proposal.gt_masks = masks[proposal.gt_index]
            return self.mask_head(pooled, proposals)
        classes = torch.cat([x.gt_classes for x in proposals])
        logits = self.mask_head.class_logits(pooled, classes).float()
        with torch.no_grad(), record_function("solo_d2.mask_targets"):
            masks, visible = self.mask_targets(proposals, targets, logits.shape[-1])
        # without any mask, this is a zero that still reaches every parameter
        loss = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="sum")
        num_pixels = normalizer(logits.new_full((), masks.numel()))
        losses = {"loss_mask": self.mask_head.loss_weight * loss / num_pixels}
        if self.mask_iou_head is None:
            return losses

        iou = mask_iou_targets(logits > 0, masks, visible)
        predicted = _of_class(self.mask_iou_head(pooled, logits.sigmoid()), classes)
        positive = iou > 0
        loss = (0.5 * (predicted - iou) ** 2 * positive).sum()
        losses["loss_maskiou"] = loss / normalizer(positive.sum())
        return losses

    def mask_targets(
        self, proposals: list[Instances], targets: list[Instances], size: int
    ) -> tuple[Tensor, Tensor]:
        """Objects in their boxes (R, size, size) bool, and the share of each that is inside (R,).

        Raises:
            ValueError: an image has objects without masks.
        """
        boxes = torch.cat([x.proposal_boxes.tensor for x in proposals])
        corners = np.array(boxes.tolist(), dtype=np.float32).reshape(-1, 4)
        crops = [boxes.new_zeros((0, size, size), dtype=torch.bool)]
        visible = [boxes.new_zeros(0)]
        for proposal, masks in zip(proposals, _masks_of(proposals, targets)):
            ours, corners = np.split(corners, [len(proposal)])
            if masks is not None:
                crops.append(upload(crop_masks(masks, proposal.gt_index, ours, size), boxes.device))
                visible.append(upload(visible_share(masks, proposal.gt_index, ours), boxes.device))
        return torch.cat(crops), torch.cat(visible)


def _masks_of(
    proposals: list[Instances], targets: list[Instances]
) -> list[PolygonMasks | BitMasks | None]:
    """Masks of the objects of each image, None for an image without proposals."""
    if any(len(x) and not target.has("gt_masks") for x, target in zip(proposals, targets)):
        raise ValueError(
            "training masks needs instances with 'gt_masks'; without masks in the data, set "
            "MODEL.MASK_ON to False"
        )
    return [target.gt_masks if len(x) else None for x, target in zip(proposals, targets)]


def _num_classes(cfg) -> int:
    """The number of classes of FCOS, which also replaces -1 in MODEL.ROI_HEADS.NUM_CLASSES.

    Raises:
        ValueError: MODEL.ROI_HEADS.NUM_CLASSES is a different number.
    """
    num_classes = resolve_num_classes(cfg, "MODEL.FCOS.NUM_CLASSES")
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1:
        write_num_classes(cfg, num_classes)
    configured = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if configured != num_classes:
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {configured}, but FCOS has {num_classes} classes; "
            "set it to -1 to use that number"
        )
    return num_classes


def _of_class(predictions: Tensor, classes: Tensor) -> Tensor:
    """(R, C) -> (R,) float32."""
    return predictions.float().gather(1, classes[:, None])[:, 0]
