"""AdaptIS: Adaptive Instance Selection Network (arXiv 1909.07829)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from solo_d2.layers.distributed import normalizer
from solo_d2.layers.masks import chunk_length, tight_boxes
from solo_d2.layers.points import read_at_points
from solo_d2.layers.resample import resize

from ..num_classes import resolve_num_classes
from ..segmentor import GroundTruth, InstanceSegmentor
from .head import (
    STYLES,
    DenseHead,
    FeatureFusion,
    MapController,
    SelectionHead,
    VectorController,
    init_uniform,
    init_weights,
    resize_corners,
    valid_cells,
)
from .inference import (
    Segmentation,
    assemble,
    find_peaks,
    panoptic_segments,
    proposal_map,
    select_at_random,
    select_greedily,
    vote,
)
from .losses import (
    IGNORE,
    normalized_focal_loss,
    normalized_focal_loss_softmax,
    proposal_loss,
)
from .targets import (
    PROPOSAL_TARGETS,
    AdaptiveThreshold,
    dense_targets,
    draw_points,
    mask_iou,
    mask_quality,
    paint_semantic,
    targets_of_points,
)

# Detectron2 writes its log as often; a metric of each step would wait for the device each time.
_METRIC_PERIOD = 20


class Encoding(NamedTuple):
    """What is made once of a batch of images, whatever the points."""

    feature: Tensor  # (B, C, h, w)
    control: Tensor  # (B, ., h, w), of ``controller.prepare``
    selection: Tensor  # (B, ., h, w), of ``selection_head.prepare``
    valid: Tensor | None  # (B, 1, h, w) bool, cells that are not padding; None: there is none
    image_sizes: list[tuple[int, int]]
    padded_size: tuple[int, int]


class View(NamedTuple):
    """One image, as it is or mirrored, ready for any number of points."""

    encoding: Encoding
    semantic: Tensor  # (K, H, W) probabilities
    proposals: Tensor | None  # (H, W) squared probabilities, if they are used


@META_ARCH_REGISTRY.register()
class AdaptIS(InstanceSegmentor):
    """A point in, an object out; automatic and panoptic by choosing the points itself.

    Inside, points are (row, column) in pixels of the network's input. In the input dicts,
    "points" (N, 2) are (x, y) in pixels of the original image, whose size "height" and "width"
    tell.
    """

    num_classes_key = "MODEL.ADAPTIS.NUM_THINGS"
    best_metric = "panoptic_seg/PQ"

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        fusion: nn.Module | None,
        controller: nn.Module,
        selection_head: nn.Module,
        semantic_head: nn.Module,
        proposal_head: nn.Module | None,
        stride: int,
        num_stuff: int,
        num_things: int,
        num_points: int = 12,
        points_from_one_object: bool = False,
        min_object_area: int = 0,
        ignored_point_prob: float = 0.0,
        loss_alpha: float = 0.5,
        loss_gamma: float = 2.0,
        semantic_loss_gamma: float = 1.0,
        semantic_loss_weight: float = 0.75,
        freeze_bn: bool = True,
        proposal_targets: str = "score",
        dense_proposals: bool = False,
        dense_options: dict[str, Any] | None = None,
        init_threshold: float = 0.35,
        test_mode: str = "proposals",
        flip: bool = False,
        flip_original: bool = False,
        disjoint_masks: bool = True,
        min_segment_area: int = 1,
        search: dict[str, Any],
        greedy: dict[str, Any],
        random: dict[str, Any],
        assembly: dict[str, Any],
        **kwargs,
    ):
        """
        Args:
            in_features: of the backbone, finest first.
            fusion: makes one map of several features; None for a single feature.
            controller, selection_head, semantic_head: see ``head``.
            proposal_head: None in the first stage. With it, everything else is frozen.
            stride: of the map.
            num_stuff, num_things: number of classes.
            num_points: per image in training.
            points_from_one_object: of an image, in the first stage.
            min_object_area: smaller objects are not drawn, in pixels.
            ignored_point_prob: how often a region to ignore is drawn in place of an object.
            loss_alpha, loss_gamma: of the loss of masks.
            semantic_loss_gamma, semantic_loss_weight: of the semantic loss.
            freeze_bn: keep the frozen parts in eval mode in the second stage.
            proposal_targets: one of ``targets.PROPOSAL_TARGETS``.
            dense_proposals: train the proposal head on maps instead of points.
            dense_options: keywords of ``targets.dense_targets``.
            init_threshold: of masks in the second stage.
            test_mode: "proposals" or "random".
            flip: average with the mirrored image.
            flip_original: mirror points to W - column, one pixel off, as published.
            disjoint_masks: of the instances; else they may overlap.
            min_segment_area: of a panoptic segment.
            search: keywords of ``inference.proposal_map`` and ``inference.find_peaks``.
            greedy, random, assembly: keywords of ``inference.select_greedily``,
                ``inference.select_at_random`` and ``inference.assemble``.
            kwargs: see ``InstanceSegmentor``.

        Raises:
            ValueError: an option is none of those that there are.
        """
        super().__init__(**kwargs)
        self.in_features = in_features
        self.fusion = fusion
        self.controller = controller
        self.selection_head = selection_head
        self.semantic_head = semantic_head
        self.proposal_head = proposal_head
        self.stride = stride
        self.num_stuff = num_stuff
        self.num_things = num_things
        self.num_points = num_points
        self.points_from_one_object = points_from_one_object
        self.min_object_area = min_object_area
        self.ignored_point_prob = ignored_point_prob
        self.loss_alpha = loss_alpha
        self.loss_gamma = loss_gamma
        self.semantic_loss_gamma = semantic_loss_gamma
        self.semantic_loss_weight = semantic_loss_weight
        self.freeze_bn = freeze_bn
        self.proposal_targets = PROPOSAL_TARGETS[proposal_targets]
        self.dense_proposals = dense_proposals
        self.dense_options = dense_options or {}
        self.test_mode = test_mode if proposal_head is not None else "random"
        self.flip = flip
        self.flip_original = flip_original
        self.disjoint_masks = disjoint_masks
        self.min_segment_area = min_segment_area
        self.search = search
        self.greedy = greedy
        self.random = random
        self.assembly = assembly
        if proposal_head is not None:
            self.iou_threshold = AdaptiveThreshold(init_threshold)
            for parameter in self.parameters():
                parameter.requires_grad = False
            for parameter in proposal_head.parameters():
                parameter.requires_grad = True

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        options = super().from_config(cfg)
        adaptis, test = cfg.MODEL.ADAPTIS, cfg.MODEL.ADAPTIS.TEST
        _check_choice("STAGE", adaptis.STAGE, ("instance", "proposals"))
        _check_choice("HEAD", adaptis.HEAD, STYLES)
        _check_choice("CONTROLLER", adaptis.CONTROLLER, ("map", "fc"))
        _check_choice("PROPOSAL.TARGET", adaptis.PROPOSAL.TARGET, tuple(PROPOSAL_TARGETS))
        _check_choice("TEST.MODE", test.MODE, ("proposals", "random"))
        _check_choice("TEST.CLASS_VOTE", test.CLASS_VOTE, ("mean", "majority"))
        _check_choice("TEST.MASKS", test.MASKS, ("disjoint", "raw"))
        shapes = options["backbone"].output_shape()
        unknown = [name for name in adaptis.IN_FEATURES if name not in shapes]
        if unknown or not adaptis.IN_FEATURES:
            raise ValueError(
                f"MODEL.ADAPTIS.IN_FEATURES is {adaptis.IN_FEATURES}, but the backbone has "
                f"{[*shapes]}"
            )
        if adaptis.NUM_STUFF < 1:
            raise ValueError(f"MODEL.ADAPTIS.NUM_STUFF must be 1 or more, not {adaptis.NUM_STUFF}")
        levels = [shapes[name] for name in adaptis.IN_FEATURES]
        fusion, channels = None, levels[0].channels
        if len(levels) > 1:
            channels = adaptis.FUSE_DIM
            fusion = FeatureFusion(
                [x.channels for x in levels],
                [x.stride for x in levels],
                channels,
                norm=adaptis.FUSE_NORM,
            )
        num_things = resolve_num_classes(cfg, "MODEL.ADAPTIS.NUM_THINGS")
        toy = adaptis.HEAD == "toy"
        style = {"style": adaptis.HEAD, "norm": adaptis.NORM}
        dim = adaptis.CONV_DIM
        controller: nn.Module = VectorController(channels, dim)
        if adaptis.CONTROLLER == "map":
            controller = MapController(channels, dim, norm=adaptis.NORM)
        selection_head = SelectionHead(
            channels,
            dim,
            norm_radius=adaptis.NORM_RADIUS,
            append_distance=adaptis.APPEND_DIST,
            adain_after=adaptis.ADAIN_AFTER,
            adain_eps=adaptis.ADAIN_EPS,
            adain_bias_plus_one=adaptis.ADAIN_BIAS_ONE,
            rescale=adaptis.RESCALE,
            **style,
        )
        num_convs = 3 if toy else 2
        semantic_head = DenseHead(
            channels,
            adaptis.SEMANTIC_DIM,
            adaptis.NUM_STUFF + num_things,
            num_convs=num_convs,
            **style,
        )
        for head in (controller, selection_head, semantic_head):
            init_weights(head, gain=1.0 if toy else 2.0**0.5)
        proposal_head = None
        if adaptis.STAGE == "proposals":
            dropout = 0.0 if toy else 0.5
            proposal_head = DenseHead(
                channels, adaptis.PROPOSAL_DIM, 1, num_convs=2, dropout=dropout, **style
            )
            if not toy:  # published as it is: the toy's keeps PyTorch's own
                init_uniform(proposal_head)
        return {
            **options,
            "in_features": adaptis.IN_FEATURES,
            "fusion": fusion,
            "controller": controller,
            "selection_head": selection_head,
            "semantic_head": semantic_head,
            "proposal_head": proposal_head,
            "stride": levels[0].stride,
            "num_stuff": adaptis.NUM_STUFF,
            "num_things": num_things,
            "num_points": adaptis.NUM_POINTS,
            "points_from_one_object": adaptis.POINTS_FROM_ONE_OBJECT,
            "min_object_area": adaptis.MIN_OBJECT_AREA,
            "ignored_point_prob": adaptis.IGNORED_POINT_PROB,
            "loss_alpha": adaptis.LOSS.ALPHA,
            "loss_gamma": adaptis.LOSS.GAMMA,
            "semantic_loss_gamma": adaptis.LOSS.SEM_GAMMA,
            "semantic_loss_weight": adaptis.LOSS.SEM_WEIGHT,
            "freeze_bn": adaptis.FREEZE_BN,
            "proposal_targets": adaptis.PROPOSAL.TARGET,
            "dense_proposals": adaptis.PROPOSAL.DENSE,
            "dense_options": {
                "mask_unsampled": adaptis.PROPOSAL.MASK_UNSAMPLED,
                "background": adaptis.PROPOSAL.DENSE_BACKGROUND,
            },
            "init_threshold": adaptis.PROPOSAL.INIT_THRESH,
            "mask_threshold": test.THRESH1,
            "test_mode": test.MODE,
            "flip": test.FLIP,
            "flip_original": test.FLIP_ORIGINAL,
            "disjoint_masks": test.MASKS == "disjoint",
            "min_segment_area": test.MIN_SEGMENT_AREA,
            "search": {
                "min_things_prob": test.ITHRESH,
                "blur": test.FL_BLUR,
                "min_value": test.FL_PROB,
                "eps": test.FL_EPS,
                "step": test.FL_STEP,
                "flood": test.FLOOD,
            },
            "greedy": {
                "mask_threshold": test.THRESH1,
                "max_occupied": test.THRESH2,
                "cut_radius": test.CUT_RADIUS,
                "max_candidates": test.MAX_ITERS,
            },
            "random": {
                "mask_threshold": test.RANDOM.THRESH1,
                "min_free": test.RANDOM.THRESH2,
                "min_things_prob": test.RANDOM.ITHRESH,
                "num_iters": test.RANDOM.NUM_ITERS,
                "num_candidates": test.RANDOM.NUM_CANDIDATES,
            },
            "assembly": {
                "min_things_prob": test.MIN_THINGS_PROB,
                "min_stuff_prob": test.MIN_STUFF_PROB,
                "stuff_prob_mult": test.STUFF_PROB_MULT,
                "class_vote": test.CLASS_VOTE,
            },
        }

    def train(self, mode: bool = True) -> "AdaptIS":
        super().train(mode)
        if mode and self.proposal_head is not None and self.freeze_bn:
            for name, child in self.named_children():
                if name != "proposal_head":
                    child.eval()
        return self

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: as for ``InstanceSegmentor``. For training optionally "sem_seg"
                (H, W) int64 (stuff, then things, -1 ignored), painted from the instances if there
                is none, and "points" (N, 2) in place of drawn ones, the same N for all images.
                For inference, "points" asks for what lies under them.

        Returns:
            Training: named losses. Inference, at output size: {"instances"}, one per point and in
            their order if there are points, else {"instances", "panoptic_seg", "sem_seg"}; see
            ``prompt`` and ``segment``.
        """
        if self.training:
            images = self.preprocess_image(batched_inputs)
            ground_truth = self.prepare_ground_truth(batched_inputs, images)
            if self.proposal_head is None:
                return self.instance_losses(images, ground_truth, batched_inputs)
            return self.proposal_losses(images, ground_truth, batched_inputs)
        # one by one: what a batch would pad changes the statistics that masks are made with
        results = []
        for inputs in batched_inputs:
            views = self.views(inputs)
            height = inputs.get("height", views[0].semantic.shape[-2])
            width = inputs.get("width", views[0].semantic.shape[-1])
            if "points" in inputs:
                results.append({"instances": self.prompt(views, inputs["points"], height, width)})
            else:
                results.append(self.segment(views, height, width))
        return results

    # ---- shared by training and inference

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        images = super().preprocess_image(batched_inputs)
        if self.training and not torch.is_autocast_enabled("cpu"):
            # With channels last, a third quicker, the CPU's batch norms sum far less exactly: ReLU
            # and pooling then pick other pixels, and some gradients differ by per cents.
            images.tensor = images.tensor.contiguous()
        return images

    def encode(self, images: ImageList) -> Encoding:
        """Everything that does not depend on points."""
        features = self.backbone(images.tensor)
        chosen = [features[name] for name in self.in_features]
        feature = chosen[0] if self.fusion is None else self.fusion(chosen)
        # a feature that is not taken is connected too: processes that train together must have a
        # gradient for every parameter
        idle = [x[:0].sum() for name, x in features.items() if name not in self.in_features]
        if idle and self.training:
            feature = feature + sum(idle)
        padded_size = (images.tensor.shape[-2], images.tensor.shape[-1])
        valid = None
        if any(tuple(size) != padded_size for size in images.image_sizes):
            map_size = (feature.shape[-2], feature.shape[-1])
            valid = valid_cells(images.image_sizes, map_size, 1 / self.stride, feature.device)
        return Encoding(
            feature,
            self.controller.prepare(feature),
            self.selection_head.prepare(feature),
            valid,
            images.image_sizes,
            padded_size,
        )

    def select(self, encoding: Encoding, points: Tensor) -> Tensor:
        """
        Args:
            encoding: of B images.
            points: (B, N, 2) rows and columns.

        Returns:
            (B * N, 1, h, w) logits at the stride of the map, image by image.
        """
        control = self.controller(encoding.control, points, 1 / self.stride)
        return self.selection_head(
            encoding.selection, points, control, 1 / self.stride, encoding.valid
        )

    # ---- training

    def instance_losses(
        self,
        images: ImageList,
        ground_truth: list[GroundTruth],
        batched_inputs: list[dict],
    ) -> dict[str, Tensor]:
        """The first stage: masks under points, and semantic labels."""
        encoding = self.encode(images)
        points, targets = self.point_targets(
            ground_truth, batched_inputs, from_one_object=self.points_from_one_object
        )
        logits = resize_corners(self.select(encoding, points), encoding.padded_size)
        targets = targets.unflatten(0, points.shape[:2])
        _set_padding(targets, images.image_sizes, IGNORE)
        pixels = points.new_tensor([h * w for h, w in images.image_sizes])
        masks_loss = normalized_focal_loss(
            logits,
            targets.flatten(0, 1)[:, None],
            alpha=self.loss_alpha,
            gamma=self.loss_gamma,
            num_pixels=pixels.repeat_interleave(points.shape[1]),
        )
        semantic = resize_corners(self.semantic_head(encoding.feature), encoding.padded_size)
        labels = torch.stack(
            [self.semantic_target(gt, x) for gt, x in zip(ground_truth, batched_inputs)]
        )
        semantic_loss = normalized_focal_loss_softmax(
            semantic, labels, gamma=self.semantic_loss_gamma
        )
        if has_event_storage() and get_event_storage().iter % _METRIC_PERIOD == 0:
            self._log_mask_iou(logits[:, 0].detach(), targets.flatten(0, 1))
        return {
            "loss_instance": masks_loss.mean(),
            "loss_semantic": self.semantic_loss_weight * semantic_loss.mean(),
        }

    def _log_mask_iou(self, logits: Tensor, targets: Tensor) -> None:
        """The loss, rescaled in every step, hardly shows whether the masks get better."""
        iou = mask_iou(logits.float().sigmoid(), targets, self.mask_threshold)
        known = targets.flatten(1).gt(0).any(dim=1)
        if known.any():
            get_event_storage().put_scalar("adaptis/mask_iou", iou[known].mean().item())

    def proposal_losses(
        self,
        images: ImageList,
        ground_truth: list[GroundTruth],
        batched_inputs: list[dict],
    ) -> dict[str, Tensor]:
        """The second stage: how good a mask each of the points on an object gives."""
        assert self.proposal_head is not None
        with torch.no_grad():
            encoding = self.encode(images)
            points, masks = self.point_targets(ground_truth, batched_inputs, from_one_object=True)
            logits = resize_corners(self.select(encoding, points), encoding.padded_size)
            probs = logits[:, 0].float().sigmoid().unflatten(0, points.shape[:2])
            _set_padding(probs, encoding.image_sizes, 0)
            targets, iou = self.proposal_targets_of(probs.flatten(0, 1), masks, points)
        logits = self.proposal_head(encoding.feature)
        if self.dense_proposals:
            sampled = (masks > 0).unflatten(0, (-1, points.shape[1]))[:, 0]
            objects = torch.stack([gt.masks.any(dim=0) for gt in ground_truth])
            targets = dense_targets(points, targets, sampled, objects, **self.dense_options)
            _set_padding(targets, encoding.image_sizes, IGNORE)
            loss = proposal_loss(resize_corners(logits, encoding.padded_size)[:, 0], targets)
            loss = loss.sum() / normalizer((targets != IGNORE).sum())
        else:
            at_points = read_at_points(logits, points, 1 / self.stride)
            loss = proposal_loss(at_points[:, 0], targets.flatten()).mean()
        if has_event_storage():
            get_event_storage().put_scalar("adaptis/mask_iou", iou.item())
            get_event_storage().put_scalar(
                "adaptis/mask_threshold", self.iou_threshold.value.item()
            )
        return {"loss_proposal": loss}

    def proposal_targets_of(
        self, probs: Tensor, masks: Tensor, points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Move the adaptive threshold, then judge the points by it.

        Args:
            probs: (B * N, H, W) soft masks.
            masks: (B * N, H, W): 1 object, 0 rest, -1 ignored.
            points: (B, N, 2).

        Returns:
            (B, N) targets of the points and the mean IoU.
        """
        iou = self.iou_threshold.update(probs, masks)
        shape = points.shape[:2]
        targets = self.proposal_targets(
            mask_iou(probs, masks, self.iou_threshold.value).view(shape),
            mask_quality(probs, masks).view(shape),
        )
        return targets, iou

    def point_targets(
        self,
        ground_truth: list[GroundTruth],
        batched_inputs: list[dict],
        *,
        from_one_object: bool,
    ) -> tuple[Tensor, Tensor]:
        """Points (B, N, 2) and the masks under them (B * N, H, W) int8, -1 ignored.

        Raises:
            ValueError: the images bring different numbers of points.
        """
        drawn = []
        for gt, inputs in zip(ground_truth, batched_inputs):
            if "points" in inputs:
                height = inputs.get("height", gt.image_size[0])
                width = inputs.get("width", gt.image_size[1])
                points = to_input_frame(inputs["points"], (height, width), gt.image_size)
                drawn.append(targets_of_points(points.to(self.device), gt.masks))
                continue
            first_stage = self.proposal_head is None
            drawn.append(
                draw_points(
                    gt.masks,
                    gt.crowd_masks,
                    self.num_points,
                    from_one_object=from_one_object,
                    min_area=self.min_object_area,
                    ignored_prob=self.ignored_point_prob if first_stage else 0.0,
                )
            )
        if len({len(x.points) for x in drawn}) != 1:
            raise ValueError(
                "all images of a training batch need the same number of points, not "
                + ", ".join(str(len(x.points)) for x in drawn)
            )
        masks = torch.stack([x.masks for x in drawn])
        return torch.stack([x.points for x in drawn]), masks.flatten(0, 1)

    def semantic_target(self, gt: GroundTruth, inputs: dict) -> Tensor:
        """(H, W) int64 at the padded size: stuff, then things, -1 ignored.

        Raises:
            ValueError: there are several stuff classes and no "sem_seg".
        """
        h, w = gt.image_size
        labels = torch.full(gt.masks.shape[1:], IGNORE, dtype=torch.long, device=self.device)
        if "sem_seg" in inputs:
            given = inputs["sem_seg"].to(self.device).long()
            # Detectron2's own label for what is to be ignored, 255, is beyond all classes
            known = (given >= 0) & (given < self.num_stuff + self.num_things)
            labels[:h, :w] = torch.where(known, given, IGNORE)
            return labels
        if self.num_stuff != 1:
            raise ValueError(
                f"MODEL.ADAPTIS.NUM_STUFF is {self.num_stuff}, but image "
                f"{inputs.get('file_name', '?')} has no 'sem_seg'"
            )
        painted = paint_semantic(gt.masks, gt.classes, gt.crowd_masks, num_stuff=self.num_stuff)
        labels[:h, :w] = painted[:h, :w]
        return labels

    # ---- inference

    @torch.no_grad()
    def views(self, inputs: dict) -> list[View]:
        """The image of an input dict, and its mirror image if that is asked for."""
        images = [inputs["image"]]
        if self.flip:
            images.append(inputs["image"].flip(-1))
        return [self._view(self.preprocess_image([{"image": image}])) for image in images]

    def _view(self, images: ImageList) -> View:
        encoding = self.encode(images)
        semantic = self.semantic_head(encoding.feature).float().softmax(dim=1)
        proposals = None
        if self.proposal_head is not None and self.test_mode == "proposals":
            logits = self.proposal_head(encoding.feature).float()
            proposals = self._to_image(logits, encoding)[0, 0].sigmoid() ** 2
        return View(encoding, self._to_image(semantic, encoding)[0], proposals)

    def _to_image(self, maps: Tensor, encoding: Encoding) -> Tensor:
        """(n, C, h, w) -> (n, C, H, W) in the frame of the image without padding."""
        h, w = encoding.image_sizes[0]
        return resize_corners(maps, encoding.padded_size)[..., :h, :w]

    @torch.no_grad()
    def mask_probabilities(self, views: list[View], points: Tensor) -> Tensor:
        """Soft masks of points, the mean over the views.

        Args:
            views: of one image.
            points: (n, 2) rows and columns; in one pass, but chunks of them where it would take
                much memory.

        Returns:
            (n, H, W) float32 at the size of the network's input.
        """
        return torch.cat([*self._mask_chunks(views, points)])

    def _mask_chunks(self, views: list[View], points: Tensor) -> Iterator[Tensor]:
        points = points.to(self.device)
        width = views[0].encoding.image_sizes[0][1]
        prepared = views[0].encoding.selection[0]
        for chunk in points.split(chunk_length(prepared.numel())):
            mean = self._probabilities(views[0], chunk)
            if len(views) > 1:
                last = width if self.flip_original else width - 1
                mirrored = torch.stack([chunk[:, 0], last - chunk[:, 1]], dim=1)
                mean = (mean + self._probabilities(views[1], mirrored).flip(-1)) / 2
            yield mean

    def _probabilities(self, view: View, points: Tensor) -> Tensor:
        probs = self.select(view.encoding, points[None]).float().sigmoid()
        # the published code enlarges probabilities here, logits in training
        return self._to_image(probs, view.encoding)[:, 0]

    def mean_of_views(self, views: list[View]) -> tuple[Tensor, Tensor | None]:
        """Semantic probabilities (K, H, W) and the proposal map (H, W) at the input's size."""
        semantic, proposals = views[0].semantic, views[0].proposals
        if len(views) > 1:
            semantic = (semantic + views[1].semantic.flip(-1)) / 2
            if proposals is not None and views[1].proposals is not None:
                proposals = (proposals + views[1].proposals.flip(-1)) / 2
        return semantic, proposals

    @torch.no_grad()
    def prompt(self, views: list[View], points: Tensor, height: int, width: int) -> Instances:
        """What lies under points: one instance per point, in their order, none suppressed.

        Args:
            views: of the image.
            points: (N, 2), x and y in the output frame.
            height, width: of the output.

        Returns:
            Instances with ``pred_masks``, ``pred_boxes``, ``scores``, ``pred_classes`` and
            ``mask_probabilities`` (N, height, width) float32, of which the masks are those above
            TEST.THRESH1. A mask may be empty; its score is 0 then.

        Raises:
            ValueError: see ``to_input_frame``.
        """
        points = to_input_frame(points, (height, width), views[0].encoding.image_sizes[0])
        things = resize(self.mean_of_views(views)[0][None], (height, width))[0, self.num_stuff :]
        probs = torch.cat(
            [resize(x[:, None], (height, width))[:, 0] for x in self._mask_chunks(views, points)]
        )
        votes = [
            vote(
                chunk,
                things,
                mask_threshold=self.mask_threshold,
                class_vote=self.assembly["class_vote"],
            )
            for chunk in probs.split(chunk_length(height * width))
        ]
        result = Instances((height, width))
        result.pred_masks = probs > self.mask_threshold
        result.pred_boxes = Boxes(tight_boxes(result.pred_masks))
        result.scores = torch.cat([x[1] for x in votes])
        result.pred_classes = torch.cat([x[0] for x in votes])
        result.mask_probabilities = probs
        return result

    @torch.no_grad()
    def segment(self, views: list[View], height: int, width: int) -> dict[str, Any]:
        """Everything in the image.

        Masks are chosen at the network's resolution. Their probabilities, not the binary masks,
        are then resized and compete for the pixels of the output.

        Returns:
            "instances" (their masks do not overlap unless TEST.MASKS is "raw"; without overlaps,
            AP is lower than it could be), "panoptic_seg" (see ``panoptic_segments``) and
            "sem_seg", the probabilities (K, height, width).
        """
        semantic, proposals = self.mean_of_views(views)
        semantic = semantic.contiguous()
        things = semantic[self.num_stuff :]

        def predict(points: Tensor) -> Tensor:
            return self.mask_probabilities(views, points)

        if proposals is not None:
            threshold = self.greedy["mask_threshold"]
            occupied = torch.zeros(proposals.shape, dtype=torch.bool, device=self.device)
            masks = select_greedily(
                self.find_candidates(proposals, things, occupied),
                predict,
                occupied,
                **self.greedy,
            )
        else:
            threshold = self.random["mask_threshold"]
            # the same points in every run
            generator = torch.Generator().manual_seed(0)
            masks = select_at_random(predict, things, generator=generator, **self.random)
        semantic = resize(semantic[None], (height, width))[0]
        segmentation = assemble(
            masks,
            semantic,
            num_stuff=self.num_stuff,
            mask_threshold=threshold,
            keep_masks=not self.disjoint_masks,
            **self.assembly,
        )
        return {
            "instances": self._to_instances(segmentation),
            "panoptic_seg": panoptic_segments(
                segmentation, num_stuff=self.num_stuff, min_area=self.min_segment_area
            ),
            "sem_seg": semantic,
        }

    def find_candidates(self, proposals: Tensor, things: Tensor, occupied: Tensor) -> Any:
        """(K, 2) rows and columns in the order in which they are looked at."""
        search = dict(self.search)
        values = proposal_map(
            proposals,
            things,
            occupied,
            min_things_prob=search.pop("min_things_prob"),
            blur=search.pop("blur"),
        )
        return find_peaks(values, max_peaks=self.greedy["max_candidates"], **search)[0]

    def _to_instances(self, segmentation: Segmentation) -> Instances:
        """The instances that have pixels."""
        result = Instances((segmentation.ids.shape[0], segmentation.ids.shape[1]))
        count = len(segmentation.scores)
        if self.disjoint_masks:
            numbers = torch.arange(1, count + 1, device=self.device)
            masks = segmentation.ids == numbers[:, None, None]
        else:
            none = segmentation.ids.new_zeros((0, *segmentation.ids.shape), dtype=torch.bool)
            masks = torch.stack(segmentation.masks) if segmentation.masks else none
        present = masks.flatten(1).any(dim=1)
        result.pred_masks = masks[present]
        result.pred_boxes = Boxes(tight_boxes(result.pred_masks))
        result.scores = segmentation.scores[present]
        result.pred_classes = segmentation.classes[present]
        return result


def to_input_frame(points: Any, original: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Points given by a user, checked, as the network takes them.

    Args:
        points: (N, 2), x and y in pixels of the original image; anything that a tensor is made of.
        original: height and width of the original image.
        size: height and width of the network's input without padding.

    Returns:
        (N, 2) float32 rows and columns in the network's input.

    Raises:
        ValueError: there is no point, it is not two numbers, or it lies outside the image.
    """
    points = torch.as_tensor(points, dtype=torch.float32)
    if points.numel() == 0:
        raise ValueError("no points; give one (x, y) or more")
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be (N, 2), x and y of each, not {tuple(points.shape)}")
    height, width = original
    for number, (x, y) in enumerate(points.tolist()):
        if not (0 <= x < width and 0 <= y < height):  # NaN is not either
            what = "is not a number" if x != x or y != y else "is outside the image"
            raise ValueError(
                f"point {number} (x={x:g}, y={y:g}) {what}; the image has {width} x {height} pixels"
            )
    scale = points.new_tensor([size[0] / height, size[1] / width])
    return points.flip(1) * scale


def _set_padding(maps: Tensor, image_sizes: list[tuple[int, int]], value: int) -> None:
    """Fill (B, ..., H, W) outside the images, in place."""
    for image, (h, w) in zip(maps, image_sizes):
        image[..., h:, :] = value
        image[..., w:] = value


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"MODEL.ADAPTIS.{key} must be one of {', '.join(choices)}, not {value!r}")
