"""YOLACT (arXiv 1904.02689) and YOLACT++ (arXiv 1912.06218)."""

import logging
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torch.profiler import record_function

from solo_d2.layers.boxes import box_areas
from solo_d2.layers.distributed import normalizer
from solo_d2.layers.masks import upsample_to_binary

from ..num_classes import resolve_num_classes
from ..segmentor import GroundTruth, InstanceSegmentor
from . import losses
from .anchors import encode, level_scales, make_priors
from .head import YOLACTHead
from .inference import (
    BOX_ROUNDINGS,
    NMS_TYPES,
    Detections,
    find_candidates,
    output_boxes,
    pixel_windows,
    suppress,
)
from .mask_iou import MaskIoUHead
from .protonet import Protonet, assemble_masks, inside_boxes
from .pyramid import YOLACTPyramid, xavier_conv
from .targets import BACKGROUND, Matches, match, reduce_masks, semantic_target

CROPS = ("output", "prototype", "none")
# Objects that are not wider and higher than this, in pixels, would have no finite targets.
_MIN_BOX_SIZE = 1e-2


class YOLACTOutputs(NamedTuple):
    """Raw outputs for N images with P anchors, float32. C has no background."""

    box_offsets: Tensor  # (N, P, 4), see ``anchors.encode``
    class_logits: Tensor  # (N, P, C + 1), background first
    coefficients: Tensor  # (N, P, K) in -1 to 1
    prototypes: Tensor  # (N, h, w, K), not negative, over the padded input
    priors: Tensor  # (P, 4), see ``anchors.make_priors``
    finest: Tensor  # (N, D, h / 2, w / 2), the pyramid's


@META_ARCH_REGISTRY.register()
class YOLACT(InstanceSegmentor):
    """Masks as linear combinations of an image's prototypes, cropped with predicted boxes.

    Boxes are relative, see ``anchors``, but where Detectron2 sees them: there they are in pixels.
    """

    num_classes_key = "MODEL.YOLACT.NUM_CLASSES"

    @configurable
    def __init__(
        self,
        *,
        pyramid: YOLACTPyramid,
        head: YOLACTHead,
        protonet: Protonet,
        semantic_pred: nn.Module,
        mask_iou_head: MaskIoUHead | None = None,
        num_classes: int,
        anchors: dict[str, Any],
        matching: dict[str, Any],
        neg_pos_ratio: float = 3.0,
        masks_to_train: int = 100,
        mask_area_norm: bool = True,
        box_loss_weight: float = 1.5,
        class_loss_weight: float = 1.0,
        mask_loss_weight: float = 6.125,
        semantic_loss_weight: float = 1.0,
        mask_iou_loss_weight: float = 25.0,
        mask_iou_min_area: float = 25.0,
        mask_iou_detach: bool = False,
        rescore_boxes: bool = False,
        crop: str = "output",
        crop_padding: float = 1.0,
        freeze_bn: str = "",
        score_threshold: float = 0.05,
        suppression: dict[str, Any],
        min_score: float = 0.0,
        box_rounding: str = "int",
        **kwargs,
    ):
        """
        Args:
            pyramid, head, protonet, semantic_pred: the network beyond the backbone.
            mask_iou_head: of YOLACT++.
            num_classes: C, without background.
            anchors: keywords of ``make_priors``: scales, aspect_ratios, square.
            matching: keywords of ``match``: iou_thresholds, crowd_threshold.
            neg_pos_ratio: hard negatives of the class loss per positive anchor.
            masks_to_train: positive anchors per image in the mask loss; 0 for all.
            mask_area_norm: divide the mask loss of an instance by its box's area, rather than by
                the area of the prototypes.
            box_loss_weight, class_loss_weight, mask_loss_weight, semantic_loss_weight,
                mask_iou_loss_weight: factors.
            mask_iou_min_area: larger objects train the mask IoU, in pixels of the prototypes.
            mask_iou_detach: keep the gradient of the mask IoU from the masks.
            rescore_boxes: multiply ``scores`` with the mask IoU, not only ``mask_scores``.
            crop: one of CROPS, see config.py.
            crop_padding: of the crop at the size of the prototypes, in their pixels.
            freeze_bn: if not empty, keep the backbone's batch norms as they are; the reason, for
                the log.
            score_threshold: of candidates.
            suppression: keywords of ``inference.suppress``.
            min_score: of results; only higher ones are given.
            box_rounding: one of BOX_ROUNDINGS.
            kwargs: see ``InstanceSegmentor``.

        Raises:
            ValueError: an option is none of those that there are.
        """
        for key, value, known in (
            ("CROP", crop, CROPS),
            ("BOX_ROUNDING", box_rounding, BOX_ROUNDINGS),
            ("NMS_TYPE", suppression.get("nms_type", "fast"), NMS_TYPES),
        ):
            if value not in known:
                raise ValueError(
                    f"MODEL.YOLACT.{key} must be one of {', '.join(known)}, not {value!r}"
                )
        super().__init__(**kwargs)
        # the names are those of the parameters in checkpoints
        self.fpn = pyramid
        self.head = head
        self.protonet = protonet
        self.semantic_pred = semantic_pred
        self.mask_iou_head = mask_iou_head
        self.num_classes = num_classes
        self.anchors = anchors
        self.matching = matching
        self.neg_pos_ratio = neg_pos_ratio
        self.masks_to_train = masks_to_train
        self.mask_area_norm = mask_area_norm
        self.box_loss_weight = box_loss_weight
        self.class_loss_weight = class_loss_weight
        self.mask_loss_weight = mask_loss_weight
        self.semantic_loss_weight = semantic_loss_weight
        self.mask_iou_loss_weight = mask_iou_loss_weight
        self.mask_iou_min_area = mask_iou_min_area
        self.mask_iou_detach = mask_iou_detach
        self.rescore_boxes = rescore_boxes
        self.crop = crop
        self.crop_padding = crop_padding
        self.score_threshold = score_threshold
        self.suppression = suppression
        self.min_score = min_score
        self.box_rounding = box_rounding
        self.freeze_bn = freeze_bn if self._batch_norms() else ""
        if self.freeze_bn:
            for module in self._batch_norms():
                module.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        options = super().from_config(cfg)
        yolact = cfg.MODEL.YOLACT
        num_classes = resolve_num_classes(cfg, "MODEL.YOLACT.NUM_CLASSES")
        scales = level_scales(yolact.ANCHOR_SIZES, yolact.ANCHORS_PER_OCTAVE)
        images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        freeze_bn = ""
        if images < yolact.FREEZE_BN_BELOW:
            freeze_bn = (
                f"{images} images per process and step are fewer than "
                f"MODEL.YOLACT.FREEZE_BN_BELOW = {yolact.FREEZE_BN_BELOW}"
            )
        return {
            **options,
            "pyramid": YOLACTPyramid(
                options["backbone"].output_shape(),
                in_features=yolact.IN_FEATURES,
                out_channels=yolact.CONV_DIM,
                num_levels=len(scales),
                norm=yolact.NORM,
            ),
            "head": YOLACTHead(
                in_channels=yolact.CONV_DIM,
                num_anchors=yolact.ANCHORS_PER_OCTAVE * len(yolact.ANCHOR_ASPECT_RATIOS),
                num_classes=num_classes,
                num_masks=yolact.NUM_PROTOTYPES,
                predictor_gain=yolact.PREDICTOR_GAIN,
                norm=yolact.NORM,
            ),
            "protonet": Protonet(
                in_channels=yolact.CONV_DIM, num_masks=yolact.NUM_PROTOTYPES, norm=yolact.NORM
            ),
            "semantic_pred": xavier_conv(
                yolact.CONV_DIM, num_classes, 1, gain=yolact.PREDICTOR_GAIN
            ),
            "mask_iou_head": (
                MaskIoUHead(num_classes=num_classes) if yolact.MASK_IOU.ENABLED else None
            ),
            "num_classes": num_classes,
            "anchors": {
                "scales": scales,
                "aspect_ratios": yolact.ANCHOR_ASPECT_RATIOS,
                "square": yolact.SQUARE_ANCHORS,
            },
            "matching": {
                "iou_thresholds": tuple(yolact.IOU_THRESHOLDS),
                "crowd_threshold": yolact.CROWD_THRESH,
            },
            "neg_pos_ratio": yolact.NEG_POS_RATIO,
            "masks_to_train": yolact.MASKS_TO_TRAIN,
            "mask_area_norm": yolact.MASK_AREA_NORM,
            "box_loss_weight": yolact.BOX_LOSS_WEIGHT,
            "class_loss_weight": yolact.CLASS_LOSS_WEIGHT,
            "mask_loss_weight": yolact.MASK_LOSS_WEIGHT,
            "semantic_loss_weight": yolact.SEMANTIC_LOSS_WEIGHT,
            "mask_iou_loss_weight": yolact.MASK_IOU.LOSS_WEIGHT,
            "mask_iou_min_area": yolact.MASK_IOU.MIN_AREA,
            "mask_iou_detach": yolact.MASK_IOU.DETACH,
            "rescore_boxes": yolact.MASK_IOU.RESCORE_BOXES,
            "crop": yolact.CROP,
            "crop_padding": yolact.CROP_PADDING,
            "freeze_bn": freeze_bn,
            "score_threshold": yolact.SCORE_THRESH_TEST,
            "suppression": {
                "nms_type": yolact.NMS_TYPE,
                "iou_threshold": yolact.NMS_THRESH_TEST,
                "top_k": yolact.TOPK_CANDIDATES_TEST,
                "score_threshold": yolact.SCORE_THRESH_TEST,
                "class_score_threshold": yolact.CLASS_SCORE_THRESH_TEST,
                "limit_cross_class": yolact.LIMIT_CROSS_CLASS,
                "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            },
            "min_score": yolact.MIN_SCORE_TEST,
            "box_rounding": yolact.BOX_ROUNDING,
            "mask_threshold": yolact.MASK_THRESH_TEST,
        }

    def _batch_norms(self) -> list[nn.Module]:
        norm = nn.modules.batchnorm._BatchNorm
        return [module for module in self.backbone.modules() if isinstance(module, norm)]

    def train(self, mode: bool = True) -> "YOLACT":
        super().train(mode)
        if self.freeze_bn:
            for module in self._batch_norms():
                module.eval()
            if mode:
                message = f"The backbone's batch norms stay as they are: {self.freeze_bn}"
                log_first_n(logging.INFO, message, name=__name__, key="message")
        return self

    def predict(self, features: dict[str, Tensor], images: ImageList) -> YOLACTOutputs:
        """Raw outputs for the backbone's features."""
        with record_function("solo_d2.heads"):
            levels = self.fpn(features)
            offsets, logits, coefficients = self.head(levels)
            prototypes = self.protonet(levels[0])
            priors = make_priors(
                [tuple(level.shape[-2:]) for level in levels],
                tuple(images.tensor.shape[-2:]),
                device=offsets.device,
                **self.anchors,
            )
        return YOLACTOutputs(offsets, logits, coefficients, prototypes, priors, levels[0])

    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        outputs = self.predict(features, images)
        semantic_logits = self.semantic_pred(outputs.finest).float()
        named = self.output_losses(outputs, semantic_logits, ground_truth)
        # a feature that the pyramid leaves out is connected too: processes that train together
        # must have a gradient for every parameter
        idle = [x[:0].sum() for name, x in features.items() if name not in self.fpn.in_features]
        named["loss_class"] = named["loss_class"] + sum(idle)
        return named

    def output_losses(
        self, outputs: YOLACTOutputs, semantic_logits: Tensor, ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        """Named losses of raw outputs; ``semantic_logits`` are (N, C, h', w')."""
        ground_truth = [_without_degenerate(gt) for gt in ground_truth]
        with torch.no_grad(), record_function("solo_d2.assign"):
            matches = [self.match(gt, outputs.priors) for gt in ground_truth]
        labels = torch.stack([found.labels for found in matches])
        num_positive = (labels > BACKGROUND).sum()
        if has_event_storage():
            get_event_storage().put_scalar("yolact/positive_anchors", num_positive.item())
        # half precision ends here: areas, logarithms and probabilities near 0 and 1 follow
        with torch.autocast(self.device.type, enabled=False):
            class_loss = losses.class_loss(outputs.class_logits, labels, self.neg_pos_ratio)
            sums = {
                "loss_class": self.class_loss_weight * class_loss,
                "loss_box": self.box_loss_weight * self._box_loss(outputs, matches, ground_truth),
                **self._mask_losses(outputs, matches, ground_truth),
            }
            scale = normalizer(num_positive)
            named = {name: total / scale for name, total in sums.items()}
            semantic_loss = self._semantic_loss(semantic_logits, ground_truth)
            named["loss_semantic"] = self.semantic_loss_weight * semantic_loss
        return named

    def match(self, gt: GroundTruth, priors: Tensor) -> Matches:
        """Match the anchors with one image's objects."""
        unit = _unit(gt.masks.shape[-2:])
        return match(gt.boxes / unit, gt.classes, gt.crowd_boxes / unit, priors, **self.matching)

    def _box_loss(
        self, outputs: YOLACTOutputs, matches: list[Matches], ground_truth: list[GroundTruth]
    ) -> Tensor:
        """Sum over the positive anchors of all images."""
        total = outputs.box_offsets.new_zeros(())
        for offsets, found, gt in zip(outputs.box_offsets, matches, ground_truth):
            positive = found.labels > BACKGROUND
            boxes = gt.boxes[found.objects[positive]] / _unit(gt.masks.shape[-2:])
            targets = encode(boxes, outputs.priors[positive])
            total = total + losses.box_loss(offsets[positive], targets)
        return total

    def _mask_losses(
        self, outputs: YOLACTOutputs, matches: list[Matches], ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        """Sums over the positive anchors of all images: masks, and mask IoUs in YOLACT++."""
        h, w = outputs.prototypes.shape[1:3]
        mask_loss, iou_loss = outputs.prototypes.new_zeros(2).unbind()
        for i, (found, gt) in enumerate(zip(matches, ground_truth)):
            positive = (found.labels > BACKGROUND).nonzero()[:, 0]
            weight = 1.0
            if self.masks_to_train and len(positive) > self.masks_to_train:
                chosen = torch.randperm(len(positive), device=positive.device)
                weight = len(positive) / self.masks_to_train
                positive = positive[chosen[: self.masks_to_train]]
            objects = found.objects[positive]
            boxes = gt.boxes[objects] * _ratios(gt.masks.shape[-2:], (h, w), gt.boxes)
            masks = assemble_masks(outputs.prototypes[i], outputs.coefficients[i][positive])
            if self.crop != "none":
                masks = masks * inside_boxes(boxes, (h, w), padding=self.crop_padding)
            with torch.no_grad(), record_function("solo_d2.reduce"):
                truth = reduce_masks(gt.masks, (h, w))[objects]
            areas = box_areas(boxes) if self.mask_area_norm else h * w
            mask_loss = mask_loss + weight * losses.mask_loss(masks, truth, areas)
            if self.mask_iou_head is not None:
                iou_loss = iou_loss + self._mask_iou_loss(masks, truth, gt.classes[objects])
        named = {"loss_mask": self.mask_loss_weight * mask_loss}
        if self.mask_iou_head is not None:
            named["loss_mask_iou"] = self.mask_iou_loss_weight * iou_loss
        return named

    def _mask_iou_loss(self, masks: Tensor, truth: Tensor, classes: Tensor) -> Tensor:
        large = truth.sum(dim=(1, 2)) > self.mask_iou_min_area
        masks, truth, classes = masks[large], truth[large], classes[large]
        ious = losses.mask_ious(masks, truth)
        predicted = self.mask_iou_head(masks.detach() if self.mask_iou_detach else masks)
        return losses.mask_iou_loss(predicted.gather(1, classes[:, None])[:, 0], ious)

    def _semantic_loss(self, logits: Tensor, ground_truth: list[GroundTruth]) -> Tensor:
        """Mean over images."""
        total = logits.new_zeros(())
        size = tuple(logits.shape[-2:])
        for image, gt in zip(logits, ground_truth):
            with torch.no_grad():
                masks = reduce_masks(gt.masks, size)
                target = semantic_target(masks, gt.classes, self.num_classes)
            total = total + losses.semantic_loss(image, target)
        return total / len(logits)

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        outputs = self.predict(features, images)
        size = tuple(images.tensor.shape[-2:])
        results = []
        for i, image_size in enumerate(images.image_sizes):
            with record_function("solo_d2.nms"):
                found = self.detect(outputs, i, size)
            with (
                record_function("solo_d2.masks"),
                torch.autocast(self.device.type, enabled=False),
            ):
                results.append(self.assemble(outputs, i, found, image_size, size))
        return results

    def detect(self, outputs: YOLACTOutputs, image: int, size: tuple[int, int]) -> Detections:
        """Detections of one image without masks; ``size`` is that of the padded input."""
        found = find_candidates(
            outputs.box_offsets[image],
            outputs.class_logits[image],
            outputs.priors,
            score_threshold=self.score_threshold,
        )
        return suppress(found, unit=_unit(size), **self.suppression)

    def assemble(
        self,
        outputs: YOLACTOutputs,
        image: int,
        found: Detections,
        image_size: tuple[int, int],
        size: tuple[int, int],
    ) -> Instances:
        """Detections with their soft masks at the size of the prototypes.

        Args:
            outputs, image, found: of the network, which image, of ``detect``.
            image_size, size: height and width of the input without padding and with it.

        Returns:
            Instances with ``pred_boxes`` in pixels of the input, not clipped, and, where there is
            a mask IoU head, ``mask_scores``. With crop "output" ``pred_masks`` are not cropped.
        """
        boxes = found.boxes * _unit(size)
        prototypes = outputs.prototypes[image]
        masks = assemble_masks(prototypes, outputs.coefficients[image][found.priors])
        result = Instances(image_size)
        result.pred_boxes = Boxes(boxes)
        result.scores, result.pred_classes = found.scores, found.classes
        cropped = masks
        rescored = self.mask_iou_head is not None
        if self.crop == "prototype" or (self.crop == "output" and rescored):
            size_here = tuple(prototypes.shape[:2])
            here = boxes * _ratios(size, size_here, boxes)
            cropped = masks * inside_boxes(here, size_here, padding=self.crop_padding)
        if self.mask_iou_head is not None:
            ious = self.mask_iou_head(cropped).gather(1, found.classes[:, None])[:, 0]
            result.mask_scores = found.scores * ious
        result.pred_masks = masks if self.crop == "output" else cropped
        if self.mask_iou_head is not None and self.rescore_boxes:
            result.scores = result.mask_scores
            result = result[result.scores.argsort(descending=True)]
        return result[result.scores > self.min_score]

    def postprocess(
        self, instances: Instances, height: int, width: int, padded_size: tuple[int, int]
    ) -> Instances:
        """One result of ``inference`` in the output frame; those without area are left out."""
        boxes = output_boxes(
            instances.pred_boxes.tensor,
            instances.image_size,
            (height, width),
            rounding=self.box_rounding,
        )
        # published for COCO's json, but by the area, which is positive if both sides are negative
        visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        instances, boxes = instances[visible], boxes[visible]
        masks = upsample_to_binary(
            instances.pred_masks,
            padded_size=padded_size,
            image_size=instances.image_size,
            output_size=(height, width),
            threshold=self.mask_threshold,
            direct=True,
            windows=pixel_windows(boxes) if self.crop == "output" else None,
        )
        result = Instances((height, width), **instances.get_fields())
        result.pred_masks = masks
        result.pred_boxes = Boxes(boxes)
        return result


def _unit(size: tuple[int, int]) -> float:
    """Pixels that relative boxes are in units of, in an input of this height and width."""
    return float(max(size))


def _ratios(before: tuple[int, int], after: tuple[int, int], like: Tensor) -> Tensor:
    """(4,) factors of x1, y1, x2, y2 when something of one size becomes one of another."""
    y, x = (b / a for a, b in zip(before, after))
    return like.new_tensor([x, y, x, y])


def _without_degenerate(gt: GroundTruth) -> GroundTruth:
    """Without objects that have no area."""
    good = (gt.boxes[:, 2:] - gt.boxes[:, :2] > _MIN_BOX_SIZE).all(dim=1)
    return gt._replace(boxes=gt.boxes[good], classes=gt.classes[good], masks=gt.masks[good])
