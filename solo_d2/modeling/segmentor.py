"""From a batch of images to their instances: the base of all one-stage architectures here.

Shape shorthand of this file:
    N: images
    M: instances of one image, with a mask each
    H, W: height and width of the padded batch
"""

from abc import ABC, abstractmethod
from itertools import chain
from typing import NamedTuple

import torch
from detectron2.modeling import Backbone, build_backbone
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from torch import Tensor, nn
from torch.profiler import record_function

from solo_d2.layers.symbolic import refuse_export
from solo_d2.layers.upload import upload
from solo_d2.postprocessing import postprocess

from .own_keys import warn_about_own_keys
from .prepare import check_precision, checkpoint_activations, prepare


class GroundTruth(NamedTuple):
    """Annotations of one image on the model's device. M may be 0."""

    boxes: Tensor  # (M, 4) x1, y1, x2, y2 in input pixels, right and bottom exclusive
    classes: Tensor  # (M,) int64
    masks: Tensor  # (M, H, W) bool, zero in the padding
    image_size: tuple[int, int]  # height and width before padding
    # Regions of many objects that are not annotated one by one; the fields above exclude them.
    crowd_boxes: Tensor  # (number of crowds, 4)
    crowd_masks: Tensor  # (number of crowds, H, W) bool


class InstanceSegmentor(nn.Module, ABC):
    """Base class: normalizes and batches images, runs the backbone, post-processes.

    A subclass implements ``losses`` and ``inference``.
    """

    # Whether the losses leave the pixels of crowds alone. If so, ``InstanceMapper`` passes crowds
    # on as instances with the field gt_crowd. Otherwise it drops them, as Detectron2's does.
    uses_crowds = False

    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_mean: list[float],
        pixel_std: list[float],
        freeze_bn_stats: bool = False,
        mask_threshold: float = 0.5,
        num_classes: int | None = None,
    ):
        """
        Args:
            backbone: any Detectron2 backbone; modified in place, see ``prepare``.
            pixel_mean, pixel_std: per channel, in the order of the input images' channels.
            freeze_bn_stats: keep the backbone's batch norms in eval mode while training; their
                affine parameters are still trained.
            mask_threshold: a pixel belongs to an instance where its soft mask exceeds this.
            num_classes: a class that is not below this is an error in training; None: no check.

        Raises:
            ValueError: ``pixel_mean`` or ``pixel_std`` has an unsupported value.
        """
        super().__init__()
        if len(pixel_mean) != len(pixel_std) or not all(std > 0 for std in pixel_std):
            raise ValueError(
                "pixel_mean and pixel_std need a number per channel, and the latter a positive "
                f"one, not {[*pixel_mean]} and {[*pixel_std]}"
            )
        self.backbone = prepare(backbone)
        self.freeze_bn_stats = freeze_bn_stats
        self.mask_threshold = mask_threshold
        self.num_classes = num_classes
        self._finite_versions: list[int] = []  # of the weights, when they were last checked
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        warn_about_own_keys(cfg)
        backbone = build_backbone(cfg)
        if cfg.MODEL.BACKBONE.CHECKPOINT_ACTIVATIONS:
            checkpoint_activations(backbone)
        return {
            "backbone": backbone,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "freeze_bn_stats": cfg.MODEL.BACKBONE.FREEZE_BN_STATS,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def modules_with_frozen_statistics(self) -> list[nn.Module]:
        """Modules whose batch norms stay in eval mode while training; a subclass adds its own."""
        return [self.backbone] if self.freeze_bn_stats else []

    def train(self, mode: bool = True) -> "InstanceSegmentor":
        super().train(mode)
        for frozen in self.modules_with_frozen_statistics():
            for module in frozen.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm):
                    module.eval()
        return self

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: in the format of Detectron2's ``DatasetMapper``: "image" (3, h, w), for
                training "instances", for inference "height" and "width" of the output.

        Returns:
            Training: named losses. Inference: a list of {"instances": Instances} at output size
            with ``pred_masks``, ``pred_boxes``, ``scores``, ``pred_classes``.

        Raises:
            ValueError: an annotation is missing or wrong, or the weights cannot be used.
        """
        refuse_export(type(self).__name__)
        images = self.preprocess_image(batched_inputs)
        with record_function("solo_d2.backbone"):
            features = self.backbone(images.tensor)
        if self.training:
            return self.losses(images, features, self.prepare_ground_truth(batched_inputs, images))
        results = self.inference(images, features)
        if not all(map(len, results)):
            self.check_weights()
        return self.postprocess_batch(results, batched_inputs, images)

    def postprocess_batch(
        self, results: list[Instances], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Bring the results of ``inference`` to the output frames, as ``forward`` returns them."""
        padded_size = tuple(images.tensor.shape[-2:])
        processed = []
        for instances, inputs in zip(results, batched_inputs):
            height = inputs.get("height", inputs["image"].shape[-2])
            width = inputs.get("width", inputs["image"].shape[-1])
            with record_function("solo_d2.output"):
                result = self.postprocess(instances, height, width, padded_size)
            processed.append({"instances": result})
        return processed

    def check_weights(self) -> None:
        """Called if no instance was found, which is always so with non-finite weights.

        Raises:
            ValueError: a weight is inf or NaN.
        """
        # reading all weights takes a third of the time of a small image: once after a change
        tensors = chain(self.parameters(), self.buffers())
        versions = [0 if x.is_inference() else x._version for x in tensors]
        if versions == self._finite_versions:
            return
        weights = {k: v for k, v in self.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in weights.values()])
        if not finite.all():
            name = list(weights)[int(finite.logical_not().nonzero()[0])]
            raise ValueError(f"the model's weights are not finite: {name} has inf or NaN values")
        self._finite_versions = versions

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize, then pad with zeros at the right and bottom.

        Raises:
            ValueError: the weights were converted to half precision.
        """
        check_precision(self.pixel_mean.dtype, self.device)
        images = [upload(x["image"], self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def prepare_ground_truth(
        self, batched_inputs: list[dict], images: ImageList
    ) -> list[GroundTruth]:
        """Annotations on the device, polygons rasterized, masks padded to the batch.

        Raises:
            ValueError: an input has no "instances", or they have no masks, masks of another size
                than the image's, or a class out of range.
        """
        height, width = images.tensor.shape[-2:]
        return [
            self._image_ground_truth(inputs, size, (height, width))
            for inputs, size in zip(batched_inputs, images.image_sizes)
        ]

    def _image_ground_truth(
        self, inputs: dict, image_size: tuple[int, int], padded_size: tuple[int, int]
    ) -> GroundTruth:
        name = inputs.get("file_name", "?")
        if "instances" not in inputs:
            raise ValueError(f"training needs 'instances'; image {name} has none")
        instances: Instances = inputs["instances"]
        # an image without annotations has no gt_masks field at all
        if instances.has("gt_masks"):
            bitmasks = instances.gt_masks
            if isinstance(bitmasks, PolygonMasks):
                bitmasks = BitMasks.from_polygon_masks(bitmasks, *image_size)
            masks, boxes = bitmasks.tensor, instances.gt_boxes.tensor
            classes = instances.gt_classes
        elif len(instances.get_fields().get("gt_classes", ())):
            raise ValueError(
                f"image {name} has instances without masks; set MODEL.MASK_ON: True so that they "
                "are loaded"
            )
        else:
            masks = torch.zeros((0, *image_size), dtype=torch.bool)
            boxes, classes = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.long)
        if tuple(masks.shape[1:]) != tuple(image_size):
            raise ValueError(
                f"image {name} is {image_size[0]} pixels high and {image_size[1]} wide, but its "
                f"gt_masks are {masks.shape[1]} x {masks.shape[2]}"
            )
        # checked before the copy to the device, where reading it would force a synchronization
        known = self.num_classes is not None
        wrong = classes[(classes < 0) | (classes >= self.num_classes)] if known else ()
        if len(wrong):
            raise ValueError(
                f"image {name} has an instance of class {int(wrong[0])}, but gt_classes must be in "
                f"[0, {self.num_classes}) (num_classes)"
            )
        objects: slice | Tensor = slice(None)
        crowds: slice | Tensor = slice(0)
        if instances.has("gt_crowd") and instances.gt_crowd.any():
            objects, crowds = ~instances.gt_crowd, instances.gt_crowd
        return GroundTruth(
            upload(boxes[objects], self.device),
            upload(classes[objects], self.device),
            _padded(masks[objects], padded_size, self.device),
            image_size,
            crowd_boxes=upload(boxes[crowds], self.device),
            crowd_masks=_padded(masks[crowds], padded_size, self.device),
        )

    @abstractmethod
    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[GroundTruth]
    ) -> dict[str, Tensor]:
        """Named losses of a batch; finite and connected to every parameter for any input."""

    @abstractmethod
    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """Instances of each image in the network's frame, with soft ``pred_masks`` (M, h, w)."""

    def postprocess(
        self, instances: Instances, height: int, width: int, padded_size: tuple[int, int]
    ) -> Instances:
        """Bring a result of ``inference`` to the output frame; see ``solo_d2.postprocessing``."""
        return postprocess(
            instances,
            height,
            width,
            padded_size=padded_size,
            mask_threshold=self.mask_threshold,
        )


def _padded(masks: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """(M, h, w) -> (M, *size) on the device; no copy if nothing changes."""
    m, h, w = masks.shape
    if (h, w) == size:
        return upload(masks, device)
    padded = torch.zeros((m, *size), dtype=torch.bool, device=device)
    padded[:, :h, :w] = upload(masks, device)
    return padded
