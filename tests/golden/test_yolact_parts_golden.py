"""Single functions of YOLACT against the original code's results for stored inputs."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import build_lr_scheduler

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.rename_rules import convert
from solo_d2.layers.box_nms import Kept, cross_class_fast_nms, fast_nms, traditional_nms
from solo_d2.layers.masks import upsample_to_binary
from solo_d2.modeling import GroundTruth
from solo_d2.modeling.yolact.anchors import AnchorGenerator, decode, encode
from solo_d2.modeling.yolact.criterion import YOLACTCriterion, class_costs, hard_negatives
from solo_d2.modeling.yolact.head import MaskRater, YOLACTOutputs, assemble_masks, inside_boxes
from solo_d2.modeling.yolact.inference import output_boxes
from solo_d2.modeling.yolact.targets import match

pytestmark = pytest.mark.golden

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "YOLACT"
# Relative tolerances: of box codec and NMS, and of losses and their gradients.
CODEC, LOSSES = 1e-5, 1e-4
# name of the anchors in the file -> our config, and the sizes of the levels
ANCHORS_OF = {
    "r50_550": ("YOLACT_R50.yaml", (69, 35, 18, 9, 5)),
    "plus_550": ("YOLACT_PLUS_R50.yaml", (69, 35, 18, 9, 5)),
    "im700": ("YOLACT_im700_R101.yaml", (88, 44, 22, 11, 6)),
    "im400": ("YOLACT_im400_R101.yaml", (50, 25, 13, 7, 4)),
    "pascal_550": ("YOLACT_R50_SBD.yaml", (69, 35, 18, 9, 5)),
}
# name of a result -> options that differ from the defaults, which are the published ones
FAST_NMS = {
    "fast": {},
    "fast_top15": {"top_k": 15},
    "fast_iou03": {"iou_threshold": 0.3},
    "fast_second": {"score_threshold": 0.05},
}
CROSS_CLASS_NMS = {"cross": {}, "cross_top60": {"top_k": 60}}
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


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, rtol: float) -> None:
    """Relative to the largest value: a sum that cancels has no relative accuracy of its own."""
    atol = rtol * float(theirs.abs().max())
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ANCHORS_OF)
def test_anchors_are_the_originals(golden, name):
    config, sizes = ANCHORS_OF[name]
    options = load_config(config).MODEL.YOLACT
    generator = AnchorGenerator(
        sizes=options.ANCHOR_SIZES,
        per_octave=options.ANCHORS_PER_OCTAVE,
        aspect_ratios=options.ANCHOR_ASPECT_RATIOS,
        square=options.SQUARE_ANCHORS,
    )
    anchors = generator([(n, n) for n in sizes], (options.INPUT_SIZE, options.INPUT_SIZE))
    assert len(anchors) == golden[f"priors_{name}_count"]
    assert torch.equal(anchors[::97], golden[f"priors_{name}_slice"])


def test_box_codec_is_the_originals(golden):
    priors, offsets, boxes = (golden[f"codec_{name}"] for name in ("priors", "loc", "boxes"))
    assert_near(decode(offsets, priors), boxes, CODEC)
    assert_near(encode(boxes, priors), golden["codec_encoded_back"], CODEC)


def assert_kept(golden, name: str, kept: Kept) -> None:
    assert torch.equal(kept.index, golden[f"{name}_index"].long()), name
    assert torch.equal(kept.classes, golden[f"{name}_class"].long()), name
    assert_near(kept.scores, golden[f"{name}_score"], CODEC)


def test_fast_nms_is_the_originals(golden):
    boxes, scores = golden["nms_boxes"], golden["nms_scores"]
    for name, options in FAST_NMS.items():
        assert_kept(golden, name, fast_nms(boxes, scores, **options))
    for name, options in CROSS_CLASS_NMS.items():
        assert_kept(golden, name, cross_class_fast_nms(boxes, scores, **options))
    # all survivors, before the selection of the best
    kept = fast_nms(boxes, scores, max_detections=None)
    survives = torch.zeros(scores.shape, dtype=torch.bool)
    survives[kept.classes, kept.index] = True
    shape = (len(scores), golden["fast_all_kept"].shape[1] * 8)
    bits = torch.zeros(shape, dtype=torch.bool)
    bits[:, : scores.shape[1]] = survives
    weights = 2 ** torch.arange(7, -1, -1)
    packed = (bits.view(len(scores), -1, 8) * weights).sum(2)
    assert torch.equal(packed, golden["fast_all_kept"].long())


def test_traditional_nms_is_the_originals(golden):
    kept = traditional_nms(golden["nms_boxes"] * 550, golden["nms_scores"])
    assert_kept(golden, "trad", kept)


def test_matching_is_the_originals(golden):
    priors = golden["match_priors"]
    for case in ("match0", "match1", "match2", "match3"):
        boxes, classes = golden[f"{case}_gt"], golden[f"{case}_labels"]
        crowds = golden[f"{case}_crowd"] if f"{case}_crowd" in golden else torch.zeros(0, 4)
        labels, objects = match(boxes, classes, crowds, priors)
        assert torch.equal(labels, golden[f"{case}_conf"].long()), case
        assert torch.equal(objects, golden[f"{case}_gtidx"].long()), case
        positive = (labels > 0).nonzero()[:, 0]
        assert torch.equal(positive, golden[f"{case}_pos"].long()), case
        offsets = encode(boxes[objects], priors)
        assert_near(offsets[positive], golden[f"{case}_pos_loc"], CODEC)
        assert_near(offsets[::37], golden[f"{case}_loc_slice"], CODEC)


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
        self.anchors = golden["loss_priors"] * to_ours
        self.ground_truth = []
        crowds = golden[f"{name}_num_crowds"].tolist()
        for i, num_crowds in enumerate(crowds):
            rows, masks = golden[f"{name}_gt{i}"], golden.masks(f"{name}_gtmask{i}")
            boxes = rows[:, :4] * to_ours * max(size)
            n = len(rows) - num_crowds
            gt = GroundTruth(boxes[:n], rows[:n, 4].long(), masks[:n], size, boxes[n:], masks[n:])
            self.ground_truth.append(gt)
        self.criterion = YOLACTCriterion(num_classes=self.info["num_classes"] - 1)
        self.mask_rater = mask_rater(mask_iou_weights) if "I" in self.info["keys"] else None

    def losses(self) -> list[torch.Tensor]:
        f = self.fields
        outputs = YOLACTOutputs(f["loc"], f["conf"], f["mask"], f["proto"], self.anchors, f["segm"])
        named = self.criterion(outputs, f["segm"], self.ground_truth, self.mask_rater)
        assert named.keys() == {LOSS_OF[key] for key in self.info["keys"]}
        return [named[LOSS_OF[key]] for key in self.info["keys"]]


def mask_rater(weights: dict[str, torch.Tensor]) -> MaskRater:
    rater = MaskRater(num_classes=len(weights["predictor.bias"]))
    rater.load_state_dict(weights)
    return rater


@pytest.fixture(scope="module")
def mask_iou_weights(golden, stand_in_weights) -> dict[str, torch.Tensor]:
    converted = convert(stand_in_weights("yolact_plus_r50"))
    prefix = "mask_iou_head."
    return {k.removeprefix(prefix): v for k, v in converted.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def loss_cases(golden, mask_iou_weights) -> dict[str, LossCase]:
    names = golden.meta["info"]["loss_cases"]
    assert names
    return {name: LossCase(golden, name, mask_iou_weights) for name in names}


def test_matching_and_hard_negatives_of_the_loss_cases_are_the_originals(golden, loss_cases):
    for name, case in loss_cases.items():
        matches = [case.criterion.match(gt, case.anchors) for gt in case.ground_truth]
        labels = torch.stack([found.labels for found in matches])
        hard = hard_negatives(
            class_costs(case.fields["conf"], labels), labels, case.criterion.neg_pos_ratio
        )
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
                assert len(drawn) > case.criterion.masks_to_train
                patch.setattr(torch, "randperm", lambda n, drawn=drawn: drawn)
            values = case.losses()
        ours = torch.stack(values).detach().double()
        theirs = golden[f"{name}_loss"]
        torch.testing.assert_close(ours, theirs, rtol=LOSSES, atol=0)
        fields = list(case.fields.values())
        options = {"retain_graph": True, "allow_unused": True}
        for key, value in zip(case.info["keys"], values):
            gradients = torch.autograd.grad(value, fields, **options)
            for field, gradient in zip(case.fields, gradients):
                norm = 0.0 if gradient is None else float(gradient.norm())
                expected = case.info["grad_norms"][key][field]
                assert norm == pytest.approx(expected, rel=LOSSES), (name, key)
        for field, gradient in zip(
            case.fields, torch.autograd.grad(sum(values), fields, retain_graph=True)
        ):
            if f"{name}_grad_{field}" in golden:
                assert_near(gradient, golden[f"{name}_grad_{field}"], LOSSES)
        if f"{name}_miou_grad_norm" in golden:
            rater = case.mask_rater
            weights = [p for n, p in rater.named_parameters() if n.endswith("weight")]
            # the file's were accumulated: of this loss alone for grad_norms, then of the sum
            alone = values[case.info["keys"].index("I")]
            accumulated = torch.autograd.grad(alone + sum(values), weights)
            norms = torch.stack([gradient.norm() for gradient in accumulated])
            assert_near(norms, golden[f"{name}_miou_grad_norm"], LOSSES)


def test_mask_iou_network_is_the_originals(golden, mask_iou_weights):
    with torch.no_grad():
        ious = mask_rater(mask_iou_weights)(golden["miou_in"].float() / 64)
    assert_near(ious, golden["miou_out"], LOSSES)


def assert_same_masks(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    different = (ours ^ theirs).flatten(1).sum(1)
    union = (ours | theirs).flatten(1).sum(1)
    # pixels whose value is one half except for rounding
    assert ((different <= 3) | (different <= 0.001 * union)).all(), different


def test_mask_assembly_and_boxes_of_odd_detections_are_the_originals(golden):
    prototypes, boxes = golden["mask_proto"], golden["mask_boxes"]
    n, height, width = golden["mask_final_shape"].tolist()
    h, w = prototypes.shape[:2]
    soft = assemble_masks(prototypes, golden["mask_coeff"])
    cropped = soft * inside_boxes(boxes * torch.tensor([w, h, w, h]), (h, w))
    assert_near(cropped, golden["mask_soft"], LOSSES)

    sizes = {"padded_size": (1, 1), "image_size": (1, 1), "output_size": (height, width)}
    final = upsample_to_binary(cropped, threshold=0.5, direct=True, **sizes)
    assert_same_masks(final, golden.masks("mask_final"))
    uncropped = upsample_to_binary(soft, threshold=0.5, direct=True, **sizes)
    assert_same_masks(uncropped, golden.masks("mask_final_nocrop", "mask_final_shape"))
    final_boxes = output_boxes(boxes, (1, 1), (height, width), rounding="int")
    assert len(final_boxes) == n
    assert (final_boxes - golden["mask_final_boxes"]).abs().max() <= 1


def test_schedule_is_the_originals(golden):
    cfg = load_config("YOLACT_R50.yaml")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    schedule = build_lr_scheduler(cfg, optimizer)
    for iteration, theirs in zip(golden["lr_iter"].tolist(), golden["lr_value"].tolist()):
        schedule.last_epoch = iteration
        assert schedule.get_lr() == [pytest.approx(theirs, rel=1e-6)], iteration
