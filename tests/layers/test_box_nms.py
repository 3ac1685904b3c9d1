"""NMS of boxes that have scores of several classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from solo_d2.layers import masks as mask_ops
from solo_d2.layers.box_nms import cross_class_fast_nms, fast_nms, traditional_nms

cases = given(st.integers(0, 10**6), st.integers(0, 25), st.integers(1, 4))


def random_boxes(generator: torch.Generator, n: int) -> torch.Tensor:
    """On a coarse grid, so that equal and nested boxes and boxes without area occur."""
    corners = torch.randint(0, 6, (n, 2, 2), generator=generator).sort(dim=1).values
    return corners.reshape(n, 4).float()


def random_candidates(seed: int, n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (n, 4), and scores (classes, n) that are all different."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randperm(classes * n, generator=g).float().view(classes, n)
    return random_boxes(g, n), (scores + 1) / (classes * n + 1)


def pairs(kept) -> list[tuple[int, int]]:
    return list(zip(kept.classes.tolist(), kept.index.tolist()))


def literal_fast_nms(boxes, scores, threshold, top_k):
    """Class by class: dropped if any better box overlaps it, even one that is dropped."""
    kept = []
    for label, row in enumerate(scores):
        order = row.argsort(descending=True)[:top_k].tolist()
        for rank, j in enumerate(order):
            better = [box_iou(boxes[i][None], boxes[j][None]).item() for i in order[:rank]]
            if all(iou <= threshold for iou in better):  # NaN is not
                kept.append((row[j].item(), label, j))
    return [(label, j) for _, label, j in sorted(kept, reverse=True)]


@cases
@settings(max_examples=60, deadline=None)
def test_fast_nms_is_its_definition(seed, n, classes):
    boxes, scores = random_candidates(seed, n, classes)
    kept = fast_nms(boxes, scores, iou_threshold=0.41, top_k=9, max_detections=None)
    expected = literal_fast_nms(boxes, scores, 0.41, 9)
    assert pairs(kept) == expected
    assert torch.equal(kept.scores, scores[kept.classes, kept.index])
    assert (
        pairs(fast_nms(boxes, scores, iou_threshold=0.41, top_k=9, max_detections=3))
        == (expected[:3])
    )


@cases
@settings(max_examples=40, deadline=None)
def test_fast_nms_keeps_the_best_of_each_class_and_never_more_than_greedy_nms(seed, n, classes):
    boxes, scores = random_candidates(seed, n, classes)
    kept = pairs(fast_nms(boxes, scores, max_detections=None))
    if n:
        best = set(enumerate(scores.argmax(dim=1).tolist()))
        assert best <= set(kept)
    above = pairs(fast_nms(boxes, scores, score_threshold=0.5, max_detections=None))
    assert above == [(label, j) for label, j in kept if scores[label, j] > 0.5]


@cases
@settings(max_examples=40, deadline=None)
def test_cross_class_fast_nms_is_fast_nms_of_one_class(seed, n, classes):
    boxes, scores = random_candidates(seed, n, classes)
    best, labels = scores.max(dim=0)
    kept = cross_class_fast_nms(boxes, scores, top_k=12)
    alone = fast_nms(boxes, best[None], top_k=12, max_detections=None)
    assert torch.equal(kept.index, alone.index)
    assert torch.equal(kept.classes, labels[kept.index])
    assert len(set(kept.index.tolist())) == len(kept.index)
    limited = cross_class_fast_nms(boxes, scores, top_k=12, max_detections=2)
    assert torch.equal(limited.index, kept.index[:2])


def literal_greedy_nms(boxes, scores, threshold, lowest):
    kept = []
    pixels = boxes + torch.tensor([0, 0, 1, 1])
    for label, row in enumerate(scores):
        mine: list[int] = []
        for j in row.argsort(descending=True).tolist():
            overlaps = [box_iou(pixels[i][None], pixels[j][None]).item() for i in mine]
            if row[j] > lowest and all(iou < threshold for iou in overlaps):
                mine.append(j)
                kept.append((row[j].item(), label, j))
    return [(label, j) for _, label, j in sorted(kept, reverse=True)]


@cases
@settings(max_examples=60, deadline=None)
def test_traditional_nms_is_its_definition(seed, n, classes):
    boxes, scores = random_candidates(seed, n, classes)
    options = {"iou_threshold": 0.5, "score_threshold": 0.2}
    kept = traditional_nms(boxes, scores, max_detections=None, **options)
    assert pairs(kept) == literal_greedy_nms(boxes, scores, 0.5, 0.2)
    assert pairs(traditional_nms(boxes, scores, max_detections=2, **options)) == pairs(kept)[:2]


def test_traditional_nms_drops_at_the_threshold_exactly():
    # 4 x 2 and 4 x 4 pixels with both ends counted: IoU 1/2
    boxes = torch.tensor([[0.0, 0, 3, 3], [0, 0, 3, 1]])
    scores = torch.tensor([[0.9, 0.8]])
    assert len(traditional_nms(boxes, scores, iou_threshold=0.5).index) == 1
    assert len(traditional_nms(boxes, scores, iou_threshold=0.51).index) == 2


def test_fast_nms_keeps_one_of_several_boxes_without_area():
    point = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert len(fast_nms(point[None], torch.tensor([[0.9]])).index) == 1
    kept = fast_nms(point.repeat(3, 1), torch.tensor([[0.7, 0.9, 0.8]]))
    assert kept.index.tolist() == [1]


@pytest.mark.parametrize("nms", [fast_nms, cross_class_fast_nms, traditional_nms])
def test_without_candidates_there_are_no_detections(nms):
    kept = nms(torch.zeros(0, 4), torch.zeros(80, 0))
    assert [len(field) for field in kept] == [0, 0, 0]
    assert kept.index.dtype == kept.classes.dtype == torch.int64


def test_fast_nms_works_in_chunks_of_classes(monkeypatch):
    boxes, scores = random_candidates(5, 20, 7)
    whole = fast_nms(boxes, scores)
    monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 1)
    assert pairs(fast_nms(boxes, scores)) == pairs(whole)
