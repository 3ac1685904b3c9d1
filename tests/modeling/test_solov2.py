"""SOLOv2 on tiny inputs: shapes, bad input, options."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from solo_d2 import add_solo_d2_config
from solo_d2.layers import masks as mask_ops

SIZE = (64, 96)


def tiny_config(**options):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "SOLOv2"),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.SOLO.NUM_CLASSES", 3, "MODEL.SOLO.NUM_GRIDS", [12, 10, 8, 6, 4]),
            *("MODEL.SOLO.CONV_DIM", 64, "MODEL.SOLO.NUM_CONVS", 1),
            *("MODEL.SOLOV2.MASK_DIM", 64, "MODEL.SOLOV2.MASK_CONV_DIM", 64),
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


def example(masks: torch.Tensor, boxes=None, size=SIZE) -> dict:
    """A training input with the given masks and, by default, their tight boxes."""
    instances = Instances(size)
    instances.gt_boxes, instances.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0).long()
    if len(masks):  # like Detectron2's mapper: without annotations there is no gt_masks
        instances = Instances(size)
        boxes = mask_ops.tight_boxes(masks) if boxes is None else torch.as_tensor(boxes).float()
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
    "zero-area box": [example(ORDINARY, boxes=[[10, 10, 10, 50]])],
    "inverted box": [example(ORDINARY, boxes=[[50, 50, 10, 10]])],
    "box out of the image": [example(ORDINARY, boxes=[[200, 200, 260, 260]])],
    "500 instances": [example(many(500))],
    "object beyond the last scale bound": [example(ORDINARY, boxes=[[-3000, -3000, 3000, 3000]])],
    "mask that vanishes at a quarter": [example(rectangle(4, 4, 5, 40))],
    "images of different sizes": [
        example(ORDINARY),
        example(rectangle(0, 0, 30, 30, size=(33, 70)), size=(33, 70)),
    ],
}


@pytest.mark.parametrize("name", BATCHES)
def test_training_gives_finite_losses_whose_gradient_reaches_every_parameter(model, name):
    model.train()
    model.zero_grad()
    losses = model(copy.deepcopy(BATCHES[name]))
    assert set(losses) == {"loss_category", "loss_mask"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name


def test_an_image_without_instances_trains_the_categories_only(model):
    model.train()
    losses = model([example(NONE)])
    assert losses["loss_mask"] == 0
    assert losses["loss_category"] > 0


def test_an_input_without_annotations_is_named(model):
    model.train()
    with pytest.raises(ValueError, match=r"street\.jpg"):
        model([{"image": torch.zeros(3, *SIZE), "file_name": "street.jpg"}])


def test_instances_without_masks_are_an_error_that_names_the_key(model):
    model.train()
    inputs = {**example(ORDINARY), "file_name": "street.jpg"}
    inputs["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match=r"street\.jpg.*MODEL\.MASK_ON"):
        model([inputs])


def test_polygons_and_bit_masks_give_the_same_losses(model):
    model.train()
    polygon = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
    with_bits = example(ORDINARY)
    with_polygons = copy.deepcopy(with_bits)
    with_polygons["instances"].gt_masks = PolygonMasks([polygon])
    assert model([with_bits]) == model([with_polygons])


def eager(**options):
    """A model that proposes an instance wherever it can."""
    thresholds = {"MODEL__SOLO__SCORE_THRESH_TEST": 0.005, "MODEL__SOLO__UPDATE_THRESH_TEST": 0.0}
    model = tiny_model(**thresholds, **options).eval()
    torch.nn.init.normal_(model.head.kernel_pred.weight, std=0.3)
    return model


@torch.no_grad()
def run(model, sizes=(SIZE,), outputs=None):
    generator = torch.Generator().manual_seed(3)
    inputs = [{"image": torch.rand(3, *size, generator=generator) * 255} for size in sizes]
    for x, output in zip(inputs, outputs or sizes):
        x["height"], x["width"] = output
    return [x["instances"] for x in model(inputs)]


def check_output(instances: Instances, size):
    n = len(instances)
    assert instances.image_size == size
    assert instances.pred_masks.shape == (n, *size)
    assert instances.pred_masks.dtype == torch.bool
    assert torch.equal(
        instances.pred_boxes.tensor, BitMasks(instances.pred_masks).get_bounding_boxes().tensor
    )
    assert instances.scores.shape == instances.pred_classes.shape == (n,)
    assert (instances.scores[:-1] >= instances.scores[1:]).all()


def test_inference_gives_well_shaped_instances_at_the_output_size():
    sizes, outputs = [SIZE, (33, 70)], [(128, 200), (20, 31)]
    found = run(eager(), sizes, outputs)
    for instances, size in zip(found, outputs):
        assert len(instances) > 0
        check_output(instances, size)


@pytest.mark.parametrize("threshold", [2.0, 0.0])
def test_no_candidates_and_all_candidates_are_ordinary(threshold):
    model = tiny_model(MODEL__SOLO__SCORE_THRESH_TEST=threshold).eval()
    (instances,) = run(model)
    check_output(instances, SIZE)
    assert len(instances) <= 100
    if threshold > 1:
        assert len(instances) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 2)])
def test_tiny_and_long_images_pass(size):
    (instances,) = run(eager(), [size])
    check_output(instances, size)


def test_results_do_not_depend_on_the_chunks(monkeypatch):
    model = eager()
    (whole,) = run(model)
    monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 3 * 16 * 24 * 4)
    (chunked,) = run(model)
    assert torch.equal(whole.pred_masks, chunked.pred_masks)
    assert torch.equal(whole.pred_classes, chunked.pred_classes)
    torch.testing.assert_close(whole.scores, chunked.scores)


def test_limits_are_kept():
    model = eager(TEST__DETECTIONS_PER_IMAGE=5, MODEL__SOLO__TOPK_CANDIDATES_TEST=20)
    (instances,) = run(model)
    assert len(instances) == 5
    limited = eager(MODEL__SOLO__MAX_CANDIDATES_TEST=3)
    assert 1 <= len(run(limited)[0]) <= 3


def test_greedy_nms_leaves_scores_alone():
    model = eager(MODEL__SOLO__NMS_TYPE="mask")
    (instances,) = run(model)
    check_output(instances, SIZE)
    assert len(instances) > 0


def test_an_unknown_nms_is_named():
    with pytest.raises(ValueError, match="'soft'"):
        run(eager(MODEL__SOLO__NMS_TYPE="soft"))


@pytest.mark.parametrize(
    "options",
    [
        {"MODEL__SOLOV2__KERNEL_SIZE": 3},
        {"MODEL__SOLO__COORD_CONV": False},
        {"MODEL__SOLO__NORM": ""},
        {"MODEL__SOLO__DEFORM": "last"},
        {
            "MODEL__SOLO__DEFORM": "all",
            "MODEL__SOLO__DEFORM_MODULATED": True,
            "MODEL__SOLOV2__MASK_DEFORM": True,
        },
        {"MODEL__SOLO__PAD_BEFORE_REDUCTION": False},
        {"MODEL__SOLO__MAX_POSITIVES": 2},
        {"MODEL__SOLO__NMS_KERNEL": "linear"},
        {"MODEL__RESNETS__NORM": "BN", "MODEL__BACKBONE__FREEZE_BN_STATS": True},
    ],
    ids=str,
)
def test_every_option_trains_and_infers(options):
    model = tiny_model(**options)
    model.train()
    losses = model([example(many(6)), example(NONE)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    check_output(run(model.eval())[0], SIZE)


def test_frozen_statistics_stay_while_affine_parameters_train():
    model = tiny_model(
        MODEL__RESNETS__NORM="BN",
        MODEL__BACKBONE__FREEZE_BN_STATS=True,
        MODEL__BACKBONE__FREEZE_AT=0,
    ).train()
    norm = model.backbone.bottom_up.res3[0].conv1.norm
    before = norm.running_mean.clone()
    sum(model([example(ORDINARY)]).values()).backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.grad is not None


def test_mixed_precision_gives_finite_float32_losses():
    model = tiny_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([example(many(4))])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_output(run(eager())[0], SIZE)


def test_levels_of_different_lengths_are_named():
    with pytest.raises(ValueError, match="STRIDES: 5"):
        tiny_model(MODEL__SOLO__NUM_GRIDS=[12, 10])


def test_a_feature_that_the_backbone_lacks_is_named():
    with pytest.raises(ValueError, match="'p7'"):
        tiny_model(MODEL__SOLO__IN_FEATURES=["p2", "p3", "p4", "p5", "p7"])


def test_an_unset_number_of_classes_without_data_is_an_error():
    with pytest.raises(ValueError, match="MODEL.SOLO.NUM_CLASSES"):
        tiny_model(MODEL__SOLO__NUM_CLASSES=-1)


def test_candidates_are_never_all_made_at_once(monkeypatch, largest_float):
    """Hundreds of candidates, ten kept: no float tensor holds the masks of more than a chunk."""
    pixels = (SIZE[0] // 4) * (SIZE[1] // 4)
    monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 16 * pixels * 4)
    model = eager(MODEL__SOLO__TOPK_CANDIDATES_TEST=10)
    images = model.preprocess_image([{"image": torch.rand(3, *SIZE) * 255}])
    with torch.no_grad():
        features = model.backbone(images.tensor)
        outputs = model.predict(model.resize_levels(features, SIZE), features)
        scores = model.category_scores(outputs)[0]
        assert (scores > 0.005).sum() > 100
        with largest_float() as mode:
            found = model.detect(outputs, scores, 0, (SIZE[0] // 4, SIZE[1] // 4))
    assert len(found.scores) == 10
    feature_map = outputs.mask_features[0].numel()
    assert mode.bytes <= 4 * max(16 * pixels, feature_map)
