"""Target assignment, mask reduction, dice and focal loss against the original code."""

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F

from solo_d2.layers.losses import dice_loss
from solo_d2.layers.masks import downsample_masks, downsample_unpadded_masks, mass_centers
from solo_d2.modeling.solo.targets import assign_cells, last_claims

pytestmark = pytest.mark.golden

BACKGROUND = 80  # of AdelaiDet's targets
LOSSES = 1e-6  # relative; targets are exact


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("solo_targets")


def assign(golden, case: str, *, inclusive_boxes: bool):
    """Targets of a case, its padded masks and its unpadded size."""
    config = golden.meta["config"]
    unpadded = golden.masks(f"{case}_gt_masks")
    height, width = golden[f"{case}_padded_hw"].tolist()
    masks = F.pad(unpadded, (0, width - unpadded.shape[2], 0, height - unpadded.shape[1]))
    centers, areas = mass_centers(masks)
    targets = assign_cells(
        golden[f"{case}_gt_boxes"],
        golden[f"{case}_gt_classes"],
        centers,
        areas,
        (height, width),
        num_classes=BACKGROUND,
        num_grids=config["num_grids"],
        scale_ranges=config["scale_ranges"],
        sigma=config["sigma"],
        inclusive_boxes=inclusive_boxes,
    )
    return targets, masks, tuple(unpadded.shape[1:])


def expected_masks(golden, prefix: str) -> torch.Tensor:
    return golden.masks(f"{prefix}_tmask")


def implementations(golden) -> list[tuple[str, str]]:
    return [(case, impl) for case, per_impl in golden.meta["cases"].items() for impl in per_impl]


def test_category_grids_are_the_originals(golden):
    num_grids = golden.meta["config"]["num_grids"]
    for case, impl in implementations(golden):
        targets, _, _ = assign(golden, case, inclusive_boxes=impl != "adet_v2")
        grids = targets.categories.split([g * g for g in num_grids])
        for level, grid in enumerate(grids):
            if impl != "adet_v2":  # their classes start at 1, background is 0
                grid = torch.where(grid == BACKGROUND, 0, grid + 1)
            expected = golden[f"{case}_{impl}_l{level}_cate"].long().flatten()
            assert torch.equal(grid, expected), (case, impl, level)


def test_positive_cells_are_the_originals_in_their_order(golden):
    num_grids = golden.meta["config"]["num_grids"]
    for case, impl in implementations(golden):
        targets, _, _ = assign(golden, case, inclusive_boxes=impl != "adet_v2")
        if not impl.endswith("v2"):
            targets = last_claims(targets, num_grids)
        for level, grid in enumerate(num_grids):
            expected = golden[f"{case}_{impl}_l{level}_cells"].long()
            if expected.dim() == 2:  # (row, column)
                expected = expected[:, 0] * grid + expected[:, 1]
            cells = targets.cell[targets.level == level]
            assert torch.equal(cells, expected), (case, impl, level)


def test_mask_targets_are_the_originals(golden):
    config = golden.meta["config"]
    for case, impl in implementations(golden):
        targets, masks, image_size = assign(golden, case, inclusive_boxes=impl != "adet_v2")
        if not impl.endswith("v2"):
            targets = last_claims(targets, config["num_grids"])
        for level in range(len(config["strides"])):
            expected = expected_masks(golden, f"{case}_{impl}_l{level}")
            stride = masks.shape[-1] // expected.shape[-1]
            if impl == "adet_v2":
                reduced = downsample_unpadded_masks(
                    masks, stride, image_size, tuple(masks.shape[1:])
                )
            else:
                reduced = downsample_masks(masks, stride)
            actual = reduced[targets.instance[targets.level == level]]
            assert torch.equal(actual, expected), (case, impl, level)
            sums = golden[f"{case}_{impl}_l{level}_tmask_sum"].long()
            assert torch.equal(actual.flatten(1).sum(1), sums), (case, impl, level)


def loss_cases(golden, kind: str) -> list[str]:
    prefixes = {name.split("_")[0] for name in golden.arrays.files if name.startswith(kind)}
    assert prefixes
    return sorted(prefixes)


def test_dice_loss_and_its_gradient_are_the_originals(golden):
    for case in loss_cases(golden, "dice"):
        logits = golden[f"{case}_logits"].requires_grad_()
        distances = dice_loss(logits.sigmoid(), golden[f"{case}_target"])
        (3 * distances.mean()).backward()
        torch.testing.assert_close(distances, golden[f"{case}_out"], rtol=LOSSES, atol=1e-7)
        expected = golden[f"{case}_grad3mean"]
        # relative to the largest entry: the smallest are differences of nearly equal numbers
        atol = LOSSES * expected.abs().max().item()
        torch.testing.assert_close(logits.grad, expected, rtol=LOSSES, atol=atol)


def test_focal_loss_and_its_gradient_are_the_originals(golden):
    for case in loss_cases(golden, "focal"):
        logits = golden[f"{case}_logits"].requires_grad_()
        labels = golden[f"{case}_labels"]
        num_classes = logits.shape[1]
        one_hot = F.one_hot(labels, num_classes + 1)[:, :-1]
        loss = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2.0, reduction="sum")
        loss = loss / ((labels < num_classes).sum() + 1)
        loss.backward()
        for name in (f"{case}_out", f"{case}_out_mmdet"):
            torch.testing.assert_close(loss, golden[name], rtol=LOSSES, atol=0)
        expected = golden[f"{case}_grad"]
        atol = LOSSES * expected.abs().max().item()
        torch.testing.assert_close(logits.grad, expected, rtol=LOSSES, atol=atol)
