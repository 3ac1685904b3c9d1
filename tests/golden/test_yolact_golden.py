"""YOLACT and YOLACT++ against the original's code, with stand-in weights of their checkpoints."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.rename_rules import convert, recognize, rename_key
from solo_d2.data.augmentation import test_resize as build_resize
from solo_d2.modeling.yolact.inference import find_candidates

pytestmark = pytest.mark.golden

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "YOLACT"
# golden file -> the config of its model
CONFIG_OF = {
    "yolact_r50": "YOLACT_R50.yaml",
    "yolact_darknet53": "YOLACT_DarkNet53.yaml",
    "yolact_plus_r50": "YOLACT_PLUS_R50.yaml",
}
NMS_OF = {"fast": "fast", "cross": "cross_class", "trad": "traditional"}
LOSS_OF = {
    "B": "loss_box",
    "C": "loss_class",
    "M": "loss_mask",
    "S": "loss_semantic",
    "I": "loss_mask_iou",
}


def load_config(golden) -> CfgNode:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(CONFIGS / CONFIG_OF[golden.name]))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL.DEVICE = "cpu"
    yolact, mode = cfg.MODEL.YOLACT, golden.meta["mode"]
    yolact.SCORE_THRESH_TEST = float(re.search(r"conf threshold ([\d.]+)", mode)[1])
    yolact.TOPK_CANDIDATES_TEST = int(re.search(r"top_k (\d+)", mode)[1])
    yolact.NMS_THRESH_TEST = float(re.search(r"NMS IoU ([\d.]+)", mode)[1])
    yolact.MIN_SCORE_TEST = float(re.search(r"score_threshold ([\d.]+)", mode)[1])
    cfg.TEST.DETECTIONS_PER_IMAGE = int(re.search(r"max (\d+) detections", mode)[1])
    yolact.CROP = "prototype"  # the published order: crop, then resize
    return cfg


@pytest.fixture(scope="module", params=CONFIG_OF)
def golden(request, load_golden):
    return load_golden(request.param)


@pytest.fixture(scope="module")
def weights(golden, stand_in_weights):
    """The original's state dict."""
    table = re.search(r"keys/(\w+)\.keys\.tsv", golden.meta["weights"]["table"])[1]
    return stand_in_weights(table, golden.meta["weights"]["seed"])


@pytest.fixture(scope="module")
def build(golden, weights):
    """The model for so many images per step."""

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
        return model, cfg

    return make


def network_input(image: torch.Tensor, cfg) -> torch.Tensor:
    """uint8 (H, W, 3) BGR -> float (3, S, S) in the config's channel order, as in evaluation."""
    if cfg.INPUT.FORMAT == "RGB":
        image = image.flip(-1)
    image = image.numpy()
    resized = build_resize(cfg).get_transform(image).apply_image(image)
    return torch.from_numpy(resized).permute(2, 0, 1).float()


def sliced(golden, name: str, array: torch.Tensor) -> torch.Tensor:
    """Apply the slice in the array's description, "C3[0,::37,::6,::6]"."""
    text = re.search(r"\[([\d:, ]+)\]", golden.meta["arrays"][name])[1]
    index = [
        slice(*(int(n) if n else None for n in part.split(":"))) if ":" in part else int(part)
        for part in text.replace(" ", "").split(",")
    ]
    return array[tuple(index)]


class Tolerance:
    """The file's, in numbers."""

    def __init__(self, golden):
        text = golden.meta["tolerance"]
        self.rms = float(re.search(r"([\d.e-]+) relative to their rms", text)[1])
        self.scores = float(re.search(r"scores to ([\d.]+(?:e-?\d+)?)", text)[1])
        self.pixels = int(re.search(r"\+-(\d+) px", text)[1])
        self.mask = float(re.search(r"([\d.]+)% of mask pixels", text)[1]) / 100
        text = golden.meta["train_tolerance"]
        at_least, factor = re.search(r"max\(([\d.e-]+), (\d+) x", text).groups()
        self.train, self.noise_factor = float(at_least), float(factor)
        self.noise_limit = float(re.search(r"exceeds ([\d.e-]+) ", text)[1])


@pytest.fixture(scope="module")
def tolerance(golden):
    return Tolerance(golden)


class Run:
    """All stages of the image through the model."""

    @torch.no_grad()
    def __init__(self, golden, model, cfg):
        self.model = model.eval()
        height, width = golden.meta["source_size_hw"]
        image = network_input(golden["image"], cfg)
        assert list(image.shape[1:]) == golden.meta["network_input"]
        inputs = [{"image": image, "height": height, "width": width}]
        predict, model.predict = model.predict, self.record
        self.output_size = (height, width)
        self.whole_route = model(inputs)[0]["instances"]
        model.predict = predict
        self.levels = model.fpn(self.features)
        self.size = tuple(self.images.tensor.shape[-2:])
        self.found, self.raw, self.final = {}, {}, {}
        for name, nms_type in NMS_OF.items():
            model.suppression["nms_type"] = nms_type
            found = model.detect(self.outputs, 0, self.size)
            raw = model.assemble(self.outputs, 0, found, self.images.image_sizes[0], self.size)
            raw.priors = found.priors
            self.found[name], self.raw[name] = found, raw
            self.final[name] = model.postprocess(raw, height, width, self.size)

    def record(self, features, images):
        self.features, self.images = features, images
        self.outputs = type(self.model).predict(self.model, features, images)
        return self.outputs


@pytest.fixture(scope="module")
def run(golden, build):
    return Run(golden, *build())


def test_input_is_the_originals(golden, run):
    ours = sliced(golden, "input_slice", run.images.tensor)
    torch.testing.assert_close(ours, golden["input_slice"], rtol=0, atol=1e-4)


def test_features_are_the_originals(golden, run, tolerance):
    arrays = dict(zip(("C3", "C4", "C5"), (run.features[f"res{k}"] for k in (3, 4, 5))))
    arrays.update((f"P{k}", level) for k, level in enumerate(run.levels, 3))
    for name, array in arrays.items():
        rms = float(array.square().mean().sqrt())
        ours = sliced(golden, f"{name}_slice", array)
        atol = tolerance.rms * rms
        torch.testing.assert_close(ours, golden[f"{name}_slice"], rtol=0, atol=atol, msg=name)


def test_raw_outputs_are_the_originals(golden, run, tolerance):
    outputs = run.outputs
    assert len(outputs.priors) == golden["num_priors"]
    assert torch.equal(sliced(golden, "priors_slice", outputs.priors), golden["priors_slice"])
    for name, noise, array in (
        ("loc", "loc", outputs.box_offsets),
        ("logits", "logits", outputs.class_logits),
        ("coeff", "mask", outputs.coefficients),
        ("proto", "proto", outputs.prototypes),
    ):
        ours = sliced(golden, f"{name}_slice", array)
        atol = tolerance.rms * golden.meta["noise"][noise]["rms"]
        torch.testing.assert_close(ours, golden[f"{name}_slice"], rtol=0, atol=atol, msg=name)
    ours = sliced(golden, "conf_slice", outputs.class_logits.softmax(-1))
    torch.testing.assert_close(ours, golden["conf_slice"], rtol=0, atol=tolerance.scores)


def test_candidates_are_the_originals(golden, run, tolerance):
    boxes, scores, priors = find_candidates(
        run.outputs.box_offsets[0],
        run.outputs.class_logits[0],
        run.outputs.priors,
        score_threshold=run.model.score_threshold,
    )
    assert torch.equal(priors, golden["cand_prior"].long())
    best, classes = scores.max(dim=0)
    assert torch.equal(classes, golden["cand_class"].long())
    torch.testing.assert_close(best, golden["cand_score"], rtol=0, atol=tolerance.scores)
    torch.testing.assert_close(boxes, golden["cand_box"], rtol=0, atol=tolerance.rms)


def in_our_order(golden, kind: str, classes: torch.Tensor, priors: torch.Tensor) -> list[int]:
    """For each of ours, the golden's detection of the same class and prior."""
    keys = zip(golden[f"{kind}_class"].tolist(), golden[f"{kind}_prior"].tolist())
    theirs = {key: i for i, key in enumerate(keys)}
    return [theirs[key] for key in zip(classes.tolist(), priors.tolist())]


@pytest.mark.parametrize("kind", NMS_OF)
def test_detections_are_the_originals(golden, run, tolerance, kind):
    found, raw = run.found[kind], run.raw[kind]
    assert len(found.scores) == len(golden[f"{kind}_prior"])
    index = in_our_order(golden, kind, found.classes, found.priors)
    assert len(set(index)) == len(index)
    scores = golden[f"{kind}_score"][index]
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=tolerance.scores)
    boxes = golden[f"{kind}_box_rel"][index]
    torch.testing.assert_close(found.boxes, boxes, rtol=0, atol=tolerance.rms)
    coefficients = run.outputs.coefficients[0][found.priors]
    theirs = golden[f"{kind}_coeff"][index]
    torch.testing.assert_close(coefficients, theirs, rtol=0, atol=tolerance.rms)
    if f"{kind}_mask_score" in golden:
        mask_scores = golden[f"{kind}_mask_score"][index]
        atol = tolerance.scores
        torch.testing.assert_close(raw.mask_scores, mask_scores, rtol=0, atol=atol)
        ious = golden[f"{kind}_maskiou"][index]
        torch.testing.assert_close(raw.mask_scores / raw.scores, ious, rtol=atol * 10, atol=atol)
    else:
        assert not raw.has("mask_scores")


@pytest.mark.parametrize("kind", NMS_OF)
def test_boxes_and_masks_in_the_image_are_the_originals(golden, run, tolerance, kind):
    final = run.final[kind]
    index = in_our_order(golden, kind, final.pred_classes, final.priors)
    boxes = golden[f"{kind}_box"]
    # those whose whole-numbered box is empty are left out, as the original does for COCO's json
    visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    surely = (boxes[:, 2:] > boxes[:, :2] + 2 * tolerance.pixels).all(dim=1)
    assert set(surely.nonzero()[:, 0].tolist()) <= set(index)
    assert set(index) <= set(visible.nonzero()[:, 0].tolist())
    assert (final.pred_boxes.tensor - boxes[index]).abs().max() <= tolerance.pixels
    masks = golden.masks(f"{kind}_masks", f"{kind}_mask_shape")[index]
    different = (final.pred_masks ^ masks).flatten(1).sum(1)
    union = (final.pred_masks | masks).flatten(1).sum(1)
    assert ((different <= 3) | (different <= tolerance.mask * union)).all(), different


def test_cropped_soft_masks_are_the_originals(golden, run, tolerance):
    soft = golden["fast_softmask_slice"]
    index = in_our_order(golden, "fast", run.raw["fast"].pred_classes, run.raw["fast"].priors)
    # the file has the first few of its detections
    rank = torch.tensor(index).argsort()
    ours = sliced(golden, "fast_softmask_slice", run.raw["fast"].pred_masks[rank])
    torch.testing.assert_close(ours, soft, rtol=0, atol=tolerance.rms)


def test_whole_route_is_the_stages_in_turn(run):
    final, whole = run.final["fast"], run.whole_route
    assert whole.image_size == run.output_size
    assert torch.equal(whole.pred_masks, final.pred_masks)
    assert torch.equal(whole.pred_boxes.tensor, final.pred_boxes.tensor)
    assert torch.equal(whole.scores, final.scores)


def training_inputs(golden, cfg) -> list[dict]:
    inputs = []
    for i, image in enumerate(golden["train_images"]):
        height, width = golden.meta["network_input"]
        rows = golden[f"train{i}_boxes"]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(rows[:, :4] * torch.tensor([width, height, width, height]))
        instances.gt_crowd = torch.arange(len(rows)) >= len(rows) - golden[f"train{i}_num_crowds"]
        # a crowd's class is that of its annotation; the original's is -1
        instances.gt_classes = rows[:, 4].long().clamp(min=0)
        packed = golden[f"train{i}_masks"]
        masks = unpack(packed, height, width)
        instances.gt_masks = BitMasks(masks)
        inputs.append({"image": network_input(image, cfg), "instances": instances})
    return inputs


def unpack(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    bits = (packed[:, :, None] >> torch.arange(7, -1, -1)) & 1
    return bits.flatten(1)[:, : height * width].view(-1, height, width).bool()


class Training:
    """A backward pass over both training images, with batch norms frozen or trained."""

    def __init__(self, golden, model, cfg, channels_last: bool = True):
        self.model = model.train()
        if not channels_last:
            preprocess = model.preprocess_image
            model.preprocess_image = lambda inputs: in_rows(preprocess(inputs))
            model.to(memory_format=torch.contiguous_format)
        predict, model.predict = model.predict, self.record
        model.semantic_pred.register_forward_hook(self.record_semantic)
        self.inputs = training_inputs(golden, cfg)
        self.losses = model(self.inputs)
        sum(self.losses.values()).backward()
        model.predict = predict

    def record(self, features, images):
        self.images = images
        self.outputs = type(self.model).predict(self.model, features, images)
        return self.outputs

    def record_semantic(self, module, inputs, output):
        self.semantic_logits = output.detach()


def in_rows(images: ImageList) -> ImageList:
    """The same in the usual layout."""
    images.tensor = images.tensor.contiguous(memory_format=torch.contiguous_format)
    return images


def assert_training(golden, training, tolerance, weights, kind: str) -> None:
    """Losses and gradient norms, where the file's own noise lets them be compared."""
    model = training.model
    ours = torch.stack([training.losses[LOSS_OF[key]] for key in golden.meta["loss_keys"]])
    suffix = "_bn" if kind == "bn" else ""
    noise = golden.meta["noise"][f"train_{kind}_threads1_vs_2_relative"]
    keys = [*golden.meta["loss_keys"], *golden.meta["grad_names"]]
    rules = recognize(weights).rules
    parameters = dict(model.named_parameters())
    norms = [parameters[rename_key(name, rules)].grad.norm() for name in golden.meta["grad_names"]]
    values = torch.cat([ours.detach(), torch.stack(norms)]).double()
    expected = torch.cat([golden[f"train{suffix}_loss"], golden[f"train{suffix}_grad_norm"]])
    noises = [noise["loss"][key] for key in golden.meta["loss_keys"]] + noise["grad"]
    assert min(noises) <= tolerance.noise_limit
    for key, value, theirs, level in zip(keys, values, expected, noises):
        if level <= tolerance.noise_limit:
            rtol = max(tolerance.train, tolerance.noise_factor * level)
            assert float(value) == pytest.approx(float(theirs), rel=rtol), (kind, key)


@pytest.fixture(scope="module")
def frozen(golden, build):
    return Training(golden, *build(images_per_step=2))


def test_training_with_frozen_batch_norm_is_the_originals(golden, frozen, tolerance, weights):
    assert_training(golden, frozen, tolerance, weights, "frozen")
    logits = frozen.semantic_logits
    atol = tolerance.rms * float(logits.square().mean().sqrt())
    ours = sliced(golden, "segm_slice", logits)
    torch.testing.assert_close(ours, golden["segm_slice"], rtol=0, atol=atol)


def test_matching_is_the_originals(golden, frozen):
    ground_truth = frozen.model.prepare_ground_truth(frozen.inputs, frozen.images)
    for i, gt in enumerate(ground_truth):
        labels, objects = frozen.model.match(gt, frozen.outputs.priors)
        positive = (labels > 0).nonzero()[:, 0]
        assert torch.equal(positive, golden[f"train{i}_pos"].long())
        assert torch.equal(objects[positive], golden[f"train{i}_pos_gt"].long())
        neutral = (labels == -1).nonzero()[:, 0]
        assert torch.equal(neutral, golden[f"train{i}_neutral"].long())


def test_class_loss_without_the_crowd_is_the_originals(golden, frozen, tolerance):
    ground_truth = frozen.model.prepare_ground_truth(frozen.inputs, frozen.images)
    alone = [gt._replace(crowd_boxes=gt.crowd_boxes[:0]) for gt in ground_truth]
    with torch.no_grad():
        named = frozen.model.output_losses(frozen.outputs, frozen.semantic_logits, alone)
    expected = golden.meta["train"]["C_loss_without_crowd_row"]
    assert float(named["loss_class"]) == pytest.approx(expected, rel=tolerance.train)


def test_training_with_batch_statistics_is_the_originals(golden, build, tolerance, weights):
    # In the layout of the original: PyTorch takes batch statistics in float32 rather than float64
    # where channels come last, which these networks amplify to several percent of a gradient.
    training = Training(golden, *build(images_per_step=8), channels_last=False)
    assert_training(golden, training, tolerance, weights, "bn")
    name = re.match(r"([\w.]+) after", golden.meta["arrays"]["train_bn_running_mean"])[1]
    ours = training.model.state_dict()[rename_key(name, recognize(weights).rules)]
    torch.testing.assert_close(ours, golden["train_bn_running_mean"], rtol=1e-5, atol=1e-5)
