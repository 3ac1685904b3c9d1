"""From soft masks to instances and a panoptic segmentation (AdaptIS, section 3.5)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from solo_d2.layers.masks import tight_boxes
from solo_d2.layers.resample import resize

from ..options import check_choice
from .head import resize_corners


class FoundInstances(Instances):
    """Instances in the network's frame, with soft masks in the order of acceptance."""

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        semantic: Tensor,
        mask_threshold: float,
        **fields: Tensor,
    ):
        """
        Args:
            image_size: height and width of the network's input without padding.
            semantic: (C, H, W) probabilities, without padding.
            mask_threshold: threshold of ``pred_masks``.
            fields: see ``InstanceSegmentor.inference``.
        """
        super().__init__(image_size, **fields)
        self._semantic, self._mask_threshold = semantic, mask_threshold

    @property
    def semantic(self) -> Tensor:
        return self._semantic

    @property
    def mask_threshold(self) -> float:
        return self._mask_threshold


class PanopticInstances(Instances):
    """Instances in the output frame, together with the segmentation of the whole image."""

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        panoptic_seg: tuple[Tensor, list[dict[str, Any]]],
        sem_seg: Tensor,
        **fields: Tensor | Boxes,
    ):
        """
        Args:
            image_size: output size, height and width.
            panoptic_seg: see ``PanopticAssembler.segments``.
            sem_seg: (C, height, width) probabilities.
            fields: see ``InstanceSegmentor.forward``.
        """
        super().__init__(image_size, **fields)
        self._panoptic_seg, self._sem_seg = panoptic_seg, sem_seg

    def output(self) -> dict[str, Any]:
        """The output dict of Detectron2's panoptic models."""
        return {
            "instances": Instances(self.image_size, **self.get_fields()),
            "panoptic_seg": self._panoptic_seg,
            "sem_seg": self._sem_seg,
        }


class Segmentation(NamedTuple):
    """The result of M masks competing for the pixels of the output (H, W)."""

    ids: Tensor  # (H, W) int32: 1..M, 0 for none
    semantic: Tensor  # (H, W) int64: stuff classes, then things; -1 unknown
    background: Tensor  # (H, W) float32, the probability that masks compete with


def vote(
    masks: Tensor, things: Tensor, *, mask_threshold: float = 0.4, class_vote: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Class and score of soft masks.

    The published code has no scores. Ours is the mean mask probability inside the mask times the
    mean probability of its class there; 0 for an empty mask.

    Args:
        masks: (M, H, W) soft.
        things: (T, H, W) probabilities of the thing classes.
        mask_threshold: a pixel is inside where its probability exceeds this.
        class_vote: "mean" of the class probabilities over the mask, or "majority" of its pixels.

    Returns:
        (M,) int64 classes and (M,) float32 scores.
    """
    inside = (masks > mask_threshold).flatten(1).float()
    area = inside.sum(dim=1).clamp(min=1)
    with torch.autocast(masks.device.type, enabled=False):
        means = inside @ things.flatten(1).float().T / area[:, None]
        ballots = means
        if class_vote == "majority":
            winners = torch.zeros_like(things).scatter_(0, things.argmax(dim=0)[None], 1)
            ballots = inside @ winners.flatten(1).float().T
    classes = ballots.argmax(dim=1)
    certainty = (masks.flatten(1).float() * inside).sum(dim=1) / area
    return classes, certainty * means.gather(1, classes[:, None])[:, 0]


@dataclass(frozen=True)
class PanopticAssembler:
    """Lets soft masks and the background compete for every pixel, and lists the segments."""

    num_stuff: int = 1
    # See ``vote``.
    class_vote: str = "mean"
    # Pixels whose best mask has a lower probability belong to no instance.
    min_things_prob: float = 0.0
    # Pixels whose best stuff class has a lower probability have no semantic label.
    min_stuff_prob: float = 0.0
    # Factor on the probability of the background, 1 - things.
    stuff_prob_mult: float = 1.0
    # Smaller segments are void.
    min_segment_area: int = 1
    # Instances have the pixels that they won. False: all their pixels above the threshold, which
    # may overlap.
    disjoint_masks: bool = True

    def __post_init__(self) -> None:
        check_choice("class_vote", self.class_vote, ("mean", "majority"))
        if self.num_stuff < 1:
            raise ValueError(f"num_stuff must be at least 1, not {self.num_stuff}")

    def __call__(
        self, found: Instances, size: tuple[int, int], padded_size: tuple[int, int]
    ) -> PanopticInstances:
        """
        Args:
            found: ``FoundInstances``. Their probabilities, not binary masks, are resized, one mask
                at a time.
            size: output size, height and width.
            padded_size: height and width of the network's padded input.

        Returns:
            The instances that have a pixel, best first. Because their masks do not overlap, AP is
            lower than it could be.
        """
        overlapping: list[Tensor] = []

        def resized() -> Iterator[Tensor]:
            h, w = found.image_size
            for mask in found.pred_masks[:, None, None]:
                mask = resize(resize_corners(mask, padded_size)[..., :h, :w], size)[0, 0]
                if not self.disjoint_masks:
                    overlapping.append(mask > found.mask_threshold)
                yield mask

        semantic = resize(found.semantic[None], size)[0]
        segmentation = self.compete(resized(), semantic)
        scores, classes = found.scores, found.pred_classes
        numbers = torch.arange(1, len(scores) + 1, device=scores.device)[:, None, None]
        masks = torch.stack(overlapping) if overlapping else segmentation.ids == numbers
        order = scores.argsort(descending=True, stable=True)
        order = order[masks.flatten(1).any(dim=1)[order]]
        masks = masks[order]
        return PanopticInstances(
            size,
            panoptic_seg=self.segments(segmentation, classes, scores),
            sem_seg=semantic,
            pred_masks=masks,
            pred_boxes=Boxes(tight_boxes(masks)),
            scores=scores[order],
            pred_classes=classes[order],
        )

    def vote(
        self, chunks: Iterable[Tensor], things: Tensor, mask_threshold: float
    ) -> tuple[Tensor, Tensor]:
        """Classes and scores (M,) of soft masks that come in chunks; see the function ``vote``."""
        votes = [
            vote(x, things, mask_threshold=mask_threshold, class_vote=self.class_vote)
            for x in chunks
        ]
        return torch.cat([classes for classes, _ in votes]), torch.cat([s for _, s in votes])

    def compete(
        self, masks: Iterable[Tensor], semantic_probs: Tensor, ignored: Tensor | None = None
    ) -> Segmentation:
        """
        Args:
            masks: soft masks (H, W) in the order in which they were accepted. They are consumed one
                at a time and not stored.
            semantic_probs: (C, H, W), stuff before things.
            ignored: (H, W) bool, pixels that get no semantic label.
        """
        stuff, things = semantic_probs[: self.num_stuff], semantic_probs[self.num_stuff :]
        background = self.stuff_prob_mult * (1 - things.sum(dim=0))
        best = background.clone()
        ids = torch.zeros(best.shape, dtype=torch.int32, device=best.device)
        for number, mask in enumerate(masks, start=1):
            # strict comparison: the first of equal masks wins
            wins = mask > best
            best = torch.where(wins, mask, best)
            ids.masked_fill_(wins, number)
        ids.masked_fill_(best < self.min_things_prob, 0)
        unknown = stuff.amax(dim=0) < self.min_stuff_prob
        if ignored is not None:
            unknown |= ignored
        semantic = semantic_probs.argmax(dim=0).masked_fill(unknown, -1)
        return Segmentation(ids, semantic, background)

    def segments(
        self, segmentation: Segmentation, classes: Tensor, scores: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Stuff segments, then instances, in Detectron2's format.

        A pixel is void if its semantic label is a thing but it belongs to no instance.

        Args:
            segmentation: segmentation of one image.
            classes, scores: (M,) of its masks.

        Returns:
            (H, W) int32 segment ids, 0 for void, and per segment its "id", "isthing", "category_id"
            (the stuff class, or the thing class counted from 0), "area", and for things "score".
        """
        ids, semantic = segmentation.ids, segmentation.semantic
        is_stuff = (ids == 0) & (semantic >= 0) & (semantic < self.num_stuff)
        # 0 void, then stuff classes, then instances
        number = torch.where(is_stuff, semantic + 1, 0)
        number = torch.where(ids > 0, ids.long() + self.num_stuff, number)
        areas = number.flatten().bincount(minlength=1 + self.num_stuff + len(scores))
        kept = areas >= max(1, self.min_segment_area)
        kept[0] = False
        lookup = torch.where(kept, kept.cumsum(0), 0).int()
        segments: list[dict[str, Any]] = []
        class_list, score_list = classes.tolist(), scores.tolist()
        for index, area in enumerate(areas.tolist()):
            if index == 0 or area < max(1, self.min_segment_area):
                continue
            thing = index - 1 - self.num_stuff
            segment = {"id": len(segments) + 1, "isthing": thing >= 0, "area": area}
            if thing >= 0:
                segment |= {"category_id": class_list[thing], "score": score_list[thing]}
            else:
                segment["category_id"] = index - 1
            segments.append(segment)
        return lookup[number], segments
