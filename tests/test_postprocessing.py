"""From soft masks in the network's frame to instances at the output size."""

import torch
from detectron2.structures import BitMasks, Instances

from solo_d2.postprocessing import postprocess

IMAGE, PADDED, OUTPUT = (24, 40), (32, 48), (48, 80)


def soft_instances(*regions: tuple[int, int, int, int]) -> Instances:
    """Soft masks at a quarter of the padded input, 0.9 in a region x1, y1, x2, y2 of it."""
    masks = torch.zeros(len(regions), PADDED[0] // 4, PADDED[1] // 4)
    for mask, (x1, y1, x2, y2) in zip(masks, regions):
        mask[y1:y2, x1:x2] = 0.9
    instances = Instances(IMAGE, pred_masks=masks)
    instances.scores = torch.linspace(0.9, 0.5, len(regions))
    instances.pred_classes = torch.arange(len(regions))
    return instances


def process(instances: Instances) -> Instances:
    return postprocess(instances, *OUTPUT, padded_size=PADDED, mask_threshold=0.5)


def test_masks_are_scaled_to_the_output_and_boxes_are_tight():
    result = process(soft_instances((1, 2, 6, 5)))
    assert result.image_size == OUTPUT
    assert result.pred_masks.dtype == torch.bool
    # a quarter of the input, the output is twice the input: a factor of 8
    assert result.pred_boxes.tensor.tolist() == [[8, 16, 48, 40]]
    assert result.pred_masks[0, 16:40, 8:48].float().mean() > 0.95  # round corners
    expected = BitMasks(result.pred_masks).get_bounding_boxes().tensor
    assert torch.equal(result.pred_boxes.tensor, expected)


def test_a_mask_in_the_padding_or_below_the_threshold_is_no_instance():
    instances = soft_instances(
        (1, 2, 6, 5), (11, 0, 12, 8), (0, 7, 12, 8), (4, 4, 8, 6), (0, 0, 0, 0)
    )
    result = process(instances)
    assert result.pred_classes.tolist() == [0, 3]
    assert torch.equal(result.scores, instances.scores[[0, 3]])
    assert result.pred_masks.flatten(1).any(1).all()


def test_no_instances_and_only_empty_ones_give_none():
    for instances in (soft_instances(), soft_instances((11, 0, 12, 8))):
        result = process(instances)
        assert len(result) == 0
        assert result.pred_masks.shape == (0, *OUTPUT)
        assert result.pred_boxes.tensor.shape == (0, 4)


def test_the_input_is_left_alone():
    instances = soft_instances((1, 2, 6, 5), (11, 0, 12, 8))
    before = instances.pred_masks.clone()
    process(instances)
    assert len(instances) == 2 and not instances.has("pred_boxes")
    assert torch.equal(instances.pred_masks, before)
