"""YOLACT on tiny inputs: bad input, options, frames, batches, half precision, frozen norms."""

import copy
import logging
from functools import partial

import pytest
import tiny_models
import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from example_inputs import EMPTY, NONE, ORDINARY, SIZE, example, many, rectangle
from torch import nn

from solo_d2.layers.masks import tight_boxes
from solo_d2.modeling import YOLACT
from solo_d2.modeling.yolact.anchors import AnchorGenerator
from solo_d2.modeling.yolact.criterion import YOLACTCriterion
from solo_d2.modeling.yolact.head import YOLACTHead

PLUS = {
    "MODEL__YOLACT__MASK_IOU__ENABLED": True,
    "MODEL__YOLACT__ANCHORS_PER_OCTAVE": 3,
    "MODEL__YOLACT__SQUARE_ANCHORS": False,
}
VERSIONS = {"YOLACT": {}, "YOLACT++": PLUS}


tiny_config = partial(tiny_models.tiny_config, tiny_models.YOLACT)
tiny_model = partial(tiny_models.tiny_model, tiny_models.YOLACT)


@pytest.fixture(scope="module", params=VERSIONS.values(), ids=VERSIONS)
def model(request):
    return tiny_model(**request.param)


def check_gradients(model) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("masks, crowds", [(NONE, 0), (ORDINARY, 1), (EMPTY, 0)])
def test_an_image_without_objects_trains_the_semantic_branch_only(model, masks, crowds):
    model.train()
    boxes = [[10.0, 10, 10, 10]] if masks is EMPTY else None
    inputs = example(masks, boxes=boxes)
    inputs["instances"].gt_crowd = torch.arange(len(masks)) >= len(masks) - crowds
    losses = model([inputs])
    assert losses.pop("loss_semantic") > 0
    assert all(loss == 0 for loss in losses.values())


def eager(**options):
    """A model that detects an object at nearly every anchor."""
    model = tiny_model(MODEL__YOLACT__SCORE_THRESH_TEST=0.01, **options).eval()
    nn.init.normal_(model.head.class_logits.weight, std=0.3)
    nn.init.normal_(model.head.coefficient_pred.weight, std=0.3)
    if model.mask_iou_head is not None:
        nn.init.constant_(model.mask_iou_head.predictor.bias, 0.3)
    return model


def inputs_of(sizes, outputs=None) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    inputs = [{"image": torch.rand(3, *size, generator=generator) * 255} for size in sizes]
    for x, (height, width) in zip(inputs, outputs or sizes):
        x["height"], x["width"] = height, width
    return inputs


@torch.no_grad()
def run(model, sizes=(SIZE,), outputs=None) -> list[Instances]:
    return [x["instances"] for x in model(inputs_of(sizes, outputs))]


def check_output(instances: Instances, size, integer: bool = True) -> None:
    n = len(instances)
    assert instances.image_size == size
    assert instances.pred_masks.shape == (n, *size)
    assert instances.pred_masks.dtype == torch.bool
    assert instances.scores.shape == instances.pred_classes.shape == (n,)
    assert (instances.scores[:-1] >= instances.scores[1:]).all()
    boxes = instances.pred_boxes.tensor
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes[:, [3, 2]] <= torch.tensor(size)).all()
    if integer:
        assert torch.equal(boxes, boxes.round())


def check_inside(instances: Instances) -> None:
    """No pixel center lies outside of its box."""
    tight, boxes = tight_boxes(instances.pred_masks), instances.pred_boxes.tensor
    filled = instances.pred_masks.flatten(1).any(dim=1)
    tight, boxes = tight[filled], boxes[filled]
    assert filled.any()
    assert (tight[:, :2] + 0.5 >= boxes[:, :2]).all()
    assert (tight[:, 2:] - 0.5 < boxes[:, 2:]).all()


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_inference_gives_well_shaped_instances_at_the_output_size(version):
    sizes, outputs = [SIZE, (33, 70)], [(128, 200), (20, 31)]
    for instances, size in zip(run(eager(**version), sizes, outputs), outputs):
        assert 0 < len(instances) <= 100
        check_output(instances, size)
        check_inside(instances)
        assert instances.has("mask_scores") == bool(version)


@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_no_candidates_and_all_candidates_are_ordinary(threshold):
    for nms_type in ("fast", "cross_class", "traditional"):
        options = {
            "MODEL__YOLACT__SCORE_THRESH_TEST": threshold,
            "MODEL__YOLACT__NMS_TYPE": nms_type,
        }
        (instances,) = run(tiny_model(**PLUS, **options).eval())
        check_output(instances, SIZE)
        assert (len(instances) == 0) == (threshold == 1)


@pytest.mark.parametrize("name", ["box_pred", "class_logits"])
def test_weights_that_are_no_numbers_are_named(name):
    model = eager()
    nn.init.constant_(getattr(model.head, name).bias, float("nan"))
    with pytest.raises(ValueError, match=rf"head\.{name}\.bias has inf or NaN"):
        run(model)


def same(a: Instances, b: Instances) -> None:
    assert torch.equal(a.pred_classes, b.pred_classes)
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
    assert (a.pred_boxes.tensor - b.pred_boxes.tensor).abs().max() <= 1
    assert (a.pred_masks ^ b.pred_masks).float().mean() < 1e-3


def test_the_largest_image_of_a_batch_is_as_if_alone_and_padding_has_no_content():
    model = eager()
    large, small, other = inputs_of([SIZE, (40, 50), SIZE])
    with torch.no_grad():
        first, second = (x["instances"] for x in model([large, small]))
        same(first, model([large])[0]["instances"])
        # the result for an image depends on the padded size, not on the other images
        same(second, model([small, other])[0]["instances"])
    check_output(second, (40, 50))


def test_a_padded_image_gives_boxes_and_masks_in_its_own_frame():
    """The same padded tensor, with and without its image size."""
    model = eager(MODEL__YOLACT__BOX_ROUNDING="float", MODEL__YOLACT__CROP="none")
    (padded,) = inputs_of([SIZE])
    h, w = 40, 60
    padded["image"][:, h:], padded["image"][:, :, w:] = 0, 0
    padded["image"] += model.pixel_mean * (padded["image"] == 0)
    cropped = {"image": padded["image"][:, :h, :w].clone(), "height": 2 * h, "width": 2 * w}
    padded["height"], padded["width"] = 2 * SIZE[0], 2 * SIZE[1]
    with torch.no_grad():
        whole = model([padded])[0]["instances"]
        part = model([cropped, padded])[0]["instances"]
    visible = whole.pred_boxes.tensor.clone()
    visible[:, 2].clamp_(max=2 * w)
    visible[:, 3].clamp_(max=2 * h)
    whole = whole[(visible[:, 2:] > visible[:, :2]).all(dim=1)]
    assert len(whole) == len(part) > 0
    difference = whole.pred_masks[:, : 2 * h, : 2 * w] ^ part.pred_masks
    assert difference.float().mean() < 1e-3


def test_crops_differ_as_they_should():
    by_crop = {}
    for crop in ("output", "prototype", "none"):
        model = eager(MODEL__YOLACT__CROP=crop)
        (by_crop[crop],) = run(model, outputs=[(256, 384)])
    inner, padded, whole = (by_crop[crop].pred_masks for crop in ("output", "prototype", "none"))
    check_inside(by_crop["output"])
    assert not (inner & ~whole).any() and not (padded & ~whole).any()
    assert (whole & ~padded).any() and (padded & ~inner).any()


def test_float_boxes_are_the_integer_ones_before_truncation():
    (whole,) = run(eager())
    (exact,) = run(eager(MODEL__YOLACT__BOX_ROUNDING="float"))
    check_output(exact, SIZE, integer=False)
    check_inside(exact)
    boxes = exact.pred_boxes.tensor
    exact = exact[(boxes.trunc()[:, 2:] > boxes.trunc()[:, :2]).all(dim=1)]
    assert torch.equal(exact.pred_boxes.tensor.trunc(), whole.pred_boxes.tensor)


def test_limits_are_kept():
    (few,) = run(eager(TEST__DETECTIONS_PER_IMAGE=5))
    assert len(few) <= 5
    model = eager(MODEL__YOLACT__NMS_TYPE="cross_class", TEST__DETECTIONS_PER_IMAGE=2)
    (unlimited,) = run(model)
    assert len(unlimited) > 2


def test_mask_iou_loss_reaches_the_prototypes():
    model = tiny_model(**PLUS).train()
    model.criterion.mask_iou_min_area = 0
    nn.init.constant_(model.mask_iou_head.predictor.bias, 0.3)
    model([example(ORDINARY)])["loss_mask_iou"].backward()
    assert model.protonet.predictor.weight.grad.any()
    assert model.mask_iou_head.predictor.bias.grad.any()


OPTIONS = [
    {"MODEL__YOLACT__NORM": "GN", "MODEL__YOLACT__CONV_DIM": 64},
    {"MODEL__YOLACT__CROP": "none"},
    {"MODEL__YOLACT__CROP": "prototype"},
    {"MODEL__YOLACT__MASKS_TO_TRAIN": 2},
    {"MODEL__YOLACT__MASKS_TO_TRAIN": 0},
    {"MODEL__YOLACT__INPUT_SIZE": 70},
    {"MODEL__YOLACT__IN_FEATURES": ["res4", "res5"]},
    {"MODEL__YOLACT__ANCHOR_SIZES": [12, 24, 48]},
    {"MODEL__MOBILENETV2__NORM": "FrozenBN"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_and_infers(options):
    model = eager(**PLUS, **options)
    model.train()
    losses = model([example(many(6)), example(NONE)])
    assert losses["loss_mask"] > 0
    sum(losses.values()).backward()
    check_gradients(model)
    check_output(run(model.eval())[0], SIZE)


def test_the_limit_of_masks_keeps_the_loss_in_expectation(monkeypatch):
    model = eager().train()
    for module in model.backbone.modules():
        module.eval()
    whole = model([example(many(6))])["loss_mask"]
    model.criterion.masks_to_train = 5
    limited = torch.stack([model([example(many(6))])["loss_mask"] for _ in range(30)])
    assert limited.std() > 0
    assert abs(limited.mean() - whole) < 4 * limited.std() / 30**0.5


def test_two_processes_have_the_losses_of_the_joined_batch(monkeypatch):
    model = eager(**PLUS, MODEL__YOLACT__MASKS_TO_TRAIN=0).train()
    for module in model.backbone.modules():
        module.eval()
    batches = [[example(ORDINARY)], [example(many(6))]]
    expected = model(sum(batches, []))

    counts: list[float] = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: counts.append(x.item()))
    for batch in batches:
        model(batch)
    assert counts[0] != counts[1]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.fill_(sum(counts)))
    parts = [model(batch) for batch in batches]
    for name, loss in expected.items():
        mean = sum(part[name] for part in parts) / 2
        assert mean.item() == pytest.approx(loss.item(), rel=1e-4), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CROP", "input", "crop must be one of output, prototype, none, not 'input'"),
        ("NMS_TYPE", "soft", "nms_type must be one of fast, cross_class, traditional, not 'soft'"),
        ("BOX_ROUNDING", "ceil", "box_rounding must be one of int, float, not 'ceil'"),
        ("IN_FEATURES", ["res9"], "in_features must be some of"),
        ("ANCHOR_SIZES", [24], "num_levels must be at least 3, .* not 1"),
        ("ANCHOR_ASPECT_RATIOS", [0.0], "aspect_ratios must be positive"),
        ("INPUT_SIZE", -1, "input_size must be 0 or more, not -1"),
        ("MASKS_TO_TRAIN", -1, "masks_to_train must be at least 0, not -1"),
        ("NUM_PROTOTYPES", 0, "num_prototypes must be at least 1, not 0"),
        ("NMS_THRESH_TEST", -1.0, "nms_threshold must be from 0 to 1, not -1.0"),
        ("TOPK_CANDIDATES_TEST", 0, "top_k must be at least 1, not 0"),
    ],
)
def test_an_unsupported_option_is_named_when_the_model_is_built(key, value, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**{f"MODEL__YOLACT__{key}": value})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("num_levels", {"anchor_generator": AnchorGenerator(sizes=[8], aspect_ratios=[1, 2, 3])}),
        ("num_anchors", {"head": YOLACTHead(in_channels=32, num_anchors=4, num_classes=3)}),
        ("num_classes", {"criterion": YOLACTCriterion(num_classes=4)}),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(name, part):
    options = YOLACT.from_config(tiny_config())
    YOLACT(**options)
    with pytest.raises(ValueError, match=f"the parts must have the same {name}, not"):
        YOLACT(**{**options, **part})


@pytest.mark.parametrize(
    "part", ["protonet.predictor", "head.coefficient_pred", "head.class_logits"]
)
def test_a_network_of_nan_gives_nan_losses_rather_than_an_error(part):
    model = tiny_model(**PLUS).train()
    nn.init.constant_(model.get_submodule(part).bias, float("nan"))
    losses = model([example(ORDINARY)])
    assert losses["loss_class" if part == "head.class_logits" else "loss_mask"].isnan()


def test_raw_outputs_can_be_traced():
    model = tiny_model().eval()
    images = torch.rand(1, 3, *SIZE)
    traced = torch.jit.trace_module(model, {"dense": images}, check_trace=False)
    for a, b in zip(traced.dense(images * 2), model.dense(images * 2), strict=True):
        torch.testing.assert_close(a, b)


def norms_of(model) -> list[nn.BatchNorm2d]:
    return [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]


def test_small_batches_freeze_batch_norm_and_say_so(caplog):
    with caplog.at_level(logging.INFO, logger="solo_d2"):
        model = tiny_model(SOLVER__IMS_PER_BATCH=4)
    said = [x.getMessage() for x in caplog.records if "FREEZE_BN_BELOW" in x.getMessage()]
    assert len(said) == 1 and "4 images" in said[0]
    before = copy.deepcopy(model.backbone.state_dict())
    model.eval().train()
    assert norms_of(model)
    for norm in norms_of(model):
        assert not norm.training and not norm.weight.requires_grad and not norm.bias.requires_grad
    sum(model([example(ORDINARY)]).values()).backward()
    for name, value in model.backbone.state_dict().items():
        if "running" in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "options", [{"SOLVER__IMS_PER_BATCH": 6}, {"MODEL__YOLACT__FREEZE_BN_BELOW": 0}]
)
def test_large_batches_and_a_switch_train_batch_norm(options, caplog):
    options = {"SOLVER__IMS_PER_BATCH": 1, **options}
    with caplog.at_level(logging.INFO, logger="solo_d2"):
        model = tiny_model(**options).train()
    assert not [x for x in caplog.records if "FREEZE_BN_BELOW" in x.getMessage()]
    assert all(norm.training and norm.weight.requires_grad for norm in norms_of(model))


def test_semantic_branch_is_not_evaluated_at_inference():
    model = eager()
    calls = []
    model.semantic_pred.register_forward_hook(lambda *_: calls.append(1))
    run(model)
    assert not calls
    model.train()([example(ORDINARY)])
    assert calls


def test_a_few_steps_on_one_image_lower_every_loss():
    model = tiny_model(**PLUS, MODEL__MOBILENETV2__NORM="FrozenBN").train()
    for module in model.backbone.modules():  # batch norm of a fresh network, frozen, does nothing
        if hasattr(module, "running_var"):
            module.running_var.fill_(0.05)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    history = []
    batch = [example(torch.cat([ORDINARY, rectangle(60, 5, 90, 40)]))]
    for _ in range(25):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    for name in ("loss_class", "loss_box", "loss_mask", "loss_semantic"):
        assert history[-1][name] < 0.8 * history[0][name], name
