"""FCOS, a detector without anchors: boxes and classes from every location of a pyramid.

Shape shorthand in this folder:

    N: number of images
    M: objects of an image, padded to the largest number in the batch
    C: number of classes, without background
    L: locations of all levels of an image
    H, W: height and width of a level's map
    P: positive locations of the batch
    R: boxes (regions of interest) of all images of the batch that get masks
    S: side of the square of features pooled for a box; masks have the side 2 S
"""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import record_function

from solo_d2.layers.symbolic import refuse_export

from ..num_classes import resolve_num_classes
from ..options import check_at_least, check_choice, check_fractions
from .head import FCOSHead, FCOSOutputs
from .inference import SelectedBoxes, select_boxes
from .losses import BOX_LOSSES, box_loss
from .targets import assign_locations, box_distances, centerness, level_locations


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCOSProposalGenerator(nn.Module):
    """FCOS as the proposal generator of a ``GeneralizedRCNN``.

    It is a detector: its boxes, classes and scores are final. ``CenterMaskROIHeads`` adds masks to
    them or, with MODEL.MASK_ON False, passes them through.
    """

    num_classes_key = "MODEL.FCOS.NUM_CLASSES"

    @configurable
    def __init__(
        self,
        *,
        head: nn.Module,
        in_features: list[str],
        strides: list[int],
        num_classes: int,
        borders: list[float],
        radius: float = 1.5,
        box_loss_type: str = "giou",
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        score_threshold_train: float = 0.05,
        score_threshold_test: float = 0.05,
        threshold_with_centerness: bool = False,
        pre_nms_topk: int = 1000,
        nms_threshold: float = 0.6,
        max_proposals: int = 100,
        max_detections: int = 100,
        needs_proposals: bool = True,
    ):
        """
        Args:
            head: see ``FCOSHead``.
            in_features, strides: for each level, a feature of the backbone and its stride.
            num_classes: C.
            borders, radius: which locations are assigned to a box, see
                ``targets.assign_locations``.
            box_loss_type: see ``losses.box_loss``.
            focal_loss_alpha, focal_loss_gamma: parameters of the class loss.
            score_threshold_train, score_threshold_test, threshold_with_centerness, pre_nms_topk,
                nms_threshold: see ``inference.select_boxes``.
            max_proposals, max_detections: boxes per image in training and in inference; 0: all.
            needs_proposals: whether another branch is trained with the boxes found in training.

        Raises:
            ValueError: an option has an unsupported value.
        """
        check_choice("box_loss_type", box_loss_type, BOX_LOSSES)
        _check_levels(in_features, strides, borders)
        check_at_least(1, num_classes=num_classes, pre_nms_topk=pre_nms_topk)
        check_at_least(0, radius=radius, max_proposals=max_proposals, max_detections=max_detections)
        check_fractions(
            score_threshold_train=score_threshold_train,
            score_threshold_test=score_threshold_test,
            nms_threshold=nms_threshold,
        )
        super().__init__()
        self.head = head
        self.in_features = list(in_features)
        self.strides = list(strides)
        self.num_classes = num_classes
        self.borders = list(borders)
        self.radius = radius
        self.box_loss_type = box_loss_type
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.score_threshold_train = score_threshold_train
        self.score_threshold_test = score_threshold_test
        self.threshold_with_centerness = threshold_with_centerness
        self.pre_nms_topk = pre_nms_topk
        self.nms_threshold = nms_threshold
        self.max_proposals = max_proposals
        self.max_detections = max_detections
        self.needs_proposals = needs_proposals

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        fcos = cfg.MODEL.FCOS
        shapes = features_by_name(input_shape, fcos.IN_FEATURES, "MODEL.FCOS.IN_FEATURES")
        num_classes = resolve_num_classes(cfg, "MODEL.FCOS.NUM_CLASSES")
        return {
            "head": FCOSHead(
                in_channels=shapes[0].channels,
                num_levels=len(shapes),
                num_classes=num_classes,
                num_class_convs=fcos.NUM_CLS_CONVS,
                num_box_convs=fcos.NUM_BOX_CONVS,
            ),
            "in_features": fcos.IN_FEATURES,
            "strides": [shape.stride for shape in shapes],
            "num_classes": num_classes,
            "borders": fcos.SIZES_OF_INTEREST,
            "radius": fcos.CENTER_SAMPLING_RADIUS,
            "box_loss_type": fcos.BBOX_REG_LOSS_TYPE,
            "score_threshold_train": fcos.SCORE_THRESH_TRAIN,
            "score_threshold_test": fcos.SCORE_THRESH_TEST,
            "nms_threshold": fcos.NMS_THRESH,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "needs_proposals": cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: the batch.
            features: the backbone's features.
            gt_instances: for training, with ``gt_boxes`` and ``gt_classes``.

        Returns:
            Training: proposals like those of Detectron2's own generators, with ``proposal_boxes``
            and ``objectness_logits`` (the scores), and the losses. Inference: detections with
            ``pred_boxes``, ``scores``, ``pred_classes`` and ``locations`` (x, y), and no losses.

        Boxes are in input pixels, not clipped to the image, best first.

        Raises:
            ValueError: ``gt_instances`` is missing in training, or a class is out of range.
        """
        refuse_export("a model with FCOS")
        outputs = self.dense(features)
        if not self.training:
            return self.detect(outputs, images.image_sizes), {}
        if gt_instances is None:
            raise ValueError("training needs 'instances' in every input")
        losses = self.losses(outputs, gt_instances)
        # Connect the features that no level uses: under DistributedDataParallel every parameter
        # needs a gradient.
        unused = [x for name, x in features.items() if name not in self.in_features]
        losses["loss_fcos_cls"] = losses["loss_fcos_cls"] + sum(x[:0].sum() for x in unused)
        return self.propose(outputs, images.image_sizes), losses

    def dense(self, features: dict[str, Tensor]) -> FCOSOutputs:
        """Raw outputs for the backbone's features; what an exported graph runs."""
        return self.head([features[name] for name in self.in_features])

    @torch.no_grad()
    def propose(self, outputs: FCOSOutputs, image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """The boxes to train a mask branch with."""
        if not self.needs_proposals:
            empty = outputs.distances[0].new_zeros
            fields = {"proposal_boxes": Boxes(empty(0, 4)), "objectness_logits": empty(0)}
            return [Instances(size, **fields) for size in image_sizes]
        found = self._select(outputs, self.score_threshold_train, self.max_proposals)
        return [
            Instances(size, proposal_boxes=Boxes(image.boxes), objectness_logits=image.scores)
            for size, image in zip(image_sizes, found)
        ]

    def detect(self, outputs: FCOSOutputs, image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """The detections.

        Raises:
            ValueError: the outputs are inf or NaN.
        """
        found = self._select(outputs, self.score_threshold_test, self.max_detections)
        boxes = [image.boxes for image in found]
        # NaN scores find nothing, NaN distances find boxes that are nowhere
        suspects = [torch.cat(boxes), *(() if all(map(len, boxes)) else outputs.class_logits)]
        if not torch.stack([x.isfinite().all() for x in suspects]).all():
            raise ValueError("the outputs are not finite: weights have inf or NaN values")
        return [
            Instances(
                size,
                pred_boxes=Boxes(image.boxes),
                scores=image.scores,
                pred_classes=image.classes,
                locations=image.locations,
            )
            for size, image in zip(image_sizes, found)
        ]

    def _select(
        self, outputs: FCOSOutputs, score_threshold: float, post_nms_topk: int
    ) -> list[SelectedBoxes]:
        return select_boxes(
            outputs,
            strides=self.strides,
            score_threshold=score_threshold,
            threshold_with_centerness=self.threshold_with_centerness,
            pre_nms_topk=self.pre_nms_topk,
            nms_threshold=self.nms_threshold,
            post_nms_topk=post_nms_topk,
        )

    def losses(self, outputs: FCOSOutputs, gt_instances: list[Instances]) -> dict[str, Tensor]:
        """Losses of classes, boxes and centerness (FCOS, section 3.1).

        The losses of classes and centerness are divided by the number of positive locations. The
        box loss is weighted by the centerness targets and divided by their sum. Both divisors are
        means over the processes.
        """
        class_logits, distances, centerness_logits = (
            torch.cat([x.flatten(2) for x in levels], dim=2) for levels in outputs
        )
        sizes = [x.shape[-2:] for x in outputs.class_logits]
        with torch.no_grad(), record_function("solo_d2.assign"):
            boxes = pad_sequence([x.gt_boxes.tensor for x in gt_instances], batch_first=True)
            classes = pad_sequence([x.gt_classes for x in gt_instances], batch_first=True)
            self._check_classes(classes)
            owner = assign_locations(
                boxes, sizes, strides=self.strides, borders=self.borders, radius=self.radius
            )
            image, location = (owner < boxes.shape[1]).nonzero(as_tuple=True)
            instance = owner[image, location]

            one_hot = torch.zeros_like(class_logits, dtype=torch.float32)
            one_hot[image, classes[image, instance], location] = one_hot.new_ones(())
            points, stride = self._locations(sizes, boxes.device)
            targets = box_distances(points[location], boxes[image, instance].float())
            targets = targets / stride[location, None]
            weights = centerness(targets)
            num_positive, weight_sum = _mean_over_processes(
                torch.stack([weights.new_full((), len(weights)), weights.sum()])
            )
        if has_event_storage():
            get_event_storage().put_scalar("fcos/positive_locations", len(weights))

        class_loss = sigmoid_focal_loss(
            class_logits,
            one_hot,
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )
        box_losses = box_loss(distances[image, :, location], targets, self.box_loss_type)
        centerness_loss = F.binary_cross_entropy_with_logits(
            centerness_logits[image, 0, location].float(), weights, reduction="sum"
        )
        return {
            "loss_fcos_cls": class_loss / num_positive.clamp(min=1),
            "loss_fcos_loc": (box_losses * weights).sum() / weight_sum.clamp(min=1e-6),
            "loss_fcos_ctr": centerness_loss / num_positive.clamp(min=1),
        }

    def _check_classes(self, classes: Tensor) -> None:
        """Check classes (N, M): a wrong one would train another class or fail in a CUDA kernel."""
        if classes.numel() == 0:
            return
        wrong = (classes < 0) | (classes >= self.num_classes)
        if wrong.any():
            image = int(wrong.any(dim=1).nonzero()[0, 0])
            label = int(classes[wrong][0])
            raise ValueError(
                f"gt_classes must be 0 to {self.num_classes - 1}, "
                f"but an object of image {image} of the batch has {label}"
            )

    def _locations(
        self, sizes: list[tuple[int, int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(L, 2) locations of all levels, and (L,) their strides."""
        levels = [
            level_locations(size, stride, device) for size, stride in zip(sizes, self.strides)
        ]
        strides = [points.new_full((len(points),), s) for points, s in zip(levels, self.strides)]
        return torch.cat(levels), torch.cat(strides)


def features_by_name(
    shapes: dict[str, ShapeSpec], names: Sequence[str], key: str
) -> list[ShapeSpec]:
    """Shapes of the features that the config lists under ``key``.

    Raises:
        ValueError: the backbone lacks a feature, or the features differ in number of channels.
    """
    for name in names:
        if name not in shapes:
            raise ValueError(f"{key} has {name!r}, but the backbone's outputs are {[*shapes]}")
    channels = {name: shapes[name].channels for name in names}
    if len(set(channels.values())) != 1:
        raise ValueError(f"{key} must all have the same number of channels: {channels}")
    return [shapes[name] for name in names]


def _check_levels(
    in_features: Sequence[str], strides: Sequence[int], borders: Sequence[float]
) -> None:
    if not len(in_features) == len(strides) == len(borders) + 1:
        raise ValueError(
            "in_features, strides and borders must be for the same levels: "
            f"{len(in_features)} features, {len(strides)} strides and {len(borders)} borders "
            "between them"
        )
    if list(borders) != sorted(borders):
        raise ValueError(f"borders must be in ascending order, not {list(borders)}")


def _mean_over_processes(sums: Tensor) -> Tensor:
    world_size = comm.get_world_size()
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return sums / world_size
