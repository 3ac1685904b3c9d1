"""YOLACT and YOLACT++ against the original's code, with stand-in weights of their checkpoints."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.rename_rules import convert, find_new_name, recognize

pytestmark = pytest.mark.golden

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "YOLACT"
# golden file -> the config of its model
CONFIG_OF = {
    "yolact_r50": "YOLACT_R50.yaml",
    "yolact_darknet53": "YOLACT_DarkNet53.yaml",
    "yolact_plus_r50": "YOLACT_PLUS_R50.yaml",
}
# the original's name of the first batch norm
FIRST_NORM_OF = {"yolact_darknet53": "backbone._preconv.1"}
NMS_OF = {"fast": "fast", "cross": "cross_class", "trad": "traditional"}
LOSS_OF = {
    "B": "loss_box",
    "C": "loss_class",
    "M": "loss_mask",
    "S": "loss_semantic",
    "I": "loss_mask_iou",
}


# Maximum difference from the original: raw outputs, relative to their rms; scores; sides of
# boxes in pixels; pixels of a mask, relative to its area.
OUTPUTS, SCORES, PIXELS, MASK = 1e-3, 1e-4, 1, 1e-3
# Losses and gradient norms: relative, at least 20 times the noise of the original itself. Where
# that noise is larger than the limit (statistics of two images through these stand-in weights) the
# original's value says nothing.
TRAINING, NOISE_FACTOR, NOISE_LIMIT = 1e-3, 20, 1e-2
# The part of an array that the files have.
SLICES = {
    "input": np.s_[0, :, ::25, ::25],
    "C3": np.s_[0, ::37, ::6, ::6],
    "C4": np.s_[0, ::37, ::3, ::3],
    "C5": np.s_[0, ::37, ::2, ::2],
    "P3": np.s_[0, ::17, ::6, ::6],
    "P4": np.s_[0, ::17, ::3, ::3],
    "P5": np.s_[0, ::17, ::2, ::2],
    "P6": np.s_[0, ::17],
    "P7": np.s_[0, ::17],
    "priors": np.s_[::13],
    "loc": np.s_[0, ::13],
    "logits": np.s_[0, ::37],
    "conf": np.s_[0, ::37],
    "coeff": np.s_[0, ::13],
    "proto": np.s_[0, ::6, ::6],
    "fast_softmask": np.s_[:6, ::3, ::3],
    "segm": np.s_[:, ::4, ::6, ::6],
}


def load_config(golden) -> CfgNode:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(CONFIGS / CONFIG_OF[golden.name]))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture(scope="module", params=CONFIG_OF)
def golden(request, load_golden):
    return load_golden(request.param)


@pytest.fixture(scope="module")
def weights(golden, stand_in_weights):
    """The original's state dict."""
    return stand_in_weights(golden.name)


@pytest.fixture(scope="module")
def build(golden, weights):
    """The model for this many images per step."""

    def make(images_per_step: int = 8):
        cfg = load_config(golden)
        state_dict = convert(weights)
        cfg.SOLVER.IMS_PER_BATCH = images_per_step
        cfg.MODEL.YOLACT.NUM_CLASSES = len(state_dict["semantic_pred.bias"])
        model = build_model(cfg)
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
        assert not unexpected
        # num_batches_tracked is not part of the checkpoint's mathematics
        assert not [name for name in missing if not name.endswith("num_batches_tracked")]
        return model

    return make


def network_input(image: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) BGR -> (3, H, W) RGB, as the configs expect; the model resizes it."""
    return image.flip(-1).permute(2, 0, 1)


def assert_slice(golden, name: str, array: torch.Tensor, atol: float) -> None:
    theirs = golden[f"{name}_slice"]
    torch.testing.assert_close(array[SLICES[name]], theirs, rtol=0, atol=atol, msg=name)


def rms(array: torch.Tensor) -> float:
    return float(array.square().mean().sqrt())


class Run:
    """All stages of the image through the model."""

    @torch.no_grad()
    def __init__(self, golden, model):
        self.model = model.eval()
        height, width = golden.meta["source_size_hw"]
        inputs = [{"image": network_input(golden["image"]), "height": height, "width": width}]
        predict, model.predict = model.predict, self.record
        self.output_size = (height, width)
        self.images = model.preprocess_image(inputs)
        self.whole_route = model(inputs)[0]["instances"]
        model.predict = predict
        self.levels = model.fpn(self.features)
        size = tuple(self.images.tensor.shape[-2:])
        assert size == tuple(golden.meta["network_input"])
        detector, outputs = model.detector, self.outputs
        self.candidates = detector.candidates(
            outputs.box_offsets[0], outputs.class_logits[0], outputs.anchors
        )
        self.found, self.raw, self.final = {}, {}, {}
        for name, nms_type in NMS_OF.items():
            detector.nms_type = nms_type
            found = detector.suppress_boxes(self.candidates, unit=max(size))
            raw = detector(outputs, 0, size, size, model.mask_iou_head)
            raw.anchors = found.anchors
            self.found[name], self.raw[name] = found, raw
            self.final[name] = model.postprocess(raw, height, width, size)

    def record(self, features, input_size):
        self.features = features
        self.outputs = type(self.model).predict(self.model, features, input_size)
        return self.outputs


@pytest.fixture(scope="module")
def run(golden, build):
    return Run(golden, build())


def test_input_is_the_originals(golden, run):
    assert_slice(golden, "input", run.images.tensor, 1e-4)


def test_features_are_the_originals(golden, run):
    arrays = dict(zip(("C3", "C4", "C5"), (run.features[f"res{k}"] for k in (3, 4, 5))))
    arrays.update((f"P{k}", level) for k, level in enumerate(run.levels, 3))
    for name, array in arrays.items():
        assert_slice(golden, name, array, OUTPUTS * rms(array))


def test_raw_outputs_are_the_originals(golden, run):
    outputs = run.outputs
    assert len(outputs.anchors) == golden["num_priors"]
    assert torch.equal(outputs.anchors[SLICES["priors"]], golden["priors_slice"])
    for name, theirs, array in (
        ("loc", "loc", outputs.box_offsets),
        ("logits", "logits", outputs.class_logits),
        ("coeff", "mask", outputs.coefficients),
        ("proto", "proto", outputs.prototypes),
    ):
        assert_slice(golden, name, array, OUTPUTS * golden.meta["noise"][theirs]["rms"])
    assert_slice(golden, "conf", outputs.class_logits.softmax(-1), SCORES)


def common(ours, our_scores, theirs, their_scores, cut: float) -> tuple[list[int], list[int]]:
    """Positions in ours and in theirs of the elements that both have.

    The score of an element that only one of them has must tie with ``cut``, the lowest that is
    kept.
    """
    where = {key: i for i, key in enumerate(theirs)}
    assert len(where) == len(theirs) and len(set(ours)) == len(ours)
    mine = [i for i, key in enumerate(ours) if key in where]
    index = [where[ours[i]] for i in mine]
    for scores, both in ((our_scores, mine), (their_scores, index)):
        alone = torch.ones(len(scores), dtype=torch.bool)
        alone[both] = False
        assert ((scores[alone] - cut).abs() <= SCORES).all()
    return mine, index


def test_candidates_are_the_originals(golden, run):
    boxes, scores, anchors = run.candidates
    best, classes = scores.max(dim=0)
    theirs, their_scores = golden["cand_prior"].tolist(), golden["cand_score"]
    threshold = run.model.detector.score_threshold
    mine, index = common(anchors.tolist(), best, theirs, their_scores, threshold)
    assert torch.equal(classes[mine], golden["cand_class"][index].long())
    torch.testing.assert_close(best[mine], their_scores[index], rtol=0, atol=SCORES)
    torch.testing.assert_close(boxes[mine], golden["cand_box"][index], rtol=0, atol=OUTPUTS)


def keys_of(classes: torch.Tensor, anchors: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(classes.tolist(), anchors.tolist()))


def pairs(golden, run, kind: str) -> tuple[list[int], list[int]]:
    """As ``common``, of the detections by class and anchor."""
    found = run.found[kind]
    theirs, scores = (
        keys_of(golden[f"{kind}_class"], golden[f"{kind}_prior"]),
        golden[f"{kind}_score"],
    )
    assert len(found.scores) == len(theirs)
    ours = keys_of(found.classes, found.anchors)
    return common(ours, found.scores, theirs, scores, float(scores.min()))


@pytest.mark.parametrize("kind", NMS_OF)
def test_detections_are_the_originals(golden, run, kind):
    found, raw = run.found[kind], run.raw[kind]
    mine, index = pairs(golden, run, kind)

    def near(ours, name, rtol=0.0, atol=SCORES):
        theirs = golden[f"{kind}_{name}"][index]
        torch.testing.assert_close(ours[mine], theirs, rtol=rtol, atol=atol)

    near(found.scores, "score")
    near(found.boxes, "box_rel", atol=OUTPUTS)
    near(run.outputs.coefficients[0][found.anchors], "coeff", atol=OUTPUTS)
    assert raw.has("mask_scores") == (f"{kind}_mask_score" in golden)
    if raw.has("mask_scores"):
        near(raw.mask_scores, "mask_score")
        near(raw.mask_scores / raw.scores, "maskiou", rtol=10 * SCORES)


@pytest.mark.parametrize("kind", NMS_OF)
def test_boxes_and_masks_in_the_image_are_the_originals(golden, run, kind):
    final, found, theirs = run.final[kind], run.found[kind], golden[f"{kind}_box"]
    ours = {key: i for i, key in enumerate(keys_of(final.pred_classes, final.anchors))}
    keys = keys_of(found.classes, found.anchors)
    # detections whose integer box is empty are dropped, as in the original's COCO json
    visible = (theirs[:, 2:] > theirs[:, :2]).all(dim=1)
    surely = (theirs[:, 2:] > theirs[:, :2] + 2 * PIXELS).all(dim=1)
    both = [(keys[i], j) for i, j in zip(*pairs(golden, run, kind))]
    assert all(key in ours for key, j in both if surely[j])
    both = [(ours[key], j) for key, j in both if key in ours]
    mine, index = [i for i, _ in both], [j for _, j in both]
    assert visible[index].all()
    assert (final.pred_boxes.tensor[mine] - theirs[index]).abs().max() <= PIXELS
    masks = golden.masks(f"{kind}_masks", f"{kind}_mask_shape")[index]
    different = (final.pred_masks[mine] ^ masks).flatten(1).sum(1)
    union = (final.pred_masks[mine] | masks).flatten(1).sum(1)
    assert ((different <= 3) | (different <= MASK * union)).all(), different


def test_cropped_soft_masks_are_the_originals(golden, run):
    raw = run.raw["fast"]
    mine, index = pairs(golden, run, "fast")
    # the file has the first few of its detections
    first = torch.tensor(mine)[torch.tensor(index).argsort()]
    assert_slice(golden, "fast_softmask", raw.pred_masks[first], OUTPUTS)


def test_whole_route_is_the_stages_in_turn(run):
    final, whole = run.final["fast"], run.whole_route
    assert whole.image_size == run.output_size
    assert torch.equal(whole.pred_masks, final.pred_masks)
    assert torch.equal(whole.pred_boxes.tensor, final.pred_boxes.tensor)
    assert torch.equal(whole.scores, final.scores)


def training_inputs(golden) -> list[dict]:
    """Images and annotations of the network's size."""
    inputs = []
    height, width = golden.meta["network_input"]
    for i, image in enumerate(golden["train_images"]):
        rows = golden[f"train{i}_boxes"]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(rows[:, :4] * torch.tensor([width, height, width, height]))
        instances.gt_crowd = torch.arange(len(rows)) >= len(rows) - golden[f"train{i}_num_crowds"]
        # a crowd's class is that of its annotation; the original's is -1
        instances.gt_classes = rows[:, 4].long().clamp(min=0)
        instances.gt_masks = BitMasks(unpack(golden[f"train{i}_masks"], height, width))
        # with the original's own resize: batch statistics amplify other rounding
        resized = cv2.resize(image.float().numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
        image = network_input(torch.from_numpy(resized))
        inputs.append({"image": image, "instances": instances})
    return inputs


def unpack(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    bits = (packed[:, :, None] >> torch.arange(7, -1, -1)) & 1
    return bits.flatten(1)[:, : height * width].view(-1, height, width).bool()


class Training:
    """A backward pass over both training images, with batch norms frozen or trained."""

    def __init__(self, golden, model, channels_last: bool = True):
        self.model = model.train()
        if not channels_last:
            preprocess = model.preprocess_image
            model.preprocess_image = lambda inputs: in_rows(preprocess(inputs))
            model.to(memory_format=torch.contiguous_format)
        predict, model.predict = model.predict, self.record
        model.semantic_pred.register_forward_hook(self.record_semantic)
        self.inputs = training_inputs(golden)
        self.images = model.preprocess_image(self.inputs)
        self.losses = model(self.inputs)
        sum(self.losses.values()).backward()
        model.predict = predict

    def record(self, features, input_size):
        self.outputs = type(self.model).predict(self.model, features, input_size)
        return self.outputs

    def record_semantic(self, module, inputs, output):
        self.semantic_logits = output.detach()


def in_rows(images: ImageList) -> ImageList:
    """The same images in the default memory layout."""
    images.tensor = images.tensor.contiguous(memory_format=torch.contiguous_format)
    return images


def assert_training(golden, training, weights, kind: str) -> None:
    """Compare losses and gradient norms where the file's own noise allows it."""
    model = training.model
    ours = torch.stack([training.losses[LOSS_OF[key]] for key in golden.meta["loss_keys"]])
    suffix = "_bn" if kind == "bn" else ""
    noise = golden.meta["noise"][f"train_{kind}_threads1_vs_2_relative"]
    keys = [*golden.meta["loss_keys"], *golden.meta["grad_names"]]
    rules = recognize(weights).rules
    parameters = dict(model.named_parameters())
    norms = [
        parameters[find_new_name(name, rules)].grad.norm() for name in golden.meta["grad_names"]
    ]
    values = torch.cat([ours.detach(), torch.stack(norms)]).double()
    expected = torch.cat([golden[f"train{suffix}_loss"], golden[f"train{suffix}_grad_norm"]])
    noises = [noise["loss"][key] for key in golden.meta["loss_keys"]] + noise["grad"]
    assert min(noises) <= NOISE_LIMIT
    for key, value, theirs, level in zip(keys, values, expected, noises):
        if level <= NOISE_LIMIT:
            rtol = max(TRAINING, NOISE_FACTOR * level)
            assert float(value) == pytest.approx(float(theirs), rel=rtol), (kind, key)


@pytest.fixture(scope="module")
def frozen(golden, build):
    return Training(golden, build(images_per_step=2))


def test_training_with_frozen_batch_norm_is_the_originals(golden, frozen, weights):
    assert_training(golden, frozen, weights, "frozen")
    logits = frozen.semantic_logits
    assert_slice(golden, "segm", logits, OUTPUTS * rms(logits))


def test_matching_is_the_originals(golden, frozen):
    ground_truth = frozen.model.prepare_ground_truth(frozen.inputs, frozen.images)
    for i, gt in enumerate(ground_truth):
        labels, objects = frozen.model.criterion.match(gt, frozen.outputs.anchors)
        positive = (labels > 0).nonzero()[:, 0]
        assert torch.equal(positive, golden[f"train{i}_pos"].long())
        assert torch.equal(objects[positive], golden[f"train{i}_pos_gt"].long())
        neutral = (labels == -1).nonzero()[:, 0]
        assert torch.equal(neutral, golden[f"train{i}_neutral"].long())


def test_class_loss_without_the_crowd_is_the_originals(golden, frozen):
    ground_truth = frozen.model.prepare_ground_truth(frozen.inputs, frozen.images)
    alone = [gt._replace(crowd_boxes=gt.crowd_boxes[:0]) for gt in ground_truth]
    with torch.no_grad():
        named = frozen.model.criterion(frozen.outputs, frozen.semantic_logits, alone)
    expected = golden.meta["train"]["C_loss_without_crowd_row"]
    assert float(named["loss_class"]) == pytest.approx(expected, rel=TRAINING)


def test_training_with_batch_statistics_is_the_originals(golden, build, weights):
    # In the layout of the original: PyTorch takes batch statistics in float32 rather than float64
    # where channels come last, which these networks amplify to several percent of a gradient.
    training = Training(golden, build(images_per_step=8), channels_last=False)
    assert_training(golden, training, weights, "bn")
    name = f"{FIRST_NORM_OF.get(golden.name, 'backbone.bn1')}.running_mean"
    ours = training.model.state_dict()[find_new_name(name, recognize(weights).rules)]
    torch.testing.assert_close(ours, golden["train_bn_running_mean"], rtol=1e-5, atol=1e-5)
