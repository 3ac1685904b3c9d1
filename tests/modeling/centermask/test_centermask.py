"""CenterMask and FCOS on tiny inputs: bad input, options, and the steps from logits to masks."""

import copy
from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from example_inputs import BATCHES, NONE, SIZE, example
from torch import nn

from solo_d2.config import add_point_rend_config

LOSSES = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "loss_mask", "loss_maskiou"}


tiny_config = partial(tiny_models.tiny_config, tiny_models.CENTERMASK)
tiny_model = partial(tiny_models.tiny_model, tiny_models.CENTERMASK)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def storage():
    """Detectron2's ROI heads write statistics to it in training."""
    with EventStorage() as storage:
        yield storage


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


def test_without_objects_only_the_classes_are_learned(model):
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


def find_something(model) -> None:
    nn.init.constant_(model.proposal_generator.head.class_logits.bias, 0.0)
    nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.5)


@pytest.fixture(scope="module")
def detector():
    """A model that finds something everywhere."""
    model = tiny_model().eval()
    find_something(model)
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


def test_a_result_in_a_batch_is_the_result_alone(detector):
    """Up to rounding, which depends on the size of the batch.

    In untrained models, boxes whose width is just a rounding error may appear or vanish,
    and near-equal scores change places.
    """
    inputs = [example(NONE), example(NONE)]
    inputs[1]["image"] = inputs[1]["image"].flip(0)
    with torch.no_grad():
        images = detector.preprocess_image(inputs)
        together = detector.inference(inputs, do_postprocess=False)
        alone = [detector.inference([x], do_postprocess=False)[0] for x in inputs]
    assert images.tensor.shape[-2:] == SIZE
    for in_batch, single in zip(together, alone):
        assert len(in_batch) == len(single) > 50
        # ordered by position instead of score
        orders = [
            torch.from_numpy(np.lexsort((*x.locations.T, x.pred_classes)))
            for x in (in_batch, single)
        ]
        in_batch, single = in_batch[orders[0]], single[orders[1]]
        assert torch.equal(in_batch.locations, single.locations)
        assert torch.equal(in_batch.pred_classes, single.pred_classes)
        for name in ("scores", "mask_scores", "pred_masks"):
            torch.testing.assert_close(in_batch.get(name), single.get(name), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            in_batch.pred_boxes.tensor, single.pred_boxes.tensor, rtol=0, atol=1e-3
        )


def test_boxes_are_pooled_by_their_share_of_the_image_without_its_padding(detector):
    pooler = detector.roi_heads.mask_pooler
    boxes = Boxes(torch.tensor([[0.0, 0.0, 45.0, 28.0]]))  # 52 % of the image, 20 % of the padded
    assert pooler.assign([boxes], [(40, 60)]).tolist() == [2]
    assert pooler.assign([boxes, boxes], [(40, 60), (64, 96)]).tolist() == [2, 0]
    first, second = predict(detector, (40, 60), (64, 96))
    assert first.image_size == (40, 60) and second.image_size == (64, 96)


def test_detectron2s_test_time_augmentation_works(detector):
    cfg = tiny_config(TEST__DETECTIONS_PER_IMAGE=5)
    build_model(cfg)  # replaces -1 by the number of classes, also for test-time augmentation
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
    find_something(model)
    (found,) = predict(model, SIZE)
    assert len(found) and not found.has("mask_scores")


def boxes_only(name: str) -> list[dict]:
    batch = copy.deepcopy(BATCHES[name])
    for inputs in batch:
        if inputs["instances"].has("gt_masks"):
            inputs["instances"].remove("gt_masks")
    return batch


def test_without_masks_fcos_is_a_box_detector():
    model = tiny_model(MODEL__MASK_ON=False)
    losses = losses_of(model, boxes_only("half-empty"))
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert_every_parameter_has_a_finite_gradient(model)
    find_something(model)
    (found,) = predict(model, SIZE, output=(128, 192))
    assert len(found) and found.image_size == (128, 192)
    assert not found.has("pred_masks") and not found.has("mask_scores")


# unused levels: p2 of the pyramid, p5 with few levels of FCOS, p6 of Detectron2's pyramid
UNUSED_LEVELS = [
    {
        "MODEL__RESNETS__OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL__FPN__IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL__FCOS__IN_FEATURES": ["p3", "p4"],
        "MODEL__FCOS__SIZES_OF_INTEREST": [64],
        "MODEL__ROI_HEADS__IN_FEATURES": ["p3", "p4"],
        "MODEL__MASK_ON": mask_on,
        "MODEL__BACKBONE__NAME": name,
    }
    for name in ("build_fcos_resnet_fpn_backbone", "build_resnet_fpn_backbone")
    for mask_on in (False, True)
]


@pytest.mark.parametrize(
    "options", UNUSED_LEVELS, ids=lambda options: " ".join(map(str, [*options.values()][-2:]))
)
def test_it_trains_under_ddp_that_waits_for_every_parameter(options):
    model = tiny_model(**options)
    batch = boxes_only("half-empty") if not options["MODEL__MASK_ON"] else BATCHES["half-empty"]
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step detects gradients that the first still waits for
            losses_of(parallel, batch)
    finally:
        torch.distributed.destroy_process_group()
    assert_every_parameter_has_a_finite_gradient(model)


@pytest.mark.parametrize(
    "options",
    [
        {"MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True},
        {"MODEL__ROI_MASK_HEAD__NORM": "GN", "MODEL__ROI_MASK_HEAD__CONV_DIM": 32},
        {"MODEL__CENTERMASK__ASSIGN_CRITERION": "area"},
        {"MODEL__FCOS__CENTER_SAMPLING_RADIUS": 0.0},
        {"MODEL__FCOS__BBOX_REG_LOSS_TYPE": "linear_iou", "MODEL__FCOS__NMS_THRESH": 0.0},
        {"VIS_PERIOD": 1},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_options_train_and_predict(options):
    model = tiny_model(**options)
    assert set(losses_of(model, BATCHES["half-empty"])) == LOSSES
    assert_every_parameter_has_a_finite_gradient(model)
    find_something(model)
    (found,) = predict(model, SIZE)
    assert len(found) and found.has("mask_scores")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 80}, "ROI_HEADS.NUM_CLASSES is 80, but FCOS has 3"),
        ({"MODEL__FCOS__NUM_CLASSES": -1}, "MODEL.FCOS.NUM_CLASSES is -1"),
        ({"MODEL__FCOS__NUM_CLASSES": 0}, "num_classes must be at least 1, not 0"),
        ({"MODEL__FCOS__BBOX_REG_LOSS_TYPE": "l1"}, "box_loss_type must be .*'l1'"),
        ({"MODEL__FCOS__SIZES_OF_INTEREST": [64]}, "5 features, 5 strides and 1 borders"),
        ({"MODEL__FCOS__SIZES_OF_INTEREST": [64, 32, 96, 128]}, "borders must be in ascending"),
        ({"MODEL__FCOS__SCORE_THRESH_TEST": 1.5}, "score_threshold_test must be from 0 to 1"),
        ({"MODEL__FCOS__CENTER_SAMPLING_RADIUS": -1.0}, "radius must be at least 0, not -1.0"),
        ({"TEST__DETECTIONS_PER_IMAGE": -1}, "max_detections must be at least 0, not -1"),
        ({"MODEL__FCOS__IN_FEATURES": ["p3", "q"]}, r"MODEL.FCOS.IN_FEATURES has 'q', .*'p3'"),
        ({"MODEL__ROI_HEADS__IN_FEATURES": ["p2"]}, "MODEL.ROI_HEADS.IN_FEATURES has 'p2'"),
        ({"MODEL__CENTERMASK__MASK_IOU_NUM_CONV": 0}, "num_conv must be at least 1, not 0"),
        ({"MODEL__CENTERMASK__ASSIGN_CRITERION": "size"}, "criterion must be .*'size'"),
        ({"MODEL__ROI_MASK_HEAD__POOLER_TYPE": "ROIAlign"}, "POOLER_TYPE must be .*'ROIAlign'"),
        (
            {"MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead"},
            "mask_iou_head needs .* MaskRCNNConvUpsampleHead does not have",
        ),
    ],
)
def test_unsupported_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_a_backbone_without_the_levels_of_fcos_is_refused_by_key():
    with pytest.raises(ValueError, match=r"MODEL.FCOS.IN_FEATURES has 'p3', .*\['res4'\]"):
        tiny_model(
            MODEL__BACKBONE__NAME="build_resnet_backbone", MODEL__RESNETS__OUT_FEATURES=["res4"]
        )


@pytest.mark.parametrize("name", ["MaskRCNNConvUpsampleHead", "PointRendMaskHead"])
def test_detectron2s_mask_heads_train_with_their_own_loss(name, storage):
    options: dict = {"MODEL__ROI_MASK_HEAD__NAME": name, "MODEL__CENTERMASK__MASK_IOU_ON": False}
    cfg = tiny_config(**options)
    if name == "PointRendMaskHead":
        add_point_rend_config(cfg)
        cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
        cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p3"]
        cfg.MODEL.ROI_MASK_HEAD.FC_DIM = cfg.MODEL.POINT_HEAD.FC_DIM = 16
        cfg.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION = 7
        cfg.MODEL.POINT_HEAD.NUM_CLASSES = 3
        cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
    torch.manual_seed(0)
    model = build_model(cfg)
    # PointRend's head fails without foreground, in Detectron2's own ROI heads too
    for batch in ("half-empty", "no instance at all")[: 1 if "Point" in name else 2]:
        losses = losses_of(model, BATCHES[batch])
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert_every_parameter_has_a_finite_gradient(model.roi_heads)
    extra = {"loss_mask_point"} if name == "PointRendMaskHead" else set()
    assert set(losses) == LOSSES - {"loss_maskiou"} | extra
    if not extra:  # written only by Detectron2's loss
        assert "mask_rcnn/accuracy" in storage.latest()
    find_something(model)
    (found,) = predict(model, SIZE)
    assert len(found) and found.pred_masks.shape[1:] == SIZE and not found.has("mask_scores")


def test_a_mask_head_of_ones_own_is_called_as_detectron2_calls_it():
    calls = []

    class OwnHead(nn.Module):
        def forward(self, x, instances):
            calls.append(x.shape)
            if self.training:
                assert [len(i.gt_masks) for i in instances] == [len(i) for i in instances if len(i)]
                return {"loss_own": x.sum() * 0}
            for i in instances:
                i.pred_masks = torch.ones(len(i), 1, 7, 7)
            return instances

    model = tiny_model(MODEL__CENTERMASK__MASK_IOU_ON=False)
    model.roi_heads.mask_head, model.roi_heads.has_class_logits = OwnHead(), False
    assert "loss_own" in losses_of(model, BATCHES["one ordinary image"])
    find_something(model)
    (found,) = predict(model, SIZE)
    assert found.pred_masks.any() and len(calls) == 2


def test_roi_heads_may_be_told_the_number_of_classes_too():
    assert tiny_model(MODEL__ROI_HEADS__NUM_CLASSES=3).roi_heads.num_classes == 3
