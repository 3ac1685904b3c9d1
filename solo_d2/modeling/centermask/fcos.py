"""FCOS, the detector without anchors: boxes and classes from every location of a pyramid."""

import math
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import record_function

from ..num_classes import resolve_num_classes
from .inference import select_boxes
from .losses import BOX_LOSSES
from .targets import assign_locations, box_distances, centerness, level_locations


class FCOSOutputs(NamedTuple):
    """Outputs of ``FCOSHead``, per level."""

    class_logits: list[Tensor]  # (N, C, H, W)
    distances: list[Tensor]  # (N, 4, H, W) to left, top, right, bottom; in strides, not negative
    centerness: list[Tensor]  # (N, 1, H, W) logits


class FCOSHead(nn.Module):
    """Two towers, shared by all levels; centerness is predicted by that of the boxes."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_levels: int,
        num_classes: int,
        num_share_convs: int = 0,
        num_class_convs: int = 4,
        num_box_convs: int = 4,
        norm: str = "GN",
        use_scale: bool = True,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            in_channels: of all features, and of the towers.
            num_levels, num_classes: the outputs are per level, of so many classes.
            num_share_convs, num_class_convs, num_box_convs: 3x3 convolutions, each with norm and
                ReLU, before both towers and in each.
            norm: see ``detectron2.layers.get_norm``; "" for none.
            use_scale: a learned factor on the distances of each level.
            prior_prob: of each class before training.
        """
        super().__init__()
        self.share_tower = _tower(num_share_convs, in_channels, norm)
        self.class_tower = _tower(num_class_convs, in_channels, norm)
        self.box_tower = _tower(num_box_convs, in_channels, norm)
        self.class_logits = _conv3x3(in_channels, num_classes)
        self.box_pred = _conv3x3(in_channels, 4)
        self.centerness = _conv3x3(in_channels, 1)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - prior_prob) / prior_prob))
        self.scales = nn.Parameter(torch.ones(num_levels)) if use_scale else None

    def forward(self, features: list[Tensor]) -> FCOSOutputs:
        """One feature (N, C, H, W) per level."""
        outputs = FCOSOutputs([], [], [])
        for level, feature in enumerate(features):
            shared = self.share_tower(feature)
            box_feature = self.box_tower(shared)
            distances = self.box_pred(box_feature).float()
            if self.scales is not None:
                distances = distances * self.scales[level]
            outputs.class_logits.append(self.class_logits(self.class_tower(shared)))
            outputs.distances.append(F.relu(distances))
            outputs.centerness.append(self.centerness(box_feature))
        return outputs


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCOSProposalGenerator(nn.Module):
    """FCOS as the proposal generator of a ``GeneralizedRCNN``.

    It detects: its boxes, classes and scores are final. ``CenterMaskROIHeads`` adds masks to them
    or, with MODEL.MASK_ON False, passes them through.
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
        select_train: dict[str, Any] | None,
        select_test: dict[str, Any],
    ):
        """
        Args:
            head: see ``FCOSHead``.
            in_features, strides: a feature of the backbone and its stride per level.
            num_classes: C.
            borders, radius: which locations learn a box, see ``targets.assign_locations``.
            box_loss_type: one of ``losses.BOX_LOSSES``.
            focal_loss_alpha, focal_loss_gamma: of the class loss.
            select_train, select_test: keywords of ``inference.select_boxes``; None in training if
                nobody needs boxes there.

        Raises:
            ValueError: there is no such loss, or not one border less than levels.
        """
        if box_loss_type not in BOX_LOSSES:
            raise ValueError(
                f"MODEL.FCOS.BBOX_REG_LOSS_TYPE must be one of {', '.join(BOX_LOSSES)}, "
                f"not {box_loss_type!r}"
            )
        if len(borders) != len(strides) - 1:
            raise ValueError(
                f"MODEL.FCOS.SIZES_OF_INTEREST has {len(borders)} borders, "
                f"but {len(strides)} levels have {len(strides) - 1}"
            )
        super().__init__()
        self.head = head
        self.in_features = in_features
        self.strides = strides
        self.num_classes = num_classes
        self.assignment = {"strides": strides, "borders": borders, "radius": radius}
        self.box_loss = BOX_LOSSES[box_loss_type]
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.select_train = select_train
        self.select_test = select_test

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        fcos = cfg.MODEL.FCOS
        for name in fcos.IN_FEATURES:
            if name not in input_shape:
                raise ValueError(f"the backbone has no feature {name!r}, only {[*input_shape]}")
        shapes = [input_shape[name] for name in fcos.IN_FEATURES]
        if len({shape.channels for shape in shapes}) != 1:
            channels = dict(zip(fcos.IN_FEATURES, (shape.channels for shape in shapes)))
            raise ValueError(
                f"FCOS's features must have as many channels as each other: {channels}"
            )
        num_classes = resolve_num_classes(cfg, "MODEL.FCOS.NUM_CLASSES")

        def select(mode: str) -> dict[str, Any]:
            return {
                "score_threshold": fcos[f"SCORE_THRESH_{mode}"],
                "threshold_with_centerness": fcos.THRESH_WITH_CENTERNESS,
                "pre_nms_topk": fcos[f"PRE_NMS_TOPK_{mode}"],
                "nms_threshold": fcos.NMS_THRESH,
                "post_nms_topk": fcos[f"POST_NMS_TOPK_{mode}"],
            }

        return {
            "head": FCOSHead(
                in_channels=shapes[0].channels,
                num_levels=len(shapes),
                num_classes=num_classes,
                num_share_convs=fcos.NUM_SHARE_CONVS,
                num_class_convs=fcos.NUM_CLS_CONVS,
                num_box_convs=fcos.NUM_BOX_CONVS,
                norm=fcos.NORM,
                use_scale=fcos.USE_SCALE,
                prior_prob=fcos.PRIOR_PROB,
            ),
            "in_features": fcos.IN_FEATURES,
            "strides": [shape.stride for shape in shapes],
            "num_classes": num_classes,
            "borders": fcos.SIZES_OF_INTEREST,
            "radius": fcos.CENTER_SAMPLING_RADIUS,
            "box_loss_type": fcos.BBOX_REG_LOSS_TYPE,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "select_train": select("TRAIN") if cfg.MODEL.MASK_ON else None,
            "select_test": select("TEST"),
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
            features: of the backbone.
            gt_instances: for training, with ``gt_boxes`` and ``gt_classes``.

        Returns:
            Training: proposals as of Detectron2's own generators, with ``proposal_boxes`` and
            ``objectness_logits`` (the scores), and the losses. Inference: detections with
            ``pred_boxes``, ``scores``, ``pred_classes`` and ``locations`` (x, y), and no losses.

            Boxes are in input pixels, not clipped to the image, best first.

        Raises:
            ValueError: training without ``gt_instances``.
        """
        outputs = self.head([features[name] for name in self.in_features])
        if not self.training:
            return self.detect(outputs, images.image_sizes), {}
        if gt_instances is None:
            raise ValueError("training needs 'instances' in every input")
        losses = self.losses(outputs, gt_instances)
        return self.propose(outputs, images.image_sizes), losses

    @torch.no_grad()
    def propose(self, outputs: FCOSOutputs, image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """Boxes to train a mask branch with."""
        if self.select_train is None:
            empty = outputs.distances[0].new_zeros
            fields = {"proposal_boxes": Boxes(empty(0, 4)), "objectness_logits": empty(0)}
            return [Instances(size, **fields) for size in image_sizes]
        return [
            Instances(size, proposal_boxes=Boxes(found.boxes), objectness_logits=found.scores)
            for size, found in zip(
                image_sizes, select_boxes(*outputs, strides=self.strides, **self.select_train)
            )
        ]

    def detect(self, outputs: FCOSOutputs, image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """The boxes that are found."""
        return [
            Instances(
                size,
                pred_boxes=Boxes(found.boxes),
                scores=found.scores,
                pred_classes=found.classes,
                locations=found.locations,
            )
            for size, found in zip(
                image_sizes, select_boxes(*outputs, strides=self.strides, **self.select_test)
            )
        ]

    def losses(self, outputs: FCOSOutputs, gt_instances: list[Instances]) -> dict[str, Tensor]:
        """Losses of classes, boxes and centerness (FCOS, section 3.1).

        The first and the last are divided by the number of positive locations, that of the boxes,
        which is weighted by the centerness targets, by their sum; both are means over processes.
        """
        class_logits, distances, centerness_logits = (
            torch.cat([x.flatten(2) for x in levels], dim=2) for levels in outputs
        )
        sizes = [x.shape[-2:] for x in outputs.class_logits]
        with torch.no_grad(), record_function("solo_d2.assign"):
            boxes = pad_sequence([x.gt_boxes.tensor for x in gt_instances], batch_first=True)
            classes = pad_sequence([x.gt_classes for x in gt_instances], batch_first=True)
            owner = assign_locations(boxes, sizes, **self.assignment)
            image, location = (owner < boxes.shape[1]).nonzero(as_tuple=True)
            instance = owner[image, location]

            one_hot = torch.zeros_like(class_logits, dtype=torch.float32)
            one_hot[image, classes[image, instance], location] = 1
            points, stride = self._locations(sizes, boxes.device)
            targets = box_distances(points[location], boxes[image, instance].float())
            targets = targets / stride[location, None]
            weights = centerness(targets)
            num_positive, weight_sum = _mean_over_processes(
                torch.stack([weights.new_tensor(len(weights)), weights.sum()])
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
        box_loss = self.box_loss(distances[image, :, location], targets) * weights
        centerness_loss = F.binary_cross_entropy_with_logits(
            centerness_logits[image, 0, location].float(), weights, reduction="sum"
        )
        return {
            "loss_fcos_cls": class_loss / num_positive.clamp(min=1),
            "loss_fcos_loc": box_loss.sum() / weight_sum.clamp(min=1e-6),
            "loss_fcos_ctr": centerness_loss / num_positive.clamp(min=1),
        }

    def _locations(
        self, sizes: list[tuple[int, int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(L, 2) locations of all levels, and (L,) their strides."""
        levels = [
            level_locations(size, stride, device) for size, stride in zip(sizes, self.strides)
        ]
        strides = [points.new_full((len(points),), s) for points, s in zip(levels, self.strides)]
        return torch.cat(levels), torch.cat(strides)


class _GroupNorm(nn.GroupNorm):
    """PyTorch's, without its refusal of groups of one value: P7 of a small image is one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _tower(num_convs: int, channels: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        *(
            _conv3x3(
                channels,
                channels,
                norm=_GroupNorm(32, channels) if norm == "GN" else get_norm(norm, channels),
                activation=nn.ReLU(inplace=True),
            )
            for _ in range(num_convs)
        )
    )


def _conv3x3(in_channels: int, out_channels: int, **options: Any) -> Conv2d:
    """With a bias, also where a norm follows, as in the published code."""
    conv = Conv2d(in_channels, out_channels, kernel_size=3, padding=1, **options)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def _mean_over_processes(sums: Tensor) -> Tensor:
    world_size = comm.get_world_size()
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return sums / world_size
