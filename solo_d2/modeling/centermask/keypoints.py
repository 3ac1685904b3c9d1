"""Keypoints in the boxes of FCOS."""

from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_keypoint_head
from detectron2.structures import Instances
from torch import Tensor, nn

from ..options import check_choice
from .fcos import features_by_name
from .pooler import AdaptiveROIPooler


class KeypointBranch(nn.Module):
    """A keypoint head of Detectron2 on features that ``AdaptiveROIPooler`` pools."""

    def __init__(self, *, in_features: list[str], pooler: AdaptiveROIPooler, head: nn.Module):
        """
        Args:
            in_features: the features to pool from.
            pooler: gives the head's input (R, channels, S, S).
            head: a keypoint head of Detectron2's kind.
        """
        super().__init__()
        self.in_features = in_features
        self.pooler = pooler
        self.head = head

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> "KeypointBranch":
        options, names = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES
        shapes = features_by_name(input_shape, names, "MODEL.ROI_HEADS.IN_FEATURES")
        check_choice("MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", options.POOLER_TYPE, ("ROIAlignV2",))
        size = options.POOLER_RESOLUTION
        pooler = AdaptiveROIPooler(
            output_size=size,
            strides=[shape.stride for shape in shapes],
            criterion=cfg.MODEL.CENTERMASK.ASSIGN_CRITERION,
            sampling_ratio=options.POOLER_SAMPLING_RATIO,
        )
        head_input = ShapeSpec(channels=shapes[0].channels, width=size, height=size)
        return cls(in_features=names, pooler=pooler, head=build_keypoint_head(cfg, head_input))

    def forward(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """Add ``pred_keypoints`` (n, K, 3: x, y, score) in input pixels, in place."""
        boxes = [x.pred_boxes for x in instances]
        return self.head(self._pool(features, boxes, instances), instances)

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances],
    ) -> dict[str, Tensor]:
        """
        Args:
            features: the backbone's features.
            proposals: of objects, with ``gt_index``, see ``CenterMaskROIHeads``.
            targets: with ``gt_keypoints``, but for images without objects.

        Raises:
            ValueError: an image has objects without keypoints.
        """
        for proposal, target in zip(proposals, targets):
            if len(proposal):
                if not target.has("gt_keypoints"):
                    raise ValueError("training keypoints needs instances with 'gt_keypoints'")
                proposal.gt_keypoints = target.gt_keypoints[proposal.gt_index]
        boxes = [x.proposal_boxes for x in proposals]
        return self.head(self._pool(features, boxes, proposals), proposals)

    def _pool(self, features: dict[str, Tensor], boxes: list, instances: list) -> Tensor:
        sizes = [x.image_size for x in instances]
        return self.pooler([features[name] for name in self.in_features], boxes, sizes)
