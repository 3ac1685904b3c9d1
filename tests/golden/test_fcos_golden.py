"""The steps of FCOS and of CenterMask's ROI heads against the originals' code, without weights."""

import re

import numpy as np
import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import nn
from torch.nn import functional as F

from solo_d2.modeling.centermask.fcos import FCOSProposalGenerator
from solo_d2.modeling.centermask.head import FCOSOutputs
from solo_d2.modeling.centermask.inference import select_boxes
from solo_d2.modeling.centermask.mask_head import SpatialAttention
from solo_d2.modeling.centermask.mask_iou import (
    crop_masks,
    mask_iou_targets,
    visible_share,
)
from solo_d2.modeling.centermask.pooler import AdaptiveROIPooler, assign_by_ratio
from solo_d2.modeling.centermask.roi_heads import CenterMaskROIHeads
from solo_d2.modeling.centermask.targets import (
    assign_locations,
    box_distances,
    centerness,
    level_locations,
)

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("fcos_parts")


# The file's tolerances: of arrays, and of losses.
ARRAY = {"rtol": 1e-5, "atol": 1e-5}
LOSS = {"rtol": 1e-5, "atol": 1e-12}


def close(actual, expected, loss: bool = False):
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), expected, **(LOSS if loss else ARRAY)
    )


def borders_of(golden) -> list[float]:
    return [high for _, high in golden.meta["sizes_of_interest"][:-1]]


def level_arrays(golden, prefix: str) -> FCOSOutputs:
    levels = range(len(golden.meta["strides"]))
    return FCOSOutputs(
        *([golden[f"{prefix}_{name}{i}"] for i in levels] for name in ("logits", "reg", "ctr"))
    )


def by_level(flat: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(images, locations of all levels) -> flat, ordered by level, then image, then location."""
    return torch.cat([level.flatten() for level in flat.split(counts, dim=1)])


@pytest.mark.parametrize("levels", ["3_5", "2_5"])
def test_boxes_get_the_level_of_their_share_of_the_image(golden, levels):
    low, high = map(int, levels.split("_"))
    boxes, image = Boxes(golden["lvl_boxes"]), golden["lvl_image_index"].long()
    actual = assign_by_ratio(
        boxes.area(), golden["lvl_image_sizes"].prod(dim=1)[image], min_level=low, max_level=high
    )
    assert actual.tolist() == golden[f"lvl_ratio_{levels}"].tolist()


def test_the_pooler_assigns_by_the_unpadded_sizes(golden):
    image = golden["lvl_image_index"].long()
    sizes = [tuple(size) for size in golden["lvl_image_sizes"].tolist()]
    boxes = [Boxes(golden["lvl_boxes"][image == i]) for i in range(len(sizes))]
    pooler = AdaptiveROIPooler(output_size=2, strides=[8, 16, 32])
    expected = torch.cat([golden["lvl_ratio_3_5"][image == i] for i in range(len(sizes))])
    assert pooler.assign(boxes, sizes).tolist() == expected.tolist()


def test_the_area_criterion_is_detectron2s(golden):
    actual = assign_boxes_to_levels([Boxes(golden["lvl_boxes"])], 3, 5, 224, 4)
    assert actual.tolist() == golden["lvl_area_3_5"].tolist()


def test_locations(golden):
    sizes = [tuple(size) for size in golden["loc_shapes"].tolist()]
    levels = [
        level_locations(size, stride, torch.device("cpu"))
        for size, stride in zip(sizes, golden.meta["strides"])
    ]
    assert torch.equal(torch.cat(levels), golden["loc_all"])


@pytest.mark.parametrize("kind", ["cs", "in"])
def test_targets_of_locations(golden, kind):
    strides, num_classes = golden.meta["strides"], golden.meta["classes"]
    images = [i for i in range(9) if f"tgt_gt{i}_boxes" in golden]
    boxes = [golden[f"tgt_gt{i}_boxes"] for i in images]
    classes = [golden[f"tgt_gt{i}_classes"].long() for i in images]
    sizes = [tuple(size) for size in golden["loc_shapes"].tolist()]
    counts = [height * width for height, width in sizes]
    padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    owner = assign_locations(
        padded,
        sizes,
        strides=strides,
        borders=borders_of(golden),
        radius=golden.meta["radius"] if kind == "cs" else 0,
    )
    image = torch.arange(len(images))[:, None].expand_as(owner)
    label_of = nn.utils.rnn.pad_sequence(classes, batch_first=True)
    label_of = F.pad(label_of, (0, 1), value=num_classes)
    labels = by_level(label_of[image, owner], counts)
    assert labels.tolist() == golden[f"tgt_{kind}_labels"].tolist()

    positive = labels < num_classes
    locations = golden["loc_all"].expand(len(images), -1, -1)
    strides_of = torch.cat([torch.full((n,), s) for n, s in zip(counts, strides)])
    flat = {
        "x": by_level(locations[..., 0], counts)[positive],
        "y": by_level(locations[..., 1], counts)[positive],
        "stride": by_level(strides_of.expand(len(images), -1), counts)[positive],
        "image": by_level(image, counts)[positive],
        "owner": by_level(owner, counts)[positive],
    }
    points = torch.stack([flat["x"], flat["y"]], dim=1)
    distances = box_distances(points, padded[flat["image"], flat["owner"]])
    distances = distances / flat["stride"][:, None]
    close(distances, golden[f"tgt_{kind}_pos_reg"])
    close(centerness(distances), golden[f"tgt_{kind}_pos_ctr"])


def generator(golden, **options) -> FCOSProposalGenerator:
    return FCOSProposalGenerator(
        head=nn.Identity(),
        in_features=["p3", "p4", "p5", "p6", "p7"],
        strides=golden.meta["strides"],
        num_classes=golden.meta["classes"],
        borders=borders_of(golden),
        focal_loss_alpha=golden.meta["focal"]["alpha"],
        focal_loss_gamma=golden.meta["focal"]["gamma"],
        **options,
    )


def ground_truth(golden, present: list[bool]) -> list[Instances]:
    result = []
    for i, has_objects in enumerate(present):
        keep = slice(None) if has_objects else slice(0)
        boxes = Boxes(golden[f"loss_gt{i}_boxes"][keep])
        classes = golden[f"loss_gt{i}_classes"].long()[keep]
        result.append(Instances((128, 160), gt_boxes=boxes, gt_classes=classes))
    return result


PRESENT = {"both": [True, True], "second_empty": [True, False], "all_empty": [False, False]}


@pytest.mark.parametrize("kind", ["cs", "in"])
@pytest.mark.parametrize("loss", ["giou", "iou", "linear_iou"])
@pytest.mark.parametrize("images", PRESENT)
def test_losses(golden, images, loss, kind):
    outputs = level_arrays(golden, "loss")
    for levels in outputs:
        for x in levels:
            x.requires_grad_()
    radius = golden.meta["radius"] if kind == "cs" else 0
    fcos = generator(golden, box_loss_type=loss, radius=radius)
    losses = fcos.losses(outputs, ground_truth(golden, PRESENT[images]))
    names = ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]
    key = f"loss_{images}_{loss}_{kind}"
    close([losses[name].item() for name in names], golden[key], loss=True)
    sum(losses.values()).backward()
    norms = [torch.cat([x.grad.flatten() for x in levels]).norm().item() for levels in outputs]
    if f"{key}_gradnorm" in golden:
        close(norms, golden[f"{key}_gradnorm"])


SETTINGS = {
    "default100": {},
    "post20": {"post_nms_topk": 20},
    "pre50post30": {"pre_nms_topk": 50, "post_nms_topk": 30},
    "withctr100": {"threshold_with_centerness": True},
    "thr03": {"score_threshold": 0.03},
    # 40 per level is not in the file's notes; its arrays show it
    "nonms": {"nms_threshold": 0.0, "pre_nms_topk": 40, "post_nms_topk": 60},
}


@pytest.mark.parametrize("tag", SETTINGS)
def test_selected_boxes(golden, recorded_order, tag):
    settings = {"score_threshold": 0.05, "pre_nms_topk": 1000, "nms_threshold": 0.6}
    settings |= {"post_nms_topk": 100} | SETTINGS[tag]
    outputs = level_arrays(golden, "sel")
    found = select_boxes(outputs, strides=golden.meta["strides"], **settings)
    for i, image in enumerate(found):
        recorded = [golden[f"sel_{tag}_{i}_{name}"] for name in image._fields]
        order = recorded_order(
            image.scores, image.boxes, recorded[1], recorded[0], tolerance=ARRAY["atol"]
        )
        for actual, expected in zip(image, recorded):
            close(actual[order], expected)


def test_matched_proposals(golden):
    """The file also has the background, all of it, which has no masks; we leave it out."""
    heads = CenterMaskROIHeads(
        mask_in_features=[],
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
    )
    proposals = [
        Instances(
            (128, 160),
            proposal_boxes=Boxes(golden[f"sel_default100_{i}_boxes"]),
            objectness_logits=golden[f"sel_default100_{i}_scores"],
        )
        for i in range(2)
    ]
    targets = ground_truth(golden, [True, False])
    for i, found in enumerate(heads.label_and_sample_proposals(proposals, targets)):
        foreground = golden[f"mat_{i}_gt_classes"] < 80
        assert len(foreground) == len(proposals[i]) + len(targets[i])
        assert len(found) == foreground.sum()
        close(found.proposal_boxes.tensor, golden[f"mat_{i}_boxes"][foreground])
        close(found.objectness_logits, golden[f"mat_{i}_scores"][foreground])
        assert torch.equal(found.gt_classes, golden[f"mat_{i}_gt_classes"][foreground].long())
        if foreground.any():
            matched = targets[i].gt_boxes.tensor[found.gt_index]
            close(matched, golden[f"mat_{i}_gt_boxes"][foreground])


def polygons(golden) -> PolygonMasks:
    objects: dict[int, list] = {}
    for name in sorted(golden.arrays.files):
        if match := re.fullmatch(r"msk_poly_(\d+)_(\d+)", name):
            objects.setdefault(int(match[1]), []).append(golden[name].numpy())
    return PolygonMasks([objects[i] for i in range(len(objects))])


class GivenOutputs(nn.Module):
    """Replaces a head: returns the recorded outputs of the original's head."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output, self.loss_weight, self.inputs = output, 1.0, []

    def class_logits(self, x, classes):
        return self.output[torch.arange(len(classes)), classes]

    def forward(self, features, mask_probs):
        self.inputs.append(mask_probs)
        return self.output


class GivenPooled(nn.Module):
    def forward(self, levels, boxes, image_sizes):
        return torch.zeros(sum(map(len, boxes)), 1, 14, 14)


def all_classes(golden, count: int) -> torch.Tensor:
    """Mask logits of all classes, of which only those of one class are recorded."""
    recorded = golden["msk_logits_cls"]
    logits = torch.zeros(len(recorded), count, *recorded.shape[1:])
    logits[torch.arange(len(recorded)), golden["msk_gt_classes"].long()] = recorded
    return logits.requires_grad_()


def mask_losses(golden, masks, mask_logits, mask_ious):
    """Both losses of the ROIs, and the input probabilities of the MaskIoU head."""
    num_classes = mask_ious.shape[1]
    iou_head = GivenOutputs(mask_ious)
    heads = CenterMaskROIHeads(
        mask_in_features=[],
        mask_pooler=GivenPooled(),
        mask_head=GivenOutputs(mask_logits),
        mask_iou_head=iou_head,
        num_classes=num_classes,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=None,
    )
    size = tuple(golden["msk_image_size"].tolist())
    proposals = Instances(
        size,
        proposal_boxes=Boxes(golden["msk_boxes"]),
        gt_classes=golden["msk_gt_classes"].long(),
        gt_index=golden["msk_gt_index"].tolist(),
    )
    targets = Instances(size, gt_masks=masks)
    losses = heads.mask_losses({}, [proposals], [targets])
    return losses, iou_head.inputs[0]


def test_mask_targets(golden):
    masks, index = polygons(golden), golden["msk_gt_index"].tolist()
    boxes = golden.arrays["msk_boxes"].astype(np.float32)
    logits = golden["msk_logits_cls"]
    targets = crop_masks(masks, index, boxes, logits.shape[-1])
    recorded = np.unpackbits(golden.arrays["msk_target28_packed"])[: logits.numel()]
    assert torch.equal(targets, torch.from_numpy(recorded.astype(bool)).view(logits.shape))

    visible = visible_share(masks, index, boxes)
    close(visible, golden["msk_ratio"])
    close(mask_iou_targets(logits > 0, targets, visible), golden["msk_maskiou_target"])


def test_mask_losses(golden):
    predicted = golden["msk_pred_maskiou"].requires_grad_()
    logits = all_classes(golden, predicted.shape[1])
    losses, probs = mask_losses(golden, polygons(golden), logits, predicted)
    close(probs[:, ::7, ::7], golden["msk_selected"])
    close(losses["loss_mask"].item(), golden["msk_loss_mask"], loss=True)
    close(losses["loss_maskiou"].item(), golden["msk_loss_maskiou"], loss=True)
    losses["loss_maskiou"].backward(retain_graph=True)
    close(predicted.grad, golden["msk_grad_maskiou"])
    losses["loss_mask"].backward()
    close(logits.grad.norm(), golden["msk_grad_logits_norm"])


def test_masks_that_miss_their_objects_have_no_iou_loss(golden):
    predicted = golden["msk_pred_maskiou"].requires_grad_()
    logits = torch.full((len(predicted), predicted.shape[1], 28, 28), -1.0)
    losses, _ = mask_losses(golden, polygons(golden), logits, predicted)
    close(losses["loss_maskiou"].item(), golden["msk_loss_maskiou_no_positive"], loss=True)
    losses["loss_maskiou"].backward()
    assert not predicted.grad.any()


def test_bitmasks_show_about_the_same_share_as_their_polygons(golden):
    height, width = golden["msk_image_size"].tolist()
    masks = polygons(golden)
    bitmasks = BitMasks.from_polygon_masks(masks, height, width)
    index = golden["msk_gt_index"].tolist()
    boxes = golden.arrays["msk_boxes"].astype(np.float32)
    difference = visible_share(bitmasks, index, boxes) - visible_share(masks, index, boxes)
    assert difference.abs().max() < 0.01


def test_spatial_attention(golden):
    module = SpatialAttention()
    module.load_state_dict({"conv.weight": golden["sam_weight"]})
    with torch.no_grad():
        close(module(golden["sam_in"]), golden["sam_out"])
