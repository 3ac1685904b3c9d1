"""EPS (arXiv 2105.08965): localization maps from image labels and saliency maps.

Shape shorthand in this folder:

    N: images of a batch
    C: classes, without the background
    H, W: the network's input, padded; h, w: the class activation map (CAM)

The background is the last channel of the CAM, and the first of the output.
"""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import move_device_like
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from solo_d2.layers.resample import resize

from ..num_classes import resolve_num_classes
from ..options import check_fractions
from ..own_keys import warn_about_own_keys
from ..prepare import check_precision, prepare
from .inference import PseudoMasks, rescale, to_regions
from .losses import classification_loss, saliency_loss
from .targets import UNLABELED, StandIn, image_labels


@META_ARCH_REGISTRY.register()
class EPS(nn.Module):
    """A classifier with a map for the background, whose maps are the segmentation.

    At inference it returns Detectron2's "sem_seg", whose argmax is the label map.
    """

    num_classes_key = "MODEL.EPS.NUM_CLASSES"
    best_metric = "sem_seg/mIoU"
    # it needs a mapper that supplies the labels of an image, also for evaluation
    trains_on_image_labels = True
    # from the output to what ``solo_d2.predictor`` shows
    to_regions = staticmethod(to_regions)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        num_classes: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        use_saliency: bool = True,
        tau: float = 0.4,
        lam: float = 0.5,
        stand_in: StandIn | None = None,
        pseudo_masks: PseudoMasks | None = None,
        freeze_bn_stats: bool = False,
    ):
        """
        Args:
            backbone: any Detectron2 backbone; modified in place, see ``prepare``.
            in_features: the features that are classified, resized to the first and concatenated.
            num_classes: C, at most 254: label maps have 8 bits.
            pixel_mean, pixel_std: per channel, in the order of the input images' channels.
            use_saliency: False for the paper's baseline: C channels without a background, dropout
                before the classifier, and ReLU in place of softmax.
            tau, lam: see ``estimate_saliency``.
            stand_in: makes the saliency of an input that has none.
            pseudo_masks: makes the output from the maps.
            freeze_bn_stats: keep the backbone's batch norms in eval mode while training.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        shapes = backbone.output_shape()
        if not in_features or not set(in_features) <= set(shapes):
            raise ValueError(f"in_features must be some of {[*shapes]}, not {[*in_features]}")
        if not 1 <= num_classes < UNLABELED:
            raise ValueError(f"num_classes must be 1 to {UNLABELED - 1}, not {num_classes!r}")
        if len(pixel_mean) != len(pixel_std) or not all(std > 0 for std in pixel_std):
            raise ValueError(
                "pixel_mean and pixel_std need a number per channel, and the latter a positive "
                f"one, not {[*pixel_mean]} and {[*pixel_std]}"
            )
        check_fractions(tau=tau, lam=lam)
        self.stand_in = stand_in or StandIn()
        self.pseudo_masks = pseudo_masks or PseudoMasks()
        if self.pseudo_masks.use_bg_cam and not use_saliency:
            raise ValueError("use_bg_cam needs use_saliency: the baseline has no background map")
        self.backbone = prepare(backbone)
        self.in_features = list(in_features)
        self.stride = shapes[in_features[0]].stride
        self.num_classes = num_classes
        self.use_saliency = use_saliency
        self.tau, self.lam = tau, lam
        self.freeze_bn_stats = freeze_bn_stats
        self.dropout = nn.Identity() if use_saliency else nn.Dropout2d(0.5)
        channels = sum(shapes[name].channels for name in in_features)
        self.classifier = nn.Conv2d(channels, num_classes + int(use_saliency), 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self._warned = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        warn_about_own_keys(cfg)
        options = cfg.MODEL.EPS
        return {
            "backbone": build_backbone(cfg),
            "in_features": options.IN_FEATURES,
            "num_classes": resolve_num_classes(cfg, cls.num_classes_key),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "use_saliency": options.SALIENCY_LOSS,
            "tau": options.TAU,
            "lam": options.LAM,
            "stand_in": StandIn(erosion=options.STAND_IN_EROSION, blur=options.STAND_IN_BLUR),
            "pseudo_masks": PseudoMasks(
                scales=tuple(options.TEST_SCALES),
                bg_threshold=options.BG_THRESHOLD,
                use_bg_cam=options.USE_BG_CAM,
            ),
            "freeze_bn_stats": cfg.MODEL.BACKBONE.FREEZE_BN_STATS,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> "EPS":
        super().train(mode)
        if self.freeze_bn_stats:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                    module.eval()
        return self

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batched_inputs: each with "image" (3, h, w), and optionally "image_labels" (C,), 0 or 1.
                For training also "saliency" (1, h, w), 0 to 1. Without them, "instances" or
                "sem_seg" (a label map) must be there, from which both are derived. For inference
                also "height" and "width" of the output; without labels, classes are predicted.

        Returns:
            Training: named losses. Inference: a list of {"sem_seg": (C + 1, height, width)} scores
            from 0 to 1, the background first, 0 for classes that are not in the image.

        Raises:
            ValueError: an annotation is missing or wrong, or the weights cannot be used.
        """
        check_precision(self.pixel_mean.dtype, self.device)
        if not self.training:
            return [{"sem_seg": self._segment(x)} for x in batched_inputs]
        labels = self._labels(batched_inputs)
        images = self._batch([x["image"] for x in batched_inputs])
        cam = self._cam(images.tensor)
        losses = {"loss_cls": classification_loss(cam, labels)}
        if self.use_saliency:
            saliency = self._saliency(batched_inputs, images)
            losses["loss_sal"] = saliency_loss(cam, labels, saliency, tau=self.tau, lam=self.lam)
        return losses

    def _batch(self, images: list[Tensor]) -> ImageList:
        """Normalize, then pad with zeros at the right and bottom."""
        images = [move_device_like(image, self.pixel_mean) for image in images]
        return self._pad([(image - self.pixel_mean) / self.pixel_std for image in images])

    def _pad(self, tensors: list[Tensor]) -> ImageList:
        return ImageList.from_tensors(
            tensors,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def _cam(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C + 1, h, w) logits; C for the baseline."""
        features = self.backbone(images)
        first, *others = (features[name] for name in self.in_features)
        maps = [first, *(resize(x, first.shape[-2:]) for x in others)]
        return self.classifier(self.dropout(torch.cat(maps, dim=1)))

    def _labels(self, batched_inputs: list[dict]) -> Tensor:
        """(N, C)"""
        labels = []
        for x in batched_inputs:
            labels.append(image_labels(x, self.num_classes))
            if labels[-1] is None:
                raise ValueError(
                    "training needs 'image_labels', 'instances' or 'sem_seg'; image "
                    f"{x.get('file_name', '?')} has none of them"
                )
        return torch.stack(labels).to(self.device)

    def _saliency(self, batched_inputs: list[dict], images: ImageList) -> Tensor:
        """(N, 1, H, W), 0 in the padding."""
        maps = []
        for x, size in zip(batched_inputs, images.image_sizes):
            if not ("saliency" in x or self._warned):
                logging.getLogger(__name__).warning(
                    "EPS TRAINS ON GROUND-TRUTH MASKS: there are no saliency maps, so the union of "
                    "all annotated masks stands in for them. Results are not those of weak "
                    "supervision. MODEL.EPS.SALIENCY_FOLDER names the folder of real ones"
                )
                self._warned = True
            maps.append(x["saliency"].float() if "saliency" in x else self.stand_in(x))
            if maps[-1].shape != (1, *size):
                raise ValueError(
                    f"image {x.get('file_name', '?')} is {size[0]} pixels high and {size[1]} wide, "
                    f"but its saliency has the shape {tuple(maps[-1].shape)}"
                )
        return self._pad([saliency.to(self.device) for saliency in maps]).tensor

    def _segment(self, inputs: dict) -> Tensor:
        """(C + 1, height, width) of one image."""
        image = inputs["image"]
        size = inputs.get("height", image.shape[-2]), inputs.get("width", image.shape[-1])
        cams = []
        for scale in self.pseudo_masks.scales:
            scaled = rescale(image, scale)
            images = self._batch([scaled, scaled.flip(-1)])
            h, w = (-(-side // self.stride) for side in scaled.shape[-2:])
            cams.append(self._cam(images.tensor)[..., :h, :w].float())  # without the padding
        logits = torch.stack([cam.mean(dim=(0, 2, 3)) for cam in cams]).mean(dim=0)
        if not logits.isfinite().all():
            raise ValueError("the class maps are not finite: the weights have inf or NaN values")
        labels = image_labels(inputs, self.num_classes)
        labels = logits[: self.num_classes] if labels is None else labels
        present = (labels > 0).nonzero()[:, 0].to(self.device)
        maps = [cam.softmax(dim=1) if self.use_saliency else cam.relu() for cam in cams]
        return self.pseudo_masks(maps, present, size, self.num_classes)
