"""What is done with encoded images, whoever encoded them: the model, or a file exported from it."""

from abc import abstractmethod

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from solo_d2.layers.masks import chunk_length, tight_boxes
from solo_d2.layers.resample import resize

from .automatic import ProposalSelection, RandomSelection
from .embedded import EmbeddedImage, EncodedImages, ImageEmbedding
from .panoptic import FoundInstances, PanopticAssembler


class ObjectFinder:
    """Objects under points, and objects at points that it chooses itself.

    Attributes:
        stride: of the feature map.
        mask_threshold: of the masks of points.
        flip, flip_original, proposal_selection, random_selection, assembler: see ``AdaptIS``.
        device: of the tensors.
    """

    stride: int
    mask_threshold: float
    flip: bool
    flip_original: bool
    proposal_selection: ProposalSelection
    random_selection: RandomSelection
    assembler: PanopticAssembler
    device: torch.device

    @abstractmethod
    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Images as ``encode`` takes them."""

    @abstractmethod
    def encode(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> EncodedImages:
        """Everything that does not depend on points.

        Args:
            images: (N, 3, H, W), padded.
            image_sizes: heights and widths without padding.
        """

    @abstractmethod
    def decode(self, embedding: ImageEmbedding, points: Tensor) -> Tensor:
        """Points (N, P, 2) of N embedded images -> (N * P, 1, h, w) mask logits."""

    def embedded_images(self, images: ImageList, encoded: EncodedImages) -> list[EmbeddedImage]:
        """Each image of a batch by itself.

        Args:
            images: see ``preprocess_image``.
            encoded: the same images. Mirror images are encoded here.
        """
        embedding, semantic, proposals = encoded
        views = [embedding]
        if self.flip:
            mirrored = self.encode(images.tensor.flip(-1), images.image_sizes)
            view = mirrored.embedding
            if view.valid is not None:  # the padding is at the left
                view = view._replace(valid=view.valid.flip(-1))
            views.append(view)
            semantic = (semantic + mirrored.semantic.flip(-1)) / 2
            if proposals is not None and mirrored.proposals is not None:
                proposals = (proposals + mirrored.proposals.flip(-1)) / 2
        return [
            EmbeddedImage(
                decode=self.decode,
                views=[_image_of(view, i) for view in views],
                semantic=semantic[i, :, :h, :w].contiguous(),
                proposals=None if proposals is None else proposals[i, :h, :w].contiguous(),
                size=(h, w),
                padded_size=(images.tensor.shape[-2], images.tensor.shape[-1]),
                stride=self.stride,
                mirror_offset=0 if self.flip_original else 1,
            )
            for i, (h, w) in enumerate(images.image_sizes)
        ]

    @torch.no_grad()
    def embed_image(self, image: Tensor) -> EmbeddedImage:
        """One image (3, H, W), as in an input dict, ready for points."""
        images = self.preprocess_image([{"image": image}])
        (embedded,) = self.embedded_images(images, self.encode(images.tensor, images.image_sizes))
        return embedded

    def find(self, image: EmbeddedImage) -> FoundInstances:
        """The objects of an image, without points."""
        things = image.semantic[self.assembler.num_stuff :]
        if image.proposals is not None:
            threshold = self.proposal_selection.mask_threshold
            masks = self.proposal_selection(image.proposals, things, image)
        else:
            threshold = self.random_selection.mask_threshold
            # the same points in every run
            generator = torch.Generator().manual_seed(0)
            masks = self.random_selection(things, image, generator)
            (h, w), (padded_h, padded_w) = image.size, image.padded_size
            masks = nn.functional.pad(masks, (0, padded_w - w, 0, padded_h - h))
        chunks = masks.split(chunk_length(image.semantic[0].numel()))
        classes, scores = self.assembler.vote(map(image.enlarge, chunks), things, threshold)
        return FoundInstances(
            image.size,
            semantic=image.semantic,
            mask_threshold=threshold,
            pred_masks=masks,
            scores=scores,
            pred_classes=classes,
        )

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
        things = resize(image.semantic[None], size)[0, self.assembler.num_stuff :]
        chunks = probs.split(chunk_length(size[0] * size[1]))
        classes, scores = self.assembler.vote(chunks, things, self.mask_threshold)
        masks = probs > self.mask_threshold
        return Instances(
            size,
            pred_masks=masks,
            pred_boxes=Boxes(tight_boxes(masks)),
            scores=scores,
            pred_classes=classes,
            mask_probabilities=probs,
        )


def _image_of(embedding: ImageEmbedding, index: int) -> ImageEmbedding:
    """One image of a batch."""
    return ImageEmbedding(*(None if x is None else x[index : index + 1] for x in embedding))
