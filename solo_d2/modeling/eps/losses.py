"""The losses of EPS (paper, section 3).

Shape shorthand: N images, C classes, h and w of the class activation map.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def classification_loss(cam: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft-margin loss of the map's average.

    Args:
        cam: (N, C or more, h, w) logits, the background last.
        labels: (N, C) 0 or 1.
    """
    logits = cam.float().mean(dim=(2, 3))[:, : labels.shape[1]]
    return F.multilabel_soft_margin_loss(logits, labels)


def saliency_loss(
    cam: Tensor, labels: Tensor, saliency: Tensor, *, tau: float, lam: float
) -> Tensor:
    """Mean squared difference between the estimated saliency and the given one.

    Args:
        cam: (N, C + 1, h, w) logits, the background last.
        labels: (N, C) 0 or 1.
        saliency: (N, 1, H, W) 0 to 1; resized to the map.
        tau, lam: see ``estimate_saliency``.
    """
    saliency = F.interpolate(saliency, cam.shape[-2:], mode="nearest")
    estimate = estimate_saliency(cam, labels, saliency, tau=tau, lam=lam)[2]
    return F.mse_loss(estimate, saliency)


def estimate_saliency(
    cam: Tensor, labels: Tensor, saliency: Tensor, *, tau: float, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The saliency that the class maps imply.

    Args:
        cam: (N, C + 1, h, w) logits, the background last.
        labels: (N, C) 0 or 1.
        saliency: (N, 1, h, w).
        tau: a class of the image is foreground if it overlaps the saliency by more than this.
        lam: weight of the foreground.

    Returns:
        Each (N, 1, h, w): the sum of the foreground classes; 1 minus the background and the
        classes that are not foreground; the two, weighted.
    """
    probabilities = cam.float().softmax(dim=1)
    classes, background = probabilities[:, :-1], probabilities[:, -1:]
    is_salient = overlap(classes.detach(), saliency) > tau
    foreground = (classes * (labels * is_salient)[..., None, None]).sum(1, keepdim=True)
    behind = (classes * (labels * ~is_salient)[..., None, None]).sum(1, keepdim=True)
    not_background = 1 - (background + behind)
    return foreground, not_background, lam * foreground + (1 - lam) * not_background


def overlap(classes: Tensor, saliency: Tensor) -> Tensor:
    """(N, C): the share of each class's pixels, those above 0.5, that are salient.

    Args:
        classes: (N, C, h, w) probabilities.
        saliency: (N, 1, h, w).
    """
    pixels = torch.round(classes)
    # the original adds the small number at every pixel
    return (pixels * torch.round(saliency)).sum((2, 3)) / (pixels + 1e-4).sum((2, 3))
