"""The SOLO family against the originals' code, with stand-in weights of their checkpoints."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch.nn import functional as F

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.rename_rules import convert, find_new_name, recognize
from solo_d2.modeling import SOLO, SOLOv2
from solo_d2.modeling.solo.inference import Detector

pytestmark = pytest.mark.golden

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# table of parameter names -> the config of that model
CONFIG_OF = {
    "adelaidet_solov2_r50_3x": "SOLOv2/SOLOv2_R50_3x.yaml",
    "official_solov2_r50": "SOLOv2/SOLOv2_R50_3x_official.yaml",
    "solov2_light_r50": "SOLOv2/SOLOv2_Light_448_R50_3x.yaml",
    "solov2_light_512_dcn_r50": "SOLOv2/SOLOv2_Light_512_DCN_R50_3x.yaml",
    "solo_r50": "SOLO/SOLO_R50_3x.yaml",
    "decoupled_solo_r50": "SOLO/DecoupledSOLO_R50_3x.yaml",
    "decoupled_solo_light_r50": "SOLO/DecoupledSOLO_Light_512_R50_3x.yaml",
    "decoupled_solo_light_dcn_r50": "SOLO/DecoupledSOLO_Light_512_DCN_R50_3x.yaml",
}
# name in meta["C_overrides"] -> our config key
KEY_OF = {
    "score_thr": "MODEL.SOLO.SCORE_THRESH_TEST",
    "nms_pre": "MODEL.SOLO.TOPK_CANDIDATES_TEST",
    "kernel": "MODEL.SOLO.NMS_KERNEL",
    "update_thr": "MODEL.SOLO.UPDATE_THRESH_TEST",
    "max_per_img": "TEST.DETECTIONS_PER_IMAGE",
}
TRAINED = ["solov2_adelaidet", "solov2_official_mmdet", "solo", "decoupled_solo"]
FILES = [*TRAINED, "solo_dcn"]
# the table of the light model whose arrays are in the same file
LIGHT_OF = {
    "solov2_official_mmdet": "solov2_light_r50",
    "decoupled_solo": "decoupled_solo_light_r50",
}
SEED = 0  # of the stand-in weights

# Tolerances of the files. Scores are tied if noise of this size in both can swap them, that
# is, up to twice the tolerance apart; the order of tied scores is free.
LOGITS = 5e-4
CATEGORY_SCORES = 1e-5  # before maskness
SCORES = 1e-3
LOSSES = 1e-4  # relative
GRADIENT_NORMS = 1e-3  # relative
SMALL_AREA = 3  # pixels in which a tiny mask may differ


def models_in(golden) -> dict[str, str]:
    """Prefix of the arrays -> table, for the models in a file."""
    tables = dict(golden.meta.get("prefixes", {}))
    if not tables:
        tables[""] = golden.meta["table"]
    if golden.name in LIGHT_OF:
        tables["light_"] = LIGHT_OF[golden.name]
    return tables


def cases_in(golden, prefix: str) -> list[str]:
    return [case for case in "ABCM" if f"{prefix}{case}_scores" in golden]


def config_of(table: str, case: str, golden) -> CfgNode:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(CONFIGS / CONFIG_OF[table]))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL.DEVICE = "cpu"
    if case == "C":
        for name, value in golden.meta["C_overrides"].items():
            cfg.merge_from_list([KEY_OF[name], value])
    if case == "M":
        cfg.MODEL.SOLO.NMS_TYPE = "mask"
    return cfg


@pytest.fixture(scope="module")
def weights(stand_in_weights):
    cache = {}

    def get(table: str) -> dict[str, torch.Tensor]:
        if table not in cache:
            cache.clear()
            cache[table] = convert(stand_in_weights(table, SEED))
        return cache[table]

    return get


@pytest.fixture(scope="module")
def build(weights):
    """Model of a table with its converted stand-in weights, and its config."""

    def make(golden, table: str, case: str = "A"):
        cfg = config_of(table, case, golden)
        state_dict = weights(table)
        cfg.MODEL.SOLO.NUM_CLASSES = len(state_dict["head.category_pred.bias"])
        model = build_model(cfg)
        # num_batches_tracked is not part of the checkpoint's mathematics
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
        assert not unexpected
        assert not [name for name in missing if not name.endswith("num_batches_tracked")]
        return model.eval(), cfg

    return make


def network_input(image: torch.Tensor, cfg) -> torch.Tensor:
    """uint8 (H, W, 3) BGR -> float (3, H, W) in the config's channel order."""
    if cfg.INPUT.FORMAT == "RGB":
        image = image.flip(-1)
    return image.permute(2, 0, 1).float()


def sliced(array: torch.Tensor, spec: str) -> torch.Tensor:
    """Apply "[3::8,::4,::4] of 256x64x80"; the shape is checked too."""
    steps, shape = re.fullmatch(r"\[(.*)\] of ([\dx]+)", spec).groups()
    assert tuple(array.shape) == tuple(int(n) for n in shape.split("x"))
    slices = [slice(*(int(n) if n else None for n in s.split(":"))) for s in steps.split(",")]
    return array[tuple(slices)]


class Run:
    """All stages of one image through one model."""

    @torch.no_grad()
    def __init__(self, golden, key: str, model, cfg):
        self.image_key = key if f"{key}_image" in golden else key[:-1] + "A"
        if f"{self.image_key}_image" not in golden:  # another model on the main model's image
            self.image_key = "A"
        image = network_input(golden[f"{self.image_key}_image"], cfg)
        out_key = key if f"{key}_out_hw" in golden else self.image_key
        height, width = golden[f"{out_key}_out_hw"].tolist()
        inputs = [{"image": image, "height": height, "width": width}]
        images: ImageList = model.preprocess_image(inputs)
        self.features = model.backbone(images.tensor)
        size = tuple(images.tensor.shape[-2:])
        self.model = model
        self.outputs = model.predict(self.features, size)
        # per level (C, S, S): before point NMS, and whether noise decides point NMS
        self.raw_scores = [x[0].sigmoid() for x in self.outputs.category_logits]
        self.tied = [tied_with_a_rival(x) for x in self.raw_scores]
        self.scores = model.category_scores(self.outputs.category_logits)[0]
        stride = min(model.mask_strides)
        self.mask_size = (size[0] // stride, size[1] // stride)
        found = model.detector.find(self.scores)
        self.candidates = model.rank(self.outputs, found, 0, self.mask_size)
        self.kept = model.detector.suppress(self.candidates)
        self.results = model(inputs)[0]["instances"]

    def level_scores(self, level: int) -> torch.Tensor:
        """(C, S, S) after point NMS."""
        grids = self.model.num_grids
        scores = self.scores.split([grid * grid for grid in grids])[level]
        return scores.T.reshape(-1, grids[level], grids[level])

    def named_arrays(self) -> dict[str, torch.Tensor]:
        arrays = {name: feature[0] for name, feature in self.features.items()}
        for level, logits in enumerate(self.outputs.category_logits):
            arrays[f"cate_logits_l{level}"] = logits[0]
            arrays.update(self.mask_arrays(level))
        return arrays

    @torch.no_grad()
    def mask_arrays(self, level: int) -> dict[str, torch.Tensor]:
        """The inputs of masks: kernels and mask feature, or logits of all cells or lines."""
        outputs, head = self.outputs, self.model.head
        if isinstance(self.model, SOLOv2):
            kernel = outputs.kernels[level][0]
            return {f"kernel_l{level}": kernel, "mask_feat": outputs.mask_features[0]}
        if isinstance(self.model, SOLO):
            convs = {"ins": (head.mask_pred[level], outputs.mask_features[level][0])}
        else:
            convs = {
                "insx": (head.x_pred[level], outputs.x_features[level][0]),
                "insy": (head.y_pred[level], outputs.y_features[level][0]),
            }
        return {
            f"{name}_logits_l{level}": conv.select(feature, torch.arange(conv.out_channels))
            for name, (conv, feature) in convs.items()
        }


def tied_with_a_rival(scores: torch.Tensor) -> torch.Tensor:
    """Whether a score (C, S, S) equals, up to noise, the neighbor that point NMS looks at."""
    padded = F.pad(scores, (1, 0, 1, 0))
    rivals = torch.stack([padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, :-1, :-1]]).amax(0)
    return (rivals - scores).abs() <= 2 * CATEGORY_SCORES


@pytest.fixture(scope="module", params=FILES)
def golden(request, load_golden):
    return load_golden(request.param)


@pytest.fixture(scope="module")
def runs(golden, build):
    """(key of the case, our stages of it) for every case in the file."""
    results = {}
    for prefix, table in models_in(golden).items():
        for case in cases_in(golden, prefix):
            model, cfg = build(golden, table, case)
            results[f"{prefix}{case}"] = Run(golden, f"{prefix}{case}", model, cfg)
    assert results
    return results


def test_features_and_head_outputs_are_the_originals(golden, runs):
    compared = 0
    for key, run in runs.items():
        for name, array in run.named_arrays().items():
            if f"{key}_{name}" not in golden:
                continue
            torch.testing.assert_close(
                sliced(array, golden.meta["slices"][name]),
                golden[f"{key}_{name}"],
                atol=LOGITS,
                rtol=0,
                msg=lambda text, key=key, name=name: f"{key}_{name}: {text}",
            )
            compared += 1
    # a file has the head outputs of its main model, or only final results
    assert compared or "logits" not in " ".join(golden.meta["slices"])


def test_scores_after_point_nms_are_the_originals(golden, runs):
    compared = 0
    for key, run in runs.items():
        for level, raw in enumerate(run.raw_scores):
            name = f"cate_scores_ptnms_l{level}"
            if f"{key}_{name}" not in golden:
                continue
            expected, spec = golden[f"{key}_{name}"], golden.meta["slices"][name]
            ours, raw, tied = (
                sliced(x, spec) for x in (run.level_scores(level), raw, run.tied[level])
            )
            same = (ours - expected).abs() <= CATEGORY_SCORES
            # one of two tied neighbors survives, either of them
            either = tied & ((expected == 0) | ((raw - expected).abs() <= CATEGORY_SCORES))
            assert (same | either).all(), (key, name)
            compared += 1
    assert compared or "scores" not in " ".join(golden.meta["slices"])


def flat(per_level: list[torch.Tensor]) -> torch.Tensor:
    """Per level (C, S, S) -> (cells of all levels * C,), cell by cell."""
    return torch.cat([x.flatten(1) for x in per_level], dim=1).T.flatten()


def test_candidates_are_the_originals_in_their_order(golden, runs):
    compared = 0
    for key, run in runs.items():
        if f"{key}_cand_cell" not in golden:
            continue
        threshold = golden.meta["C_overrides"]["score_thr"] if key.endswith("C") else 0.1
        num_classes = run.scores.shape[1]
        cells, classes, _ = Detector(score_threshold=threshold).find(run.scores)
        ours = torch.from_numpy(cells * num_classes + classes)
        expected = golden[f"{key}_cand_cell"].long() * num_classes
        expected += golden[f"{key}_cand_class"].long()
        # the same candidates in the same order, except for those that noise decides
        raw, tied = flat(run.raw_scores), flat(run.tied)
        undecided = tied | ((raw - threshold).abs() <= CATEGORY_SCORES)
        ours_too = torch.isin(expected, ours)
        shared = ours[torch.isin(ours, expected)]
        assert torch.equal(expected[ours_too], shared), key
        assert undecided[expected[~ours_too]].all(), key
        assert undecided[ours[~torch.isin(ours, expected)]].all(), key
        torch.testing.assert_close(
            raw[shared], golden[f"{key}_cand_score"][ours_too], atol=CATEGORY_SCORES, rtol=0
        )
        compared += 1
    assert compared


def test_inputs_and_outputs_of_the_suppression_are_the_originals(golden, runs):
    compared = 0
    for key, run in runs.items():
        if f"{key}_nms_in_scores" not in golden:
            continue
        found = run.candidates
        areas = (found.masks > 0.5).flatten(1).sum(1)
        expected_scores = golden[f"{key}_nms_in_scores"]
        expected_classes = golden[f"{key}_nms_in_classes"].long()
        assert len(found.scores) == len(expected_scores), key
        assert (found.scores[:-1] >= found.scores[1:]).all(), key
        # each has its own partner; the order of tied scores is free
        free = torch.ones(len(areas), dtype=torch.bool)
        for score, label, area in zip(
            expected_scores, expected_classes, golden[f"{key}_nms_in_area"].long()
        ):
            fits = free & (found.classes == label) & ((found.scores - score).abs() <= SCORES)
            distance = torch.where(fits, (areas - area).abs(), areas.max() + 1 + area)
            assert distance.min() <= SMALL_AREA, (key, score, label, area)
            free[distance.argmin()] = False
        compared += 1
    assert compared


def match(golden, key: str, run: Run) -> list[tuple[int, int, float]]:
    """(expected, ours, IoU) pairs: the same class, the best IoU, each of ours once."""
    expected = golden.masks(f"{key}_masks").flatten(1).float()
    ours = run.results.pred_masks.flatten(1).float()
    intersection = expected @ ours.T
    iou = intersection / (expected.sum(1)[:, None] + ours.sum(1) - intersection).clamp(min=1)
    iou[golden[f"{key}_classes"][:, None] != run.results.pred_classes] = -1
    # identical masks: the nearest score decides
    gap = (golden[f"{key}_scores"][:, None] - run.results.scores).abs()
    pairs = []
    for i in (iou.amax(1)).argsort(descending=True).tolist():
        j = int((iou[i] - gap[i] * 0.1).argmax())
        pairs.append((i, j, float(iou[i, j])))
        iou[:, j] = -2
    return pairs


def test_final_instances_are_the_originals(golden, runs):
    for key, run in runs.items():
        expected_areas = golden[f"{key}_mask_areas"]
        assert len(run.results) == len(expected_areas), key
        areas = run.results.pred_masks.flatten(1).sum(1)
        for i, j, iou in match(golden, key, run):
            # pixels in only one of the two: in a tiny mask, a few are more than 0.001
            total = int(expected_areas[i]) + int(areas[j])
            difference = total * (1 - iou) / (1 + iou)
            close = iou >= 0.999 or (0 <= iou and difference <= SMALL_AREA + 0.01)
            assert close, (key, i, iou, difference)
            gap = abs(float(golden[f"{key}_scores"][i] - run.results.scores[j]))
            assert gap <= SCORES, (key, i, gap)
            boxes = golden[f"{key}_boxes_tight"][i], run.results.pred_boxes.tensor[j]
            # a mask bit that flips at the edge moves a tight box by at most a pixel or two
            assert (boxes[0] - boxes[1]).abs().max() <= 2, (key, i, boxes)


def _step(size: int, kept: int) -> int:
    """The slice step that leaves ``kept`` of ``size`` entries."""
    return next(step for step in range(1, size + 1) if len(range(0, size, step)) == kept)


def test_soft_masks_of_the_kept_instances_are_the_originals(golden, runs):
    compared = 0
    for key, run in runs.items():
        if f"{key}_soft_quarter" not in golden:
            continue
        expected, classes = golden[f"{key}_soft_quarter"], golden[f"{key}_classes"]
        # the file's slice spec is that of one of its cases: the steps follow from the shapes
        sizes = (len(classes), *run.kept.masks.shape[1:])
        steps = [_step(size, kept) for size, kept in zip(sizes, expected.shape)]
        ours = run.kept.masks[:, :: steps[1], :: steps[2]].flatten(1)
        classes = classes[:: steps[0]]
        for mask, label in zip(expected.flatten(1), classes):
            same_class = ours[run.kept.classes == label]
            nearest = (same_class - mask).abs().amax(dim=1).min()
            assert nearest <= SCORES, (key, nearest)
            compared += 1
    assert compared


@pytest.fixture(scope="module", params=TRAINED)
def training(request, load_golden, build):
    """(golden, model after a backward pass over the batch T0, T1, losses)."""
    golden = load_golden(request.param)
    table = golden.meta["table"]
    model, cfg = build(golden, table)
    # the official code sees boxes one pixel smaller
    model.assigner.inclusive_boxes = not table.startswith("adelaidet")
    model.train()
    inputs = []
    while f"T{len(inputs)}_image" in golden:
        key = f"T{len(inputs)}"
        image = network_input(golden[f"{key}_image"], cfg)
        instances = Instances(tuple(image.shape[1:]))
        instances.gt_boxes = Boxes(golden[f"{key}_gt_boxes"])
        instances.gt_classes = golden[f"{key}_gt_classes"]
        instances.gt_masks = BitMasks(golden.masks(f"{key}_gt_masks"))
        inputs.append({"image": image, "instances": instances})
    losses = model(inputs)
    sum(losses.values()).backward()
    return golden, model, losses


def test_training_losses_are_the_originals(training):
    golden, _, losses = training
    for ours, theirs in (("loss_mask", "T_loss_ins"), ("loss_category", "T_loss_cate")):
        torch.testing.assert_close(losses[ours].double(), golden[theirs], rtol=LOSSES, atol=0)


def test_gradient_norms_are_the_originals(training):
    golden, model, _ = training
    parameters = dict(model.named_parameters())
    rules = recognize(golden.meta["T_grad_names"]).rules
    names = [find_new_name(name, rules) for name in golden.meta["T_grad_names"]]
    norms = torch.stack([parameters[name].grad.double().norm() for name in names])
    torch.testing.assert_close(norms, golden["T_grad_norms"], rtol=GRADIENT_NORMS, atol=0)
    trained = [p for p in parameters.values() if p.requires_grad]
    assert len(trained) == golden.meta["T_trainable_params"]
    total = torch.stack([p.grad.double().norm() for p in trained]).norm()
    torch.testing.assert_close(total, golden["T_total_grad_norm"], rtol=GRADIENT_NORMS, atol=0)


def test_every_trained_parameter_gets_a_gradient(training):
    golden, model, _ = training
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    # where the original has none (a level without positives), ours is zero
    rules = recognize(golden.meta["T_grad_names"]).rules
    theirs = {find_new_name(name, rules) for name in golden.meta["T_params_without_grad"]}
    assert {name for name, p in trained.items() if not p.grad.any()} == theirs
