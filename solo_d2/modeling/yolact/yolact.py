"""YOLACT (arXiv 1904.02689) and YOLACT++ (arXiv 1912.06218).

Shape shorthand in this folder:

    N: images of a batch
    P: anchors of an image, over all levels; A: anchors at one location
    C: classes, without background
    K: prototypes
    M: instances of one image: objects in training, detections at inference
    R: positive anchors of one image
    H, W: the network's input, padded; h, w: prototypes, at twice the size of the finest level
"""

import logging
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import move_device_like
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.profiler import record_function

from solo_d2.layers.resample import resize

from ..num_classes import resolve_num_classes
from ..segmentor import GroundTruth, InstanceSegmentor
from .anchors import AnchorGenerator
from .criterion import YOLACTCriterion
from .head import (
    MaskRater,
    Protonet,
    YOLACTHead,
    YOLACTOutputs,
    YOLACTPyramid,
    xavier_conv,
)
from .inference import YOLACTDetector
from .targets import resize_instances


@META_ARCH_REGISTRY.register()
class YOLACT(InstanceSegmentor):
    """Masks as linear combinations of an image's prototypes, cropped to predicted boxes.

    Boxes are relative internally (see ``anchors``), and in pixels in Detectron2's ``Instances``.
    """

    num_classes_key = "MODEL.YOLACT.NUM_CLASSES"
    uses_crowds = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        pyramid: YOLACTPyramid,
        head: YOLACTHead,
        protonet: Protonet,
        semantic_pred: nn.Module,
        mask_iou_head: MaskRater | None = None,
        anchor_generator: AnchorGenerator,
        criterion: YOLACTCriterion,
        detector: YOLACTDetector,
        input_size: int = 550,
        freeze_bn: bool = False,
        pixel_mean: list[float],
        pixel_std: list[float],
        freeze_bn_stats: bool = False,
        mask_threshold: float = 0.5,
    ):
        """
        Args:
            backbone, pyramid, head, protonet, semantic_pred: the network.
            mask_iou_head: for YOLACT++ only.
            anchor_generator, criterion, detector: anchors, losses, and post-processing.
            input_size: side of the square that images are resized to; 0 keeps their size.
            freeze_bn: freeze statistics and affine parameters of the backbone's batch norms.
            pixel_mean, pixel_std, freeze_bn_stats, mask_threshold: see ``InstanceSegmentor``.

        Raises:
            ValueError: an option has an unsupported value, or the parts do not fit together.
        """
        if input_size < 0:
            raise ValueError(f"input_size must be 0 or more, not {input_size}")
        for name, counts in (
            ("num_levels", [pyramid.num_levels, anchor_generator.num_levels]),
            ("num_anchors", [head.num_anchors, anchor_generator.num_anchors]),
            ("num_classes", [head.num_classes, criterion.num_classes]),
        ):
            if counts[0] != counts[1]:
                raise ValueError(f"the parts must have the same {name}, not {counts}")
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            freeze_bn_stats=freeze_bn_stats or freeze_bn,
            mask_threshold=mask_threshold,
        )
        self.fpn = pyramid  # the name in checkpoints
        self.head = head
        self.protonet = protonet
        self.semantic_pred = semantic_pred
        self.mask_iou_head = mask_iou_head
        self.anchor_generator = anchor_generator
        self.criterion = criterion
        self.detector = detector
        self.num_classes = head.num_classes
        self.input_size = input_size
        if freeze_bn:
            for norm in _batch_norms(backbone):
                norm.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = super().from_config(cfg)
        yolact = cfg.MODEL.YOLACT
        num_classes = resolve_num_classes(cfg, cls.num_classes_key)
        anchors = AnchorGenerator(
            sizes=yolact.ANCHOR_SIZES,
            per_octave=yolact.ANCHORS_PER_OCTAVE,
            aspect_ratios=yolact.ANCHOR_ASPECT_RATIOS,
            square=yolact.SQUARE_ANCHORS,
        )
        prototypes = {"num_prototypes": yolact.NUM_PROTOTYPES, "norm": yolact.NORM}
        return {
            **options,
            "pyramid": YOLACTPyramid(
                options["backbone"].output_shape(),
                in_features=yolact.IN_FEATURES,
                out_channels=yolact.CONV_DIM,
                num_levels=anchors.num_levels,
                norm=yolact.NORM,
            ),
            "head": YOLACTHead(
                in_channels=yolact.CONV_DIM,
                num_anchors=anchors.num_anchors,
                num_classes=num_classes,
                predictor_gain=yolact.PREDICTOR_GAIN,
                **prototypes,
            ),
            "protonet": Protonet(in_channels=yolact.CONV_DIM, **prototypes),
            "semantic_pred": xavier_conv(
                yolact.CONV_DIM, num_classes, 1, gain=yolact.PREDICTOR_GAIN
            ),
            "mask_iou_head": MaskRater(num_classes=num_classes)
            if yolact.MASK_IOU.ENABLED
            else None,
            "anchor_generator": anchors,
            "criterion": YOLACTCriterion(
                num_classes=num_classes,
                masks_to_train=yolact.MASKS_TO_TRAIN,
                crop_masks=yolact.CROP != "none",
            ),
            "detector": YOLACTDetector(
                score_threshold=yolact.SCORE_THRESH_TEST,
                nms_type=yolact.NMS_TYPE,
                nms_threshold=yolact.NMS_THRESH_TEST,
                top_k=yolact.TOPK_CANDIDATES_TEST,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                crop=yolact.CROP,
                box_rounding=yolact.BOX_ROUNDING,
            ),
            "input_size": yolact.INPUT_SIZE,
            "freeze_bn": _freezes_batch_norm(cfg, options["backbone"]),
        }

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Resize to the input size, then as ``InstanceSegmentor``."""
        if self.input_size:
            size = (self.input_size, self.input_size)
            images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
            batched_inputs = [{"image": resize(x[None].float(), size)[0]} for x in images]
        return super().preprocess_image(batched_inputs)

    def prepare_ground_truth(
        self, batched_inputs: list[dict], images: ImageList
    ) -> list[GroundTruth]:
        """Resize to the input size, then as ``InstanceSegmentor``."""
        if self.input_size:
            size = (self.input_size, self.input_size)
            resized = [
                {"instances": resize_instances(x["instances"], size, self.device)}
                if "instances" in x
                else {}
                for x in batched_inputs
            ]
            batched_inputs = [{**x, **new} for x, new in zip(batched_inputs, resized)]
        return super().prepare_ground_truth(batched_inputs, images)

    def dense(self, images: Tensor) -> YOLACTOutputs:
        """Raw outputs for normalized, padded images (N, 3, H, W); what an exported graph runs."""
        return self.predict(self.backbone(images), (images.shape[-2], images.shape[-1]))

    def predict(self, features: dict[str, Tensor], input_size: tuple[int, int]) -> YOLACTOutputs:
        """Raw outputs for the backbone's features of a padded input of the given size."""
        with record_function("solo_d2.heads"):
            levels = self.fpn(features)
            offsets, logits, coefficients = self.head(levels)
            prototypes = self.protonet(levels[0])
            sizes = [tuple(level.shape[-2:]) for level in levels]
            anchors = self.anchor_generator(sizes, input_size, offsets.device)
        return YOLACTOutputs(offsets, logits, coefficients, prototypes, anchors, levels[0])

    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        outputs = self.predict(features, (images.tensor.shape[-2], images.tensor.shape[-1]))
        semantic_logits = self.semantic_pred(outputs.finest).float()
        named = self.criterion(outputs, semantic_logits, ground_truth, self.mask_iou_head)
        # Connect the features that the pyramid does not use: under DistributedDataParallel every
        # parameter needs a gradient.
        unused = [x[:0].sum() for name, x in features.items() if name not in self.fpn.in_features]
        named["loss_class"] = named["loss_class"] + sum(unused)
        return named

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        padded_size = (images.tensor.shape[-2], images.tensor.shape[-1])
        outputs = self.predict(features, padded_size)
        return [
            self.detector(outputs, i, size, padded_size, self.mask_iou_head)
            for i, size in enumerate(images.image_sizes)
        ]

    def postprocess(
        self, instances: Instances, height: int, width: int, padded_size: tuple[int, int]
    ) -> Instances:
        """Bring a result of ``inference`` to the output frame; see ``YOLACTDetector``."""
        return self.detector.postprocess(
            instances, (height, width), padded_size, self.mask_threshold
        )


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    norm = nn.modules.batchnorm._BatchNorm
    return [x for x in module.modules() if isinstance(x, norm)]


def _freezes_batch_norm(cfg: CfgNode, backbone: nn.Module) -> bool:
    """Whether a process has fewer images per step than FREEZE_BN_BELOW; logs it if so."""
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    limit = cfg.MODEL.YOLACT.FREEZE_BN_BELOW
    if images >= limit or not _batch_norms(backbone):
        return False
    logging.getLogger(__name__).info(
        f"The backbone's batch norms are frozen in training: {images} images per process and step "
        f"are fewer than MODEL.YOLACT.FREEZE_BN_BELOW = {limit}"
    )
    return True
