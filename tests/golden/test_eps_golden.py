"""EPS against the original code: its network, losses and pseudo-masks."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F

from solo_d2.checkpoint.rename_rules import convert
from solo_d2.modeling.backbone.resnet38 import ResNet38
from solo_d2.modeling.eps import EPS
from solo_d2.modeling.eps.inference import combine, rescale
from solo_d2.modeling.eps.losses import (
    classification_loss,
    estimate_saliency,
    overlap,
    saliency_loss,
)

pytestmark = pytest.mark.golden

LOSS_RTOL = 1e-5
MAP_ATOL = 1e-5
GRAD_RTOL, GRAD_ATOL = 1e-3, 1e-8
NORMALIZED_ATOL = 1e-4
SAME_PIXELS = 0.999
NET_RTOL = 1e-3  # of the largest value


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("eps_parts")


@pytest.fixture(scope="module")
def saliency(golden):
    """(3, 1, H, W)"""
    return golden["saliency_u8"][:, None] / 255


def check(actual, expected, *, rtol=0.0, atol=0.0):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)


def test_saliency_and_overlaps_are_the_originals(golden, saliency):
    cam = golden["cam"]
    resized = F.interpolate(saliency, cam.shape[-2:], mode="nearest")
    check(resized, golden["saliency_resized"], atol=MAP_ATOL)
    found = overlap(cam.softmax(dim=1)[:, :-1], resized)
    check(found, golden["overlap"], atol=MAP_ATOL)


def test_the_saliency_loss_and_its_gradient_are_the_originals(golden, saliency):
    cases = golden.meta["cases"]
    assert len(cases) == 5
    for k, case in enumerate(cases):
        cam = golden["cam"].requires_grad_()
        parts = estimate_saliency(cam, golden["label"], golden["saliency_resized"], **case)
        for name, part in zip(("fg", "bg_inv", "estimate"), parts):
            check(part.detach(), golden[f"eps{k}_{name}"], atol=MAP_ATOL)
        loss = saliency_loss(cam, golden["label"], saliency, **case)
        check(loss.detach(), golden[f"eps{k}_loss"], rtol=LOSS_RTOL)
        loss.backward()
        expected = golden[f"eps{k}_grad"]
        gradient = cam.grad if expected.shape[1] == 21 else cam.grad[:, [2, 7, 14, 20]]
        check(gradient, expected, rtol=GRAD_RTOL, atol=GRAD_ATOL)


def test_the_classification_loss_is_the_originals(golden):
    check(golden["cam"].mean(dim=(2, 3)), golden["pred"], atol=MAP_ATOL)
    loss = classification_loss(golden["cam"], golden["label"])
    check(loss, golden["loss_cls"], rtol=LOSS_RTOL)


class OneConv(nn.Module):
    """The stand-in network of the golden file, under an identity classifier."""

    size_divisibility = 0
    padding_constraints: dict = {}

    def __init__(self, weight, bias):
        super().__init__()
        self.conv = nn.Conv2d(3, 21, 5, stride=8, padding=2)
        self.conv.weight.data, self.conv.bias.data = weight, bias
        self.cams = []

    def output_shape(self):
        return {"res": ShapeSpec(channels=21, stride=8)}

    def forward(self, x):
        self.cams += list(self.conv(x))
        return {"res": self.conv(x)}


@pytest.fixture(scope="module")
def stand_in(golden):
    """The model and its output for the golden image."""
    backbone = OneConv(golden["infer_conv_weight"], golden["infer_conv_bias"])
    # ImageNet's numbers times 255
    model = EPS(
        backbone=backbone,
        in_features=["res"],
        num_classes=20,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    ).eval()
    nn.init.dirac_(model.classifier.weight)
    image = golden["infer_image"].permute(2, 0, 1)
    with torch.no_grad():
        (output,) = model([{"image": image, "image_labels": golden["infer_label"]}])
    return model, output["sem_seg"]


def test_maps_of_all_scales_are_the_originals(golden, stand_in):
    cams = stand_in[0].backbone.cams
    assert len(cams) == len(golden.meta["infer_input_shapes"]) == 8
    for k, cam in enumerate(cams):
        check(cam, golden[f"infer_cam{k}"], rtol=1e-4, atol=MAP_ATOL)
        shape = tuple(golden.meta["infer_input_shapes"][k][2:])
        image = golden["infer_image"].permute(2, 0, 1)
        assert tuple(rescale(image, (0.5, 1, 1.5, 2)[k // 2]).shape[1:]) == shape


def test_the_pseudo_mask_is_the_originals(golden, stand_in):
    scores = stand_in[1]
    present = golden["infer_label"].nonzero()[:, 0]
    check(scores[present + 1], golden["infer_norm_cam"], atol=NORMALIZED_ATOL)
    same = scores.argmax(dim=0) == golden["infer_pseudo"]
    assert same.float().mean() >= SAME_PIXELS
    # and from the recorded maps
    cams = [torch.stack([golden[f"infer_cam{2 * k + i}"] for i in (0, 1)]) for k in range(4)]
    maps = combine([cam.softmax(dim=1) for cam in cams], present, (60, 84))
    check(maps, golden["infer_norm_cam"], atol=NORMALIZED_ATOL)


@torch.no_grad()
def test_the_network_is_the_originals(golden, stand_in_weights):
    with torch.device("meta"):
        backbone = ResNet38()
        model = EPS(
            backbone=backbone,
            in_features=["res7"],
            num_classes=20,
            pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
        )
    model.load_state_dict(convert(stand_in_weights("eps_resnet38")), assign=True)
    cam = model.eval()._cam(golden["net_input"])
    for found, name in ((cam, "net_cam"), (cam.mean(dim=(2, 3)), "net_pred")):
        check(found, golden[name], atol=NET_RTOL * float(golden[name].abs().max()))
