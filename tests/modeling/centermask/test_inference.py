"""From the outputs of the FCOS head to boxes."""

import math

import pytest
import torch
from detectron2.layers import batched_nms
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.modeling.centermask.head import FCOSOutputs
from solo_d2.modeling.centermask.inference import select_boxes


def outputs(num_classes=2, levels=((4, 6), (2, 3)), images=1, seed=0):
    """Random outputs of the FCOS head: logits, distances, centerness."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels):
        return [torch.randn(images, channels, *size, generator=generator) for size in levels]

    return FCOSOutputs(draw(num_classes), [x.abs() * 3 for x in draw(4)], draw(1))


def test_boxes_scores_and_places_come_from_the_cell():
    raw = logits, distances, centerness = outputs(levels=((4, 6),))
    logits[0].fill_(-9.0)
    logits[0][0, 1, 2, 3] = 1.0
    (found,) = select_boxes(raw, strides=[8], score_threshold=0.05)
    assert found.classes.tolist() == [1] and found.locations.tolist() == [[28, 20]]
    left, top, right, bottom = (distances[0][0, :, 2, 3] * 8).tolist()
    expected = [[28 - left, 20 - top, 28 + right, 20 + bottom]]
    torch.testing.assert_close(found.boxes, torch.tensor(expected))
    score = math.sqrt(1 / (1 + math.exp(-1)) * centerness[0][0, 0, 2, 3].sigmoid().item())
    assert found.scores.item() == pytest.approx(score)


def reference_selection(
    logits, distances, centerness, image, *, strides, threshold, with_centerness, topk
):
    """All pairs of location and class one by one; per level the best ``topk``."""
    boxes, scores, classes = [], [], []
    for level, stride in enumerate(strides):
        found = []
        _, num_classes, height, width = logits[level].shape
        for y in range(height):
            for x in range(width):
                for c in range(num_classes):
                    p = logits[level][image, c, y, x].sigmoid()
                    v = p * centerness[level][image, 0, y, x].sigmoid()
                    if (v if with_centerness else p) > threshold:
                        place = torch.tensor([x, y]) * stride + stride // 2
                        pixels = distances[level][image, :, y, x] * stride
                        corners = torch.cat([place - pixels[:2], place + pixels[2:]])
                        found.append((v, c, corners))
        found.sort(key=lambda item: -item[0])
        for v, c, box in found[:topk]:
            boxes.append(box), scores.append(v.sqrt()), classes.append(c)
    if not boxes:
        return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()
    boxes, scores, classes = torch.stack(boxes), torch.stack(scores), torch.tensor(classes)
    keep = batched_nms(boxes, scores, classes, 0.6)
    return boxes[keep], scores[keep], classes[keep]


@given(
    st.integers(0, 2**16),
    st.sampled_from([0.03, 0.05, 0.5, 0.9, 1.0]),
    st.booleans(),
    st.sampled_from([1, 7, 1000]),
)
@settings(max_examples=25, deadline=None)
def test_selection_equals_looking_at_every_pair(seed, threshold, with_centerness, topk):
    levels, strides = outputs(images=2, seed=seed), [8, 16]
    found = select_boxes(
        levels,
        strides=strides,
        score_threshold=threshold,
        threshold_with_centerness=with_centerness,
        pre_nms_topk=topk,
        post_nms_topk=0,
    )
    for image, actual in enumerate(found):
        boxes, scores, classes = reference_selection(
            *levels,
            image,
            strides=strides,
            threshold=threshold,
            with_centerness=with_centerness,
            topk=topk,
        )
        torch.testing.assert_close(actual.boxes, boxes)
        torch.testing.assert_close(actual.scores, scores)
        assert torch.equal(actual.classes, classes)


def test_equal_scores_at_the_limit_all_stay():
    raw = logits, distances, centerness = outputs(levels=((4, 6),), num_classes=1)
    logits[0].fill_(-9.0)
    logits[0][0, 0, 0, :4] = torch.tensor([3.0, 1.0, 1.0, 0.0])
    centerness[0].zero_()
    distances[0].fill_(0.25)
    (found,) = select_boxes(raw, strides=[8], score_threshold=0.05, post_nms_topk=2)
    assert len(found.scores) == 3


def test_nms_is_within_a_class():
    raw = outputs(levels=((1, 1),), num_classes=2)
    raw.class_logits[0].fill_(2.0)
    (found,) = select_boxes(raw, strides=[8], score_threshold=0.05)
    assert sorted(found.classes.tolist()) == [0, 1]
    assert torch.equal(found.boxes[0], found.boxes[1])
