"""From class maps to label maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from solo_d2.modeling.eps.inference import PseudoMasks, combine, rescale, to_regions


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_images_are_resized_by_pillow(scale):
    pixels = torch.randint(0, 256, (3, 21, 30), generator=torch.Generator().manual_seed(0))
    size = round(scale * 30), round(scale * 21)
    array = pixels.permute(1, 2, 0).byte().numpy()
    expected = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))
    assert np.array_equal(rescale(pixels.float(), scale).permute(1, 2, 0).numpy(), expected)
    assert rescale(pixels, 1.0) is pixels


def test_no_image_becomes_empty():
    assert rescale(torch.zeros(3, 1, 1), 0.5).shape == (3, 1, 1)


def test_maps_of_all_scales_and_mirror_images_are_added_and_normalized():
    plain = torch.tensor([[0.0, 2.0], [0.0, 4.0]]).view(1, 2, 1, 2)  # (1, channels, 1, 2)
    pair = torch.cat([plain, plain.flip(-1)])  # what a mirrored image gives
    found = combine([pair, pair], torch.tensor([1]), (1, 2))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 16 / (16 + 1e-5)]]]))
    # a coarser scale is upsampled before it is added
    coarse = pair.new_full((2, 2, 1, 1), 1.0)
    found = combine([pair, coarse], torch.tensor([0]), (1, 2))
    torch.testing.assert_close(found, torch.tensor([[[2.0, 6.0]]]) / (6 + 1e-5))


# two classes and the background; class 0 is left, class 1 right, and weak
MAPS = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.02, 0.1], [0.1, 0.9, 0.6]]).view(1, 3, 1, 3)
PAIRS = [torch.cat([MAPS, MAPS.flip(-1)])]


@pytest.mark.parametrize(
    ("options", "present", "expected"),
    [
        ({}, [0, 1], [1, 0, 2]),  # 0.02 / 0.1 does not exceed 0.2
        ({"bg_threshold": 0.15}, [0, 1], [1, 2, 2]),
        ({}, [0], [1, 0, 0]),
        ({}, [], [0, 0, 0]),
        ({"use_bg_cam": True}, [0, 1], [1, 0, 2]),
        ({"use_bg_cam": True, "bg_threshold": 0.0}, [0], [1, 0, 0]),
        ({"use_bg_cam": True}, [], [0, 0, 0]),
    ],
)
def test_labels_are_those_of_the_classes_in_the_image_or_background(options, present, expected):
    present = torch.tensor(present, dtype=torch.long)
    scores = PseudoMasks(**options)(PAIRS, present, (1, 3), 2)
    assert scores.shape == (3, 1, 3)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores.argmax(dim=0).tolist() == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales must be positive"),
        ({"scales": (1.0, 0.0)}, "scales must be positive"),
        ({"bg_threshold": 1.5}, "bg_threshold must be from 0 to 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PseudoMasks(**options)


def test_regions_of_classes_are_instances():
    scores = torch.tensor([[0.2, 0.2, 0.2], [0.0, 0.0, 0.0], [0.1, 0.5, 0.7]])[:, None]
    label_map, regions = to_regions(scores)
    assert label_map.dtype == torch.uint8 and label_map.tolist() == [[0, 2, 2]]
    assert regions.pred_classes.tolist() == [1]
    assert regions.pred_masks.tolist() == [[[False, True, True]]]
    assert regions.pred_boxes.tensor.tolist() == [[1, 0, 3, 1]]
    assert regions.scores.tolist() == pytest.approx([0.6])
    label_map, regions = to_regions(torch.ones(3, 4, 5) * torch.tensor([1, 0, 0]).view(3, 1, 1))
    assert len(regions) == 0 and regions.pred_masks.shape == (0, 4, 5)
