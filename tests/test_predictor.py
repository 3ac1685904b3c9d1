"""Load, predict and save, for every way a model can be stored."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

import solo_d2
from solo_d2.checkpoint.architecture import Match
from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config, use_available_device
from solo_d2.errors import UserError
from solo_d2.images import UnreadableError
from solo_d2.modeling.num_classes import num_classes_keys
from solo_d2.predictor import Predictor, load

RESNET18 = """
  DEVICE: "cpu"
  BACKBONE: {NAME: "build_resnet_fpn_backbone"}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"], OUT_CHANNELS: 16}
"""
SETS = "DATASETS: {TRAIN: (), TEST: ()}\nINPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}\n"
SOLOV2 = f"""
MODEL:
  META_ARCHITECTURE: "SOLOv2"{RESNET18}
  SOLO: {{NUM_CONVS: 1, CONV_DIM: 32, SCORE_THRESH_TEST: 0.0001, MAX_CANDIDATES_TEST: 50}}
  SOLOV2: {{MASK_DIM: 32, MASK_CONV_DIM: 32}}
{SETS}
"""
MASK_RCNN = f"""
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"{RESNET18}
  MASK_ON: True
  ANCHOR_GENERATOR: {{SIZES: [[32], [64], [128], [256], [512]]}}
  RPN: {{IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"], POST_NMS_TOPK_TEST: 20}}
  ROI_HEADS:
    NAME: "StandardROIHeads"
    IN_FEATURES: ["p2", "p3", "p4", "p5"]
    NUM_CLASSES: -1
    SCORE_THRESH_TEST: 0.0
  ROI_BOX_HEAD: {{NAME: "FastRCNNConvFCHead", NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 7}}
  ROI_MASK_HEAD: {{NAME: "MaskRCNNConvUpsampleHead", NUM_CONV: 1, CONV_DIM: 16}}
{SETS}
"""
ADAPTIS = """
MODEL:
  META_ARCHITECTURE: "AdaptIS"
  DEVICE: "cpu"
  WEIGHTS: ""
  BACKBONE: {NAME: "build_adaptis_unet_backbone"}
  UNET: {WIDTH: 4, LEVELS: 3}
  ADAPTIS: {CONV_DIM: 4, SEMANTIC_DIM: 4}
  PIXEL_STD: [127.5, 127.5, 127.5]
DATASETS: {TRAIN: (), TEST: ()}
INPUT: {MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 96, FORMAT: "RGB"}
"""
MODELS = {
    "solov2": (SOLOV2, "MODEL.SOLO.NUM_CLASSES"),
    "mask_rcnn": (MASK_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES"),
    "adaptis": (ADAPTIS, "MODEL.ADAPTIS.NUM_THINGS"),
}


def make_run(folder, name):
    """A run folder with config.yaml and final weights, for two named classes and without names."""
    text, key = MODELS[name]
    (folder / "config.yaml").write_text(f"VERSION: 2\n{text}")
    cfg = load_config(str(folder / "config.yaml"), opts=[key, "2"])
    torch.manual_seed(0)
    model = build_model(cfg)
    if name == "solov2":  # without training every score is the same 0.01; spread them
        torch.nn.init.normal_(model.head.category_pred.weight, std=0.2)
        torch.nn.init.normal_(model.head.kernel_pred.weight, std=0.2)
    Checkpointer(model, str(folder), thing_classes=["disc", "bar"]).save("model_final")
    torch.save({"model": model.state_dict()}, folder / "nameless.pth")
    return folder


class Runs(dict):
    """Name of a model -> its run folder, created on first use."""

    def __init__(self, factory):
        self.factory = factory

    def __missing__(self, name):
        self[name] = make_run(self.factory.mktemp(name), name)
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def same(a, b):
    return torch.equal(a.instances.scores, b.instances.scores) and torch.equal(
        a.instances.pred_masks, b.instances.pred_masks
    )


class Probe(torch.nn.Module):
    """Finds one box everywhere and keeps its input."""

    def forward(self, batched_inputs):
        (self.seen,) = (x["image"] for x in batched_inputs)
        size = (batched_inputs[0]["height"], batched_inputs[0]["width"])
        boxes = Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
        fields = {"pred_boxes": boxes, "scores": torch.ones(1)}
        return [{"instances": Instances(size, **fields, pred_classes=torch.zeros(1).long())}]


def probe(*, min_size=32, max_size=64, input_format="RGB"):
    resize = T.ResizeShortestEdge(min_size, max_size)
    return Predictor(Probe(), resize=resize, input_format=input_format, names=["x"])


# The input of the model


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (8, 20000), (8, 100000), (3000, 2)])
def test_any_ratio_reaches_the_model_with_at_least_one_pixel_a_side(size):
    predictor = probe(min_size=800, max_size=1333)
    result = predictor.predict(np.zeros((*size, 3), dtype=np.uint8))
    assert result.instances.image_size == size
    assert min(predictor.model.seen.shape[1:]) >= 1
    assert max(predictor.model.seen.shape[1:]) <= 1333


def test_channel_order_is_that_of_the_model():
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[..., 0] = 200  # red
    for input_format, red in (("RGB", 0), ("BGR", 2)):
        predictor = probe(input_format=input_format)
        predictor.predict(image)
        assert predictor.model.seen[red].min() == 200
        assert predictor.model.seen[2 - red].max() == 0
    with pytest.raises(ValueError, match="input_format is 'YUV'"):
        probe(input_format="YUV")


def test_min_size_0_leaves_the_image_as_it_is():
    predictor = probe(min_size=0)
    predictor.predict(np.zeros((17, 99, 3), dtype=np.uint8))
    assert predictor.model.seen.shape == (3, 17, 99)


def test_a_list_gives_a_list_and_all_kinds_of_input_the_same(runs, photo):
    predictor = load(runs["solov2"])
    pixels = np.asarray(Image.open(photo))
    results = predictor.predict([photo, str(photo), Image.open(photo), pixels])
    assert len(results) == 4 and len(results[0].instances) > 0
    assert all(same(results[0], result) for result in results)
    assert predictor.predict([]) == []
    with pytest.raises(UnreadableError, match="a path, a PIL image or an RGB array"):
        predictor.predict(pixels.astype(np.float32))
    predictor.max_pixels = 100
    with pytest.raises(UnreadableError, match="limit"):
        predictor.predict(photo)


# The result


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_predicts_detectron2_instances(runs, photo, tmp_path, name):
    result = load(runs[name]).predict(photo)
    assert isinstance(result.instances, Instances)
    assert result.instances.image_size == (40, 60)
    assert result.names == ["disc", "bar"]
    result.save(tmp_path / "drawn.jpg", score_threshold=0.0)
    assert Image.open(tmp_path / "drawn.jpg").size == (60, 40)
    results = json.loads(json.dumps(result.to_coco(image_id=5)))
    assert len(results) == len(result.instances)
    assert all(x["image_id"] == 5 and x["category_id"] in (1, 2) for x in results)
    assert Visualizer(result.image).draw_instance_predictions(result.instances).get_image().size


@pytest.mark.parametrize(
    "name",
    ["adaptis_shapes_stage2", "centermask_shapes", "decoupled_solo_shapes", "fcos_shapes"]
    + ["mask_rcnn_vovnet_shapes", "pointrend_shapes", "solo_shapes", "yolact_shapes"],
)
def test_packaged_configs_with_weights_predict_and_draw(tmp_path, photo, name):
    names = ["a", "b", "c"]
    cfg = load_config(f"quick/{name}.yaml", opts=["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"])
    for key in num_classes_keys(cfg):
        cfg.merge_from_list([key, len(names)])
    model = build_model(cfg)
    Checkpointer(model, str(tmp_path), thing_classes=names).save("model")
    predictor = load(f"quick/{name}.yaml", weights=tmp_path / "model.pth")
    result = predictor.predict(photo)
    assert predictor.names == result.names == names
    assert result.instances.image_size == (40, 60)
    assert {"scores", "pred_classes", "pred_boxes"} <= set(result.instances.get_fields())
    result.save(tmp_path / "drawn.png", score_threshold=0.0)
    assert len(result.to_coco()) == len(result.instances)


def test_instances_are_those_of_default_predictor(runs, photo):
    from detectron2.engine import DefaultPredictor

    cfg = load_config(
        str(runs["solov2"] / "config.yaml"),
        opts=["MODEL.SOLO.NUM_CLASSES", "2", "MODEL.WEIGHTS", str(runs["solov2"] / "nameless.pth")],
    )
    bgr = np.asarray(Image.open(photo))[:, :, ::-1]
    theirs = DefaultPredictor(cfg)(bgr)["instances"]
    ours = load(runs["solov2"]).predict(photo).instances
    assert torch.allclose(ours.scores, theirs.scores, atol=1e-6)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)


# Sources of a model


def test_run_folder_checkpoint_and_config_with_weights_are_the_same(runs, photo, monkeypatch):
    folder = runs["solov2"]
    first = load(folder).predict(photo)
    for source, weights in (
        (folder / "model_final.pth", ""),
        (str(folder / "config.yaml"), folder / "model_final.pth"),
        (load_config(str(folder / "config.yaml")), str(folder / "model_final.pth")),
    ):
        assert same(first, load(source, weights=weights).predict(photo))


def test_the_best_checkpoint_of_a_run_is_taken_or_else_the_last(tmp_path):
    folder = make_run(tmp_path, "adaptis")
    (folder / "model_final.pth").rename(folder / "model_0000009.pth")
    with pytest.raises(
        UserError, match=r"no checkpoint: none of model_best\.pth, model_final\.pth"
    ):
        load(folder)
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    assert load(folder).names == ["disc", "bar"]
    (folder / "model_best.pth").write_text("broken")
    with pytest.raises(UserError, match=r"model_best\.pth"):
        load(folder)


def test_a_bare_checkpoint_finds_its_packaged_config(tmp_path):
    def save(name, *opts):
        sets = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", *opts]
        model = build_model(load_config(name, opts=sets))
        Checkpointer(model, str(tmp_path), thing_classes=["a", "b"]).save("model")

    file = tmp_path / "model.pth"
    save("quick/solov2_shapes.yaml", "MODEL.SOLO.NUM_CLASSES", "2")
    predictor = load(file)
    assert predictor.names == ["a", "b"] and type(predictor.model).__name__ == "SOLOv2"
    assert predictor.resize.short_edge_length == (128, 128)
    save("quick/solov2_shapes.yaml", "MODEL.SOLO.NUM_CLASSES", "2", "MODEL.SOLO.CONV_DIM", "32")
    with pytest.raises(UserError, match=r"no config\.yaml beside .* It fits no packaged one"):
        load(file)


def test_a_checkpoint_that_fits_configs_with_other_settings_is_refused(tmp_path, monkeypatch):
    torch.save(
        {"model": {"x": torch.zeros(1)}, "solo_d2": {"architecture": "SOLOv2"}},
        tmp_path / "model.pth",
    )
    fitting = [Match(f"SOLOv2/SOLOv2_{x}_3x.yaml", 80, 0) for x in ("R50", "Light_448_R50")]
    monkeypatch.setattr("solo_d2.checkpoint.find.match_configs", lambda *args: fitting)
    with pytest.raises(UserError, match="fits SOLOv2/SOLOv2_R50_3x.yaml, SOLOv2/SOLOv2_Light_448"):
        load(tmp_path / "model.pth")


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_close_and_its_results_are_float32(runs, photo, name):
    run = runs[name]
    (exact, rounded) = (load(run, dtype=x).predict(photo) for x in ("float32", torch.bfloat16))
    assert rounded.instances.scores.dtype == torch.float32
    n = min(len(exact.instances), len(rounded.instances))
    assert n == len(exact.instances) or n > 0.5 * len(exact.instances)
    best, other = exact.instances.scores[:n], rounded.instances.scores[:n]
    torch.testing.assert_close(other, best, rtol=0.1, atol=0.05)
    if name == "adaptis":
        predictor = load(run, dtype="bfloat16")
        predictor.set_image(photo)
        assert predictor.click((5, 5)).instances.scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "int8", torch.float64])
def test_a_type_that_the_device_does_not_run_is_refused(runs, dtype):
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, not"):
        load(runs["solov2"], dtype=dtype)


def test_the_config_is_not_changed(runs):
    cfg = load_config(str(runs["solov2"] / "config.yaml"))
    cfg.MODEL.DEVICE = "cuda" if not torch.cuda.is_available() else "cpu"
    cfg.freeze()
    before = cfg.dump()
    predictor = load(cfg, weights=runs["solov2"] / "model_final.pth", opts=["SEED", "3"])
    assert cfg.dump() == before and cfg.is_frozen()
    assert not predictor.model.training


def test_without_cuda_the_cpu_is_taken_and_said(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = get_cfg()
    use_available_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    assert [r.message for r in caplog.records] == ["CUDA is not available: running on the CPU"]


def test_names_come_from_the_data_set_where_the_checkpoint_has_none(runs):
    weights = runs["solov2"] / "nameless.pth"
    config = runs["solov2"] / "config.yaml"
    with pytest.raises(ValueError, match="number of classes is unknown"):
        load(config, weights=weights)
    assert load(config, weights=weights, opts=["MODEL.SOLO.NUM_CLASSES", "2"]).names == ["0", "1"]
    MetadataCatalog.get("predictor_test").set(
        thing_classes=["a", "b"], thing_dataset_id_to_contiguous_id={12: 1, 30: 0}
    )
    try:
        predictor = load(config, weights=weights, opts=["DATASETS.TEST", "('predictor_test',)"])
    finally:
        MetadataCatalog.remove("predictor_test")
    assert predictor.names == ["a", "b"] and predictor.category_ids == [30, 12]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.pth", r"no run folder, checkpoint or config .*none\.pth, nor .*nuclei"),
        ("none.yaml", r"none\.yaml"),
        ("alone/model.pth", r"no config\.yaml beside .*model\.pth"),
        ("empty", r"empty holds no checkpoint"),
    ],
)
def test_what_is_missing_is_named(tmp_path, source, message):
    (tmp_path / "alone").mkdir()
    (tmp_path / "empty").mkdir()
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "alone" / "model.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / source)


def test_a_config_without_weights_is_refused(runs):
    with pytest.raises(UserError, match="no weights"):
        load(runs["solov2"] / "config.yaml", opts=["MODEL.WEIGHTS", ""])


def test_class_mismatch_names_both_numbers(runs):
    with pytest.raises(UserError, match="NUM_CLASSES is 5, but .* trained for 2 classes"):
        load(runs["solov2"], opts=["MODEL.SOLO.NUM_CLASSES", "5"])


def test_weights_of_a_backbone_alone_are_refused_and_nan_by_name(runs, tmp_path):
    state = torch.load(runs["solov2"] / "nameless.pth")["model"]
    backbone = {name: x for name, x in state.items() if name.startswith("backbone")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    opts = ["MODEL.SOLO.NUM_CLASSES", "2"]
    with pytest.raises(UserError, match=r"backbone\.pth.*head\."):
        load(runs["solov2"] / "config.yaml", weights=tmp_path / "backbone.pth", opts=opts)
    state["head.category_pred.bias"][1] = torch.nan
    torch.save({"model": state}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth.*head\.category_pred\.bias"):
        load(runs["solov2"] / "config.yaml", weights=tmp_path / "nan.pth", opts=opts)


# Points


def test_clicks_give_one_instance_per_point_in_order(runs, photo, tmp_path):
    predictor = solo_d2.load(runs["adaptis"])
    predictor.set_image(photo)
    result = predictor.click([(5, 7), (50.5, 30), (5, 7)])
    assert len(result.instances) == 3
    assert torch.equal(result.instances.pred_masks[0], result.instances.pred_masks[2])
    one = predictor.click((5, 7))
    assert torch.equal(one.instances.pred_masks[0], result.instances.pred_masks[0])
    one.save(tmp_path / "clicked.png")
    assert (np.asarray(Image.open(tmp_path / "clicked.png"))[7, 5] == 0).all()
    with pytest.raises(ValueError, match="outside the image"):
        predictor.click((60, 10))


def test_clicks_need_an_image_and_a_model_that_takes_points(runs, photo):
    predictor = load(runs["adaptis"])
    with pytest.raises(UserError, match="set_image"):
        predictor.click((3, 4))
    other = load(runs["solov2"])
    assert predictor.takes_points and not other.takes_points
    with pytest.raises(UserError, match="AdaptIS model, not SOLOv2"):
        other.set_image(photo)
