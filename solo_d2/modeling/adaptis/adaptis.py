"""AdaptIS: Adaptive Instance Selection Network (arXiv 1909.07829).

An image is embedded once; points are then decoded into masks. In this folder, ``fusion`` and
``head`` have the layers, ``targets`` and ``criterion`` are for training, ``embedded`` is an image
that is ready for points, ``automatic`` chooses points without a user, ``panoptic`` assembles masks,
``finder`` joins these for inference, and ``predictor`` is the interactive interface.

Shape shorthand in this folder:
    N: images
    P: points of each image
    M: masks, of points or of objects; N * P masks are ordered by image
    C: semantic classes, stuff before things
    T: thing classes
    K: candidates: points to decode, or peaks of the proposal map
    h, w: height and width of the feature map
    H, W: height and width of the network's input, with its padding or, where said, without it
"""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from solo_d2.layers.points import read_at_points

from ..num_classes import resolve_num_classes
from ..options import check_choice
from ..segmentor import InstanceSegmentor
from .criterion import InstanceCriterion, ProposalCriterion
from .embedded import ImageEmbedding
from .finder import EncodedImage, InferenceOptions, ObjectFinder, output_size
from .fusion import build_fusion
from .head import Heads, build_heads, resize_corners, valid_cells
from .targets import (
    IGNORE,
    PointSampler,
    semantic_labels,
    set_padding,
    targets_of_points,
    to_input_frame,
)


class PointGroundTruth(NamedTuple):
    """Ground truth of one image."""

    points: Tensor  # (P, 2) float32
    masks: Tensor  # (P, H, W) int8, under the points: 1 object, 0 rest, -1 ignored
    semantic: Tensor  # (H, W) int64 in [0, C), -1 ignored


@META_ARCH_REGISTRY.register()
class AdaptIS(InstanceSegmentor, ObjectFinder):
    """Segments the object under each point. Without points, it chooses them itself.

    Inside, points are (row, column) in pixels of the network's input. In the input dicts,
    "points" (P, 2) are (x, y) in pixels of the original image, whose size is given by "height" and
    "width".
    """

    num_classes_key = "MODEL.ADAPTIS.NUM_THINGS"
    best_metric = "panoptic_seg/PQ"
    uses_crowds = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        fusion: nn.Module | None = None,
        heads: Heads,
        sampler: PointSampler,
        criterion: InstanceCriterion | ProposalCriterion,
        freeze_bn: bool = True,
        inference_options: InferenceOptions,
        pixel_mean: list[float],
        pixel_std: list[float],
        freeze_bn_stats: bool = False,
    ):
        """
        Args:
            backbone, pixel_mean, pixel_std, freeze_bn_stats: see ``InstanceSegmentor``.
            in_features: features of the backbone, finest first.
            fusion: combines several features into one map; None for a single feature.
            heads: with a proposal head for the second stage, which trains that head only.
            sampler: samples the points of a training step.
            criterion: loss of the stage.
            freeze_bn: in the second stage, keep the frozen parts in eval mode. False: let the
                statistics of their batch norms drift, as the published code does.
            inference_options: how objects are found.

        Raises:
            ValueError: an option has an unsupported value, or the parts do not fit together.
        """
        assembler, num_labels = inference_options.assembler, heads.semantic.predictor.out_channels
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            freeze_bn_stats=freeze_bn_stats,
            mask_threshold=inference_options.proposals.mask_threshold,
            num_classes=num_labels - assembler.num_stuff + assembler.thing_offset,
        )
        if (fusion is None) != (len(in_features) == 1):
            raise ValueError(f"fusion is needed for several features, not for {in_features}")
        second_stage = heads.proposal is not None
        if inference_options.mode == "proposals" and not second_stage:
            raise ValueError("mode 'proposals' needs a proposal head")
        if second_stage != isinstance(criterion, ProposalCriterion):
            raise ValueError("a proposal head and ProposalCriterion belong together")
        self.in_features, self.fusion = in_features, fusion
        self.stride = backbone.output_shape()[in_features[0]].stride
        self.controller, self.selection_head, self.semantic_head, self.proposal_head = heads
        self.sampler, self.criterion = sampler, criterion
        self.freeze_bn = freeze_bn
        self.options = inference_options
        if self.proposal_head is not None and isinstance(criterion, ProposalCriterion):
            self.iou_threshold = criterion.iou_threshold
            self.requires_grad_(False)
            self.proposal_head.requires_grad_(True)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = super().from_config(cfg)
        adaptis = cfg.MODEL.ADAPTIS
        check_choice("MODEL.ADAPTIS.STAGE", adaptis.STAGE, ("instance", "proposals"))
        second_stage = adaptis.STAGE == "proposals"
        num_classes = resolve_num_classes(cfg, cls.num_classes_key)
        if not adaptis.THINGS_AFTER_STUFF:
            num_classes += adaptis.NUM_STUFF
        shapes, names = options["backbone"].output_shape(), adaptis.IN_FEATURES
        if not names or not set(names) <= set(shapes):
            raise ValueError(f"in_features is {names}, but the backbone has {[*shapes]}")
        return {
            **options,
            "in_features": names,
            "fusion": build_fusion(adaptis.FUSION, [shapes[x] for x in names], adaptis.FUSE_DIM),
            "heads": build_heads(
                adaptis.HEAD,
                shapes[names[0]].channels if len(names) == 1 else adaptis.FUSE_DIM,
                num_classes,
                conv_dim=adaptis.CONV_DIM,
                semantic_dim=adaptis.SEMANTIC_DIM,
                proposal_dim=adaptis.PROPOSAL_DIM if second_stage else None,
                norm_radius=adaptis.NORM_RADIUS,
            ),
            "sampler": PointSampler(
                num_points=adaptis.NUM_POINTS,
                from_one_object=second_stage,
                min_area=adaptis.MIN_OBJECT_AREA,
                ignored_prob=adaptis.IGNORED_PROB,
            ),
            "criterion": ProposalCriterion(targets=adaptis.PROPOSAL_TARGETS)
            if second_stage
            else InstanceCriterion(adaptis.LOSS_ALPHA, adaptis.TEST.MASK_THRESH),
            "inference_options": InferenceOptions.from_config(cfg),
        }

    def modules_with_frozen_statistics(self) -> list[nn.Module]:
        modules = super().modules_with_frozen_statistics()
        if self.proposal_head is not None and self.freeze_bn:
            modules += [x for x in self.children() if x is not self.proposal_head]
        return modules

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: as for ``InstanceSegmentor``. For training also, optionally, "sem_seg"
                (H, W) int64 (stuff, then things, -1 ignored), which is otherwise painted from the
                instances, and "points" (P, 2) instead of random ones, the same P for all images.
                For inference, "points" requests the objects under them.

        Returns:
            Training: named losses. Inference, at output size: {"instances"}, one per point in the
            order of the points, if there are points; otherwise {"instances", "panoptic_seg",
            "sem_seg"}, see ``PanopticAssembler``.

        Raises:
            ValueError: see ``InstanceSegmentor``; or images are too small to train batch norm.
        """
        if not self.training:
            results: list[dict] = []
            with torch.no_grad():
                # One image at a time: padding to a common size would change AdaIN's statistics.
                for x in batched_inputs:
                    results += [self.prompt(x)] if "points" in x else super().forward([x])
            return results
        try:
            return super().forward(batched_inputs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            sizes = ", ".join("{2} x {1}".format(*x["image"].shape) for x in batched_inputs)
            raise ValueError(
                f"images too small to train: a batch with {sizes} pixels leaves one cell for batch "
                "norm; use larger images or more images per batch"
            ) from error

    # ---- the network

    def feature_map(self, features: dict[str, Tensor]) -> Tensor:
        """The map (N, channels, h, w) that the heads take, of the backbone's features."""
        chosen = [features[name] for name in self.in_features]
        feature = chosen[0] if self.fusion is None else self.fusion(chosen)
        if self.training:
            # Connect the unused features: under DistributedDataParallel every parameter needs a
            # gradient.
            unused = [x[:0].sum() for k, x in features.items() if k not in self.in_features]
            feature = sum(unused, feature)
        return feature

    def embed(
        self, feature: Tensor, image_sizes: list[tuple[int, int]], padded: tuple[int, int]
    ) -> ImageEmbedding:
        """Compute everything of the decoder that does not depend on points.

        Args:
            feature: of ``feature_map``.
            image_sizes: heights and widths without padding.
            padded: height and width of the batch.
        """
        valid = None
        if any(tuple(size) != tuple(padded) for size in image_sizes):
            sizes = torch.tensor([[int(x) for x in size] for size in image_sizes])
            map_size = (feature.shape[-2], feature.shape[-1])
            valid = valid_cells(sizes.to(feature.device), map_size, 1 / self.stride)
        return self.embedding_of(feature, valid)

    def embedding_of(self, feature: Tensor, valid: Tensor | None) -> ImageEmbedding:
        """What the decoder takes; ``valid`` as in ``ImageEmbedding``."""
        control = self.controller.prepare(feature)
        return ImageEmbedding(control, self.selection_head.prepare(feature), valid)

    def decode(self, embedding: ImageEmbedding, points: Tensor) -> Tensor:
        """Points (N, P, 2) of N embedded images -> (N * P, 1, h, w) mask logits."""
        scale = 1 / self.stride
        control = self.controller(embedding.control, points, scale)
        return self.selection_head(embedding.selection, points, control, scale, embedding.valid)

    def maps(self, feature: Tensor, padded: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Semantic probabilities (N, C, H, W), and the proposal map (N, H, W) if it is used."""
        semantic = self.semantic_head(feature).float().softmax(dim=1)
        proposals = None
        if self.use_proposals:
            assert self.proposal_head is not None
            logits = resize_corners(self.proposal_head(feature).float(), padded)
            proposals = logits[:, 0].sigmoid() ** 2
        return resize_corners(semantic, padded), proposals

    @property
    def use_proposals(self) -> bool:
        """Whether objects are found at proposals, not at random points."""
        return self.proposal_head is not None and self.options.mode != "random"

    # ---- training

    def prepare_ground_truth(self, batched_inputs: list[dict], images: ImageList) -> list[Any]:
        """A ``PointGroundTruth`` for each image.

        Raises:
            ValueError: see ``InstanceSegmentor``; or a point is outside its image, images have
                different numbers of points, or there are several stuff classes and no "sem_seg".
        """
        result = []
        num_stuff = self.options.assembler.num_stuff
        num_classes = self.semantic_head.predictor.out_channels
        for gt, inputs in zip(super().prepare_ground_truth(batched_inputs, images), batched_inputs):
            if "points" in inputs:
                points = to_input_frame(inputs["points"], output_size(inputs), gt.image_size)
                drawn = targets_of_points(points.to(self.device), gt.masks)
            else:
                drawn = self.sampler(gt.masks, gt.crowd_masks)
            if "sem_seg" not in inputs and num_stuff != 1:
                raise ValueError(
                    f"num_stuff is {num_stuff}, but image {inputs.get('file_name', '?')} has no "
                    "'sem_seg'"
                )
            semantic = semantic_labels(gt, inputs.get("sem_seg"), num_classes=num_classes)
            result.append(PointGroundTruth(*drawn, semantic))
        if len({len(x.points) for x in result}) != 1:
            raise ValueError(
                "all images of a training batch need the same number of points, not "
                + ", ".join(str(len(x.points)) for x in result)
            )
        return result

    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[Any]
    ) -> dict[str, Tensor]:
        """First stage: masks of points and semantic labels. Second stage: quality of points."""
        sizes, padded = images.image_sizes, (images.tensor.shape[-2], images.tensor.shape[-1])
        points = torch.stack([x.points for x in ground_truth])
        masks = torch.cat([x.masks for x in ground_truth])
        feature = self.feature_map(features)
        logits = resize_corners(self.decode(self.embed(feature, sizes, padded), points), padded)
        if self.proposal_head is not None and isinstance(self.criterion, ProposalCriterion):
            probs = logits[:, 0].float().sigmoid()
            set_padding(probs.unflatten(0, points.shape[:2]), sizes, 0)
            proposals = read_at_points(self.proposal_head(feature), points, 1 / self.stride)
            proposals = proposals.view(points.shape[:2])
            return {"loss_proposal": self.criterion(proposals, probs, masks)}
        set_padding(masks.unflatten(0, points.shape[:2]), sizes, IGNORE)
        semantic = resize_corners(self.semantic_head(feature), padded)
        labels = torch.stack([x.semantic for x in ground_truth])
        assert isinstance(self.criterion, InstanceCriterion)
        return self.criterion(logits, masks, semantic, labels, sizes)

    # ---- inference; see ``ObjectFinder``

    def encode(
        self,
        image: Tensor,
        image_size: tuple[int, int],
        features: dict[str, Tensor] | None = None,
    ) -> EncodedImage:
        padded = (image.shape[-2], image.shape[-1])
        feature = self.feature_map(self.backbone(image) if features is None else features)
        embedding = self.embed(feature, [image_size], padded)
        return EncodedImage(embedding, *self.maps(feature, padded))

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """``FoundInstances`` of a single image; ``forward`` passes one at a time."""
        (image_size,) = images.image_sizes
        encoded = self.encode(images.tensor, image_size, features)
        return [self.find(self.embedded_image(images, encoded))]

    def postprocess_batch(
        self, results: list[Any], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """See ``PanopticAssembler``."""
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        return [
            self.options.assembler(found, output_size(inputs), padded)
            for found, inputs in zip(results, batched_inputs)
        ]
