"""Matching of anchors and objects, and ground truth at other sizes."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.layers import masks as mask_ops
from solo_d2.layers.boxes import box_ious
from solo_d2.modeling.yolact.anchors import to_corners
from solo_d2.modeling.yolact.targets import (
    force_match,
    match,
    resize_instances,
    semantic_target,
    shrink_masks,
)


def literal_force_match(ious: torch.Tensor) -> list[int]:
    """One object after another, as in the published code."""
    ious, own = ious.clone(), [-1] * len(ious)
    for _ in range(len(ious)):
        value, anchor = ious.max(dim=1)
        if value.max() < 0:
            break
        j = int(value.argmax())
        own[j] = int(anchor[j])
        ious[:, own[j]] = -1
        ious[j] = -1
    return own


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.sampled_from([2, 5, 1000]))
@settings(max_examples=150, deadline=None)
def test_force_match_equals_the_loop_over_objects(seed, n, p, steps):
    g = torch.Generator().manual_seed(seed)
    # few steps: many ties and many zeros
    ious = torch.randint(0, steps, (n, p), generator=g) / steps
    own = force_match(ious)
    assert own.tolist() == literal_force_match(ious)
    served = own[own >= 0].tolist()
    assert len(set(served)) == len(served) == min(n, p)


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_every_object_has_an_anchor_and_labels_follow_the_iou(anchors, random_boxes, seed, n):
    boxes = random_boxes(seed, n)
    classes = torch.arange(n) % 5
    labels, objects = match(boxes, classes, torch.zeros(0, 4), anchors)
    positive = labels > 0
    assert set(objects[positive].tolist()) == set(range(n))
    assert torch.equal(labels[positive], classes[objects[positive]] + 1)
    ious = box_ious(boxes, to_corners(anchors))
    best = ious.amax(dim=0)
    assert (labels[best >= 0.5] > 0).all()
    forced = positive & (best < 0.5)
    assert int(forced.sum()) <= n
    assert (labels[(best < 0.4) & ~forced] == 0).all()
    assert (labels[(best >= 0.4) & (best < 0.5) & ~forced] == -1).all()
    # without a forced match, an anchor goes to its best object
    plain = positive & (best >= 0.5)
    own = ious[objects, torch.arange(len(anchors))]
    assert int((own[plain] < best[plain]).sum()) <= n


def test_rivals_for_one_anchor_all_get_one(anchors):
    boxes = to_corners(anchors[[40, 40, 40]])
    labels, objects = match(boxes, torch.tensor([0, 1, 2]), torch.zeros(0, 4), anchors)
    assert set(labels[labels > 0].tolist()) == {1, 2, 3}
    assert objects[40] == 0


def test_more_objects_than_anchors_are_matched_as_far_as_anchors_go(anchors, random_boxes):
    boxes, none = random_boxes(1, 5), torch.zeros(0, 4)
    labels, objects = match(boxes, torch.arange(5), none, anchors[:2])
    assert (labels > 0).all()
    assert len(set(objects.tolist())) == 2


def test_without_objects_all_is_background_but_in_crowds(anchors):
    none, no_classes = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    labels, _ = match(none, no_classes, none, anchors)
    assert (labels == 0).all()
    crowd = torch.tensor([[0.0, 0.0, 0.5, 0.7]])
    labels, _ = match(none, no_classes, crowd, anchors)
    corners = to_corners(anchors)
    within = ((corners[:, :2] >= crowd[0, :2]) & (corners[:, 2:] <= crowd[0, 2:])).all(dim=1)
    assert within.any() and (labels[within] == -1).all()
    beside = corners[:, 0] >= 0.5
    assert beside.any() and (labels[beside] == 0).all()
    assert (match(none, no_classes, crowd, anchors, crowd_threshold=1.0).labels == 0).all()


def test_crowds_leave_positives_alone(anchors, random_boxes):
    boxes, classes = random_boxes(3, 4), torch.arange(4)
    everything = torch.tensor([[-1.0, -1.0, 2.0, 2.0]])
    before, objects = match(boxes, classes, torch.zeros(0, 4), anchors)
    after, objects_after = match(boxes, classes, everything, anchors)
    assert torch.equal(before > 0, after > 0)
    assert torch.equal(objects, objects_after)
    assert (after[before <= 0] == -1).all()


def test_masks_are_shrunk_without_antialiasing_and_more_than_half_is_set():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4] = True
    masks[1, 1, 1] = True  # only one of the four pixels under a sample
    small, smaller = shrink_masks(masks, (4, 4), (1, 2))
    assert small[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert not small[1].any()
    assert smaller.shape == (2, 1, 2)
    (empty,) = shrink_masks(masks[:0], (4, 4))
    assert empty.shape == (0, 4, 4)


def test_semantic_target_is_the_union_of_each_class():
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 0, 0] = masks[1, 1, 2] = masks[2, 1, 1] = True
    classes, usable = torch.tensor([2, 2, 0]), torch.tensor([True, True, True])
    target = semantic_target(masks, classes, usable, 4)
    assert target.shape == (4, 2, 3)
    assert target[2].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert target[0].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert not target[1].any() and not target[3].any()
    assert not semantic_target(masks[:0], classes[:0], usable[:0], 4).any()
    without_last = semantic_target(masks, classes, torch.tensor([True, True, False]), 4)
    assert torch.equal(without_last[1:], target[1:]) and not without_last[0].any()


def test_objects_without_area_get_no_anchor_and_leave_the_others_alone(anchors, random_boxes):
    boxes, classes, none = random_boxes(5, 4), torch.arange(4), torch.zeros(0, 4)
    flat = torch.tensor([[0.3, 0.3, 0.3, 0.6], [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.9, float("nan")]])
    together = torch.cat([flat, boxes])
    labels, objects = match(together, torch.cat([classes[:3], classes]), none, anchors)
    alone, objects_alone = match(boxes, classes, none, anchors)
    assert torch.equal(labels, alone)
    positive = labels > 0
    assert torch.equal(objects[positive], objects_alone[positive] + 3)
    assert (match(flat, classes[:3], none, anchors).labels == 0).all()
    assert (match(boxes, classes, none, anchors, min_size=2.0).labels == 0).all()


def instances_of(size, masks=None, polygons=None, boxes=None) -> Instances:
    instances = Instances(size)
    if masks is not None:
        instances.gt_masks = BitMasks(masks)
    if polygons is not None:
        instances.gt_masks = PolygonMasks(polygons)
    if boxes is not None:
        instances.gt_boxes = Boxes(torch.tensor(boxes))
    return instances


def test_boxes_and_polygons_are_scaled_along_each_axis():
    before = instances_of(
        (100, 200),
        polygons=[[[20.0, 10.0, 200.0, 10.0, 200.0, 100.0]]],
        boxes=[[20.0, 10, 200, 100]],
    )
    before.gt_classes = torch.tensor([3])
    after = resize_instances(before, (50, 50), torch.device("cpu"))
    assert after.image_size == (50, 50)
    assert after.gt_boxes.tensor.tolist() == [[5, 5, 50, 50]]
    assert after.gt_masks.polygons[0][0].tolist() == [5, 5, 50, 5, 50, 50]
    assert after.gt_classes.tolist() == [3]
    assert before.gt_boxes.tensor.tolist() == [[20, 10, 200, 100]]
    assert before.gt_masks.polygons[0][0].tolist() == [20, 10, 200, 10, 200, 100]


@pytest.mark.parametrize("size", [(48, 64), (100, 90), (37, 61)])
def test_bit_masks_are_resized_as_opencv_does_and_set_from_one_half_on(size):
    masks = np.random.default_rng(0).random((5, 8, 9)) > 0.5
    masks = masks.repeat(9, axis=1).repeat(7, axis=2)  # blobs
    before = instances_of(masks.shape[1:], masks=torch.from_numpy(masks))
    ours = resize_instances(before, size, torch.device("cpu")).gt_masks.tensor.numpy()

    linear = {"interpolation": cv2.INTER_LINEAR}
    soft = np.stack([cv2.resize(mask.astype(np.float32), size[::-1], **linear) for mask in masks])
    surely = abs(soft - 0.5) > 1e-5
    assert surely.mean() > 0.97
    assert (ours == (soft >= 0.5))[surely].all()


def test_one_half_of_a_mask_is_set_and_chunks_do_not_matter(monkeypatch):
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, 1], masks[1, 1, 1], masks[2] = True, True, True
    before = instances_of((4, 4), masks=masks)
    whole = resize_instances(before, (2, 2), torch.device("cpu")).gt_masks.tensor
    assert whole[:, 0].tolist() == [[True, True], [False, False], [True, True]]
    monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 64)
    chunked = resize_instances(before, (2, 2), torch.device("cpu")).gt_masks.tensor
    assert torch.equal(whole, chunked)


def test_an_image_without_annotations_is_resized_too():
    after = resize_instances(Instances((30, 40)), (20, 20), torch.device("cpu"))
    assert after.image_size == (20, 20) and not after.get_fields()
    none = instances_of((30, 40), masks=torch.zeros(0, 30, 40, dtype=torch.bool))
    after = resize_instances(none, (20, 20), torch.device("cpu"))
    assert after.gt_masks.tensor.shape == (0, 20, 20)
