"""Choosing points and masks without a user, with stand-ins for the network."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.modeling.adaptis.automatic import (
    ProposalSelection,
    RandomSelection,
    find_peaks,
)

H, W = 24, 32
# (top, left, bottom, right)
OBJECTS = ((2, 2, 10, 12), (12, 4, 22, 14), (4, 18, 20, 30))


def rectangle(top: int, left: int, bottom: int, right: int, value: float = 0.9) -> torch.Tensor:
    mask = torch.full((H, W), 0.05)
    mask[top:bottom, left:right] = value
    return mask


class Network:
    """Stands in for an ``EmbeddedImage``; records the requested points."""

    stride = 1

    def __init__(self, answer):
        self.answer = answer  # points -> masks
        self.asked = []

    def soft_masks(self, points: torch.Tensor) -> torch.Tensor:
        self.asked.append(points)
        return self.answer(points) if len(points) else torch.zeros(0, H, W)

    def enlarge(self, masks: torch.Tensor) -> torch.Tensor:
        return masks


def rectangles(points: torch.Tensor) -> torch.Tensor:
    """The rectangle under each point."""
    masks = []
    for row, column in points.tolist():
        inside = [r for r in OBJECTS if r[0] <= row < r[2] and r[1] <= column < r[3]]
        masks.append(rectangle(*inside[0]) if inside else torch.full((H, W), 0.01))
    return torch.stack(masks)


def semantic_probs(num_things: int = 2) -> torch.Tensor:
    """One stuff class and things; the last object has class 1, the others class 0."""
    probs = torch.zeros(1 + num_things, H, W)
    probs[0] = 1
    for i, (top, left, bottom, right) in enumerate(OBJECTS):
        probs[:, top:bottom, left:right] = 0.1 / num_things
        probs[1 + (i == 2), top:bottom, left:right] = 0.9
    return probs


def peaks_by_definition(values, min_value, eps, step):
    """The algorithm as described in the text, pixel by pixel."""
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


def test_the_search_can_stop_early():
    values = np.random.default_rng(0).random((20, 30), dtype=np.float32) * 0.3 + 0.6
    every = find_peaks(values, min_value=0.1)[0]
    assert len(every) > 5
    assert np.array_equal(find_peaks(values, min_value=0.1, max_peaks=5)[0], every[:5])


def test_nothing_is_found_in_an_empty_map():
    peaks, labels = find_peaks(np.zeros((5, 7), dtype=np.float32), min_value=0.1)
    assert peaks.shape == (0, 2) and (labels == -1).all()


def test_proposals_count_only_on_likely_things_that_are_free():
    proposals, things = torch.ones(H, W), torch.full((1, H, W), 0.7)
    things[:, :, :4] = 0.5
    occupied = torch.zeros(H, W, dtype=torch.bool)
    occupied[:3] = True
    selection = ProposalSelection(min_things_prob=0.6, blur=1)
    values = selection.search_map(proposals, things, occupied)
    assert not values[:3].any() and not values[:, :4].any() and (values[3:, 4:] == 1).all()


def centers() -> np.ndarray:
    return np.array([[(r[0] + r[2]) // 2, (r[1] + r[3]) // 2] for r in OBJECTS])


def nothing_occupied() -> torch.Tensor:
    return torch.zeros(H, W, dtype=torch.bool)


def greedily_one_by_one(candidates, answer, occupied, *, mask_threshold, max_occupied, cut_radius):
    """The algorithm as described in the text: each mask is decoded when its turn comes."""
    occupied, accepted = occupied.clone(), []
    for row, column in candidates.tolist():
        if occupied[row, column]:
            continue
        mask = answer(torch.tensor([[row, column]]).float())[0].clone()
        if cut_radius > 0:
            top, left = max(0, row - cut_radius), max(0, column - cut_radius)
            cut = torch.zeros_like(mask)
            window = slice(top, row + cut_radius), slice(left, column + cut_radius)
            cut[window] = mask[window]
            mask = cut
        binary = mask > mask_threshold
        if binary.sum() < 10 or (binary & occupied).sum() / binary.sum() >= max_occupied:
            continue
        accepted.append(mask)
        occupied |= binary
    return torch.stack(accepted) if accepted else torch.zeros(0, H, W)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(0, 40),
    st.sampled_from([1, 2, 3, 7, 100]),
    st.sampled_from([0.2, 0.4, 0.9]),
    st.sampled_from([0, 3, 8]),
)
def test_batches_change_nothing(seed, count, batch_size, max_occupied, cut_radius):
    rng = np.random.default_rng(seed)
    candidates = np.stack([rng.integers(0, H, count), rng.integers(0, W, count)], axis=1)
    sides = {tuple(point): rng.integers(1, 9, 4) for point in candidates.tolist()}

    def answer(points):
        masks = []
        for row, column in points.int().tolist():
            up, left, down, right = sides[row, column]
            masks.append(
                rectangle(max(0, row - up), max(0, column - left), row + down, column + right)
            )
        return torch.stack(masks)

    occupied = torch.from_numpy(rng.random((H, W)) < 0.05)
    options = {"mask_threshold": 0.4, "max_occupied": max_occupied, "cut_radius": cut_radius}
    expected = greedily_one_by_one(candidates, answer, occupied, **options)
    before, network = occupied.clone(), Network(answer)
    selection = ProposalSelection(**options)
    actual = selection.select(candidates, network, occupied, batch_size=batch_size)
    assert torch.equal(actual, expected)
    assert torch.equal(occupied, before)
    assert all(len(points) <= batch_size for points in network.asked)


def test_of_each_object_one_mask_is_taken():
    candidates = np.concatenate([centers(), centers() + 1, [[0, 0]]])
    network = Network(rectangles)
    masks = ProposalSelection().select(candidates, network, nothing_occupied(), batch_size=3)
    assert len(masks) == 3
    # none of the second candidates is decoded: they are occupied
    assert [len(points) for points in network.asked] == [3, 1]


def test_a_mask_that_lies_on_others_or_is_tiny_is_dropped():
    masks = {
        0: rectangle(0, 0, 10, 10),
        11: rectangle(0, 0, 10, 17),  # 10 / 17 of it is taken
        12: rectangle(20, 20, 23, 23),  # nine pixels
        13: rectangle(0, 0, 10, 30),
    }
    network = Network(lambda points: torch.stack([masks[int(row)] for row, _ in points]))
    candidates = np.array([[0, 0], [11, 0], [12, 0], [13, 0]])
    selection = ProposalSelection(max_occupied=0.4)
    found = selection.select(candidates, network, nothing_occupied(), batch_size=4)
    assert (found > 0.4).sum(dim=(1, 2)).tolist() == [100, 300]


def test_a_mask_is_cut_to_a_window_around_its_point():
    network = Network(lambda points: torch.ones(1, H, W))
    selection = ProposalSelection(cut_radius=3)
    (mask,) = selection.select(np.array([[1, 16]]), network, nothing_occupied(), batch_size=1)
    rows, columns = mask.nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 3, 13, 18)


def test_the_proposals_lead_to_the_objects_of_things():
    proposals = torch.zeros(H, W)
    for row, column in centers():
        proposals[row - 2 : row + 3, column - 2 : column + 3] = 0.6
        proposals[row, column] = 0.9
    selection = ProposalSelection(min_value=0.1, blur=1)
    assert len(selection(proposals, semantic_probs()[1:], Network(rectangles))) == 3
    assert len(selection(proposals, torch.zeros(2, H, W), Network(rectangles))) == 0
    few = ProposalSelection(min_value=0.1, blur=1, max_candidates=2)
    assert len(few(proposals, semantic_probs()[1:], Network(rectangles))) == 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_points_find_the_objects_without_proposals():
    things = semantic_probs()[1:]
    masks = RandomSelection()(things, Network(rectangles), seeded(0))
    assert len(masks) == 3
    painted = masks > 0.5
    assert painted.sum(0).max() == 1
    assert torch.equal(painted.any(0), things.amax(0) >= 0.5)
    assert torch.equal(masks, RandomSelection()(things, Network(rectangles), seeded(0)))


def test_random_points_stop_without_things_and_after_their_rounds():
    network = Network(lambda points: torch.zeros(len(points), H, W))
    assert len(RandomSelection()(torch.zeros(1, H, W), network)) == 0
    assert network.asked == []
    things = semantic_probs()[1:]
    # an empty mask has no free share
    assert len(RandomSelection(num_rounds=4, num_candidates=3)(things, network)) == 0
    assert [len(points) for points in network.asked] == [3, 3, 3, 3]
    assert len(RandomSelection(num_rounds=1)(things, Network(rectangles))) == 1


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (ProposalSelection, {"max_occupied": 1.5}, "max_occupied must be from 0 to 1, not 1.5"),
        (ProposalSelection, {"blur": -1}, "blur must be at least 0, not -1"),
        (ProposalSelection, {"step": 0.0}, "step must be positive, not 0"),
        (RandomSelection, {"min_free": -0.1}, "min_free must be from 0 to 1, not -0.1"),
        (RandomSelection, {"num_rounds": 0}, "num_rounds must be at least 1, not 0"),
    ],
)
def test_a_wrong_option_is_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
