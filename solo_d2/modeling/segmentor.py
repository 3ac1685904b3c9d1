"""The route that every one-stage architecture here takes from a batch to its instances."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from detectron2.layers import move_device_like
from detectron2.modeling import Backbone, build_backbone
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from solo_d2.layers.frozen_bn import fold_frozen_batch_norms
from solo_d2.postprocessing import postprocess

from .own_keys import warn_about_own_keys


class GroundTruth(NamedTuple):
    """Annotations of one image, on the model's device; N = 0 is ordinary."""

    boxes: Tensor  # (N, 4) x1, y1, x2, y2 in input pixels, right and bottom exclusive
    classes: Tensor  # (N,) int64
    masks: Tensor  # (N, H, W) bool, padded with zeros to the batch
    image_size: tuple[int, int]  # height and width before padding
    crowd_boxes: Tensor  # (M, 4) of regions that hold objects not told apart; in none of the above
    crowd_masks: Tensor  # (M, H, W) bool


class InstanceSegmentor(nn.Module):
    """Base class: normalizes and batches images, runs the backbone, post-processes.

    A subclass implements ``losses`` and ``inference``.
    """

    # Crowds are no objects to it: INPUT.KEEP_CROWD may be on.
    separates_crowds = True

    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_mean: list[float],
        pixel_std: list[float],
        freeze_bn_stats: bool = False,
        mask_threshold: float = 0.5,
    ):
        """
        Args:
            backbone: any Detectron2 backbone.
            pixel_mean, pixel_std: per channel, in the order of the input images.
            freeze_bn_stats: keep the backbone's batch norms in eval mode while training; their
                affine parameters are still trained.
            mask_threshold: a pixel belongs to an instance where its soft mask exceeds this.
        """
        super().__init__()
        self.backbone = backbone
        self.freeze_bn_stats = freeze_bn_stats
        self.mask_threshold = mask_threshold
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        warn_about_own_keys(cfg)
        return {
            "backbone": fold_frozen_batch_norms(build_backbone(cfg)),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "freeze_bn_stats": cfg.MODEL.BACKBONE.FREEZE_BN_STATS,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> "InstanceSegmentor":
        super().train(mode)
        if self.freeze_bn_stats:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: as Detectron2's ``DatasetMapper`` makes them: "image" (C, H, W), for
                training "instances", for inference "height" and "width" of the output.

        Returns:
            Training: named losses. Inference: a list of {"instances": Instances} at output size
            with ``pred_masks``, ``pred_boxes``, ``scores``, ``pred_classes``.
        """
        images = self.preprocess_image(batched_inputs)
        with record_function("solo_d2.backbone"):
            features = self.backbone(images.tensor)
        if self.training:
            return self.losses(images, features, self.prepare_ground_truth(batched_inputs, images))
        results = self.inference(images, features)
        padded_size = tuple(images.tensor.shape[-2:])
        processed = []
        for instances, inputs in zip(results, batched_inputs):
            height = inputs.get("height", inputs["image"].shape[-2])
            width = inputs.get("width", inputs["image"].shape[-1])
            with record_function("solo_d2.output"):
                result = self.postprocess(instances, height, width, padded_size)
            processed.append({"instances": result})
        return processed

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize, then pad with zeros at the right and bottom."""
        images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        batch = ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )
        if self.device.type == "cpu":
            # the layout runs through the network and saves oneDNN a third of its time there
            batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
        return batch

    def prepare_ground_truth(
        self, batched_inputs: list[dict], images: ImageList
    ) -> list[GroundTruth]:
        """Annotations on the device, polygons rasterized, masks padded to the batch.

        Raises:
            ValueError: an input has no "instances", or instances without masks.
        """
        height, width = images.tensor.shape[-2:]
        ground_truth = []
        for inputs, (h, w) in zip(batched_inputs, images.image_sizes):
            if "instances" not in inputs:
                raise ValueError(
                    f"training needs 'instances'; image {inputs.get('file_name', '?')} has none"
                )
            instances: Instances = inputs["instances"]
            # an image without annotations has no gt_masks field at all
            if instances.has("gt_masks"):
                bitmasks = instances.gt_masks
                if isinstance(bitmasks, PolygonMasks):
                    bitmasks = BitMasks.from_polygon_masks(bitmasks, h, w)
                masks = F.pad(bitmasks.tensor.to(self.device), (0, width - w, 0, height - h))
                boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
            elif len(instances.get_fields().get("gt_classes", ())):
                raise ValueError(
                    f"image {inputs.get('file_name', '?')} has instances without masks; "
                    "set MODEL.MASK_ON: True so that they are loaded"
                )
            else:
                masks = torch.zeros((0, height, width), dtype=torch.bool, device=self.device)
                boxes, classes = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.long)
            boxes, classes = boxes.to(self.device), classes.to(self.device)
            objects: slice | Tensor = slice(None)
            crowds: slice | Tensor = slice(0)
            if instances.has("gt_crowd"):
                crowds = instances.gt_crowd.to(self.device)
                objects = ~crowds
            ground_truth.append(
                GroundTruth(
                    boxes[objects],
                    classes[objects],
                    masks[objects],
                    (h, w),
                    crowd_boxes=boxes[crowds],
                    crowd_masks=masks[crowds],
                )
            )
        return ground_truth

    @abstractmethod
    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        """Named losses of a batch; finite and connected to every parameter for any input."""

    @abstractmethod
    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """Instances per image in the network's frame, with soft ``pred_masks`` (N, h, w)."""

    def postprocess(
        self, instances: Instances, height: int, width: int, padded_size: tuple[int, int]
    ) -> Instances:
        """One result of ``inference`` in the output frame; see ``solo_d2.postprocessing``."""
        return postprocess(
            instances,
            height,
            width,
            padded_size=padded_size,
            mask_threshold=self.mask_threshold,
        )
