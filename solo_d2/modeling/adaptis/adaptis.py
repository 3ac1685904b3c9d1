"""AdaptIS: Adaptive Instance Selection Network (arXiv 1909.07829).

An image is embedded once; points are then decoded into masks. In this folder, ``head`` has the
layers, ``targets`` and ``criterion`` are for training, ``embedded`` is an image that is ready for
points, ``automatic`` chooses points without a user, ``panoptic`` assembles masks, and ``predictor``
is the interactive interface.

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
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..num_classes import resolve_num_classes
from ..options import check_choice
from ..segmentor import GroundTruth, InstanceSegmentor
from .automatic import ProposalSelection, RandomSelection
from .criterion import InstanceCriterion, ProposalCriterion, mask_iou
from .embedded import EncodedImages, ImageEmbedding
from .finder import ObjectFinder
from .head import FeatureFusion, Heads, build_heads, resize_corners, valid_cells
from .panoptic import PanopticAssembler, PanopticInstances
from .targets import (
    IGNORE,
    PointSampler,
    paint_semantic,
    set_padding,
    targets_of_points,
    to_input_frame,
)

# Detectron2 writes its log this often; logging in each step would synchronize with the device.
_METRIC_PERIOD = 20


class PointGroundTruth(NamedTuple):
    """Ground truth of one image."""

    objects: GroundTruth
    semantic: Tensor  # (H, W) int64 in [0, C), -1 ignored
    points: Tensor | None  # (P, 2) rows and columns given by the user instead of random ones


@META_ARCH_REGISTRY.register()
class AdaptIS(InstanceSegmentor, ObjectFinder):
    """Segments the object under each point. Without points, it chooses them itself.

    Inside, points are (row, column) in pixels of the network's input. In the input dicts,
    "points" (P, 2) are (x, y) in pixels of the original image, whose size is given by "height" and
    "width".
    """

    num_classes_key = "MODEL.ADAPTIS.NUM_THINGS"
    best_metric = "panoptic_seg/PQ"

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        fusion: nn.Module | None = None,
        heads: Heads,
        num_things: int,
        sampler: PointSampler,
        instance_criterion: InstanceCriterion,
        proposal_criterion: ProposalCriterion | None = None,
        freeze_bn: bool = True,
        test_mode: str = "auto",
        flip: bool = False,
        flip_original: bool = False,
        proposal_selection: ProposalSelection,
        random_selection: RandomSelection,
        assembler: PanopticAssembler,
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
            num_things: number of thing classes.
            sampler: samples the points of a training step.
            instance_criterion, proposal_criterion: losses of the two stages.
            freeze_bn: in the second stage, keep the frozen parts in eval mode. False: let the
                statistics of their batch norms drift, as the published code does.
            test_mode: how objects are found without points: "proposals", "random", or "auto" for
                proposals if there is a proposal head.
            flip: average over the image and its mirror image.
            flip_original: mirror points to W - column, one pixel off, as the published code does.
            proposal_selection, random_selection: the two ways to find objects.
            assembler: combines masks into instances and segments.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            freeze_bn_stats=freeze_bn_stats,
            mask_threshold=proposal_selection.mask_threshold,
            num_classes=num_things,
        )
        shapes = backbone.output_shape()
        if not in_features or not set(in_features) <= set(shapes):
            raise ValueError(f"in_features is {in_features}, but the backbone has {[*shapes]}")
        if (fusion is None) != (len(in_features) == 1):
            raise ValueError(f"fusion is needed for several features, not for {in_features}")
        check_choice("test_mode", test_mode, ("auto", "proposals", "random"))
        second_stage = heads.proposal is not None
        if test_mode == "proposals" and not second_stage:
            raise ValueError("test_mode 'proposals' needs a proposal head")
        if second_stage != (proposal_criterion is not None):
            raise ValueError("a proposal head and proposal_criterion belong together")
        self.in_features = in_features
        self.stride = shapes[in_features[0]].stride
        self.fusion = fusion
        self.controller, self.selection_head, self.semantic_head, self.proposal_head = heads
        self.num_things = num_things
        self.sampler = sampler
        self.instance_criterion = instance_criterion
        self.proposal_criterion = proposal_criterion
        self.freeze_bn = freeze_bn
        self.use_proposals = second_stage and test_mode != "random"
        self.flip = flip
        self.flip_original = flip_original
        self.proposal_selection = proposal_selection
        self.random_selection = random_selection
        self.assembler = assembler
        if self.proposal_head is not None and proposal_criterion is not None:
            self.iou_threshold = proposal_criterion.iou_threshold
            self.requires_grad_(False)
            self.proposal_head.requires_grad_(True)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = super().from_config(cfg)
        adaptis, test = cfg.MODEL.ADAPTIS, cfg.MODEL.ADAPTIS.TEST
        check_choice("MODEL.ADAPTIS.STAGE", adaptis.STAGE, ("instance", "proposals"))
        second_stage = adaptis.STAGE == "proposals"
        shapes = options["backbone"].output_shape()
        levels = [shapes[name] for name in adaptis.IN_FEATURES if name in shapes]
        fusion, channels = None, levels[0].channels if levels else 1
        if len(levels) > 1:
            channels = adaptis.FUSE_DIM
            fusion = FeatureFusion(
                [x.channels for x in levels], [x.stride for x in levels], channels
            )
        num_things = resolve_num_classes(cfg, cls.num_classes_key)
        return {
            **options,
            "in_features": adaptis.IN_FEATURES,
            "fusion": fusion,
            "heads": build_heads(
                adaptis.HEAD,
                channels,
                adaptis.NUM_STUFF + num_things,
                conv_dim=adaptis.CONV_DIM,
                semantic_dim=adaptis.SEMANTIC_DIM,
                proposal_dim=adaptis.PROPOSAL_DIM if second_stage else None,
                norm_radius=adaptis.NORM_RADIUS,
            ),
            "num_things": num_things,
            "sampler": PointSampler(
                num_points=adaptis.NUM_POINTS,
                from_one_object=second_stage,
                min_area=adaptis.MIN_OBJECT_AREA,
            ),
            "instance_criterion": InstanceCriterion(alpha=adaptis.LOSS_ALPHA),
            "proposal_criterion": ProposalCriterion(targets=adaptis.PROPOSAL_TARGETS)
            if second_stage
            else None,
            "test_mode": test.MODE,
            "flip": test.FLIP,
            "proposal_selection": ProposalSelection(
                mask_threshold=test.MASK_THRESH,
                max_occupied=test.MAX_OCCUPIED,
                max_candidates=test.MAX_CANDIDATES,
                min_things_prob=test.THINGS_THRESH,
                min_value=test.PROPOSAL_THRESH,
                blur=test.PROPOSAL_BLUR,
            ),
            "random_selection": RandomSelection(
                min_things_prob=test.RANDOM_THINGS_THRESH, num_rounds=test.RANDOM_ROUNDS
            ),
            "assembler": PanopticAssembler(num_stuff=adaptis.NUM_STUFF),
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
            "sem_seg"}, see ``postprocess``.

        Raises:
            ValueError: see ``InstanceSegmentor``; or images are too small to train batch norm.
        """
        if self.training:
            return self._train_step(batched_inputs)
        # One image at a time: padding to a common size would change AdaIN's statistics.
        with torch.no_grad():
            return [self._prompt(x) if "points" in x else self._segment(x) for x in batched_inputs]

    def _train_step(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
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

    def _segment(self, inputs: dict) -> dict[str, Any]:
        outputs: Any = super().forward([inputs])
        return outputs[0]["instances"].output()

    def _prompt(self, inputs: dict) -> dict[str, Instances]:
        image = self.embed_image(inputs["image"])
        height = inputs.get("height", image.size[0])
        width = inputs.get("width", image.size[1])
        return {"instances": self.describe(image, image.prompt(inputs["points"], height, width))}

    # ---- embed once, decode many times

    def embed(
        self, features: dict[str, Tensor], image_sizes: list[tuple[int, int]], padded: tuple
    ) -> ImageEmbedding:
        """Compute everything that does not depend on points.

        Args:
            features: the backbone's features.
            image_sizes: heights and widths without padding.
            padded: height and width of the batch.
        """
        feature = self.fuse(features)
        if self.training:
            # Connect the unused features: under DistributedDataParallel every parameter needs a
            # gradient.
            unused = [x[:0].sum() for k, x in features.items() if k not in self.in_features]
            feature = sum(unused, feature)
        valid = None
        if any(tuple(size) != tuple(padded) for size in image_sizes):
            map_size = (feature.shape[-2], feature.shape[-1])
            sizes = torch.tensor([[int(x) for x in size] for size in image_sizes])
            valid = valid_cells(sizes.to(feature.device), map_size, 1 / self.stride)
        return self.embedding_of(feature, valid)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        """The feature map (N, channels, h, w) of the backbone's features."""
        chosen = [features[name] for name in self.in_features]
        return chosen[0] if self.fusion is None else self.fusion(chosen)

    def embedding_of(self, feature: Tensor, valid: Tensor | None) -> ImageEmbedding:
        """What the decoder takes; ``valid`` as in ``ImageEmbedding``."""
        control = self.controller.prepare(feature)
        return ImageEmbedding(feature, control, self.selection_head.prepare(feature), valid)

    def decode(self, embedding: ImageEmbedding, points: Tensor) -> Tensor:
        """Points (N, P, 2) of N embedded images -> (N * P, 1, h, w) mask logits."""
        scale = 1 / self.stride
        control = self.controller(embedding.control, points, scale)
        return self.selection_head(embedding.selection, points, control, scale, embedding.valid)

    # ---- training

    def prepare_ground_truth(self, batched_inputs: list[dict], images: ImageList) -> list[Any]:
        """A ``PointGroundTruth`` for each image.

        Raises:
            ValueError: see ``InstanceSegmentor``; or a point is outside its image, or there are
                several stuff classes and no "sem_seg".
        """
        result = []
        for gt, inputs in zip(super().prepare_ground_truth(batched_inputs, images), batched_inputs):
            points = None
            if "points" in inputs:
                original = tuple(
                    inputs.get(k, n) for k, n in zip(("height", "width"), gt.image_size)
                )
                points = to_input_frame(inputs["points"], original, gt.image_size).to(self.device)
            result.append(PointGroundTruth(gt, self._semantic_target(gt, inputs), points))
        return result

    def _semantic_target(self, gt: GroundTruth, inputs: dict) -> Tensor:
        h, w = gt.image_size
        labels = torch.full(gt.masks.shape[1:], IGNORE, dtype=torch.long, device=self.device)
        num_stuff = self.assembler.num_stuff
        if "sem_seg" in inputs:
            given = inputs["sem_seg"].to(self.device).long()
            # Detectron2's label for ignored pixels, 255, is above all classes
            known = (given >= 0) & (given < num_stuff + self.num_things)
            labels[:h, :w] = torch.where(known, given, IGNORE)
        elif num_stuff != 1:
            raise ValueError(
                f"num_stuff is {num_stuff}, but image {inputs.get('file_name', '?')} has no "
                "'sem_seg'"
            )
        else:
            painted = paint_semantic(gt.masks, gt.classes, gt.crowd_masks, num_stuff=num_stuff)
            labels[:h, :w] = painted[:h, :w]
        return labels

    def losses(
        self, images: ImageList, features: dict[str, Tensor], ground_truth: list[Any]
    ) -> dict[str, Tensor]:
        """First stage: masks of points and semantic labels. Second stage: quality of points."""
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        points, masks = self.point_targets(ground_truth)
        if self.proposal_head is not None:
            return self._proposal_losses(images, features, points, masks)
        embedding = self.embed(features, images.image_sizes, padded)
        logits = resize_corners(self.decode(embedding, points), padded)
        set_padding(masks.unflatten(0, points.shape[:2]), images.image_sizes, IGNORE)
        semantic = resize_corners(self.semantic_head(embedding.feature), padded)
        labels = torch.stack([x.semantic for x in ground_truth])
        if _is_logged():
            # the loss is rescaled in every step and hardly shows whether the masks improve
            iou = mask_iou(logits[:, 0].detach().float().sigmoid(), masks, self.mask_threshold)
            known = masks.flatten(1).gt(0).any(dim=1)
            if known.any():
                get_event_storage().put_scalar("adaptis/mask_iou", iou[known].mean().item())
        return self.instance_criterion(logits, masks, semantic, labels, images.image_sizes)

    def _proposal_losses(
        self, images: ImageList, features: dict[str, Tensor], points: Tensor, masks: Tensor
    ) -> dict[str, Tensor]:
        assert self.proposal_head is not None and self.proposal_criterion is not None
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        with torch.no_grad():
            embedding = self.embed(features, images.image_sizes, padded)
            logits = resize_corners(self.decode(embedding, points), padded)
            probs = logits[:, 0].float().sigmoid()
            set_padding(probs.unflatten(0, points.shape[:2]), images.image_sizes, 0)
            targets, iou = self.proposal_criterion.targets_of(probs, masks, points)
        if _is_logged():
            storage, threshold = get_event_storage(), self.proposal_criterion.iou_threshold
            storage.put_scalar("adaptis/mask_iou", iou.item())
            storage.put_scalar("adaptis/mask_threshold", threshold.value.item())
        loss = self.proposal_criterion(
            self.proposal_head(embedding.feature),
            points,
            targets,
            masks,
            images.image_sizes,
            1 / self.stride,
        )
        return {"loss_proposal": loss}

    def point_targets(self, ground_truth: list[PointGroundTruth]) -> tuple[Tensor, Tensor]:
        """Points (N, P, 2), and the masks under them (N * P, H, W) int8, -1 ignored.

        Raises:
            ValueError: the images have different numbers of points.
        """
        drawn = [
            self.sampler(gt.objects.masks, gt.objects.crowd_masks)
            if gt.points is None
            else targets_of_points(gt.points, gt.objects.masks)
            for gt in ground_truth
        ]
        if len({len(x.points) for x in drawn}) != 1:
            raise ValueError(
                "all images of a training batch need the same number of points, not "
                + ", ".join(str(len(x.points)) for x in drawn)
            )
        masks = torch.stack([x.masks for x in drawn])
        return torch.stack([x.points for x in drawn]), masks.flatten(0, 1)

    # ---- inference; see ``ObjectFinder``

    def encode(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> EncodedImages:
        padded = (images.shape[-2], images.shape[-1])
        return self.encode_features(self.backbone(images), image_sizes, padded)

    def encode_features(
        self,
        features: dict[str, Tensor],
        image_sizes: list[tuple[int, int]],
        padded: tuple[int, int],
    ) -> EncodedImages:
        """Embedding and dense maps; arguments as ``embed``."""
        embedding = self.embed(features, image_sizes, padded)
        return EncodedImages(embedding, *self.maps(embedding.feature, padded))

    def maps(self, feature: Tensor, padded: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Semantic probabilities (N, C, H, W), and the proposal map (N, H, W) if it is used."""
        semantic = self.semantic_head(feature).float().softmax(dim=1)
        proposals = None
        if self.use_proposals:
            assert self.proposal_head is not None
            logits = resize_corners(self.proposal_head(feature).float(), padded)
            proposals = logits[:, 0].sigmoid() ** 2
        return resize_corners(semantic, padded), proposals

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """``FoundInstances`` of each image."""
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        encoded = self.encode_features(features, images.image_sizes, padded)
        return [self.find(image) for image in self.embedded_images(images, encoded)]

    def postprocess(
        self, instances: Instances, height: int, width: int, padded_size: tuple[int, int]
    ) -> PanopticInstances:
        """See ``PanopticAssembler``."""
        return self.assembler(instances, (height, width), padded_size)


def _is_logged() -> bool:
    return has_event_storage() and get_event_storage().iter % _METRIC_PERIOD == 0
