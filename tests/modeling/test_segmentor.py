"""The base class: input, ground truth, frozen statistics, and refused input."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from torch import nn

from solo_d2.layers.frozen_bn import FoldedConv2d
from solo_d2.modeling import InstanceSegmentor

SIZE = (24, 40)


class TinyBackbone(Backbone):
    """One convolution with a norm, at stride 4."""

    size_divisibility = 16

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.stem = Conv2d(3, 4, 4, stride=4, bias=False, norm=norm)

    def forward(self, x):
        return {"c1": self.stem(x)}

    def output_shape(self):
        return {"c1": ShapeSpec(channels=4, stride=4)}


class Brightness(InstanceSegmentor):
    """Each image has one instance: the pixels where the feature exceeds its mean."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, **options):
        backbone = TinyBackbone(norm(4))
        super().__init__(backbone=backbone, pixel_mean=[100.0] * 3, pixel_std=[50.0] * 3, **options)
        self.norm = nn.BatchNorm2d(4)

    def losses(self, images, features, ground_truth):
        return {"loss": self.norm(features["c1"]).square().mean()}

    def inference(self, images, features):
        results = []
        for image_size, feature in zip(images.image_sizes, features["c1"]):
            masks = feature[:1].sigmoid()
            masks = masks[masks.flatten(1).amax(1) > 0.5]
            result = Instances(image_size, pred_masks=masks)
            result.scores = torch.ones(len(masks))
            result.pred_classes = torch.zeros(len(masks), dtype=torch.long)
            results.append(result)
        return results


class FrozenNorm(Brightness):
    def modules_with_frozen_statistics(self):
        return [*super().modules_with_frozen_statistics(), self.norm]


def example(masks: torch.Tensor, classes=None, size=SIZE) -> dict:
    instances = Instances(size)
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.as_tensor(classes if classes is not None else [0] * len(masks))
    return {"image": torch.rand(3, *size) * 255, "instances": instances, "file_name": "street.jpg"}


def some_masks(n: int, size=SIZE) -> torch.Tensor:
    masks = torch.zeros(n, *size, dtype=torch.bool)
    for i in range(n):
        masks[i, i : i + 8, 2 * i : 2 * i + 12] = True
    return masks


def ground_truth(model: InstanceSegmentor, *inputs: dict):
    return model.prepare_ground_truth(list(inputs), model.preprocess_image(list(inputs)))


def test_a_model_without_losses_or_inference_cannot_be_built():
    class WithoutInference(Brightness):
        inference = InstanceSegmentor.inference

    with pytest.raises(TypeError, match="WithoutInference.*inference"):
        WithoutInference()
    options = {"backbone": TinyBackbone(nn.BatchNorm2d(4)), "pixel_mean": [0.0], "pixel_std": [1.0]}
    with pytest.raises(TypeError, match="abstract"):
        InstanceSegmentor(**options)


def test_a_model_made_in_python_is_folded_too():
    model = Brightness(FrozenBatchNorm2d)
    assert isinstance(model.backbone.stem, FoldedConv2d)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_statistics_stay_while_affine_parameters_train(norm):
    model = Brightness(norm, freeze_bn_stats=True)
    for mode in (False, True, True):
        assert model.train(mode) is model
    frozen, free = model.backbone.stem.norm, model.norm
    assert model.training and free.training and not frozen.training
    before = [copy.deepcopy(x.state_dict()) for x in (frozen, free)]
    sum(model([example(some_masks(1))]).values()).backward()
    assert torch.equal(frozen.running_mean, before[0]["running_mean"])
    assert not torch.equal(free.running_mean, before[1]["running_mean"])
    assert frozen.weight.grad is not None


def test_a_subclass_adds_modules_to_freeze():
    for freeze_backbone in (False, True):
        model = FrozenNorm(freeze_bn_stats=freeze_backbone).train()
        assert not model.norm.training
        assert model.backbone.stem.norm.training is not freeze_backbone
    assert all(module.training for module in Brightness().train().modules())


def test_masks_are_padded_to_the_batch_with_zeros():
    model = Brightness()
    inputs = [example(some_masks(2)), example(some_masks(3, (32, 33)), size=(32, 33))]
    first, second = ground_truth(model, *inputs)
    assert first.masks.shape == (2, 32, 48) and second.masks.shape == (3, 32, 48)
    assert torch.equal(first.masks[:, : SIZE[0], : SIZE[1]], some_masks(2))
    assert first.masks.sum() == some_masks(2).sum()
    assert first.image_size == SIZE
    assert len(first.crowd_boxes) == len(first.crowd_masks) == 0
    assert first.crowd_masks.shape[1:] == (32, 48)


def test_masks_of_the_size_of_the_batch_are_not_copied():
    inputs = example(some_masks(2, (32, 48)), size=(32, 48))
    inputs["instances"].gt_crowd = torch.zeros(2, dtype=torch.bool)
    (gt,) = ground_truth(Brightness(), inputs)
    assert gt.masks.data_ptr() == inputs["instances"].gt_masks.tensor.data_ptr()


@pytest.mark.parametrize("crowds", [[0, 1, 0], [1, 1, 1]])
def test_crowds_are_set_apart(crowds):
    inputs = example(some_masks(3), classes=[2, 1, 0])
    is_crowd = torch.tensor(crowds, dtype=torch.bool)
    inputs["instances"].gt_crowd = is_crowd
    (gt,) = ground_truth(Brightness(), inputs)
    masks = some_masks(3)
    assert torch.equal(gt.masks[:, : SIZE[0], : SIZE[1]], masks[~is_crowd])
    assert torch.equal(gt.crowd_masks[:, : SIZE[0], : SIZE[1]], masks[is_crowd])
    boxes = inputs["instances"].gt_boxes.tensor
    assert torch.equal(gt.boxes, boxes[~is_crowd]) and torch.equal(gt.crowd_boxes, boxes[is_crowd])
    assert torch.equal(gt.classes, torch.tensor([2, 1, 0])[~is_crowd])


def test_polygons_and_bit_masks_give_the_same_ground_truth():
    with_bits = example(some_masks(1))
    with_polygons = copy.deepcopy(with_bits)
    with_polygons["instances"].gt_masks = PolygonMasks([[[0.0, 0.0, 12, 0, 12, 8, 0, 8]]])
    (a,), (b,) = (ground_truth(Brightness(), x) for x in (with_bits, with_polygons))
    assert torch.equal(a.masks, b.masks) and a.masks.any()


def test_an_image_without_annotations_is_ordinary():
    # then Detectron2's mapper sets no gt_masks
    instances = Instances(SIZE, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    inputs = {"image": torch.rand(3, *SIZE), "instances": instances}
    (gt,) = ground_truth(Brightness(num_classes=3), inputs)
    assert gt.masks.shape == (0, 32, 48) and gt.masks.dtype == torch.bool
    assert gt.boxes.shape == (0, 4) and gt.classes.dtype == torch.long


@pytest.mark.parametrize("label", [-1, 3, 80])
def test_a_class_out_of_range_is_named_with_its_image(label):
    inputs = example(some_masks(2), classes=[1, label])
    message = rf"street\.jpg .*class {label}, .*\[0, 3\)"
    with pytest.raises(ValueError, match=message):
        Brightness(num_classes=3).train()([inputs])
    Brightness().train()([inputs])  # nothing to compare with


def test_missing_annotations_and_masks_are_named_with_their_image():
    model = Brightness().train()
    inputs = example(some_masks(1))
    inputs["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match=r"street\.jpg.*MODEL\.MASK_ON"):
        model([inputs])
    del inputs["instances"]
    with pytest.raises(ValueError, match=r"street\.jpg has none"):
        model([inputs])


def test_masks_of_another_size_than_the_image_are_refused():
    inputs = {**example(some_masks(1)), "image": torch.rand(3, 30, 40)}
    with pytest.raises(ValueError, match=r"street\.jpg is 30 pixels high.*24 x 40"):
        Brightness().train()([inputs])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused_with_what_to_do(dtype):
    model = Brightness().eval().to(dtype)
    with pytest.raises(ValueError, match=rf"{dtype}.*torch\.autocast\('cpu', dtype={dtype}\)"):
        model([{"image": torch.rand(3, *SIZE)}])


@torch.no_grad()
def test_weights_that_are_not_finite_are_named_instead_of_finding_nothing():
    model = Brightness().eval()
    inputs = [{"image": torch.rand(3, *SIZE) * 255}]
    model.backbone.stem.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"backbone\.stem\.weight has inf or NaN"):
        model(inputs)
    model.backbone.stem.weight.zero_()
    model.backbone.stem.norm.bias[0] = -1
    assert len(model(inputs)[0]["instances"]) == 0


@torch.no_grad()
def test_results_are_in_the_output_frame_of_each_image():
    model = Brightness().eval()
    model.backbone.stem.norm.bias.fill_(5)
    sizes = [(24, 40), (16, 16)]
    inputs = [{"image": torch.rand(3, *size) * 255} for size in sizes]
    inputs[0] |= {"height": 50, "width": 81}
    first, second = (x["instances"] for x in model(inputs))
    assert first.pred_masks.shape == (1, 50, 81) and first.pred_masks.all()
    assert first.pred_boxes.tensor.tolist() == [[0, 0, 81, 50]]
    assert second.image_size == (16, 16)


def test_images_are_normalized_before_padding():
    images = Brightness().preprocess_image([{"image": torch.full((3, *SIZE), 200.0)}])
    assert isinstance(images, ImageList) and images.tensor.shape == (1, 3, 32, 48)
    assert (images.tensor[:, :, : SIZE[0], : SIZE[1]] == 2).all()
    assert images.tensor.sum() == 2 * 3 * SIZE[0] * SIZE[1]
