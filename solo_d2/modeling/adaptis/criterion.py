"""The losses of AdaptIS, and the adaptive threshold of its second stage.

In a normalized focal loss (section 3.3 of the paper), the modulating weights of a sample are
rescaled to sum to its number of pixels, so that the loss does not fade as the network improves. The
gradient treats the factor as a constant. Everything is computed in float32, because 1e-12 vanishes
in half precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import check_choice
from .targets import IGNORE, PROPOSAL_TARGETS

_SEMANTIC_WEIGHT = 0.75


@dataclass(frozen=True)
class InstanceCriterion:
    """The losses of the first stage: masks of points, and semantic labels."""

    # Weight of an object's pixels in the loss of its mask; the others have 1 - alpha.
    alpha: float = 0.5
    # For the logged IoU: a pixel belongs to a mask where its probability exceeds this.
    mask_threshold: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        semantic: Tensor,
        labels: Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """
        Args:
            logits: (N * P, 1, H, W) for masks, ordered by image.
            targets: (N * P, H, W): 1 object, 0 rest, -1 ignored (as is all padding).
            semantic: (N, C, H, W) logits.
            labels: (N, H, W) int64, -1 ignored.
            image_sizes: heights and widths without padding.
        """
        if _is_logged():
            # the loss is rescaled in every step and hardly shows whether the masks improve
            iou = mask_iou(logits[:, 0].detach().float().sigmoid(), targets, self.mask_threshold)
            known = targets.flatten(1).amax(dim=1) > 0
            mean = (iou * known).sum() / known.sum().clamp(min=1)
            get_event_storage().put_scalar("adaptis/mask_iou", mean.item())
        pixels = torch.tensor([h * w for h, w in image_sizes], dtype=torch.float32)
        pixels = pixels.repeat_interleave(len(logits) // len(pixels))
        masks_loss = normalized_focal_loss(
            logits,
            targets[:, None],
            alpha=self.alpha,
            num_pixels=pixels.to(logits.device, non_blocking=True),
        )
        semantic_loss = normalized_focal_loss_softmax(semantic, labels)
        return {
            "loss_instance": masks_loss.mean(),
            "loss_semantic": _SEMANTIC_WEIGHT * semantic_loss.mean(),
        }


class ProposalCriterion:
    """The loss of the second stage: the quality of the mask that each point on an object gives."""

    def __init__(self, *, targets: str = "score"):
        """
        Args:
            targets: name of the rule, one of ``PROPOSAL_TARGETS``.

        Raises:
            ValueError: ``targets`` has an unsupported value.
        """
        check_choice("targets", targets, tuple(PROPOSAL_TARGETS))
        self.rule = PROPOSAL_TARGETS[targets]
        # the model registers it, too, as a part of its state
        self.iou_threshold = AdaptiveThreshold(0.35)

    def __call__(self, proposals: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
        """
        Args:
            proposals: (N, P) logits of the proposal head at the points.
            probs, masks: see ``targets_of``.
        """
        targets, iou = self.targets_of(probs, masks, proposals.shape[1])
        if _is_logged():
            get_event_storage().put_scalar("adaptis/mask_iou", iou.item())
            threshold = self.iou_threshold.value.item()
            get_event_storage().put_scalar("adaptis/mask_threshold", threshold)
        return proposal_loss(proposals, targets).mean()

    def targets_of(self, probs: Tensor, masks: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
        """Update the adaptive threshold, then compute the points' targets with it.

        Args:
            probs: (N * P, H, W) soft masks of points, 0 in the padding.
            masks: (N * P, H, W), the objects under the points: 1 object, 0 rest, -1 ignored.
            num_points: P.

        Returns:
            (N, P) targets of the points, and the mean IoU.
        """
        mean_iou = self.iou_threshold.update(probs, masks)
        iou = mask_iou(probs, masks, self.iou_threshold.value).view(-1, num_points)
        return self.rule(iou, mask_quality(probs, masks).view(-1, num_points)), mean_iou


def _is_logged() -> bool:
    """Detectron2 writes its log this often; logging in each step would wait for the device."""
    return has_event_storage() and get_event_storage().iter % 20 == 0


def normalized_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    gamma: float = 2.0,
    num_pixels: Tensor | None = None,
) -> Tensor:
    """Normalized focal loss for masks, with a sigmoid.

    Args:
        logits: (M, 1, H, W).
        labels: (M, 1, H, W): 1 object, 0 rest, -1 ignored.
        alpha: weight of the object's pixels; the others have 1 - alpha.
        gamma: focusing parameter; higher values reduce the weight of well-classified pixels.
        num_pixels: (M,) sums to which the modulating weights are rescaled; by default H * W,
            including ignored pixels. In a padded batch: the pixels of each sample's own image.

    Returns:
        (M,): the mean over the pixels that are not ignored; 0 if all are.
    """
    logits = logits.flatten(1).float()
    labels = labels.flatten(1)
    counted = labels != IGNORE
    positive = labels > 0
    probs = logits.sigmoid()
    truth = torch.where(positive, probs, 1 - probs)
    if num_pixels is None:
        num_pixels = torch.full_like(logits[:, 0], logits.shape[1])
    weight = torch.where(positive, alpha, 1 - alpha)
    return _normalized_focal(truth, counted, weight, num_pixels, gamma=gamma, eps=1e-12)


def normalized_focal_loss_softmax(logits: Tensor, labels: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Normalized focal loss for semantic maps, with a softmax.

    Here the normalizer counts only pixels that are not ignored.

    Args:
        logits: (N, C, H, W).
        labels: (N, H, W) int64 in [0, C), -1 ignored.
        gamma: focusing parameter; higher values reduce the weight of well-classified pixels.

    Returns:
        (N,): the mean over the pixels that are not ignored; 0 if all are.
    """
    counted = (labels != IGNORE).flatten(1)
    probs = logits.float().softmax(dim=1)
    truth = probs.gather(1, labels.clamp(min=0)[:, None]).flatten(1)
    return _normalized_focal(truth, counted, 1.0, counted.sum(dim=1), gamma=gamma, eps=1e-10)


def _normalized_focal(
    truth: Tensor,
    counted: Tensor,
    weight: Tensor | float,
    num_pixels: Tensor,
    *,
    gamma: float,
    eps: float,
) -> Tensor:
    """(M,) mean over the counted pixels of probabilities (M, pixels) of the true labels."""
    truth = truth.masked_fill(~counted, 1.0)
    beta = (1 - truth) ** gamma
    factor = num_pixels / (beta.detach().sum(dim=1) + eps)
    loss = weight * factor[:, None] * beta * (truth + eps).clamp(max=1).log() * counted
    return -loss.sum(dim=1) / (counted.sum(dim=1) + eps)


def proposal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, not reduced.

    A target of -1 gives 0. The official code still counts such points in the mean.

    Args:
        logits, targets: tensors of the same shape; targets in [0, 1] or -1.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), targets.clamp(min=0).float(), reduction="none"
    )
    return loss * (targets != IGNORE)


class AdaptiveThreshold(nn.Module):
    """A mask threshold that follows the best mean IoU in small steps; its value is a buffer."""

    STEP = 0.025  # distance to the two other thresholds that are tried
    MOMENTUM = 0.99  # share of the old value in the new value
    value: Tensor

    def __init__(self, initial: float):
        super().__init__()
        self.register_buffer("value", torch.tensor(initial, dtype=torch.float64))

    @torch.no_grad()
    def update(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Move toward the best of three thresholds for the joint batch of all processes.

        Args:
            probs: (M, H, W) soft masks.
            targets: (M, H, W): 1 object, 0 rest, -1 ignored.

        Returns:
            The mean IoU at the best threshold. If no sample has a pixel of an object, it is 0 and
            the threshold does not change.
        """
        rivals = torch.stack([self.value, self.value - self.STEP, self.value + self.STEP])
        iou = torch.stack([mask_iou(probs, targets, rival) for rival in rivals])
        known = iou >= 0
        sums = torch.stack([(iou * known).sum(dim=1), known.sum(dim=1).float()])
        sums = torch.cat([sums.flatten(), (targets > 0).any().float()[None]])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        total, count = sums[:-1].view(2, 3)
        mean = total / count.clamp(min=1)
        best = rivals.gather(0, mean.argmax()[None])[0]  # the first of equal ones
        moved = self.MOMENTUM * self.value + (1 - self.MOMENTUM) * best
        self.value.copy_(torch.where(sums[-1] > 0, moved, self.value))
        return torch.where(sums[-1] > 0, mean.amax(), 0.0)


def mask_iou(probs: Tensor, targets: Tensor, threshold: Tensor | float) -> Tensor:
    """(M,) float32: IoU of thresholded masks, excluding ignored pixels; -1 for an empty union.

    Args:
        probs: (M, H, W).
        targets: (M, H, W): 1 object, 0 rest, -1 ignored.
        threshold: a pixel is set where its probability exceeds this.
    """
    predicted = ((probs > threshold) & (targets != IGNORE)).flatten(1)
    true = (targets > 0).flatten(1)
    union = (predicted | true).sum(dim=1)
    iou = (predicted & true).sum(dim=1) / union.clamp(min=1)
    return torch.where(union > 0, iou, -1.0)


def mask_quality(probs: Tensor, targets: Tensor) -> Tensor:
    """(M,) float32: the mean probability inside each object; 0 for an empty one.

    As published, targets are used as numbers, so an ignored pixel, -1, counts against the mask.
    """
    weight = targets.flatten(1).float()
    inside = (probs.flatten(1) * weight).sum(dim=1)
    return inside / weight.sum(dim=1).clamp(min=1)
