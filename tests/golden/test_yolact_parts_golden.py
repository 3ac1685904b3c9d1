"""Single functions of YOLACT against what the original's code made of stored inputs."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.rename_rules import convert
from solo_d2.layers.box_nms import Kept, cross_class_fast_nms, fast_nms, traditional_nms
from solo_d2.layers.masks import upsample_to_binary
from solo_d2.modeling import GroundTruth
from solo_d2.modeling.yolact.anchors import decode, encode, level_scales, make_priors
from solo_d2.modeling.yolact.inference import output_boxes
from solo_d2.modeling.yolact.losses import hard_negatives
from solo_d2.modeling.yolact.mask_iou import MaskIoUHead
from solo_d2.modeling.yolact.protonet import assemble_masks, inside_boxes
from solo_d2.modeling.yolact.targets import match
from solo_d2.modeling.yolact.yolact import YOLACTOutputs

pytestmark = pytest.mark.golden

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "YOLACT"
# the original's config -> ours
CONFIG_OF = {
    "yolact_resnet50_config": "YOLACT_R50.yaml",
    "yolact_plus_resnet50_config": "YOLACT_PLUS_R50.yaml",
    "yolact_im700_config": "YOLACT_im700_R101.yaml",
    "yolact_im400_config": "YOLACT_im400_R101.yaml",
    "yolact_resnet50_pascal_config": "YOLACT_R50_SBD.yaml",
}
LOSS_OF = {
    "B": "loss_box",
    "C": "loss_class",
    "M": "loss_mask",
    "S": "loss_semantic",
    "I": "loss_mask_iou",
}


def load_config(name: str) -> CfgNode:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("yolact_parts")


def relative(golden, kind: str) -> float:
    return float(re.search(rf"([\d.e-]+) relative for {kind}", golden.meta["tolerance"])[1])


def assert_near(golden, kind: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Relative to the largest value: a sum that cancels has no relative accuracy of its own."""
    rtol = relative(golden, kind)
    atol = rtol * float(theirs.abs().max())
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=rtol, atol=atol)


def thresholds(golden) -> dict:
    """Keywords of ``match``."""
    note = golden.meta["note"]
    high, low, crowd = re.search(r"match ([\d.]+)/([\d.]+), crowd ([\d.]+)", note).groups()
    return {"iou_thresholds": (float(low), float(high)), "crowd_threshold": float(crowd)}


def test_priors_are_the_originals(golden):
    names = [name for name in golden.arrays.files if re.fullmatch(r"priors_\w+_slice", name)]
    assert names
    for name in names:
        text = golden.meta["arrays"][name]
        step, config, sizes = re.match(
            r"priors\[::(\d+)\], config (\w+), level sizes \(([\d, ]+)\)", text
        ).groups()
        cfg = load_config(CONFIG_OF[config])
        options = cfg.MODEL.YOLACT
        priors = make_priors(
            [(int(n), int(n)) for n in sizes.split(",")],
            (cfg.INPUT.SQUARE_SIZE, cfg.INPUT.SQUARE_SIZE),
            scales=level_scales(options.ANCHOR_SIZES, options.ANCHORS_PER_OCTAVE),
            aspect_ratios=options.ANCHOR_ASPECT_RATIOS,
            square=options.SQUARE_ANCHORS,
        )
        assert len(priors) == golden[name.replace("_slice", "_count")], name
        assert torch.equal(priors[:: int(step)], golden[name]), name


def test_box_codec_is_the_originals(golden):
    priors, offsets, boxes = (golden[f"codec_{name}"] for name in ("priors", "loc", "boxes"))
    assert_near(golden, "codec", decode(offsets, priors), boxes)
    assert_near(golden, "codec", encode(boxes, priors), golden["codec_encoded_back"])


def nms_options(golden, name: str) -> dict:
    """Keywords from the description of a result; what it leaves out is as in the main one."""
    options = {}
    for text in (golden.meta["arrays"]["fast_index"], golden.meta["arrays"][f"{name}_index"]):
        for pattern, key, kind in (
            (r"IoU ([\d.]+)", "iou_threshold", float),
            (r"top_k (\d+)", "top_k", int),
            (r"max (\d+)", "max_detections", int),
            (r"second per-class threshold ([\d.]+)", "score_threshold", float),
        ):
            if found := re.search(pattern, text):
                options[key] = kind(found[1])
    return options


def assert_kept(golden, name: str, kept: Kept) -> None:
    assert torch.equal(kept.index, golden[f"{name}_index"].long()), name
    assert torch.equal(kept.classes, golden[f"{name}_class"].long()), name
    assert_near(golden, "codec", kept.scores, golden[f"{name}_score"])


def test_fast_nms_is_the_originals(golden):
    boxes, scores = golden["nms_boxes"], golden["nms_scores"]
    names = [name.removesuffix("_index") for name in golden.arrays.files if "_index" in name]
    for name in [name for name in names if name.startswith("fast")]:
        assert_kept(golden, name, fast_nms(boxes, scores, **nms_options(golden, name)))
    for name in [name for name in names if name.startswith("cross")]:
        options = {**nms_options(golden, name), "max_detections": None}
        assert_kept(golden, name, cross_class_fast_nms(boxes, scores, **options))
    # everything that survives, before the cut to the best
    options = {**nms_options(golden, "fast"), "max_detections": None}
    kept = fast_nms(boxes, scores, **options)
    survives = torch.zeros(scores.shape, dtype=torch.bool)
    survives[kept.classes, kept.index] = True
    shape = (len(scores), golden["fast_all_kept"].shape[1] * 8)
    bits = torch.zeros(shape, dtype=torch.bool)
    bits[:, : scores.shape[1]] = survives
    weights = 2 ** torch.arange(7, -1, -1)
    packed = (bits.view(len(scores), -1, 8) * weights).sum(2)
    assert torch.equal(packed, golden["fast_all_kept"].long())


def test_traditional_nms_is_the_originals(golden):
    options = nms_options(golden, "trad")
    del options["top_k"]
    size = load_config(CONFIG_OF["yolact_resnet50_config"]).INPUT.SQUARE_SIZE
    # candidates of a class have the same lowest score in both steps
    threshold = nms_options(golden, "fast_second")["score_threshold"]
    kept = traditional_nms(
        golden["nms_boxes"] * size, golden["nms_scores"], score_threshold=threshold, **options
    )
    assert_kept(golden, "trad", kept)


def test_matching_is_the_originals(golden):
    priors = golden["match_priors"]
    cases = [name.removesuffix("_gt") for name in golden.arrays.files if name.startswith("match")]
    for case in sorted({name for name in cases if f"{name}_conf" in golden}):
        boxes, classes = golden[f"{case}_gt"], golden[f"{case}_labels"]
        crowds = golden[f"{case}_crowd"] if f"{case}_crowd" in golden else torch.zeros(0, 4)
        labels, objects = match(boxes, classes, crowds, priors, **thresholds(golden))
        assert torch.equal(labels, golden[f"{case}_conf"].long()), case
        assert torch.equal(objects, golden[f"{case}_gtidx"].long()), case
        positive = (labels > 0).nonzero()[:, 0]
        assert torch.equal(positive, golden[f"{case}_pos"].long()), case
        offsets = encode(boxes[objects], priors)
        assert_near(golden, "codec", offsets[positive], golden[f"{case}_pos_loc"])
        step = re.search(r"\[::(\d+)\]", golden.meta["arrays"][f"{case}_loc_slice"])[1]
        assert_near(golden, "codec", offsets[:: int(step)], golden[f"{case}_loc_slice"])


class LossCase:
    """The inputs of one case as our model has them, and its losses."""

    def __init__(self, golden, name: str, mask_iou_weights: dict[str, torch.Tensor]):
        self.info = golden.meta["info"]["loss_cases"][name]
        self.fields = {}
        for field in ("loc", "conf", "mask", "proto", "segm"):
            self.fields[field] = golden[f"{name}_{field}"].requires_grad_()
        size = tuple(golden.masks(f"{name}_gtmask0").shape[1:])
        # the original's boxes are relative to each side, ours to the longer one
        to_ours = torch.tensor([size[1], size[0]] * 2) / max(size)
        self.priors = golden["loss_priors"] * to_ours
        self.ground_truth = []
        crowds = golden[f"{name}_num_crowds"].tolist()
        for i, num_crowds in enumerate(crowds):
            rows, masks = golden[f"{name}_gt{i}"], golden.masks(f"{name}_gtmask{i}")
            boxes = rows[:, :4] * to_ours * max(size)
            n = len(rows) - num_crowds
            gt = GroundTruth(boxes[:n], rows[:n, 4].long(), masks[:n], size, boxes[n:], masks[n:])
            self.ground_truth.append(gt)
        self.model = self._build(mask_iou_weights, thresholds(golden))

    def _build(self, mask_iou_weights, matching):
        cfg = get_cfg()
        add_solo_d2_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "YOLACT"
        cfg.MODEL.DEVICE = "cpu"
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_backbone"
        cfg.MODEL.MOBILENETV2.WIDTH_MULT = 0.25
        cfg.MODEL.YOLACT.CONV_DIM = 8
        cfg.MODEL.YOLACT.NUM_CLASSES = self.info["num_classes"] - 1
        cfg.MODEL.YOLACT.NUM_PROTOTYPES = self.info["mask_dim"]
        model = build_model(cfg)
        model.matching = matching
        if "I" in self.info["keys"]:
            model.mask_iou_head = mask_iou_head(mask_iou_weights)
        return model

    def losses(self) -> list[torch.Tensor]:
        f = self.fields
        outputs = YOLACTOutputs(f["loc"], f["conf"], f["mask"], f["proto"], self.priors, f["segm"])
        named = self.model.output_losses(outputs, f["segm"], self.ground_truth)
        assert named.keys() == {LOSS_OF[key] for key in self.info["keys"]}
        return [named[LOSS_OF[key]] for key in self.info["keys"]]


def mask_iou_head(weights: dict[str, torch.Tensor]) -> MaskIoUHead:
    head = MaskIoUHead(num_classes=len(weights["predictor.bias"]))
    head.load_state_dict(weights)
    return head


@pytest.fixture(scope="module")
def mask_iou_weights(golden, stand_in_weights) -> dict[str, torch.Tensor]:
    table = re.search(r"keys/(\w+)\.keys\.tsv", golden.meta["arrays"]["miou_in"])[1]
    converted = convert(stand_in_weights(table, golden.meta["seed"]))
    prefix = "mask_iou_head."
    return {k.removeprefix(prefix): v for k, v in converted.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def loss_cases(golden, mask_iou_weights) -> dict[str, LossCase]:
    names = golden.meta["info"]["loss_cases"]
    assert names
    return {name: LossCase(golden, name, mask_iou_weights) for name in names}


def test_matching_and_hard_negatives_of_the_loss_cases_are_the_originals(golden, loss_cases):
    for name, case in loss_cases.items():
        matches = [case.model.match(gt, case.priors) for gt in case.ground_truth]
        labels = torch.stack([found.labels for found in matches])
        hard = hard_negatives(case.fields["conf"], labels, case.model.neg_pos_ratio)
        for i, found in enumerate(matches):
            positive = (found.labels > 0).nonzero()[:, 0]
            assert torch.equal(positive, golden[f"{name}_pos{i}"].long()), (name, i)
            assert torch.equal(found.objects[positive], golden[f"{name}_posgt{i}"].long())
            neutral = (found.labels == -1).nonzero()[:, 0]
            assert torch.equal(neutral, golden[f"{name}_neutral{i}"].long()), (name, i)
            negative = hard[i].nonzero()[:, 0]
            assert torch.equal(negative, golden[f"{name}_hardneg{i}"].long()), (name, i)


def test_losses_and_their_gradients_are_the_originals(golden, loss_cases, monkeypatch):
    for name, case in loss_cases.items():
        with monkeypatch.context() as patch:
            if f"{name}_perm0" in golden:
                drawn = golden[f"{name}_perm0"].long()
                assert len(drawn) > case.model.masks_to_train
                patch.setattr(torch, "randperm", lambda n, device=None, drawn=drawn: drawn)
            values = case.losses()
        ours = torch.stack(values).detach().double()
        theirs = golden[f"{name}_loss"]
        torch.testing.assert_close(ours, theirs, rtol=relative(golden, "losses"), atol=0)
        fields = list(case.fields.values())
        options = {"retain_graph": True, "allow_unused": True}
        for key, value in zip(case.info["keys"], values):
            gradients = torch.autograd.grad(value, fields, **options)
            for field, gradient in zip(case.fields, gradients):
                norm = 0.0 if gradient is None else float(gradient.norm())
                expected = case.info["grad_norms"][key][field]
                assert norm == pytest.approx(expected, rel=relative(golden, "losses")), (name, key)
        for field, gradient in zip(
            case.fields, torch.autograd.grad(sum(values), fields, retain_graph=True)
        ):
            if f"{name}_grad_{field}" in golden:
                assert_near(golden, "losses", gradient, golden[f"{name}_grad_{field}"])
        if f"{name}_miou_grad_norm" in golden:
            head = case.model.mask_iou_head
            weights = [p for n, p in head.named_parameters() if n.endswith("weight")]
            # the file's were accumulated: of this loss alone for grad_norms, then of the sum
            alone = values[case.info["keys"].index("I")]
            accumulated = torch.autograd.grad(alone + sum(values), weights)
            norms = torch.stack([gradient.norm() for gradient in accumulated])
            assert_near(golden, "losses", norms, golden[f"{name}_miou_grad_norm"])


def test_mask_iou_network_is_the_originals(golden, mask_iou_weights):
    factor = float(re.search(r"divide by (\d+)", golden.meta["arrays"]["miou_in"])[1])
    with torch.no_grad():
        ious = mask_iou_head(mask_iou_weights)(golden["miou_in"].float() / factor)
    assert_near(golden, "losses", ious, golden["miou_out"])


def assert_same_masks(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    different = (ours ^ theirs).flatten(1).sum(1)
    union = (ours | theirs).flatten(1).sum(1)
    # pixels whose value is one half but for rounding
    assert ((different <= 3) | (different <= 0.001 * union)).all(), different


def test_mask_assembly_and_boxes_of_odd_detections_are_the_originals(golden):
    prototypes, boxes = golden["mask_proto"], golden["mask_boxes"]
    n, height, width = golden["mask_final_shape"].tolist()
    h, w = prototypes.shape[:2]
    soft = assemble_masks(prototypes, golden["mask_coeff"])
    cropped = soft * inside_boxes(boxes * torch.tensor([w, h, w, h]), (h, w))
    assert_near(golden, "losses", cropped, golden["mask_soft"])

    sizes = {"padded_size": (1, 1), "image_size": (1, 1), "output_size": (height, width)}
    final = upsample_to_binary(cropped, threshold=0.5, direct=True, **sizes)
    assert_same_masks(final, golden.masks("mask_final"))
    uncropped = upsample_to_binary(soft, threshold=0.5, direct=True, **sizes)
    assert_same_masks(uncropped, golden.masks("mask_final_nocrop", "mask_final_shape"))
    final_boxes = output_boxes(boxes, (1, 1), (height, width), rounding="int")
    assert len(final_boxes) == n
    assert (final_boxes - golden["mask_final_boxes"]).abs().max() <= 1


def test_schedule_is_the_originals(golden):
    cfg = load_config(CONFIG_OF["yolact_resnet50_config"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    schedule = build_lr_scheduler(cfg, optimizer)
    for iteration, theirs in zip(golden["lr_iter"].tolist(), golden["lr_value"].tolist()):
        schedule.last_epoch = iteration
        assert schedule.get_lr() == [pytest.approx(theirs, rel=1e-6)], iteration
