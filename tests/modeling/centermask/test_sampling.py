"""The proposals that masks are trained with."""

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances

from solo_d2.modeling.centermask.roi_heads import CenterMaskROIHeads

LEFT, RIGHT, MISS = [0.0, 0.0, 20.0, 20.0], [40.0, 0.0, 60.0, 20.0], [22.0, 22.0, 38.0, 38.0]


def heads(limit: int, append: bool = False) -> CenterMaskROIHeads:
    return CenterMaskROIHeads(
        num_classes=3,
        batch_size_per_image=4 * limit,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        proposal_append_gt=append,
        mask_in_features=[],
    )


def proposed(*boxes) -> Instances:
    tensor = torch.tensor(boxes).view(-1, 4)
    return Instances((64, 64), proposal_boxes=Boxes(tensor), objectness_logits=tensor.sum(dim=1))


def objects(*boxes, classes=()) -> Instances:
    gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    return Instances((64, 64), gt_boxes=gt_boxes, gt_classes=torch.tensor(classes).long())


PROPOSALS = [proposed(MISS, RIGHT, LEFT), proposed(), proposed(LEFT, RIGHT, RIGHT)]
# in the last image, the object at the left is that of the first image
TARGETS = [
    objects(LEFT, RIGHT, classes=[2, 1]),
    objects(LEFT, classes=[0]),
    objects(RIGHT, classes=[2]),
]


def test_boxes_get_the_object_of_their_own_image_that_they_overlap():
    first, second, third = heads(9).label_and_sample_proposals(PROPOSALS, TARGETS)
    assert first.proposal_boxes.tensor.tolist() == [RIGHT, LEFT]
    assert first.gt_index == [1, 0] and first.gt_classes.tolist() == [1, 2]
    assert len(second) == 0 and second.gt_index == [] and second.gt_classes.dtype == torch.long
    assert third.proposal_boxes.tensor.tolist() == [RIGHT, RIGHT] and third.gt_index == [0, 0]


def test_objects_are_proposals_too_if_asked_for():
    first, second, third = heads(9, append=True).label_and_sample_proposals(PROPOSALS, TARGETS)
    assert first.proposal_boxes.tensor.tolist() == [RIGHT, LEFT, LEFT, RIGHT]
    assert second.proposal_boxes.tensor.tolist() == [LEFT] and second.gt_index == [0]
    assert third.gt_classes.tolist() == [2, 2, 2]


def test_the_limit_holds_in_each_image_and_the_choice_is_random():
    many = [proposed(*[LEFT] * 8, RIGHT), proposed(LEFT)]
    targets = [objects(LEFT, RIGHT, classes=[0, 1]), objects(LEFT, classes=[2])]
    torch.manual_seed(0)
    drawn = [heads(2).label_and_sample_proposals(many, targets) for _ in range(20)]
    assert {(len(a), len(b)) for a, b in drawn} == {(2, 1)}
    assert {tuple(sorted(a.gt_index)) for a, _ in drawn} == {(0, 0), (0, 1)}


def test_images_without_any_object_have_none():
    none = objects()
    found = heads(2, append=True).label_and_sample_proposals(
        [proposed(LEFT), proposed()], [none] * 2
    )
    assert [len(x) for x in found] == [0, 0]
