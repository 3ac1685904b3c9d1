"""The SOLO family on tiny inputs: shapes, bad input, options, and what each model adds."""

import re
from functools import partial

import pytest
import tiny_models
import torch
from detectron2.modeling import build_backbone
from detectron2.structures import BitMasks, Instances
from example_inputs import NONE, ORDINARY, SIZE, example, many
from tiny_models import SOLO as SETTINGS
from torch.nn import functional as F

from solo_d2 import SOLO, DecoupledSOLO, SOLOv2
from solo_d2.layers import masks as mask_ops
from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.layers.frozen_bn import FoldedConv2d
from solo_d2.layers.resample import UpsampledConv2d
from solo_d2.modeling.solo.decoupled_solo import DecoupledSOLOHead
from solo_d2.modeling.solo.head import HeadSpec, TowerSpec
from solo_d2.modeling.solo.inference import Detector
from solo_d2.modeling.solo.solo import SOLOHead
from solo_d2.modeling.solo.solov2 import MaskFeatureBranch, SOLOv2Head
from solo_d2.modeling.solo.targets import CellAssigner

# Options that change how masks are made, one at a time.
ARCHITECTURES = {
    "SOLOv2": {"MODEL__META_ARCHITECTURE": "SOLOv2"},
    "SOLO": {"MODEL__META_ARCHITECTURE": "SOLO"},
    "DecoupledSOLO": {"MODEL__META_ARCHITECTURE": "DecoupledSOLO"},
    "DecoupledSOLO Light": {
        "MODEL__META_ARCHITECTURE": "DecoupledSOLO",
        "MODEL__DECOUPLED_SOLO__SHARED_TOWER": True,
    },
}
every_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES.values(), ids=ARCHITECTURES
)


SOLOV2 = {**SETTINGS, "MODEL.META_ARCHITECTURE": "SOLOv2"}
tiny_config = partial(tiny_models.tiny_config, SOLOV2)
tiny_model = partial(tiny_models.tiny_model, SOLOV2)


def python_model(name: str, tower: dict | None = None, **options):
    """The tiny model, built without a config; options are those without a key."""
    torch.manual_seed(0)
    backbone = build_backbone(tiny_config())
    tower = TowerSpec(**{"num_convs": 1, "conv_dim": 64, **(tower or {})})
    spec = HeadSpec(in_channels=32, num_classes=3, num_grids=[12, 10, 8, 6, 4], tower=tower)
    if name == "SOLOv2":
        head = SOLOv2Head(spec, mask_dim=64)
        shapes = backbone.output_shape()
        options["mask_branch"] = MaskFeatureBranch(shapes, conv_dim=64, out_dim=64, norm=tower.norm)
    else:
        head = {"SOLO": SOLOHead, "DecoupledSOLO": DecoupledSOLOHead}[name](spec)
    assigner = CellAssigner(
        num_classes=3,
        num_grids=spec.num_grids,
        scale_ranges=[[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]],
        **{key: options.pop(key) for key in ("inclusive_boxes",) if key in options},
    )
    nms = {key: options.pop(key) for key in ("nms_kernel", "nms_finite") if key in options}
    arguments = {
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [1.0, 1.0, 1.0],
        "head_in_features": ["p2", "p3", "p4", "p5", "p6"],
        "strides": [8, 8, 16, 32, 32],
        "assigner": assigner,
        "detector": Detector(**nms),
    }
    model_class = {"SOLO": SOLO, "DecoupledSOLO": DecoupledSOLO, "SOLOv2": SOLOv2}[name]
    return model_class(backbone=backbone, head=head, **{**arguments, **options})


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def model(request):
    return tiny_model(**request.param)


def test_an_image_without_instances_trains_the_categories_only(model):
    model.train()
    losses = model([example(NONE)])
    assert losses["loss_mask"] == 0
    assert losses["loss_category"] > 0


def eager(**options):
    """A model that predicts an instance wherever it can."""
    return made_eager(tiny_model(**options))


def made_eager(model):
    detector = model.detector
    detector.score_threshold, detector.update_threshold = 0.005, 0.0
    for name, parameter in model.head.named_parameters():
        if re.search(r"(kernel|mask|x|y)_pred\.", name):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


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


@every_architecture
@pytest.mark.parametrize("threshold", [2.0, 0.0])
def test_no_candidates_and_all_candidates_are_ordinary(architecture, threshold):
    model = eager(**architecture)
    model.detector.score_threshold = threshold
    (instances,) = run(model)
    check_output(instances, SIZE)
    assert len(instances) <= 100
    if threshold > 1:
        assert len(instances) == 0


@every_architecture
def test_images_of_one_size_give_the_results_of_one_by_one(architecture):
    # in float64: in float32, a pixel at the threshold may be on either side and change a score
    model = eager(**architecture).double()
    generator = torch.Generator().manual_seed(4)
    inputs = [{"image": torch.rand(3, *SIZE, generator=generator) * 255} for _ in range(3)]
    with torch.no_grad():
        together = [x["instances"] for x in model(inputs)]
        alone = [model([x])[0]["instances"] for x in inputs]
    for a, b in zip(together, alone):
        assert len(a) > 0
        assert torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-6)
        assert (a.pred_masks ^ b.pred_masks).float().mean() < 1e-5


@every_architecture
def test_a_seed_draws_the_same_positives_again(architecture):
    model = tiny_model(**architecture, MODEL__SOLO__MAX_POSITIVES=3)
    inputs = example(many(6))
    (gt,) = model.prepare_ground_truth([inputs], model.preprocess_image([inputs]))
    drawn = []
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        drawn.append([x.tolist() for x in model.assign(gt, SIZE)[1:]])
    assert all(len(pairs) == 3 for columns in drawn for pairs in columns)
    assert drawn[0] == drawn[1] and not drawn[0] == drawn[2] == drawn[3]
    model.assigner.max_positives = 0
    every = set(zip(*(x.tolist() for x in model.assign(gt, SIZE)[1:])))
    for columns in drawn:
        assert set(zip(*columns)) < every
        assert columns[0] == sorted(columns[0])  # by level, as the mask loss takes them


@every_architecture
def test_limits_are_kept(architecture):
    model = eager(
        **architecture, TEST__DETECTIONS_PER_IMAGE=5, MODEL__SOLO__TOPK_CANDIDATES_TEST=20
    )
    (instances,) = run(model)
    assert len(instances) == 5
    limited = eager(**architecture, MODEL__SOLO__MAX_CANDIDATES_TEST=3)
    assert 1 <= len(run(limited)[0]) <= 3


def test_greedy_nms_leaves_scores_alone():
    model = eager(MODEL__SOLO__NMS_TYPE="mask")
    (instances,) = run(model)
    check_output(instances, SIZE)
    assert len(instances) > 0


SHARED_OPTIONS = [
    {"MODEL__SOLO__PAD_BEFORE_DOWNSAMPLING": False},
    {"MODEL__SOLO__COORD_CONV": False},
    {"MODEL__SOLO__DEFORM": "last"},
    {"MODEL__SOLO__DEFORM": "all", "MODEL__SOLO__DEFORM_MODULATED": True},
    {"MODEL__SOLO__MAX_POSITIVES": 2},
    {"MODEL__SOLO__MASK_LOSS_TYPE": "focal"},
    {"MODEL__SOLO__MASK_LOSS_TYPE": "bce"},
    {"MODEL__SOLO__CATEGORY_ALIGN": "adaptive_pool"},
    {"MODEL__SOLO__CATEGORY_ALIGN": "region_grid"},
    {"MODEL__SOLO__NUM_CONVS": 3},
    {"MODEL__SOLO__CENTER_SIGMA": 1.0},
    {"MODEL__SOLO__NUM_GRIDS": [20, 3, 1, 1, 7]},
    # a single level, at its own stride and at another
    {
        "MODEL__SOLO__IN_FEATURES": ["p3"],
        "MODEL__SOLO__STRIDES": [8],
        "MODEL__SOLO__NUM_GRIDS": [12],
        "MODEL__SOLO__SCALE_RANGES": [[1, 2048]],
    },
    {
        "MODEL__SOLO__IN_FEATURES": ["p5"],
        "MODEL__SOLO__STRIDES": [16],
        "MODEL__SOLO__NUM_GRIDS": [12],
        "MODEL__SOLO__SCALE_RANGES": [[1, 2048]],
    },
]
SOLOV2_OPTIONS = [
    {"MODEL__SOLOV2__KERNEL_SIZE": 3},
    {"MODEL__SOLOV2__MASK_DEFORM": True, "MODEL__SOLO__DEFORM_MODULATED": True},
    {"MODEL__SOLO__NMS_KERNEL": "linear"},
    {"MODEL__RESNETS__NORM": "BN", "MODEL__BACKBONE__FREEZE_BN_STATS": True},
]


def ids_of(options: list[dict]) -> list[str]:
    """Short names: "DEFORM=all,DEFORM_MODULATED=True"."""
    return [",".join(f"{k.split('__')[-1]}={v}" for k, v in o.items()) for o in options]


def check_that_it_trains_and_infers(model):
    model.train()
    losses = model([example(many(6)), example(NONE)])
    assert losses["loss_mask"] > 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    check_output(run(model.eval())[0], SIZE)


@every_architecture
@pytest.mark.parametrize("options", SHARED_OPTIONS, ids=ids_of(SHARED_OPTIONS))
def test_every_option_of_the_family_trains_and_infers(architecture, options):
    check_that_it_trains_and_infers(eager(**architecture, **options))


@pytest.mark.parametrize("options", SOLOV2_OPTIONS, ids=ids_of(SOLOV2_OPTIONS))
def test_every_option_of_solov2_trains_and_infers(options):
    check_that_it_trains_and_infers(eager(**options))


# a norm, a flag of another project's code, or both; and options that the config does not set
PYTHON_OPTIONS = [
    {"tower": {"norm": ""}},
    {"tower": {"norm": "BN"}, "focal_loss_gamma": 1.0, "category_loss_weight": 0.5},
    {"inclusive_boxes": True},
    {"nms_kernel": "linear", "nms_finite": True},
]


@pytest.mark.parametrize("name", ["SOLO", "DecoupledSOLO", "SOLOv2"])
@pytest.mark.parametrize("options", PYTHON_OPTIONS, ids=lambda x: ",".join(x))
def test_options_without_a_key_are_arguments(name, options):
    check_that_it_trains_and_infers(made_eager(python_model(name, **options)))


@pytest.mark.parametrize("name", ["SOLO", "DecoupledSOLO", "SOLOv2"])
def test_a_model_made_in_python_equals_the_one_of_the_config(name):
    made, configured = python_model(name), tiny_model(MODEL__META_ARCHITECTURE=name)
    made.load_state_dict(configured.state_dict())
    assert any(isinstance(x, FoldedConv2d) for x in made.backbone.modules())
    assert made.train()([example(many(6))]) == configured.train()([example(many(6))])


def test_deformable_convolutions_start_as_published():
    shapes = build_backbone(tiny_config()).output_shape()
    branch = MaskFeatureBranch(shapes, conv_dim=64, out_dim=64, deformable=True, modulated=True)
    convs = [x for x in branch.modules() if isinstance(x, DeformConv2d)]
    assert len(convs) == 8
    for conv in convs:
        fan_out = 64 * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert conv.offset.weight.std().item() == pytest.approx(0.01, rel=0.2)
    tower = TowerSpec(num_convs=1, conv_dim=64, deform="all").build(64)
    (conv,) = (x for x in tower.modules() if isinstance(x, DeformConv2d))
    assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (conv.offset.weight == 0).all()


WRONG_OPTIONS = {
    "mask_loss_type": ("MODEL.SOLO.MASK_LOSS_TYPE", "lovasz", "dice, focal, bce"),
    "category_align": ("MODEL.SOLO.CATEGORY_ALIGN", "roi_align", "interpolate"),
    "deform": ("MODEL.SOLO.DEFORM", "first", "none, last, all"),
    "num_convs": ("MODEL.SOLO.NUM_CONVS", 0, "at least 1"),
    "conv_dim": ("MODEL.SOLO.CONV_DIM", 48, "a multiple of 32"),
    "prior_prob": ("MODEL.SOLO.PRIOR_PROB", 0.0, "between 0 and 1"),
    "max_candidates": ("MODEL.SOLO.MAX_CANDIDATES_TEST", -1, "at least 0"),
    "topk_candidates": ("MODEL.SOLO.TOPK_CANDIDATES_TEST", -1, "at least 0"),
    "mask_loss_weight": ("MODEL.SOLO.MASK_LOSS_WEIGHT", float("nan"), "at least 0"),
    "score_threshold": ("MODEL.SOLO.SCORE_THRESH_TEST", 1e9, "from 0 to 1"),
    "nms_sigma": ("MODEL.SOLO.NMS_SIGMA", 0.0, "positive"),
    "num_grids": ("MODEL.SOLO.NUM_GRIDS", [12, 10, 0, 6, 4], "at least 1"),
    "strides": ("MODEL.SOLO.STRIDES", [8, 8, 16, 32, 64], "32"),
    "nms_type": ("MODEL.SOLO.NMS_TYPE", "matrx", "matrix, mask"),
    "nms_kernel": ("MODEL.SOLO.NMS_KERNEL", "gauss", "gaussian, linear"),
    "kernel_size": ("MODEL.SOLOV2.KERNEL_SIZE", 2, "odd"),
    "out_dim": ("MODEL.SOLOV2.MASK_DIM", 48, "a multiple of 32"),
    "in_features": ("MODEL.SOLOV2.MASK_IN_FEATURES", ["p2", "p4"], "double"),
}


@pytest.mark.parametrize("argument", WRONG_OPTIONS)
def test_a_wrong_option_is_refused_when_the_model_is_built(argument):
    key, value, allowed = WRONG_OPTIONS[argument]
    with pytest.raises(ValueError, match=rf"\b{argument}\b") as error:
        tiny_model(**{key: value})
    assert allowed in str(error.value) and str(value) in str(error.value)


def test_only_solov2_has_a_mask_branch():
    branch = MaskFeatureBranch(build_backbone(tiny_config()).output_shape())
    with pytest.raises(ValueError, match="SOLO has no mask_branch"):
        python_model("SOLO", mask_branch=branch)
    with pytest.raises(TypeError, match="mask_loss_wieght"):
        python_model("SOLO", mask_loss_wieght=0.2)
    other = CellAssigner(num_classes=4, num_grids=[12, 10, 8, 6, 4], scale_ranges=[[1, 96]] * 5)
    with pytest.raises(ValueError, match="num_classes of the assigner is 4, that of the head 3"):
        python_model("SOLO", assigner=other)


def test_levels_of_different_lengths_are_named():
    with pytest.raises(ValueError, match="num_grids has 2, .*strides has 5"):
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
        outputs = model.predict(features, SIZE)
        scores = model.category_scores(outputs.category_logits)[0]
        assert (scores > 0.005).sum() > 100
        with largest_float() as mode:
            candidates = model.detector.find(scores)
            found = model.rank(outputs, candidates, 0, (SIZE[0] // 4, SIZE[1] // 4))
    assert len(found.scores) == 10
    feature_map = outputs.mask_features[0].numel()
    assert mode.bytes <= 4 * max(16 * pixels, feature_map)


V1 = {name: options for name, options in ARCHITECTURES.items() if name != "SOLOv2"}


def every_mask(model, outputs, level: int, size) -> torch.Tensor:
    """Masks of all cells, as in the published code: all channels, then the rest."""
    head, grid = model.head, model.head.num_grids[level]

    def maps(conv, feature):
        logits = conv(feature[0][None])
        assert logits.shape[1] == conv.out_channels
        return F.interpolate(logits.sigmoid(), size=size, mode="bilinear")[0]

    if type(model).__name__ == "SOLO":
        return maps(head.mask_pred[level], outputs.mask_features[level])
    x = maps(head.x_pred[level], outputs.x_features[level])
    y = maps(head.y_pred[level], outputs.y_features[level])
    return (y[:, None] * x[None]).flatten(0, 1)[: grid * grid]


@pytest.mark.parametrize("architecture", V1.values(), ids=V1)
def test_chosen_masks_equal_those_of_a_full_evaluation(architecture):
    model = eager(**architecture)
    images = model.preprocess_image([{"image": torch.rand(3, *SIZE) * 255}])
    with torch.no_grad():
        features = model.backbone(images.tensor)
        outputs = model.predict(features, SIZE)
        for level, grid in enumerate(model.head.num_grids):
            stride = model.strides[level] // 2
            native = (SIZE[0] // stride, SIZE[1] // stride)
            for size in (None, (16, 24)):
                expected = every_mask(model, outputs, level, size or native)
                for cells in ([0, grid, grid * grid - 1], [5], [], range(grid * grid)):
                    cells = torch.tensor(list(cells), dtype=torch.long)
                    masks = model.soft_masks(outputs, 0, level, cells.numpy(), size)
                    torch.testing.assert_close(masks, expected[cells], atol=1e-6, rtol=1e-5)


@every_architecture
@torch.no_grad()
def test_levels_without_candidates_make_no_mask_features_and_change_nothing(architecture):
    model = eager(**architecture)
    images = model.preprocess_image([{"image": torch.rand(3, *SIZE) * 255}])
    features = model.backbone(images.tensor)
    complete = model.predict(features, SIZE)
    # the best candidates of levels 1 and 3 only
    start, stop = model.level_offsets[:-1], model.level_offsets[1:]
    scores = model.category_scores(complete.category_logits)
    for level in (0, 2, 4):
        scores[:, start[level] : stop[level]] = 0
    model.category_scores = lambda logits: scores
    made = []
    predict_masks = model.predict_masks

    def recorded(logits, levels, features):
        made.append([level is not None for level in levels])
        return predict_masks(logits, levels, features)

    model.predict_masks = recorded
    (found,) = model.inference(images, features)
    assert made == [[False, True, False, True, False]]
    ranked = model.rank(complete, model.detector.find(scores[0]), 0, (SIZE[0] // 4, SIZE[1] // 4))
    expected = model.detector.suppress(ranked)
    assert len(found) > 1
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_masks, expected.masks)


@pytest.mark.parametrize("architecture", V1.values(), ids=V1)
def test_gradients_equal_those_of_a_full_evaluation(architecture, monkeypatch):
    model = eager(**architecture).train()

    def gradients():
        model.zero_grad()
        sum(model([example(many(6)), example(ORDINARY)]).values()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    chosen = gradients()
    monkeypatch.setattr(
        UpsampledConv2d, "select", lambda conv, x, channels: conv(x[None])[0][channels]
    )
    full = gradients()
    for name, gradient in full.items():
        atol = 1e-5 * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(chosen[name], gradient, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("architecture", V1.values(), ids=V1)
def test_training_makes_no_tensor_with_a_channel_per_cell(architecture, largest_float):
    """One instance on grids of 99 x 99: few masks, but those of all cells would be huge."""
    model = tiny_model(**architecture, MODEL__SOLO__NUM_GRIDS=[99, 36, 24, 16, 12]).train()
    with largest_float() as mode:
        sum(model([example(ORDINARY)]).values()).backward()
    assert mode.bytes < 99 * 99 * (SIZE[0] // 4) * (SIZE[1] // 4) * 4


@pytest.mark.parametrize("architecture", V1.values(), ids=V1)
def test_a_cell_has_one_mask_target_that_of_its_category(architecture):
    model = tiny_model(**architecture)
    inputs = example(torch.cat([ORDINARY, ORDINARY]))
    images = model.preprocess_image([inputs])
    (gt,) = model.prepare_ground_truth([inputs], images)
    targets = model.assign(gt, SIZE)
    assert set(targets.instance.tolist()) == {1}
    assert len(targets.cell) == (targets.categories < 3).sum() > 0
    both = tiny_model().assign(gt, SIZE)
    assert len(both.cell) == 2 * len(targets.cell)
