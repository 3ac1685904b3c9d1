"""What is done with encoded images, whoever encoded them: the model, or a file exported from it."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from solo_d2.layers.masks import chunk_length, tight_boxes
from solo_d2.layers.resample import resize

from ..options import check_choice
from .automatic import ProposalSelection, RandomSelection
from .embedded import EmbeddedImage, ImageEmbedding
from .panoptic import FoundInstances, PanopticAssembler


class EncodedImage(NamedTuple):
    """What the network says about one image before points are known."""

    embedding: ImageEmbedding
    semantic: Tensor  # (1, C, H, W) probabilities
    proposals: Tensor | None  # (1, H, W) squared probabilities, if they are used


@dataclass(frozen=True)
class InferenceOptions:
    """How an encoded image becomes objects."""

    proposals: ProposalSelection
    random: RandomSelection
    assembler: PanopticAssembler
    # How objects are found without points: "proposals", "random", or "auto" for proposals if there
    # is a proposal head.
    mode: str = "auto"
    # Average over the image and its mirror image.
    flip: bool = False
    # Mirror points to W - column, one pixel off, as the published code does.
    flip_original: bool = False

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("auto", "proposals", "random"))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "InferenceOptions":
        adaptis, test = cfg.MODEL.ADAPTIS, cfg.MODEL.ADAPTIS.TEST
        return cls(
            ProposalSelection(
                mask_threshold=test.MASK_THRESH,
                max_occupied=test.MAX_OCCUPIED,
                max_candidates=test.MAX_CANDIDATES,
                min_things_prob=test.THINGS_THRESH,
                min_value=test.PROPOSAL_THRESH,
                blur=test.PROPOSAL_BLUR,
            ),
            RandomSelection(
                min_things_prob=test.RANDOM_THINGS_THRESH, num_rounds=test.RANDOM_ROUNDS
            ),
            PanopticAssembler(
                num_stuff=adaptis.NUM_STUFF,
                thing_offset=adaptis.NUM_STUFF if adaptis.THINGS_AFTER_STUFF else 0,
            ),
            mode=test.MODE,
            flip=test.FLIP,
        )


class ObjectFinder:
    """Objects under points, and objects at points that it chooses itself.

    Attributes:
        stride: of the feature map.
        mask_threshold: of the masks of points.
        device: of the tensors.
        options: see ``InferenceOptions``.
    """

    stride: int
    mask_threshold: float
    device: torch.device
    options: InferenceOptions

    @abstractmethod
    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Images as ``encode`` takes them."""

    @abstractmethod
    def encode(self, image: Tensor, image_size: tuple[int, int]) -> EncodedImage:
        """Everything that does not depend on points.

        Args:
            image: (1, 3, H, W), padded.
            image_size: height and width without padding.
        """

    @abstractmethod
    def decode(self, embedding: ImageEmbedding, points: Tensor) -> Tensor:
        """Points (N, P, 2) of N embedded images -> (N * P, 1, h, w) mask logits."""

    def embedded_image(self, images: ImageList, encoded: EncodedImage) -> EmbeddedImage:
        """One image, ready for points.

        Args:
            images: see ``preprocess_image``.
            encoded: the same image. Its mirror image is encoded here.
        """
        ((h, w),) = images.image_sizes
        embedding, semantic, proposals = encoded
        views = [embedding]
        if self.options.flip:
            mirrored = self.encode(images.tensor.flip(-1), (h, w))
            view = mirrored.embedding
            if view.valid is not None:  # the padding is at the left
                view = view._replace(valid=view.valid.flip(-1))
            views.append(view)
            semantic = (semantic + mirrored.semantic.flip(-1)) / 2
            if proposals is not None and mirrored.proposals is not None:
                proposals = (proposals + mirrored.proposals.flip(-1)) / 2
        return EmbeddedImage(
            decode=self.decode,
            views=views,
            semantic=semantic[0, :, :h, :w].contiguous(),
            proposals=None if proposals is None else proposals[0, :h, :w].contiguous(),
            size=(h, w),
            padded_size=(images.tensor.shape[-2], images.tensor.shape[-1]),
            stride=self.stride,
            mirror_offset=0 if self.options.flip_original else 1,
        )

    @torch.no_grad()
    def embed_image(self, image: Tensor) -> EmbeddedImage:
        """One image (3, H, W), as in an input dict, ready for points."""
        images = self.preprocess_image([{"image": image}])
        encoded = self.encode(images.tensor, images.image_sizes[0])
        return self.embedded_image(images, encoded)

    def find(self, image: EmbeddedImage) -> FoundInstances:
        """The objects of an image, without points."""
        things = image.semantic[self.options.assembler.num_stuff :]
        selection: ProposalSelection | RandomSelection
        if image.proposals is not None:
            selection = self.options.proposals
            masks = selection(image.proposals, things, image)
        else:
            selection = self.options.random
            # the same points in every run
            masks = selection(things, image, torch.Generator().manual_seed(0))
            (h, w), (padded_h, padded_w) = image.size, image.padded_size
            masks = nn.functional.pad(masks, (0, padded_w - w, 0, padded_h - h))
        chunks = map(image.enlarge, masks.split(chunk_length(image.semantic[0].numel())))
        classes, scores = self.options.assembler.vote(chunks, things, selection.mask_threshold)
        return FoundInstances(
            image.size,
            semantic=image.semantic,
            pred_masks=masks,
            scores=scores,
            pred_classes=classes,
        )

    def prompt(self, inputs: dict[str, Any]) -> dict[str, Instances]:
        """{"instances"} of the objects under the "points" of an input dict; see ``describe``."""
        image = self.embed_image(inputs["image"])
        height, width = output_size(inputs)
        return {"instances": self.describe(image, image.prompt(inputs["points"], height, width))}

    @torch.no_grad()
    def describe(self, image: EmbeddedImage, probs: Tensor) -> Instances:
        """Instances of soft masks, in their order, none suppressed.

        Args:
            image: of ``embed_image``.
            probs: (M, height, width) of ``EmbeddedImage.prompt``.

        Returns:
            Instances with ``pred_masks``, ``pred_boxes``, ``scores``, ``pred_classes`` and
            ``mask_probabilities``, which exceed ``mask_threshold`` in the masks. A mask may be
            empty; then its score is 0.
        """
        size = (probs.shape[-2], probs.shape[-1])
        assembler = self.options.assembler
        things = resize(image.semantic[None], size)[0, assembler.num_stuff :]
        chunks = probs.split(chunk_length(size[0] * size[1]))
        classes, scores = assembler.vote(chunks, things, self.mask_threshold)
        masks = probs > self.mask_threshold
        return Instances(
            size,
            pred_masks=masks,
            pred_boxes=Boxes(tight_boxes(masks)),
            scores=scores,
            pred_classes=classes,
            mask_probabilities=probs,
        )


def output_size(inputs: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the results that an input dict asks for."""
    height, width = inputs["image"].shape[-2:]
    return inputs.get("height", height), inputs.get("width", width)
