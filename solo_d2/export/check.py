"""Whether an exported file says what its model says, on one image."""

from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn

from solo_d2.modeling.adaptis import ObjectFinder

from .exported import ExportedDetector

# More than this is not float noise.
SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 0.05  # pixels
MASK_TOLERANCE = 1e-3  # of soft masks
# No more of a score is explained by pixels at the threshold.
_MAX_FLIP_EFFECT = 1e-2
_MAX_MASK_DIFFERENCE = 0.5  # of soft masks; above it they are two objects
_POINTS = 5  # along each side, for AdaptIS


@dataclass(frozen=True)
class Agreement:
    """Two results for one image, instance by instance; see ``compare``."""

    eager: int  # number of instances
    exported: int
    matched: int
    identical_masks: int  # of the matched
    differing_pixels: int  # of the matched
    score: float  # worst differences of the matched
    box: float
    soft_mask: float

    @property
    def equal(self) -> bool:
        """Up to float noise."""
        return (
            self.eager == self.exported == self.matched
            and self.score <= SCORE_TOLERANCE
            and self.box <= BOX_TOLERANCE
            and self.soft_mask <= MASK_TOLERANCE
        )

    def table(self) -> str:
        """Two lines: titles and figures."""
        columns = {
            "eager": self.eager,
            "exported": self.exported,
            "matched": self.matched,
            "masks identical": self.identical_masks,
            "pixels that differ": self.differing_pixels,
            "score": f"{self.score:.1e}",
            "box": f"{self.box:.1e}",
            "soft mask": f"{self.soft_mask:.1e}",
        }
        widths = [max(len(title), len(str(value))) for title, value in columns.items()]
        lines = (columns, columns.values())
        return "\n".join(
            "  ".join(str(x).rjust(width) for x, width in zip(line, widths)) for line in lines
        )


@torch.no_grad()
def raw_instances(model: nn.Module, image: Tensor) -> Instances:
    """Instances in the network's frame with soft masks; of AdaptIS, those under a grid of points.

    Args:
        model: eager, in eval mode, or exported.
        image: (3, h, w) as the network takes it.
    """
    if isinstance(model, ExportedDetector):
        return model.raw(image)
    if isinstance(model, ObjectFinder):
        height, width = image.shape[-2:]
        steps = (torch.arange(_POINTS) + 0.5) / _POINTS
        points = torch.cartesian_prod(steps * width, steps * height)
        found = model.embed_image(image)
        instances = model.describe(found, found.prompt(points, height, width))
        instances.pred_masks = instances.mask_probabilities
        instances.remove("pred_boxes")  # those of the masks
        return instances
    if isinstance(model, GeneralizedRCNN):
        (instances,) = model.inference([{"image": image}], do_postprocess=False)
        return instances
    images = model.preprocess_image([{"image": image}])
    (instances,) = model.inference(images, model.backbone(images.tensor))
    return instances


def compare(
    eager: Instances, exported: Instances, *, mask_threshold: float = 0.5, in_order: bool = False
) -> Agreement:
    """Match instances of the same class and score, best mask first, and measure what differs.

    Scores within the tolerance of each other count as tied, so that their order is free.

    Args:
        eager, exported: of ``raw_instances``.
        mask_threshold: of the pixels that are compared.
        in_order: match those of the same position: the results of points.
    """
    if in_order:
        pairs = list(zip(range(len(eager)), range(len(exported))))
    else:
        pairs = _match(eager, exported, mask_threshold)
    differences = [_differences(eager, i, exported, j, mask_threshold) for i, j in pairs]
    pixels = [_differing_pixels(eager, i, exported, j, mask_threshold) for i, j in pairs]

    def worst(name: str) -> float:
        return max((x[name] for x in differences), default=0.0)

    return Agreement(
        eager=len(eager),
        exported=len(exported),
        matched=len(pairs),
        identical_masks=pixels.count(0),
        differing_pixels=sum(pixels),
        score=worst("score"),
        box=worst("box"),
        soft_mask=worst("soft_mask"),
    )


def _match(eager: Instances, exported: Instances, threshold: float) -> list[tuple[int, int]]:
    """Pairs of the same class and score, the most similar first.

    Of instances with equal scores at the limit of their number, each side may keep another one.
    These have no partner.
    """
    tied = []
    for i in range(len(eager)):
        close = (exported.scores - eager.scores[i]).abs() <= _MAX_FLIP_EFFECT
        same = close & (exported.pred_classes == eager.pred_classes[i])
        for j in same.nonzero()[:, 0].tolist():
            mask = _soft_mask_difference(eager, i, exported, j)
            score = _score_difference(eager, i, exported, j, threshold)
            if mask <= _MAX_MASK_DIFFERENCE and score <= SCORE_TOLERANCE:
                tied.append((mask, _box_difference(eager, i, exported, j), i, j))
    partner: dict[int, int] = {}
    for _, _, i, j in sorted(tied):
        if i not in partner and j not in partner.values():
            partner[i] = j
    return list(partner.items())


def _score_difference(
    eager: Instances, i: int, exported: Instances, j: int, threshold: float
) -> float:
    """Less what pixels at the threshold explain.

    SOLO's score is a mean over the pixels of the mask, so each pixel that float noise moves across
    the threshold changes it by up to one part of their number.
    """
    difference = _largest(eager.scores[i], exported.scores[j])
    if difference > SCORE_TOLERANCE and eager.has("pred_masks"):
        area = int((eager.pred_masks[i] > threshold).sum())
        flipped = _differing_pixels(eager, i, exported, j, threshold)
        difference -= min(difference, flipped / max(1, area))
    return difference


def _differences(
    eager: Instances, i: int, exported: Instances, j: int, threshold: float
) -> dict[str, float]:
    result = {"score": _score_difference(eager, i, exported, j, threshold)}
    if eager.has("mask_scores"):  # they have no upper bound
        rated = _largest(eager.mask_scores[i], exported.mask_scores[j])
        result["score"] = max(result["score"], rated / max(1.0, float(eager.mask_scores[i])))
    result["box"] = _box_difference(eager, i, exported, j)
    return result | {"soft_mask": _soft_mask_difference(eager, i, exported, j)}


def _box_difference(eager: Instances, i: int, exported: Instances, j: int) -> float:
    """In pixels, of the parts within the image."""
    if not eager.has("pred_boxes"):
        return 0.0
    boxes = [x.pred_boxes[k].clone() for x, k in ((eager, i), (exported, j))]
    for box in boxes:
        box.clip(eager.image_size)
    return _largest(*(box.tensor for box in boxes))


def _soft_mask_difference(eager: Instances, i: int, exported: Instances, j: int) -> float:
    if not eager.has("pred_masks"):
        return 0.0
    return _largest(eager.pred_masks[i], exported.pred_masks[j])


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _differing_pixels(
    eager: Instances, i: int, exported: Instances, j: int, threshold: float
) -> int:
    if not eager.has("pred_masks"):
        return 0
    masks = eager.pred_masks[i] > threshold, exported.pred_masks[j] > threshold
    return int((masks[0] ^ masks[1]).sum())
