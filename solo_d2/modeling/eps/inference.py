"""From class activation maps to label maps.

Shape shorthand: C classes, K of them in the image; H and W of the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor

from solo_d2.layers.masks import tight_boxes
from solo_d2.layers.resample import resize

from ..options import check_fractions


def rescale(image: Tensor, scale: float) -> Tensor:
    """Resize an image by a factor with Pillow, bicubic, as published.

    Args:
        image: (3, H, W), values from 0 to 255.
        scale: factor on both sides.

    Returns:
        (3, round(scale * H), round(scale * W)); on the CPU if the size changes.
    """
    if scale == 1:
        return image
    height, width = (max(1, round(scale * side)) for side in image.shape[-2:])
    # PyTorch's own resize differs from Pillow's by one in some pixels
    pixels = image.round().clamp(0, 255).to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@dataclass(frozen=True)
class PseudoMasks:
    """Makes scores of pixels from the maps of the classes in an image.

    Attributes:
        scales: factors on the size of the image whose maps are added.
        bg_threshold: score of the background at every pixel.
        use_bg_cam: take the background's map as its score instead.
    """

    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    bg_threshold: float = 0.2
    use_bg_cam: bool = False

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an attribute has an unsupported value.
        """
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise ValueError(f"scales must be positive numbers, not {self.scales!r}")
        check_fractions(bg_threshold=self.bg_threshold)

    def __call__(
        self, pairs: Sequence[Tensor], present: Tensor, size: tuple[int, int], num_classes: int
    ) -> Tensor:
        """
        Args:
            pairs: see ``combine``; the background is the last channel.
            present: (K,) the classes in the image.
            size: H and W.
            num_classes: C.

        Returns:
            (C + 1, H, W), the background first; 0 for classes that are not in the image.
        """
        scores = pairs[0].new_zeros((num_classes + 1, *size))
        if self.use_bg_cam:
            scores[0] = combine(pairs, present.new_tensor([num_classes]), size)[0]
        else:
            scores[0] = self.bg_threshold
        return scores.index_copy_(0, present + 1, combine(pairs, present, size))


def combine(pairs: Sequence[Tensor], channels: Tensor, size: tuple[int, int]) -> Tensor:
    """Add up the maps of several scales, and divide each by its maximum.

    Args:
        pairs: for each scale (2, channels, h, w), not negative: of the image and its mirror image.
        channels: (K,) the channels to use.
        size: H and W.

    Returns:
        (K, H, W), 0 to 1.
    """
    total = pairs[0].new_zeros((len(channels), *size))
    if len(channels) == 0:
        return total
    for pair in pairs:
        plain, mirrored = resize(pair.index_select(1, channels), size)
        total += plain + mirrored.flip(-1)
    return total / (total.amax(dim=(1, 2), keepdim=True) + 1e-5)


def to_regions(scores: Tensor) -> tuple[Tensor, Instances]:
    """The label map of (C + 1, H, W) scores, and the region of each class as an instance.

    Returns:
        (H, W) uint8, 0 for the background and k + 1 for class k; and instances whose score is the
        mean of their class in their region.
    """
    best, label_map = scores.max(dim=0)
    classes = label_map.unique()
    classes = classes[classes > 0] - 1
    masks = label_map == classes[:, None, None] + 1
    instances = Instances(tuple(label_map.shape))
    instances.pred_masks, instances.pred_classes = masks, classes
    instances.pred_boxes = Boxes(tight_boxes(masks))
    instances.scores = (masks * best).sum((1, 2)) / masks.sum((1, 2))
    return label_map.to(torch.uint8), instances
