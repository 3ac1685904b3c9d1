"""CenterMask against the original's code, with stand-in weights of its checkpoints."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.rename_rules import convert, find_new_name, recognize
from solo_d2.modeling.centermask.mask_iou import crop_masks, mask_iou_targets

pytestmark = pytest.mark.golden

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG_OF = {
    "centermask_v39": "CenterMask/CenterMask_V39_3x.yaml",
    "centermask_lite_v39": "CenterMask/CenterMask_Lite_V39_4x.yaml",
}
# name in meta["config"] -> our config key
KEY_OF = {
    "fcos.num_classes": "MODEL.FCOS.NUM_CLASSES",
    "fcos.in_features": "MODEL.FCOS.IN_FEATURES",
    "fcos.inference_th_train": "MODEL.FCOS.SCORE_THRESH_TRAIN",
    "fcos.inference_th_test": "MODEL.FCOS.SCORE_THRESH_TEST",
    "fcos.nms_th": "MODEL.FCOS.NMS_THRESH",
    "fcos.post_nms_topk_test": "TEST.DETECTIONS_PER_IMAGE",
    "fcos.sizes_of_interest": "MODEL.FCOS.SIZES_OF_INTEREST",
    "fcos.num_cls_convs": "MODEL.FCOS.NUM_CLS_CONVS",
    "fcos.num_box_convs": "MODEL.FCOS.NUM_BOX_CONVS",
    "fcos.pos_radius": "MODEL.FCOS.CENTER_SAMPLING_RADIUS",
    "fcos.loc_loss_type": "MODEL.FCOS.BBOX_REG_LOSS_TYPE",
    "roi_mask_head.pooler_resolution": "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
    "roi_mask_head.pooler_sampling_ratio": "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO",
    "roi_mask_head.num_conv": "MODEL.ROI_MASK_HEAD.NUM_CONV",
    "roi_mask_head.conv_dim": "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "roi_mask_head.norm": "MODEL.ROI_MASK_HEAD.NORM",
    "roi_mask_head.pooler_type": "MODEL.ROI_MASK_HEAD.POOLER_TYPE",
    "roi_mask_head.assign_criterion": "MODEL.CENTERMASK.ASSIGN_CRITERION",
    "roi_maskiou_head.conv_dim": "MODEL.CENTERMASK.MASK_IOU_CONV_DIM",
    "roi_maskiou_head.num_conv": "MODEL.CENTERMASK.MASK_IOU_NUM_CONV",
    "roi_heads.num_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
    "roi_heads.in_features": "MODEL.ROI_HEADS.IN_FEATURES",
    "roi_heads.iou_thresholds": "MODEL.ROI_HEADS.IOU_THRESHOLDS",
    "roi_heads.batch_size_per_image": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "roi_heads.positive_fraction": "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    "roi_heads.proposal_append_gt": "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT",
    "backbone": "MODEL.VOVNET.CONV_BODY",
    "norm": "MODEL.VOVNET.NORM",
    "fpn_channels": "MODEL.FPN.OUT_CHANNELS",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "format": "INPUT.FORMAT",
}
# name in meta["config"]["fcos"] -> our attribute of the proposal generator, an option without a key
ATTRIBUTE_OF = {
    "pre_nms_topk_train": "pre_nms_topk",
    "pre_nms_topk_test": "pre_nms_topk",
    "post_nms_topk_train": "max_proposals",
    "thresh_with_ctr": "threshold_with_centerness",
    "loss_alpha": "focal_loss_alpha",
    "loss_gamma": "focal_loss_gamma",
}
CASES = ["t", "e1", "e2", "z"]

# The part of an array that the file has.
PART_OF = {
    "a_input_norm_slice": np.s_[0, :, ::16, ::16],
    "a_bu_stage3": np.s_[0, ::32, ::4, ::4],
    "a_bu_stage4": np.s_[0, ::32, ::2, ::2],
    "a_bu_stage5": np.s_[0, ::32, ::2, ::2],
    "a_fpn_p3": np.s_[0, ::16, ::2, ::2],
    "a_fpn_p4": np.s_[0, ::16],
    "a_fpn_p5": np.s_[0, ::8],
    "a_fpn_p6": np.s_[0, ::8],
    "a_fpn_p7": np.s_[0, ::4],
    "a_logits_p3": np.s_[0, ::8],
    "a_logits_p4": np.s_[0, ::4],
    "a_logits_p5": np.s_[0, ::2],
    "a_logits_p6": np.s_[0],
    "a_logits_p7": np.s_[0],
    "a_roi_feat": np.s_[:8, ::32],
    "a_sam_out": np.s_[:4, ::32],
    "a_mask_logits_all": np.s_[:2, ::8],
}
# Case b is this part of image a, and image 1 of a training batch is that part, mirrored.
ROWS_AND_COLUMNS_OF_B = {"centermask_v39": (250, 310), "centermask_lite_v39": (243, 317)}
SECOND_TRAINING_IMAGE = np.s_[:, 16:240, 20:308]
# The training score threshold of case z: no proposals except the ground truth.
THRESHOLD_OF_Z = 0.9999

# The tolerances that the files suggest.
FEATURE = {"atol": 1e-4, "rtol": 1e-4}
BOX = {"atol": 1e-3, "rtol": 0}
SCORE = {"atol": 1e-5, "rtol": 0}
LOSS = {"atol": 1e-9, "rtol": 1e-4}
MASK_IOU_LOSS = {"atol": 1e-9, "rtol": 1e-3}
MASK_IOU_TARGET = {"atol": 5e-3, "rtol": 0}
GRAD = {"atol": 1e-9, "rtol": 2e-3}


def close(actual, expected, tolerance: dict[str, float]) -> None:
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(actual, expected, **tolerance)


def same_masks(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Nearly all pixels of each mask."""
    different = (actual ^ expected).sum(dim=(1, 2))
    iou = (actual & expected).sum(dim=(1, 2)) / (actual | expected).sum(dim=(1, 2)).clamp(min=1)
    assert ((iou >= 0.999) | (different <= 3)).all(), different.tolist()


def network_input(image: torch.Tensor) -> torch.Tensor:
    """uint8 (H, W, 3) BGR -> float (3, H, W)."""
    return image.permute(2, 0, 1).float()


def part(array: torch.Tensor, key: str) -> torch.Tensor:
    return array[PART_OF[key]]


@pytest.fixture(scope="module", params=CONFIG_OF)
def golden(request, load_golden):
    return load_golden(request.param)


@pytest.fixture(scope="module")
def cfg(golden):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    table = golden.meta["config"]["keys_table"].removesuffix(".keys.tsv")
    cfg.merge_from_file(str(CONFIGS / CONFIG_OF[table]))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (), "DATASETS.TEST", ()])
    cfg.MODEL.FCOS.NUM_CLASSES = golden.meta["config"]["fcos"]["num_classes"]
    return cfg


@pytest.fixture(scope="module")
def model(golden, cfg, stand_in_weights):
    table = golden.meta["config"]["keys_table"].removesuffix(".keys.tsv")
    model = build_model(cfg)
    model.load_state_dict(convert(stand_in_weights(table, golden.meta["seed_of_weights"])))
    return model.eval()


def test_the_config_is_the_originals(golden, cfg, model):
    differing = {}
    for name, key in KEY_OF.items():
        value, node = golden.meta["config"], cfg
        for level in name.split("."):
            value = value[level]
        for level in key.split("."):
            node = node[level]
        node = list(node) if isinstance(node, tuple) else node
        if node != value and not (key == "MODEL.ROI_HEADS.NUM_CLASSES" and node == -1):
            differing[key] = (node, value)
    for name, attribute in ATTRIBUTE_OF.items():
        value = getattr(model.proposal_generator, attribute)
        if value != golden.meta["config"]["fcos"][name]:
            differing[attribute] = (value, golden.meta["config"]["fcos"][name])
    assert not differing


class Stages:
    """The stages of one image in the model, in evaluation mode."""

    @torch.no_grad()
    def __init__(self, model, image: torch.Tensor, golden, case: str, recorded_order):
        height, width = golden[f"{case}_out_size"].tolist()
        inputs = [{"image": image, "height": height, "width": width}]
        self.images = model.preprocess_image(inputs)
        self.body = model.backbone.bottom_up(self.images.tensor)
        self.features = model.backbone(self.images.tensor)
        fcos, heads = model.proposal_generator, model.roi_heads
        self.outputs = fcos.head([self.features[name] for name in fcos.in_features])
        (found,) = fcos.detect(self.outputs, self.images.image_sizes)
        recorded = golden[f"{case}_det_scores"], golden[f"{case}_det_boxes"]
        self.found = found[
            recorded_order(
                found.scores, found.pred_boxes.tensor, *recorded, tolerance=SCORE["atol"]
            )
        ]
        boxes = [self.found.pred_boxes]
        self.level = heads.mask_pooler.assign(boxes, self.images.image_sizes)
        self.pooled = heads.pool(self.features, boxes, [self.found])
        (self.result,) = heads.forward_with_given_boxes(self.features, [self.found])
        copy = Instances(self.result.image_size, **self.result.get_fields())
        copy.pred_boxes = self.result.pred_boxes.clone()
        self.output = detector_postprocess(copy, height, width)


@pytest.fixture(scope="module")
def stages(golden, model, recorded_order):
    """Case -> its stages: a is the whole image, b a part that needs padding."""
    image = network_input(golden["a_image"])
    rows, columns = ROWS_AND_COLUMNS_OF_B[golden.name]
    parts = {"a": image, "b": image[:, :rows, :columns]}
    return {case: Stages(model, part, golden, case, recorded_order) for case, part in parts.items()}


def compare_stats(array, golden, key, tolerance):
    if key in golden:
        stats = [array.mean(), array.std(), array.min(), array.max()]
        close(torch.stack(stats), golden[key], tolerance)


def test_body_and_pyramid(golden, stages):
    run = stages["a"]
    assert list(run.images.tensor.shape) == golden["a_input_padded_shape"].tolist()
    image = part(run.images.tensor, "a_input_norm_slice")
    close(image, golden["a_input_norm_slice"], FEATURE)
    for prefix, features in (("a_bu", run.body), ("a_fpn", run.features)):
        for name, feature in features.items():
            key = f"{prefix}_{name}"
            close(part(feature, key), golden[key], FEATURE)
            compare_stats(feature, golden, f"{key}_stats", FEATURE)


def test_head_outputs(golden, stages, model):
    outputs = stages["a"].outputs
    for i, name in enumerate(model.proposal_generator.in_features):
        logits = outputs.class_logits[i]
        key = f"a_logits_{name}"
        close(part(logits, key), golden[key], FEATURE)
        close(logits[0].amax(dim=0), golden[f"a_logits_max_{name}"], FEATURE)
        close(outputs.distances[i][0], golden[f"a_reg_{name}"], FEATURE)
        close(outputs.centerness[i][0, 0], golden[f"a_ctr_{name}"], FEATURE)
        threshold = golden.meta["config"]["fcos"]["inference_th_test"]
        assert (logits.sigmoid() > threshold).sum() == golden["a_n_candidates"][i]


@pytest.mark.parametrize("case", ["a", "b"])
def test_detections(golden, stages, case):
    found = stages[case].found
    assert found.pred_classes.tolist() == golden[f"{case}_det_classes"].tolist()
    close(found.pred_boxes.tensor, golden[f"{case}_det_boxes"], BOX)
    close(found.scores, golden[f"{case}_det_scores"], SCORE)
    assert torch.equal(found.locations, golden[f"{case}_det_locations"])
    assert stages[case].level.tolist() == golden[f"{case}_roi_level"].tolist()


@torch.no_grad()
def test_mask_branch(golden, stages, model):
    run, heads = stages["a"], model.roi_heads
    classes = run.found.pred_classes
    close(part(run.pooled, "a_roi_feat"), golden["a_roi_feat"], FEATURE)
    seen = []
    hook = heads.mask_head.attention.register_forward_hook(lambda *args: seen.append(args[1][0]))
    logits = heads.mask_head.class_logits(run.pooled, classes)
    hook.remove()
    (feature,) = seen
    attention = heads.mask_head.attention
    close(attention.attention(feature)[:, 0], golden["a_sam_attention"], FEATURE)
    close(part(attention(feature), "a_sam_out"), golden["a_sam_out"], FEATURE)
    close(logits, golden["a_mask_logits_cls"], FEATURE)
    every_class = part(heads.mask_head.layers(run.pooled), "a_mask_logits_all")
    close(every_class, golden["a_mask_logits_all"], FEATURE)
    ious = heads.mask_iou_head(run.pooled, logits.sigmoid())
    close(ious, golden["a_maskiou_all"], FEATURE)


@pytest.mark.parametrize("case", ["a", "b"])
def test_results(golden, stages, case):
    run = stages[case]
    close(run.result.mask_scores, golden[f"{case}_mask_scores_raw"], SCORE)
    out = run.output
    assert out.pred_classes.tolist() == golden[f"{case}_out_classes"].tolist()
    close(out.pred_boxes.tensor, golden[f"{case}_out_boxes"], BOX)
    close(out.scores, golden[f"{case}_out_scores"], SCORE)
    close(out.mask_scores, golden[f"{case}_out_mask_scores"], SCORE)
    expected = golden.masks(f"{case}_out_masks_packed", f"{case}_out_masks_shape")
    same_masks(out.pred_masks, expected)


def annotations(golden, i: int, size: tuple[int, int]) -> Instances:
    xy, objects = golden.arrays[f"t_gt{i}_polygon_xy"], golden[f"t_gt{i}_polygon_obj"].tolist()
    ends = np.cumsum(golden.arrays[f"t_gt{i}_polygon_len"])
    polygons: list[list] = [[] for _ in golden[f"t_gt{i}_classes"]]
    for index, polygon in zip(objects, np.split(xy, ends[:-1])):
        polygons[index].append(polygon)
    return Instances(
        size,
        gt_boxes=Boxes(golden[f"t_gt{i}_boxes"]),
        gt_classes=golden[f"t_gt{i}_classes"].long(),
        gt_masks=PolygonMasks(polygons),
    )


def without_objects(size: tuple[int, int]) -> Instances:
    return Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())


class Training:
    """The batch of all training cases: its features and head outputs, computed once."""

    def __init__(self, golden, model, recorded_order):
        image = network_input(golden["a_image"])
        inputs = [{"image": image}, {"image": image[SECOND_TRAINING_IMAGE].flip(-1)}]
        self.golden, self.recorded_order = golden, recorded_order
        self.model = model
        self.images = model.preprocess_image(inputs)
        self.features = model.backbone(self.images.tensor)
        fcos = model.proposal_generator
        self.outputs = fcos.head([self.features[name] for name in fcos.in_features])
        sizes = self.images.image_sizes
        both = [annotations(golden, i, size) for i, size in enumerate(sizes)]
        none = [without_objects(size) for size in sizes]
        self.targets = {"t": both, "e1": [both[0], none[1]], "e2": none, "z": both}

    def propose(self, case: str) -> list[Instances]:
        fcos, sizes = self.model.proposal_generator, self.images.image_sizes
        with pytest.MonkeyPatch.context() as patch:
            if case == "z":
                patch.setattr(fcos, "score_threshold_train", THRESHOLD_OF_Z)
            proposals = fcos.propose(self.outputs, sizes)
        recorded = "z" if case == "z" else "t"
        for i, found in enumerate(proposals):
            order = self.recorded_order(
                found.objectness_logits,
                found.proposal_boxes.tensor,
                self.golden[f"{recorded}_prop{i}_scores"],
                self.golden[f"{recorded}_prop{i}_boxes"],
                tolerance=SCORE["atol"],
            )
            proposals[i] = found[order]
        return proposals

    def sample(self, case: str) -> list[Instances]:
        heads = self.model.roi_heads
        return heads.label_and_sample_proposals(self.propose(case), self.targets[case])

    def losses(self, case: str) -> dict[str, torch.Tensor]:
        losses = self.model.proposal_generator.losses(self.outputs, self.targets[case])
        heads = self.model.roi_heads
        losses |= heads.mask_losses(self.features, self.sample(case), self.targets[case])
        return losses


@pytest.fixture(scope="module")
def training(golden, model, recorded_order):
    # The gradients are those of training mode: every norm is frozen or has no statistics.
    model.requires_grad_(True)
    with EventStorage():
        yield Training(golden, model, recorded_order)
    model.zero_grad()


@pytest.mark.parametrize("case", ["t", "z"])
def test_training_proposals(golden, training, case):
    for i, found in enumerate(training.propose(case)):
        close(found.proposal_boxes.tensor, golden[f"{case}_prop{i}_boxes"], BOX)
        close(found.objectness_logits, golden[f"{case}_prop{i}_scores"], SCORE)


@pytest.mark.parametrize("case", CASES)
def test_number_of_sampled_boxes(golden, training, case):
    proposals, targets = training.propose(case), training.targets[case]
    counts = torch.zeros(2)
    for found, proposed, target in zip(training.sample(case), proposals, targets):
        # the original also samples the background: the rest, as there are fewer than 512 boxes
        counts += torch.tensor([len(found), len(proposed) + len(target) - len(found)])
    assert torch.equal(counts / len(training.targets[case]), golden[f"{case}_roi_counts"])


@pytest.mark.parametrize("case", ["t", "z"])
def test_foreground_and_its_targets(golden, training, case):
    heads = training.model.roi_heads
    foreground = training.sample(case)
    size = 2 * heads.mask_pooler.output_size
    masks, visible = heads.mask_targets(foreground, training.targets[case], size)
    labels = torch.cat([x.gt_classes for x in foreground])
    assert labels.tolist() == golden[f"{case}_fg_labels"].tolist()
    expected, share = [], []
    for i, found in enumerate(foreground):
        close(found.proposal_boxes.tensor, golden[f"{case}_fg{i}_boxes"], BOX)
        assert found.gt_classes.tolist() == golden[f"{case}_fg{i}_gt_classes"].tolist()
        matched = training.targets[case][i].gt_boxes.tensor[found.gt_index]
        close(matched, golden[f"{case}_fg{i}_gt_boxes"], BOX)
        bits = np.unpackbits(golden.arrays[f"{case}_fg{i}_target28_packed"])
        bits = bits[: len(found) * size * size].reshape(-1, size, size)
        expected.append(torch.from_numpy(bits.astype(bool)))
        share.append(golden[f"{case}_fg{i}_area_in_box"] / golden[f"{case}_fg{i}_area_full"])
    # a corner of a box moves by rounding, and with it a pixel of a polygon drawn in it
    assert (masks ^ torch.cat(expected)).sum() <= 3
    close(visible, torch.cat(share).clamp(0, 1), {"atol": 1e-3, "rtol": 0})

    with torch.no_grad():
        boxes = [x.proposal_boxes for x in foreground]
        pooled = heads.pool(training.features, boxes, foreground)
        logits = heads.mask_head.class_logits(pooled, labels)
    target = mask_iou_targets(logits > 0, masks, visible)
    close(target, golden[f"{case}_maskiou_target"], MASK_IOU_TARGET)


def our_parameter(name: str, model) -> tuple[torch.nn.Parameter, tuple]:
    """The parameter for a name of the original, and the part of it that is meant."""
    source = recognize([name, "proposal_generator.fcos_head.cls_logits.bias"])
    part: tuple = ()
    if joined := find_new_name(name, source.joined):
        part = (int(re.search(r"\.(\d+)\.", name)[1]),)
        name = joined
    return model.get_parameter(find_new_name(name, source.rules)), part


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(golden, training, case):
    losses = training.losses(case)
    names = golden.arrays[f"{case}_loss_names"].tolist()
    assert set(losses) == set(names)
    for name, expected in zip(names, golden[f"{case}_loss_values"].tolist()):
        limits = MASK_IOU_LOSS if name == "loss_maskiou" else LOSS
        close(losses[name].detach(), expected, limits)

    for key, loss in (
        ("grad_maskiou_only", losses["loss_maskiou"]),
        ("grad", sum(losses.values())),
    ):
        if f"{case}_{key}_names" not in golden:
            continue
        names = golden.arrays[f"{case}_{key}_names"].tolist()
        wanted = [our_parameter(name, training.model) for name in names]
        grads = torch.autograd.grad(loss, [parameter for parameter, _ in wanted], retain_graph=True)
        norms = [grad[part].norm() for grad, (_, part) in zip(grads, wanted)]
        close(torch.stack(norms), golden[f"{case}_{key}_norms"], GRAD)


def test_bitmask_targets_are_close_to_those_of_polygons(golden, training):
    """The effect of training on bitmasks; the original supports only polygons."""
    heads = training.model.roi_heads
    for i, found in enumerate(training.sample("t")):
        target, boxes = training.targets["t"][i], found.proposal_boxes.tensor.detach().numpy()
        height, width = target.image_size
        bitmasks = golden.masks(f"t_gt{i}_masks_packed", f"t_gt{i}_masks_shape")
        assert tuple(bitmasks.shape[1:]) == (height, width)
        share, masks = [], []
        for gt_masks in (target.gt_masks, BitMasks(bitmasks)):
            target.gt_masks = gt_masks
            masks.append(crop_masks(gt_masks, found.gt_index, boxes, 28))
            _, visible = heads.mask_targets([found], [target], 28)
            share.append(visible)
        assert (share[0] - share[1]).abs().max() < 0.01  # seen: 0.004
        assert (masks[0] ^ masks[1]).float().mean() < 0.02  # seen: 0.009
