"""Panoptic segmentation: a semantic branch beside the instances (SOLOv2, section 4.4)."""

from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_sem_seg_head
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..options import check_at_least, check_fractions
from ..segmentor import GroundTruth
from .base import SOLOFamily
from .decoupled_solo import DecoupledSOLO
from .solo import SOLO
from .solov2 import SOLOv2


class PanopticGroundTruth(NamedTuple):
    """Annotations of one image on the model's device."""

    objects: GroundTruth
    semantic: Tensor  # (H, W) int64: 0 things, then classes of stuff, or the head's ignore_value


class Panoptic(SOLOFamily):
    """Adds Panoptic FPN's semantic branch to a model of the family, and merges as Panoptic FPN.

    As in Detectron2's "separated" data sets, semantic class 0 stands for all things.
    """

    best_metric = "panoptic_seg/PQ"

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module,
        num_semantic_classes: int,
        overlap_threshold: float = 0.5,
        stuff_area_limit: int = 4096,
        instance_score_threshold: float = 0.5,
        **options: Any,
    ):
        """
        Args:
            sem_seg_head: Detectron2's ``SemSegFPNHead``, or one with its interface.
            num_semantic_classes: of that head; with 2, a label map may be missing in training: then
                all pixels outside of objects are stuff.
            overlap_threshold: an instance is left out if better ones cover more of it than this.
            stuff_area_limit: stuff with fewer pixels of the output is left out.
            instance_score_threshold: instances with lower scores are left out.
            options: see ``SOLOFamily``.

        Raises:
            ValueError: an argument has an unsupported value.
        """
        check_at_least(2, num_semantic_classes=num_semantic_classes)
        check_at_least(0, stuff_area_limit=stuff_area_limit)
        check_fractions(
            overlap_threshold=overlap_threshold, instance_score_threshold=instance_score_threshold
        )
        super().__init__(**options)
        self.sem_seg_head = sem_seg_head
        self.num_semantic_classes = num_semantic_classes
        self.merge_limits = (overlap_threshold, stuff_area_limit, instance_score_threshold)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        options = super().from_config(cfg)
        combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
        return {
            **options,
            "sem_seg_head": build_sem_seg_head(cfg, options["backbone"].output_shape()),
            "num_semantic_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "overlap_threshold": combine.OVERLAP_THRESH,
            "stuff_area_limit": combine.STUFF_AREA_LIMIT,
            "instance_score_threshold": combine.INSTANCES_CONFIDENCE_THRESH,
        }

    def prepare_ground_truth(self, batched_inputs: list[dict], images: ImageList) -> list[Any]:
        """A ``PanopticGroundTruth`` for each image.

        Raises:
            ValueError: see ``InstanceSegmentor``; or a label map "sem_seg" is missing or wrong.
        """
        objects = super().prepare_ground_truth(batched_inputs, images)
        return [
            PanopticGroundTruth(gt, self._semantic_target(gt, inputs))
            for gt, inputs in zip(objects, batched_inputs)
        ]

    def _semantic_target(self, gt: GroundTruth, inputs: dict) -> Tensor:
        ignored, (h, w) = self.sem_seg_head.ignore_value, gt.image_size
        name = inputs.get("file_name", "?")
        if "sem_seg" in inputs:
            known = inputs["sem_seg"].long()
            # checked before the copy to the device, where reading it would force a synchronization
            wrong = known[
                (known != ignored) & ~((known >= 0) & (known < self.num_semantic_classes))
            ]
            if len(wrong):
                raise ValueError(
                    f"image {name} has the semantic label {int(wrong[0])}, but they must be in "
                    f"[0, {self.num_semantic_classes}) (num_semantic_classes), or {ignored}"
                )
            known = known.to(self.device)
        elif self.num_semantic_classes == 2:
            crowd, thing = (x.any(dim=0)[:h, :w] for x in (gt.crowd_masks, gt.masks))
            known = torch.ones((h, w), dtype=torch.long, device=self.device)
            known = known.masked_fill(crowd, ignored).masked_fill(thing, 0)
        else:
            raise ValueError(
                f"image {name} has no 'sem_seg', which {self.num_semantic_classes} semantic "
                "classes need"
            )
        target = known.new_full(gt.masks.shape[1:], ignored)
        target[:h, :w] = known
        return target

    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[Any]
    ) -> dict[str, Tensor]:
        """Those of the instances and of the semantic branch."""
        named = super().losses(images, features, [gt.objects for gt in ground_truth])
        targets = torch.stack([gt.semantic for gt in ground_truth])
        _, semantic = self.sem_seg_head(features, targets)
        any_known = (targets != self.sem_seg_head.ignore_value).any()
        # a mean over no pixel is NaN
        return named | {k: torch.where(any_known, loss, 0.0) for k, loss in semantic.items()}

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """Instances in the network's frame that carry the semantic logits of their image."""
        logits, _ = self.sem_seg_head(features, None)
        return [
            _WithLogits(found, image_logits.float())
            for found, image_logits in zip(super().inference(images, features), logits)
        ]

    def postprocess_batch(
        self, results: list[Instances], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """As Detectron2's ``PanopticFPN``: {"instances", "sem_seg", "panoptic_seg"} per image."""
        outputs = super().postprocess_batch(results, batched_inputs, images)
        for output, found in zip(outputs, results):
            assert isinstance(found, _WithLogits)
            instances = output["instances"]
            semantic = sem_seg_postprocess(found.logits, found.image_size, *instances.image_size)
            output["sem_seg"] = semantic
            output["panoptic_seg"] = combine_semantic_and_instance_outputs(
                instances, semantic.argmax(dim=0), *self.merge_limits
            )
        return outputs


class _WithLogits(Instances):
    """Instances, and the semantic logits (C, H, W) of the padded image."""

    def __init__(self, instances: Instances, logits: Tensor):
        super().__init__(instances.image_size, **instances.get_fields())
        self._logits = logits

    @property
    def logits(self) -> Tensor:
        return self._logits


@META_ARCH_REGISTRY.register()
class PanopticSOLOv2(Panoptic, SOLOv2):
    """SOLOv2 with a semantic branch."""


@META_ARCH_REGISTRY.register()
class PanopticSOLO(Panoptic, SOLO):
    """SOLO with a semantic branch."""


@META_ARCH_REGISTRY.register()
class PanopticDecoupledSOLO(Panoptic, DecoupledSOLO):
    """Decoupled SOLO with a semantic branch."""
