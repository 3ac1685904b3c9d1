"""From soft masks to instances and a panoptic segmentation (AdaptIS, section 3.5)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from solo_d2.layers.masks import tight_boxes
from solo_d2.layers.resample import resize

from ..options import check_at_least
from .head import resize_corners
from .targets import label_areas


class FoundInstances(Instances):
    """Instances in the network's frame, with soft masks in the order of acceptance."""

    def __init__(self, image_size: tuple[int, int], *, semantic: Tensor, **fields: Tensor):
        """
        Args:
            image_size: height and width of the network's input without padding.
            semantic: (C, H, W) probabilities, without padding.
            fields: see ``InstanceSegmentor.inference``.
        """
        super().__init__(image_size, **fields)
        self._semantic = semantic  # not a field, which has an entry for each instance

    @property
    def semantic(self) -> Tensor:
        return self._semantic


class Segmentation(NamedTuple):
    """The result of M masks competing for the pixels of the output (H, W)."""

    ids: Tensor  # (H, W) int32: 1..M, 0 for none
    semantic: Tensor  # (H, W) int64: stuff classes, then things; -1 unknown
    background: Tensor  # (H, W) float32, the probability that masks compete with


def vote(masks: Tensor, things: Tensor, *, mask_threshold: float = 0.4) -> tuple[Tensor, Tensor]:
    """Class and score of soft masks.

    A mask has the class with the highest mean probability inside. The published code has no scores.
    Ours is that mean times the mean mask probability inside; 0 for an empty mask.

    Args:
        masks: (M, H, W) soft.
        things: (T, H, W) probabilities of the thing classes.
        mask_threshold: a pixel is inside where its probability exceeds this.

    Returns:
        (M,) int64 classes in [0, T), and (M,) float32 scores.
    """
    inside = (masks > mask_threshold).flatten(1).float()
    area = inside.sum(dim=1).clamp(min=1)
    with torch.autocast(masks.device.type, enabled=False):
        means, classes = (inside @ things.flatten(1).float().T / area[:, None]).max(dim=1)
    certainty = (masks.flatten(1).float() * inside).sum(dim=1) / area
    return classes, certainty * means


@dataclass(frozen=True)
class PanopticAssembler:
    """Lets soft masks and the background compete for every pixel, and lists the segments."""

    num_stuff: int = 1
    # Added to the thing classes of results: 0 where they are counted from 0, ``num_stuff`` where
    # they continue the numbers of stuff.
    thing_offset: int = 0
    # Pixels whose best mask has a lower probability belong to no instance.
    min_things_prob: float = 0.0
    # Pixels whose best stuff class has a lower probability have no semantic label.
    min_stuff_prob: float = 0.0
    # Factor on the probability of the background, 1 - things.
    stuff_prob_mult: float = 1.0
    # Smaller segments are void.
    min_segment_area: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, num_stuff=self.num_stuff, min_segment_area=self.min_segment_area)

    def __call__(
        self, found: FoundInstances, size: tuple[int, int], padded_size: tuple[int, int]
    ) -> dict[str, Any]:
        """
        Args:
            found: probabilities, not binary masks, are resized, one mask at a time.
            size: output size, height and width.
            padded_size: height and width of the network's padded input.

        Returns:
            "instances" that have a pixel, best first, with the pixels that they won: their masks do
            not overlap, so that AP is lower than it could be; "panoptic_seg" of ``segments``; and
            "sem_seg" (C, *size) probabilities.
        """

        def resized() -> Iterator[Tensor]:
            h, w = found.image_size
            for mask in found.pred_masks[:, None, None]:
                yield resize(resize_corners(mask, padded_size)[..., :h, :w], size)[0, 0]

        semantic = resize(found.semantic[None], size)[0]
        segmentation = self.compete(resized(), semantic)
        order = found.scores.argsort(descending=True, stable=True)
        won = label_areas(segmentation.ids.long(), len(order) + 1)[1:]
        order = order[won[order] > 0]
        masks = segmentation.ids == order[:, None, None] + 1
        instances = Instances(
            size,
            pred_masks=masks,
            pred_boxes=Boxes(tight_boxes(masks)),
            scores=found.scores[order],
            pred_classes=found.pred_classes[order],
        )
        return {
            "instances": instances,
            "panoptic_seg": self.segments(segmentation, found.pred_classes, found.scores),
            "sem_seg": semantic,
        }

    def vote(
        self, chunks: Iterable[Tensor], things: Tensor, mask_threshold: float
    ) -> tuple[Tensor, Tensor]:
        """Classes of results and scores (M,) of soft masks that come in chunks; see ``vote``."""
        votes = [vote(x, things, mask_threshold=mask_threshold) for x in chunks]
        classes = torch.cat([classes for classes, _ in votes]) + self.thing_offset
        return classes, torch.cat([scores for _, scores in votes])

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
            (the stuff class, or the thing class), "area", and for things "score".
        """
        ids, semantic = segmentation.ids, segmentation.semantic
        is_stuff = (ids == 0) & (semantic >= 0) & (semantic < self.num_stuff)
        # 0 void, then stuff classes, then instances
        number = torch.where(is_stuff, semantic + 1, 0)
        number = torch.where(ids > 0, ids.long() + self.num_stuff, number)
        areas = label_areas(number, 1 + self.num_stuff + len(scores))
        kept = areas >= self.min_segment_area
        kept[0] = False
        lookup = torch.where(kept, kept.cumsum(0), 0).int()
        # one copy from the device for both
        _, *area_list = torch.cat([areas, classes]).tolist()
        class_list, score_list = area_list[len(areas) - 1 :], scores.tolist()
        segments: list[dict[str, Any]] = []
        for index, area in enumerate(area_list[: len(areas) - 1]):
            if area < self.min_segment_area:
                continue
            thing = index - self.num_stuff
            segment = {"id": len(segments) + 1, "isthing": thing >= 0, "area": area}
            if thing >= 0:
                segment |= {"category_id": class_list[thing], "score": score_list[thing]}
            else:
                segment["category_id"] = index
            segments.append(segment)
        return lookup[number], segments
