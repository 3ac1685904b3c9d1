"""From soft masks to instances and segments."""

import pytest
import torch

from solo_d2.modeling.adaptis.panoptic import FoundInstances, PanopticAssembler, vote

H, W = 24, 32
# (top, left, bottom, right)
OBJECTS = ((2, 2, 10, 12), (12, 4, 22, 14), (4, 18, 20, 30))


def rectangle(top: int, left: int, bottom: int, right: int, value: float = 0.9) -> torch.Tensor:
    mask = torch.full((H, W), 0.05)
    mask[top:bottom, left:right] = value
    return mask


def semantic_probs(num_things: int = 2) -> torch.Tensor:
    """One stuff class and things; the last object has class 1, the others class 0."""
    probs = torch.zeros(1 + num_things, H, W)
    probs[0] = 1
    for i, (top, left, bottom, right) in enumerate(OBJECTS):
        probs[:, top:bottom, left:right] = 0.1 / num_things
        probs[1 + (i == 2), top:bottom, left:right] = 0.9
    return probs


def found(masks, probs, *, padded=(0, 0)) -> FoundInstances:
    """Instances as returned by ``AdaptIS.inference``."""
    masks = torch.stack(masks) if masks else torch.zeros(0, H, W)
    classes, scores = vote(masks, probs[1:])
    masks = torch.nn.functional.pad(masks, (0, padded[1], 0, padded[0]))
    return FoundInstances(
        (H, W),
        semantic=probs,
        pred_masks=masks,
        scores=scores,
        pred_classes=classes,
    )


def competed(masks, probs=None, **options):
    probs = semantic_probs() if probs is None else probs
    return PanopticAssembler(**options).compete(iter(masks), probs)


def test_instances_have_ids_classes_scores_and_a_semantic_map():
    masks = [rectangle(*r) for r in OBJECTS]
    result = competed(masks)
    for i, (top, left, bottom, right) in enumerate(OBJECTS):
        assert (result.ids[top:bottom, left:right] == i + 1).all()
    assert int((result.ids > 0).sum()) == sum((r[2] - r[0]) * (r[3] - r[1]) for r in OBJECTS)
    assert result.ids.dtype == torch.int32
    classes, scores = vote(torch.stack(masks), semantic_probs()[1:])
    assert classes.tolist() == [0, 0, 1]
    torch.testing.assert_close(scores, torch.full((3,), 0.9 * 0.9))
    assert torch.equal(result.semantic > 0, result.ids > 0)


def test_the_higher_probability_wins_a_pixel_and_the_first_of_equal_ones():
    strong, weak = rectangle(0, 0, 8, 8, 0.9), rectangle(4, 4, 12, 12, 0.8)
    things = torch.zeros(3, H, W)
    things[1] = 1
    for masks, winner in (([strong, weak], 1), ([weak, strong], 2), ([strong, strong], 1)):
        assert competed(masks, things).ids[5, 5] == winner


def test_background_wins_where_it_is_more_likely():
    result = competed([rectangle(0, 0, 8, 8, 0.6)], stuff_prob_mult=0.5)
    # outside the first object the background has 0.5
    assert result.ids[0, 0] == 1
    assert competed([rectangle(0, 0, 8, 8, 0.6)]).ids[0, 0] == 0


def test_unlikely_pixels_belong_to_no_instance_and_unlikely_stuff_to_no_class():
    result = competed(
        [rectangle(*OBJECTS[0], 0.6), rectangle(*OBJECTS[1])],
        min_things_prob=0.7,
        min_stuff_prob=0.5,
    )
    assert result.ids.unique().tolist() == [0, 2]
    top, left, bottom, right = OBJECTS[2]
    assert (result.semantic[top:bottom, left:right] == -1).all()
    assert result.semantic[0, 0] == 0


def test_masks_are_resized_as_probabilities_without_their_padding():
    masks = [rectangle(*r) for r in OBJECTS]
    small = PanopticAssembler()(found(masks, semantic_probs()), (H, W), (H, W))
    size, padded = (2 * H, 2 * W), (H + 8, W + 4)
    large = PanopticAssembler()(found(masks, semantic_probs(), padded=(8, 4)), size, padded)
    assert large["instances"].image_size == size
    same = large["instances"].pred_masks[:, ::2, ::2] == small["instances"].pred_masks
    assert same.float().mean() > 0.98


def test_the_class_has_the_highest_mean_probability_inside():
    things = torch.zeros(2, H, W)
    # most pixels lean to class 1, a few are sure of class 0
    things[0], things[1] = 0.45, 0.5
    things[:, :2, :10] = torch.tensor([1.0, 0.0])[:, None, None]
    mask = rectangle(0, 0, 10, 10)[None]
    classes, scores = vote(mask, things)
    assert classes.tolist() == [0]
    assert float(scores) == pytest.approx(0.9 * (0.2 * 1 + 0.8 * 0.45))


def test_classes_of_things_may_follow_those_of_stuff():
    things = torch.rand(2, H, W)
    classes, scores = vote(torch.ones(3, H, W), things)
    shifted = PanopticAssembler(thing_offset=11).vote([torch.ones(3, H, W)], things, 0.4)
    assert torch.equal(shifted[0], classes + 11) and torch.equal(shifted[1], scores)


def test_an_empty_mask_has_score_zero():
    classes, scores = vote(torch.zeros(2, H, W), torch.rand(3, H, W))
    assert scores.tolist() == [0, 0] and ((classes >= 0) & (classes < 3)).all()


def test_nothing_found_is_an_ordinary_result():
    result = PanopticAssembler()(found([], semantic_probs()), (H, W), (H, W))
    assert result["instances"].pred_masks.shape == (0, H, W)
    ids, segments = result["panoptic_seg"]
    assert [s["isthing"] for s in segments] == [False]
    # thing pixels without an instance are void
    assert torch.equal(ids == 0, semantic_probs().argmax(0) > 0)


def segments_of(min_segment_area=1):
    masks = [rectangle(*OBJECTS[0]), rectangle(*OBJECTS[2])]
    assembler = PanopticAssembler(min_segment_area=min_segment_area)
    segmentation = assembler.compete(masks, semantic_probs())
    return assembler.segments(segmentation, *vote(torch.stack(masks), semantic_probs()[1:]))


def test_panoptic_segments_are_stuff_then_instances_and_the_rest_is_void():
    ids, segments = segments_of()
    assert [s["id"] for s in segments] == [1, 2, 3]
    assert [s["isthing"] for s in segments] == [False, True, True]
    assert [s["category_id"] for s in segments] == [0, 0, 1]
    assert [s["area"] for s in segments] == [int((ids == s["id"]).sum()) for s in segments]
    assert "score" not in segments[0] and segments[2]["score"] == pytest.approx(0.81)
    top, left, bottom, right = OBJECTS[1]
    assert (ids[top:bottom, left:right] == 0).all() and ids.dtype == torch.int32


def test_small_segments_become_void_and_the_ids_stay_without_gaps():
    ids, segments = segments_of(min_segment_area=100)
    assert [s["id"] for s in segments] == [1, 2]
    top, left, bottom, right = OBJECTS[0]
    assert (ids[top:bottom, left:right] == 0).all()


def test_instances_are_sorted_by_score_and_have_their_own_pixels():
    weak, strong = rectangle(0, 0, 8, 8, 0.8), rectangle(4, 4, 12, 12, 0.9)
    hidden = rectangle(5, 5, 10, 10, 0.7)
    probs = torch.full((2, H, W), 0.1)
    probs[1] = 0.9
    every = found([weak, strong, hidden], probs)
    result = PanopticAssembler()(every, (H, W), (H, W))["instances"]
    assert result.scores.tolist() == pytest.approx([0.81, 0.72])
    assert result.pred_masks.flatten(1).sum(1).tolist()[1] == 64 - 16
    assert result.pred_masks.sum(0).max() == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_segment_area": 0}, "min_segment_area must be at least 1, not 0"),
        ({"num_stuff": 0}, "num_stuff must be at least 1, not 0"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        PanopticAssembler(**options)
