"""How AdaptIS chooses points and puts masks together, with stand-ins for the network."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.modeling.adaptis.inference import (
    assemble,
    find_peaks,
    panoptic_segments,
    proposal_map,
    select_at_random,
    select_greedily,
    vote,
)

H, W = 24, 32
# (top, left, bottom, right)
OBJECTS = ((2, 2, 10, 12), (12, 4, 22, 14), (4, 18, 20, 30))


def rectangle(top: int, left: int, bottom: int, right: int, value: float = 0.9) -> torch.Tensor:
    mask = torch.full((H, W), 0.05)
    mask[top:bottom, left:right] = value
    return mask


def network(points: torch.Tensor) -> torch.Tensor:
    """The rectangle under each point."""
    masks = []
    for row, column in points.tolist():
        inside = [r for r in OBJECTS if r[0] <= row < r[2] and r[1] <= column < r[3]]
        masks.append(rectangle(*inside[0]) if inside else torch.full((H, W), 0.01))
    return torch.stack(masks)


def semantic_probs(num_things: int = 2) -> torch.Tensor:
    """One stuff class and things; the last object is of class 1, the others of class 0."""
    probs = torch.zeros(1 + num_things, H, W)
    probs[0] = 1
    for i, (top, left, bottom, right) in enumerate(OBJECTS):
        probs[:, top:bottom, left:right] = 0.1 / num_things
        probs[1 + (i == 2), top:bottom, left:right] = 0.9
    return probs


def peaks_by_definition(values, min_value, eps, step):
    """As in the text of the algorithm, pixel by pixel."""
    h, w = values.shape
    labels = np.full((h, w), -1)
    peaks = []

    def around(row, column):
        for r in range(max(0, row - 1), min(h, row + 2)):
            for c in range(max(0, column - 1), min(w, column + 2)):
                if (r, c) != (row, column):
                    yield r, c

    level = np.float32(0.99)
    while level > np.float32(min_value):
        level -= np.float32(step)
        for row in range(h):
            for column in range(w):
                value = values[row, column]
                if labels[row, column] != -1 or value < level:
                    continue
                neighbors = [values[u] for u in around(row, column)]
                if any(n < np.float32(min_value) or n > value for n in neighbors):
                    continue
                labels[row, column] = len(peaks)
                queue = deque([(row, column)])
                while queue:
                    v = queue.popleft()
                    for u in around(*v):
                        if labels[u] == -1 and values[v] + np.float32(eps) > values[u]:
                            labels[u] = len(peaks)
                            queue.append(u)
                peaks.append((row, column))
    return np.array(peaks).reshape(-1, 2), labels


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0, 4, 20]),
    st.sampled_from([0.0, 0.003, 0.1]),
    st.sampled_from([0.05, 0.3]),
)
def test_peaks_are_those_of_the_definition(seed, h, w, levels, eps, min_value):
    values = np.random.default_rng(seed).random((h, w), dtype=np.float32)
    if levels:  # plateaus and ties
        values = np.round(values * levels).astype(np.float32) / np.float32(levels)
    expected = peaks_by_definition(values, min_value, eps, 0.025)
    actual = find_peaks(values, min_value=min_value, eps=eps, step=0.025)
    assert np.array_equal(actual[0], expected[0])
    assert np.array_equal(actual[1], expected[1])


def test_the_search_can_stop_early_and_go_without_floods():
    values = np.random.default_rng(0).random((20, 30), dtype=np.float32) * 0.3 + 0.6
    every = find_peaks(values, min_value=0.1)[0]
    assert len(every) > 5
    assert np.array_equal(find_peaks(values, min_value=0.1, max_peaks=5)[0], every[:5])
    unflooded = find_peaks(values, min_value=0.1, flood=False)[0]
    assert {tuple(p) for p in every} <= {tuple(p) for p in unflooded}


def test_nothing_is_found_in_an_empty_map():
    peaks, labels = find_peaks(np.zeros((5, 7), dtype=np.float32), min_value=0.1)
    assert peaks.shape == (0, 2) and (labels == -1).all()


def test_proposals_count_only_on_likely_things_that_are_free():
    proposals, things = torch.ones(H, W), torch.full((1, H, W), 0.7)
    things[:, :, :4] = 0.5
    occupied = torch.zeros(H, W, dtype=torch.bool)
    occupied[:3] = True
    values = proposal_map(proposals, things, occupied, min_things_prob=0.6, blur=1)
    assert not values[:3].any() and not values[:, :4].any() and (values[3:, 4:] == 1).all()


def centers() -> np.ndarray:
    return np.array([[(r[0] + r[2]) // 2, (r[1] + r[3]) // 2] for r in OBJECTS])


def nothing_occupied() -> torch.Tensor:
    return torch.zeros(H, W, dtype=torch.bool)


def test_each_object_is_taken_once_and_the_given_map_is_not_written_to():
    candidates = np.concatenate([centers(), centers() + 1, [[0, 0]]])
    occupied = nothing_occupied()
    asked = []

    def predict(points):
        asked.append(points)
        return network(points)

    masks = list(select_greedily(candidates, predict, occupied))
    assert len(masks) == 3 and not occupied.any()
    # of the second candidates none is asked for: they are occupied
    assert len(asked) == 4


def test_a_mask_that_lies_on_others_or_is_tiny_is_dropped():
    def predict(points):
        return {
            0: rectangle(0, 0, 10, 10),
            11: rectangle(0, 0, 10, 17),  # 10 / 17 of it is taken
            12: rectangle(20, 20, 23, 23),  # nine pixels
            13: rectangle(0, 0, 10, 30),
        }[int(points[0, 0])][None]

    candidates = np.array([[0, 0], [11, 0], [12, 0], [13, 0]])
    areas = [
        int((m > 0.4).sum())
        for m in select_greedily(candidates, predict, nothing_occupied(), max_occupied=0.4)
    ]
    assert areas == [100, 300]
    # only so many are looked at, not accepted
    few = select_greedily(candidates, predict, nothing_occupied(), max_candidates=3)
    assert len(list(few)) == 1


def test_a_mask_is_cut_to_a_window_around_its_point():
    (mask,) = select_greedily(
        np.array([[1, 16]]),
        lambda points: torch.ones(1, H, W),
        nothing_occupied(),
        cut_radius=3,
    )
    rows, columns = mask.nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 3, 13, 18)


def assembled(masks, probs=None, **options):
    return assemble(
        iter(masks), semantic_probs() if probs is None else probs, num_stuff=1, **options
    )


def test_instances_have_ids_classes_scores_and_a_semantic_map():
    result = assembled([rectangle(*r) for r in OBJECTS])
    for i, (top, left, bottom, right) in enumerate(OBJECTS):
        assert (result.ids[top:bottom, left:right] == i + 1).all()
    assert int((result.ids > 0).sum()) == sum((r[2] - r[0]) * (r[3] - r[1]) for r in OBJECTS)
    assert result.ids.dtype == torch.int32
    assert result.classes.tolist() == [0, 0, 1]
    torch.testing.assert_close(result.scores, torch.full((3,), 0.9 * 0.9))
    assert torch.equal(result.semantic > 0, result.ids > 0)


def test_the_higher_probability_wins_a_pixel_and_the_first_of_equal_ones():
    strong, weak = rectangle(0, 0, 8, 8, 0.9), rectangle(4, 4, 12, 12, 0.8)
    things = torch.zeros(3, H, W)
    things[1] = 1
    for masks, winner in (([strong, weak], 1), ([weak, strong], 2), ([strong, strong], 1)):
        assert assembled(masks, things).ids[5, 5] == winner


def test_background_wins_where_it_is_more_likely():
    result = assembled([rectangle(0, 0, 8, 8, 0.6)], stuff_prob_mult=0.5)
    # outside the first object the background has 0.5
    assert result.ids[0, 0] == 1
    assert assembled([rectangle(0, 0, 8, 8, 0.6)]).ids[0, 0] == 0


def test_unlikely_pixels_belong_to_no_instance_and_unlikely_stuff_to_no_class():
    result = assembled(
        [rectangle(*OBJECTS[0], 0.6), rectangle(*OBJECTS[1])],
        min_things_prob=0.7,
        min_stuff_prob=0.5,
    )
    assert result.ids.unique().tolist() == [0, 2]
    top, left, bottom, right = OBJECTS[2]
    assert (result.semantic[top:bottom, left:right] == -1).all()
    assert result.semantic[0, 0] == 0


def test_masks_are_resized_as_probabilities():
    probs = torch.nn.functional.interpolate(semantic_probs()[None], scale_factor=2)[0]
    result = assembled([rectangle(*r) for r in OBJECTS], probs)
    assert result.ids.shape == (2 * H, 2 * W)
    small = assembled([rectangle(*r) for r in OBJECTS])
    same = result.ids[::2, ::2] == small.ids
    assert same.float().mean() > 0.98


def test_the_class_is_the_mean_vote_or_the_majority():
    things = torch.zeros(2, H, W)
    # most pixels lean to class 1, a few are sure of class 0
    things[0], things[1] = 0.45, 0.5
    things[:, :2, :10] = torch.tensor([1.0, 0.0])[:, None, None]
    mask = rectangle(0, 0, 10, 10)[None]
    assert vote(mask, things)[0].tolist() == [0]
    classes, scores = vote(mask, things, class_vote="majority")
    assert classes.tolist() == [1]
    assert float(scores) == pytest.approx(0.9 * 0.8 * 0.5)


def test_an_empty_mask_has_score_zero():
    classes, scores = vote(torch.zeros(2, H, W), torch.rand(3, H, W))
    assert scores.tolist() == [0, 0] and ((classes >= 0) & (classes < 3)).all()


def test_nothing_found_is_an_ordinary_result():
    result = assembled([])
    assert not result.ids.any() and len(result.classes) == len(result.scores) == 0
    ids, segments = panoptic_segments(result, num_stuff=1)
    assert [s["isthing"] for s in segments] == [False]
    assert torch.equal(ids == 0, result.semantic > 0)  # things that nothing was found for


def test_panoptic_segments_are_stuff_then_instances_and_the_rest_is_void():
    result = assembled([rectangle(*OBJECTS[0]), rectangle(*OBJECTS[2])])
    ids, segments = panoptic_segments(result, num_stuff=1)
    assert [s["id"] for s in segments] == [1, 2, 3]
    assert [s["isthing"] for s in segments] == [False, True, True]
    assert [s["category_id"] for s in segments] == [0, 0, 1]
    assert [s["area"] for s in segments] == [int((ids == s["id"]).sum()) for s in segments]
    assert "score" not in segments[0] and segments[2]["score"] == pytest.approx(0.81)
    top, left, bottom, right = OBJECTS[1]
    assert (ids[top:bottom, left:right] == 0).all() and ids.dtype == torch.int32
    # small ones become void, and the ids stay without gaps
    ids, segments = panoptic_segments(result, num_stuff=1, min_area=100)
    assert [s["id"] for s in segments] == [1, 2]
    top, left, bottom, right = OBJECTS[0]
    assert (ids[top:bottom, left:right] == 0).all()


def test_masks_before_the_competition_are_kept_on_request():
    strong, weak = rectangle(0, 0, 8, 8, 0.9), rectangle(4, 4, 12, 12, 0.8)
    result = assembled([strong, weak], keep_masks=True)
    assert [int(m.sum()) for m in result.masks] == [64, 64]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_points_find_the_objects_without_proposals():
    things = semantic_probs()[1:]
    masks = list(select_at_random(network, things, generator=seeded(0)))
    assert len(masks) == 3
    painted = torch.stack(masks) > 0.5
    assert painted.sum(0).max() == 1
    assert torch.equal(painted.any(0), things.amax(0) >= 0.5)
    again = list(select_at_random(network, things, generator=seeded(0)))
    assert all(torch.equal(a, b) for a, b in zip(masks, again))


def test_random_points_stop_without_things_and_after_their_rounds():
    def forbidden(points):
        raise AssertionError("nothing to ask for")

    assert list(select_at_random(forbidden, torch.zeros(1, H, W))) == []
    things = semantic_probs()[1:]
    rounds = []

    def empty(points):
        rounds.append(len(points))
        return torch.zeros(len(points), H, W)

    # an empty mask has no share that is free
    assert list(select_at_random(empty, things, num_iters=4, num_candidates=3)) == []
    assert rounds == [3, 3, 3, 3]
    assert len(list(select_at_random(network, things, num_iters=1))) == 1
