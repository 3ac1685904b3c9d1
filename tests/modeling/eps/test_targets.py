"""Image labels and the stand-in saliency from annotations."""

import pytest
import torch
from detectron2.structures import PolygonMasks
from example_inputs import NONE, ORDINARY, SIZE, example, rectangle

from solo_d2.modeling.eps.targets import StandIn, image_labels

# 0 background, classes 0 and 2, unlabeled
LABEL_MAP = torch.tensor([[0, 1, 3], [255, 0, 3]])


def test_labels_are_given_or_those_of_instances_or_of_the_label_map():
    both = torch.cat([ORDINARY, rectangle(0, 0, 5, 5)])
    assert image_labels({"image_labels": [0, 1, 0]}, 3).tolist() == [0, 1, 0]
    assert image_labels(example(both), 3).tolist() == [1, 1, 0]
    assert image_labels(example(NONE), 3).tolist() == [0, 0, 0]
    assert image_labels({"sem_seg": LABEL_MAP}, 3).tolist() == [1, 0, 1]
    assert image_labels({**example(both), "image_labels": [0, 0, 1]}, 3).tolist() == [0, 0, 1]
    assert image_labels({"image": torch.zeros(3, 8, 8)}, 3) is None


def test_labels_of_another_number_of_classes_are_refused_by_image():
    with pytest.raises(ValueError, match="street.jpg: image_labels has the shape .*3 classes"):
        image_labels({"image_labels": [0, 1], "file_name": "street.jpg"}, 3)
    with pytest.raises(ValueError, match=r"street.jpg has an object of class 2, .*\[0, 2\)"):
        image_labels({"sem_seg": LABEL_MAP, "file_name": "street.jpg"}, 2)


def test_the_stand_in_is_the_union_of_all_masks():
    x = example(torch.cat([ORDINARY, rectangle(40, 40, 60, 60)]))
    union = x["instances"].gt_masks.tensor.any(dim=0)
    assert torch.equal(StandIn()(x), union[None].float())
    polygons = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
    x = example(ORDINARY)
    x["instances"].gt_masks = PolygonMasks([polygons])
    assert (StandIn()(x)[0] != ORDINARY[0]).float().mean() < 0.02
    assert StandIn()(example(NONE)).sum() == 0
    labeled = {"image": torch.zeros(3, 2, 3), "sem_seg": LABEL_MAP}
    assert StandIn()(labeled).tolist() == [[[0, 1, 1], [1, 0, 1]]]


def test_the_stand_in_is_eroded_but_not_at_the_border_of_the_image():
    x = example(rectangle(0, 10, 20, 30))
    expected = rectangle(0, 12, 18, 28).float()
    assert torch.equal(StandIn(erosion=2)(x), expected)


def test_the_stand_in_is_blurred_and_keeps_its_mean_level():
    x = example(rectangle(0, 0, 48, SIZE[0]))
    blurred = StandIn(blur=3.0)(x)[0]
    assert blurred.shape == SIZE
    assert blurred[:, 0].allclose(torch.tensor(1.0)) and blurred[:, -1].abs().max() < 1e-6
    # half-way between the pixels 47 and 48, and falling
    torch.testing.assert_close(blurred[:, 47] + blurred[:, 48], torch.ones(SIZE[0]))
    assert (blurred[:, 1:] <= blurred[:, :-1] + 1e-6).all()
    tiny = {"image": torch.zeros(3, 1, 2), "sem_seg": torch.tensor([[1, 1]])}
    torch.testing.assert_close(StandIn(blur=3.0)(tiny), torch.ones(1, 1, 2))


@pytest.mark.parametrize("options", [{"erosion": -1}, {"blur": -0.5}])
def test_negative_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 0"):
        StandIn(**options)
