"""CenterMask and FCOS on tiny inputs: bad input, options, and the steps from logits to masks."""

import copy
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.layers.masks import tight_boxes
from solo_d2.modeling.centermask.inference import select_boxes
from solo_d2.modeling.centermask.mask_head import class_mask_logits
from solo_d2.modeling.centermask.mask_iou import crop_masks, mask_iou_targets, visible_share
from solo_d2.modeling.centermask.pooler import AdaptiveROIPooler

SIZE = (64, 96)
LOSSES = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "loss_mask", "loss_maskiou"}


def tiny_config(**options):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            *("MODEL.MASK_ON", True, "MODEL.RESNETS.DEPTH", 18),
            *("MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone"),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
            *("MODEL.PROPOSAL_GENERATOR.NAME", "FCOSProposalGenerator"),
            *("MODEL.FCOS.NUM_CLASSES", 3, "MODEL.FCOS.NUM_CLS_CONVS", 1),
            *("MODEL.FCOS.NUM_BOX_CONVS", 1, "MODEL.ROI_HEADS.NUM_CLASSES", -1),
            *("MODEL.ROI_HEADS.NAME", "CenterMaskROIHeads"),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]),
            *("MODEL.ROI_MASK_HEAD.NAME", "SpatialAttentionMaskHead"),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
            *("MODEL.CENTERMASK.MASK_IOU_NUM_CONV", 2, "MODEL.CENTERMASK.MASK_IOU_CONV_DIM", 16),
            *("MODEL.CENTERMASK.MASK_IOU_FC_DIM", 16),
            *("DATASETS.TRAIN", (), "DATASETS.TEST", ()),
        ]
    )
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def tiny_model(**options):
    torch.manual_seed(0)
    return build_model(tiny_config(**options))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def storage():
    """Detectron2's ROI heads write their numbers to it in training."""
    with EventStorage() as storage:
        yield storage


def example(masks: torch.Tensor, boxes=None, size=SIZE) -> dict:
    """A training input with the given masks and, by default, their tight boxes."""
    instances = Instances(size)
    instances.gt_boxes, instances.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0).long()
    if len(masks):  # like Detectron2's mapper: without annotations there is no gt_masks
        instances = Instances(size)
        boxes = tight_boxes(masks) if boxes is None else torch.as_tensor(boxes).float()
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(len(masks)) % 3
        instances.gt_masks = BitMasks(masks)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) * 255
    return {"image": image, "instances": instances}


def rectangle(x1, y1, x2, y2, size=SIZE) -> torch.Tensor:
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, y1:y2, x1:x2] = True
    return mask


NONE = torch.zeros(0, *SIZE, dtype=torch.bool)
EMPTY = torch.zeros(1, *SIZE, dtype=torch.bool)
ORDINARY = rectangle(10, 10, 50, 50)


def many(n: int) -> torch.Tensor:
    corners = torch.randint(0, 56, (n, 2), generator=torch.Generator().manual_seed(2)).tolist()
    return torch.cat([rectangle(x, y, x + 8, y + 8) for x, y in corners])


BATCHES = {
    "one ordinary image": [example(ORDINARY)],
    "no instance at all": [example(NONE), example(NONE)],
    "half-empty": [example(ORDINARY), example(NONE)],
    "mask empty after cropping": [example(EMPTY, boxes=[[10, 10, 50, 50]])],
    "1-pixel mask": [example(rectangle(5, 5, 6, 6))],
    "mask outside of its box": [example(ORDINARY, boxes=[[60, 20, 90, 50]])],
    "zero-area box": [example(ORDINARY, boxes=[[10, 10, 10, 50]])],
    "inverted box": [example(ORDINARY, boxes=[[50, 50, 10, 10]])],
    "box out of the image": [example(ORDINARY, boxes=[[200, 200, 260, 260]])],
    "300 instances": [example(many(300))],
    "huge box": [example(ORDINARY, boxes=[[-500, -500, 500, 500]])],
    "images of different sizes": [
        example(ORDINARY),
        example(rectangle(0, 0, 30, 30, size=(33, 70)), size=(33, 70)),
    ],
}


def losses_of(model, batch) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    losses = model(copy.deepcopy(batch))
    sum(losses.values()).backward()
    return losses


def assert_every_parameter_has_a_finite_gradient(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("name", BATCHES)
def test_training_gives_finite_losses_whose_gradient_reaches_every_parameter(model, name):
    losses = losses_of(model, BATCHES[name])
    assert set(losses) == LOSSES
    assert all(torch.isfinite(loss) and loss >= 0 for loss in losses.values())
    assert_every_parameter_has_a_finite_gradient(model)


def test_without_objects_only_the_classes_are_learnt(model):
    losses = losses_of(model, BATCHES["no instance at all"])
    assert losses["loss_fcos_cls"] > 0
    assert all(losses[name] == 0 for name in LOSSES - {"loss_fcos_cls"})
    for module in (model.roi_heads, model.proposal_generator.head.box_tower):
        assert not any(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("append", [True, False])
def test_the_first_steps_have_no_proposals(append, storage):
    model = tiny_model(MODEL__ROI_HEADS__PROPOSAL_APPEND_GT=append)  # no class reaches 0.05 yet
    losses = losses_of(model, BATCHES["one ordinary image"])
    assert storage.latest()["roi_head/num_fg_samples"][0] == append
    assert (losses["loss_mask"] > 0) == append
    assert_every_parameter_has_a_finite_gradient(model)


def test_an_image_without_masks_is_named_as_the_reason(model):
    batch = copy.deepcopy(BATCHES["one ordinary image"])
    batch[0]["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="gt_masks"):
        losses_of(model, batch)


def test_training_without_instances_is_an_error(model):
    model.train()
    with pytest.raises(ValueError, match="instances"):
        model([{"image": torch.zeros(3, *SIZE)}])


def test_half_precision_trains_with_losses_of_full_precision(model):
    full = losses_of(model, BATCHES["images of different sizes"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses_of(model, BATCHES["images of different sizes"])
    assert_every_parameter_has_a_finite_gradient(model)
    for name in LOSSES:
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(full[name].item(), rel=0.1, abs=0.05)


def test_two_processes_with_the_same_batch_have_the_losses_of_one(model, monkeypatch):
    batch = BATCHES["half-empty"]
    expected = losses_of(model, batch)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2))
    actual = losses_of(model, batch)
    for name in LOSSES:
        assert actual[name].item() == pytest.approx(expected[name].item())


def test_masks_train_from_polygons_as_from_bitmasks(model):
    batch = copy.deepcopy(BATCHES["one ordinary image"])
    x1, y1, x2, y2 = batch[0]["instances"].gt_boxes.tensor[0].tolist()
    batch[0]["instances"].gt_masks = PolygonMasks([[[x1, y1, x2, y1, x2, y2, x1, y2]]])
    polygons, bitmasks = losses_of(model, batch), losses_of(model, BATCHES["one ordinary image"])
    for name in LOSSES:
        assert polygons[name].item() == pytest.approx(bitmasks[name].item(), rel=0.02)


def test_the_iou_loss_trains_the_mask_head_too(model):
    model.train()
    model.zero_grad()
    model(copy.deepcopy(BATCHES["one ordinary image"]))["loss_maskiou"].backward()
    assert model.roi_heads.mask_head.predictor.weight.grad.any()
    assert model.backbone.fpn_lateral4.weight.grad.any()


def test_classes_are_predicted_from_the_same_names_as_in_checkpoints(model):
    names = set(model.state_dict())
    for name in (
        "proposal_generator.head.class_tower.0.weight",
        "proposal_generator.head.class_tower.0.bias",
        "proposal_generator.head.box_tower.0.norm.weight",
        "proposal_generator.head.class_logits.bias",
        "proposal_generator.head.box_pred.weight",
        "proposal_generator.head.centerness.weight",
        "proposal_generator.head.scales",
        "roi_heads.mask_head.mask_fcn1.weight",
        "roi_heads.mask_head.attention.conv.weight",
        "roi_heads.mask_head.deconv.bias",
        "roi_heads.mask_head.predictor.weight",
        "roi_heads.mask_iou_head.conv2.weight",
        "roi_heads.mask_iou_head.fc1.weight",
        "roi_heads.mask_iou_head.predictor.weight",
    ):
        assert name in names
    assert model.proposal_generator.head.scales.shape == (5,)


@pytest.fixture(scope="module")
def detector():
    """A model that finds something everywhere."""
    model = tiny_model().eval()
    nn.init.constant_(model.proposal_generator.head.class_logits.bias, 0.0)
    nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.5)
    return model


@torch.no_grad()
def predict(model, *sizes, output=None) -> list[Instances]:
    inputs = []
    for i, size in enumerate(sizes):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(i)) * 255
        inputs.append({"image": image})
        if output:
            inputs[-1] |= {"height": output[0], "width": output[1]}
    model.eval()
    return [x["instances"] for x in model(inputs)]


def test_inference_gives_instances_of_the_requested_size(detector):
    (found,) = predict(detector, SIZE, output=(100, 77))
    assert len(found) >= 50 and found.image_size == (100, 77)
    assert found.pred_masks.shape == (len(found), 100, 77) and found.pred_masks.dtype == torch.bool
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 77 and boxes[:, 3].max() <= 100
    assert (found.scores.diff() <= 0).all()
    assert found.mask_scores.shape == found.scores.shape
    assert not torch.equal(found.mask_scores, found.scores)


def test_an_image_with_nothing_in_it_has_empty_fields(model):
    detections = predict(model, SIZE, (33, 70), output=(50, 60))
    for found in detections:
        assert len(found) == 0
        assert found.pred_masks.shape == (0, 50, 60) and found.pred_masks.dtype == torch.bool
        assert found.pred_boxes.tensor.shape == (0, 4)
        for name in ("scores", "mask_scores", "pred_classes"):
            assert found.get(name).shape == (0,)


def test_boxes_are_pooled_by_their_share_of_the_image_without_its_padding(detector):
    pooler = detector.roi_heads.mask_pooler
    boxes = Boxes(torch.tensor([[0.0, 0.0, 45.0, 28.0]]))  # 52 % of the image, 20 % of the padded
    assert pooler.assign([boxes], [(40, 60)]).tolist() == [2]
    assert pooler.assign([boxes, boxes], [(40, 60), (64, 96)]).tolist() == [2, 0]
    first, second = predict(detector, (40, 60), (64, 96))
    assert first.image_size == (40, 60) and second.image_size == (64, 96)


def test_detectron2s_test_time_augmentation_works(detector):
    cfg = tiny_config(MODEL__ROI_HEADS__NUM_CLASSES=3, TEST__DETECTIONS_PER_IMAGE=5)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (64, 80), 128
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        inputs = [{"image": image, "height": SIZE[0], "width": SIZE[1]}]
        (found,) = GeneralizedRCNNWithTTA(cfg, detector)(inputs)
    assert 1 <= len(found["instances"]) <= 5
    assert found["instances"].pred_masks.shape[1:] == SIZE
    assert detector.roi_heads.mask_on


def test_masks_are_added_to_given_boxes(detector):
    inputs = [{"image": torch.rand(3, *SIZE) * 255}]
    given = Instances(SIZE, pred_boxes=Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])))
    given.pred_classes = torch.tensor([1])
    with torch.no_grad():
        (found,) = detector.inference(inputs, [given], do_postprocess=False)
        assert found.pred_masks.shape == (1, 1, 28, 28) and not found.has("mask_scores")
        given.scores = torch.tensor([0.5])
        (found,) = detector.inference(inputs, [given], do_postprocess=False)
    assert found.mask_scores.shape == (1,)
    assert torch.equal(found.pred_boxes.tensor, given.pred_boxes.tensor)


@pytest.mark.parametrize(
    "box", [[10, 10, 10, 30], [10, 10, 10, 10], [200, 200, 240, 240], [-1e9, -1e9, 1e9, 1e9]]
)
def test_masks_of_degenerate_boxes_are_finite(detector, box):
    given = Instances(SIZE, pred_boxes=Boxes(torch.tensor([box]).float()))
    given.pred_classes, given.scores = torch.tensor([1]), torch.tensor([0.5])
    with torch.no_grad():
        features = detector.backbone(torch.rand(1, 3, *SIZE))
        (found,) = detector.roi_heads.forward_with_given_boxes(features, [given])
    assert torch.isfinite(found.pred_masks).all()
    assert torch.isfinite(found.mask_scores).all()


def test_without_rescoring_there_are_no_mask_scores():
    model = tiny_model(MODEL__CENTERMASK__MASK_IOU_ON=False)
    assert set(losses_of(model, BATCHES["half-empty"])) == LOSSES - {"loss_maskiou"}
    nn.init.constant_(model.proposal_generator.head.class_logits.bias, 0.0)
    (found,) = predict(model, SIZE)
    assert not found.has("mask_scores")


def test_without_masks_fcos_is_a_box_detector():
    model = tiny_model(MODEL__MASK_ON=False, MODEL__ROI_HEADS__NUM_CLASSES=-1)
    batch = copy.deepcopy(BATCHES["half-empty"])
    batch[0]["instances"].remove("gt_masks")
    losses = losses_of(model, batch)
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert_every_parameter_has_a_finite_gradient(model)
    nn.init.constant_(model.proposal_generator.head.class_logits.bias, 0.0)
    nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.5)
    (found,) = predict(model, SIZE, output=(128, 192))
    assert len(found) and found.image_size == (128, 192)
    assert not found.has("pred_masks") and not found.has("mask_scores")


@pytest.mark.parametrize(
    "options",
    [
        {"MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead"},
        {"MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True},
        {"MODEL__ROI_MASK_HEAD__NORM": "GN", "MODEL__ROI_MASK_HEAD__CONV_DIM": 32},
        {"MODEL__CENTERMASK__ASSIGN_CRITERION": "area"},
        {"MODEL__CENTERMASK__CLIP_BOXES": True},
        {"MODEL__FCOS__USE_SCALE": False, "MODEL__FCOS__NORM": ""},
        {"MODEL__FCOS__NUM_SHARE_CONVS": 1, "MODEL__FCOS__CENTER_SAMPLING_RADIUS": 0.0},
        {"MODEL__FCOS__BBOX_REG_LOSS_TYPE": "linear_iou", "MODEL__FCOS__NMS_THRESH": 0.0},
        {"VIS_PERIOD": 1},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_options_train_and_predict(options):
    model = tiny_model(**options)
    assert set(losses_of(model, BATCHES["half-empty"])) == LOSSES
    assert_every_parameter_has_a_finite_gradient(model)
    nn.init.constant_(model.proposal_generator.head.class_logits.bias, 0.0)
    nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.5)
    (found,) = predict(model, SIZE)
    assert len(found) and found.has("mask_scores")


def test_clipped_boxes_are_what_masks_are_made_for():
    model = tiny_model(MODEL__CENTERMASK__CLIP_BOXES=True).eval()
    given = Instances(SIZE, pred_boxes=Boxes(torch.tensor([[-20.0, -10.0, 40.0, 40.0]])))
    given.pred_classes, given.scores = torch.tensor([1]), torch.tensor([0.5])
    clipped = copy.deepcopy(given)
    clipped.pred_boxes.clip(SIZE)
    with torch.no_grad():
        features = model.backbone(torch.rand(1, 3, *SIZE))
        results = [
            model.roi_heads.forward_with_given_boxes(features, [x])[0] for x in (given, clipped)
        ]
    assert torch.equal(results[0].pred_masks, results[1].pred_masks)
    assert given.pred_boxes.tensor[0, 0] == -20  # what was given stays as it was


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 80}, "ROI_HEADS.NUM_CLASSES is 80, but FCOS has 3"),
        ({"MODEL__FCOS__NUM_CLASSES": -1}, "MODEL.FCOS.NUM_CLASSES is -1"),
        ({"MODEL__FCOS__BBOX_REG_LOSS_TYPE": "l1"}, "BBOX_REG_LOSS_TYPE must be .*'l1'"),
        ({"MODEL__FCOS__SIZES_OF_INTEREST": [64]}, "SIZES_OF_INTEREST has 1"),
        ({"MODEL__FCOS__IN_FEATURES": ["p3", "p9"]}, "no feature 'p9'"),
        ({"MODEL__ROI_HEADS__IN_FEATURES": ["p2"]}, "no feature 'p2'"),
        ({"MODEL__CENTERMASK__ASSIGN_CRITERION": "size"}, "ASSIGN_CRITERION must be .*'size'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_roi_heads_may_be_told_the_number_of_classes_too():
    assert tiny_model(MODEL__ROI_HEADS__NUM_CLASSES=3).roi_heads.num_classes == 3


def outputs(num_classes=2, levels=((4, 6), (2, 3)), images=1, seed=0):
    """Random outputs of FCOS's head: logits, distances, centerness."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels):
        return [torch.randn(images, channels, *size, generator=generator) for size in levels]

    return draw(num_classes), [x.abs() * 3 for x in draw(4)], draw(1)


def test_boxes_scores_and_places_come_from_the_cell():
    logits, distances, centerness = outputs(levels=((4, 6),))
    logits[0].fill_(-9.0)
    logits[0][0, 1, 2, 3] = 1.0
    (found,) = select_boxes(logits, distances, centerness, strides=[8], score_threshold=0.05)
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
        *levels,
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
    logits, distances, centerness = outputs(levels=((4, 6),), num_classes=1)
    logits[0].fill_(-9.0)
    logits[0][0, 0, 0, :4] = torch.tensor([3.0, 1.0, 1.0, 0.0])
    centerness[0].zero_()
    distances[0].fill_(0.25)
    (found,) = select_boxes(
        logits, distances, centerness, strides=[8], score_threshold=0.05, post_nms_topk=2
    )
    assert len(found.scores) == 3


def test_nms_is_within_a_class():
    logits, distances, centerness = outputs(levels=((1, 1),), num_classes=2)
    logits[0].fill_(2.0)
    (found,) = select_boxes(logits, distances, centerness, strides=[8], score_threshold=0.05)
    assert sorted(found.classes.tolist()) == [0, 1]
    assert torch.equal(found.boxes[0], found.boxes[1])


def test_half_precision_does_not_round_the_coordinates_of_pooled_boxes():
    pooler = AdaptiveROIPooler(
        criterion="ratio", output_size=7, scales=[1 / 8], sampling_ratio=0, pooler_type="ROIAlignV2"
    )
    ramp = torch.arange(200.0).expand(1, 1, 4, 200) / 256
    box = Boxes(torch.tensor([[1201.3, 2.0, 1260.9, 30.0]]))
    full = pooler([ramp], [box], [(32, 1600)])
    half = pooler([ramp.half()], [box], [(32, 1600)])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=1e-3)


def test_one_class_of_the_mask_logits_is_the_same_alone(model):
    head = model.roi_heads.mask_head
    x, classes = torch.randn(5, 32, 14, 14), torch.tensor([0, 2, 1, 1, 0])
    with torch.no_grad():
        every = head.layers(x)
        one = class_mask_logits(head, x, classes)
    assert one.shape == (5, 28, 28)
    torch.testing.assert_close(one, every[torch.arange(5), classes])


def test_no_mask_logits_are_made_of_other_classes(largest_float):
    head = tiny_model(MODEL__FCOS__NUM_CLASSES=1000).roi_heads.mask_head
    with torch.no_grad(), largest_float() as seen:
        class_mask_logits(head, torch.randn(5, 32, 14, 14), torch.arange(5))
    assert seen.bytes < 5 * 1000 * 28 * 28 * 4 / 10


def test_cropping_bitmasks_by_index_is_detectron2s_cropping():
    masks = torch.cat([rectangle(10, 10, 50, 50), rectangle(30, 5, 80, 60), rectangle(0, 0, 9, 9)])
    index = torch.tensor([1, 0, 1, 1])
    boxes = torch.tensor(
        [[25.5, 0, 81, 62.25], [10, 10, 50, 50], [-9, -9, 50, 70], [40, 40, 40, 40]]
    )
    expected = BitMasks(masks)[index].crop_and_resize(boxes, 28)
    assert torch.equal(crop_masks(BitMasks(masks), index, boxes, 28), expected)


side = st.integers(-20, 120)


@given(st.lists(st.tuples(side, side, side, side), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_visible_share_of_a_rectangle_is_its_intersection(boxes):
    object_box = [20, 10, 70, 50]
    shares = visible_share(
        BitMasks(rectangle(*object_box)),
        torch.zeros(len(boxes), dtype=torch.long),
        torch.tensor(boxes).float(),
    )
    for (x1, y1, x2, y2), share in zip(boxes, shares.tolist()):
        width = max(0, min(x2, 70) - max(x1, 20))
        height = max(0, min(y2, 50) - max(y1, 10))
        assert share == pytest.approx(width * height / (50 * 40), abs=1e-6)


def test_polygons_and_bitmasks_of_nothing_have_no_share():
    index, boxes = torch.tensor([0]), torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert visible_share(BitMasks(EMPTY), index, boxes).tolist() == [0]
    line = PolygonMasks([[[0.0, 0.0, 5.0, 5.0, 9.0, 9.0]]])
    assert visible_share(line, index, boxes).tolist() == [0]
    ordinary = PolygonMasks([[[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]])
    assert visible_share(ordinary, index, torch.tensor([[3.0, 3.0, 3.5, 8.0]])).tolist() == [0]


def test_the_iou_target_counts_what_of_the_object_is_outside_of_the_box():
    predicted, target = (
        torch.zeros(3, 4, 4, dtype=torch.bool),
        torch.zeros(3, 4, 4, dtype=torch.bool),
    )
    predicted[:, :, :2] = True  # 8 pixels
    target[:2, :2] = True  # 8 pixels, of which 4 are predicted
    iou = mask_iou_targets(predicted, target, torch.tensor([1.0, 0.5, 0.0]))
    assert iou.tolist() == pytest.approx([4 / 12, 4 / 20, 0])
