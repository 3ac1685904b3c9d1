"""The pieces of AdaptIS against the original functions."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from solo_d2.layers.adain import AdaIN
from solo_d2.layers.points import read_at_points, relative_coordinates
from solo_d2.modeling.adaptis.automatic import ProposalSelection, find_peaks
from solo_d2.modeling.adaptis.criterion import (
    AdaptiveThreshold,
    mask_iou,
    mask_quality,
    normalized_focal_loss,
    normalized_focal_loss_softmax,
    proposal_loss,
)
from solo_d2.modeling.adaptis.head import Controller, DenseHead, SelectionHead, resize_corners
from solo_d2.modeling.adaptis.panoptic import PanopticAssembler, vote
from solo_d2.modeling.adaptis.targets import dual_targets, score_targets, top20_targets

pytestmark = pytest.mark.golden

# Integers, labels of -1, lists of accepted candidates and id maps must be equal.
TOLERANCES = {
    "values": {"rtol": 1e-4, "atol": 1e-5},
    "city": {"rtol": 1e-4, "atol": 2e-4},
    "gradients": {"rtol": 1e-3, "atol": 1e-6},
}
# Names in a small module of the golden file -> ours; a norm comes two after its layer.
LAYERS = (
    (r"(?:controller\.)?controller\.(\d+)", "layers", 3),
    (r"block0\.(\d+)", "convs", 3),
    (r"convhead\.(\d+)", "convs", 3),
    (r"layers\.(\d+)", "convs", 3),
)


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("adaptis_parts")


def check(actual: torch.Tensor, expected: torch.Tensor, kind: str = "values") -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), **TOLERANCES[kind])


def numbered(golden, prefix: str) -> list[int]:
    """Indices k of the arrays "<prefix><k>_..."."""
    found = {int(m[1]) for key in golden.arrays.files if (m := re.match(rf"{prefix}(\d+)_", key))}
    assert found
    return sorted(found)


# ---- layers


def adain(golden, **options) -> AdaIN:
    channels, dim = golden["adain_scale_W"].shape
    layer = AdaIN(dim, channels, **options)
    layer.load_state_dict(
        {
            f"{name}.{ours}": golden[f"adain_{name}_{theirs}"]
            for name in ("scale", "bias")
            for ours, theirs in (("weight", "W"), ("bias", "b"))
        }
    )
    return layer


def test_adain_and_its_gradients_are_the_originals(golden):
    layer = adain(golden)
    x, w = golden["adain_x"].requires_grad_(), golden["adain_w"].requires_grad_()
    y = layer(x, w)
    check(y.detach(), golden["adain_y"])
    y.backward(golden["adain_upstream"])
    for ours, theirs in (
        (x, "gx"),
        (w, "gw"),
        (layer.scale.weight, "g_scale_W"),
        (layer.bias.bias, "g_bias_b"),
    ):
        check(ours.grad, golden[f"adain_{theirs}"], "gradients")


@torch.no_grad()
def test_adain_of_mxnet_is_the_originals(golden):
    layer = adain(golden, eps=0.0, bias_plus_one=False)
    check(layer(golden["adain_x"], golden["adain_w"]), golden["adain_y_mx"])


@torch.no_grad()
def test_adain_of_a_constant_channel_is_the_originals(golden):
    check(adain(golden)(golden["adain_const_x"], golden["adain_w"]), golden["adain_const_y"])


@torch.no_grad()
def test_modulation_without_normalization_is_the_originals(golden):
    # a channel with mean 0 and variance 1 - eps does not change
    layer = adain(golden)
    x, w = golden["adain_x"], golden["adain_w"]
    modulated = x * layer.scale(w)[:, :, None, None] + layer.bias(w)[:, :, None, None] + 1
    check(modulated, golden["adain_y_nonorm"])


def test_coordinates_are_the_originals(golden):
    assert golden.meta["coord_cases"]
    for k, case in enumerate(golden.meta["coord_cases"]):
        maps = relative_coordinates(
            golden[f"coord{k}_points"],
            tuple(case["size"]),
            radius=case["radius"],
            scale=case["spatial_scale"],
            append_distance=case["append_dist"],
        )
        check(maps, golden[f"coord{k}_out"])


def test_vectors_at_points_are_the_originals(golden):
    assert golden.meta["eqf_cases"]
    for k, case in enumerate(golden.meta["eqf_cases"]):
        vectors = read_at_points(
            golden[f"eqf{k}_feat"], golden[f"eqf{k}_points"], case["spatial_scale"]
        )
        check(vectors, golden[f"eqf{k}_out"])


# ---- losses


def loss_and_gradient(loss, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    values = loss(logits)
    values.mean().backward()
    return values.detach(), logits.grad


def test_focal_loss_of_masks_and_its_gradient_are_the_originals(golden):
    labels = golden["nfs_labels"]
    for k, case in enumerate(golden.meta["nfs_cases"]):
        count = 1.0
        if not case["size_average"]:
            count = (labels.flatten(1) != -1).sum(dim=1) + 1e-12
        values, gradient = loss_and_gradient(
            lambda x, case=case, count=count: (
                count * normalized_focal_loss(x, labels, alpha=case["alpha"], gamma=case["gamma"])
            ),
            golden["nfs_logits"],
        )
        check(values, golden[f"nfs{k}_loss"])
        check(gradient, golden[f"nfs{k}_grad"], "gradients")


def test_semantic_focal_loss_and_its_gradient_are_the_originals(golden):
    labels = golden["nfm_labels"].long()
    for k, case in enumerate(golden.meta["nfm_cases"]):
        count = 1.0
        if not case["size_average"]:
            count = (labels.flatten(1) != -1).sum(dim=1) + 1e-10
        values, gradient = loss_and_gradient(
            lambda x, case=case, count=count: (
                count * normalized_focal_loss_softmax(x, labels, gamma=case["gamma"])
            ),
            golden["nfm_logits"],
        )
        check(values, golden[f"nfm{k}_loss"])
        check(gradient, golden[f"nfm{k}_grad"], "gradients")


def test_proposal_loss_is_the_originals(golden):
    loss = proposal_loss(golden["bce_logits"][:, 0], golden["bce_labels"])
    check(loss, golden["bce_loss"])


# ---- targets


def test_adaptive_threshold_moves_as_the_original(golden):
    threshold = AdaptiveThreshold(0.4)
    average = 0.0
    for logits, gt, value, ema in zip(
        golden["aiou_logits"], golden["aiou_gt"], golden["aiou_thresh"], golden["aiou_ema"]
    ):
        iou = float(threshold.update(logits[:, 0].sigmoid(), gt[:, 0]))
        # what the original logs: a running mean over the updates that were made
        average = 0.9 * average + 0.1 * iou if (gt > 0).any() else average
        check(threshold.value, value)
        assert average == pytest.approx(float(ema), rel=1e-4)


@pytest.fixture(scope="module")
def points_of_objects(golden):
    """IoU and quality (B, N) of the proposal case, after the threshold has moved."""
    case = golden.meta["prop"]
    probs, gt = golden["prop_mask_logits"][:, 0].sigmoid(), golden["prop_gt"][:, 0]
    threshold = AdaptiveThreshold(case["iou_thresh_before"])
    threshold.update(probs, gt)
    assert float(threshold.value) == pytest.approx(case["iou_thresh_after"], abs=1e-12)
    shape = (case["batch"], case["points"])
    iou = mask_iou(probs, gt, threshold.value).view(shape)
    return iou, mask_quality(probs, gt).view(shape)


def test_judgements_of_points_are_the_originals(golden, points_of_objects):
    iou, quality = points_of_objects
    check(iou, golden["prop_iou"])
    check(quality, golden["prop_prob_score"])


@pytest.mark.parametrize(
    "rule, key",
    [
        (score_targets, "prop_labels"),
        (top20_targets, "prop_labels_top20"),
        (dual_targets, "prop_labels_dual"),
    ],
)
def test_proposal_targets_are_the_originals(golden, points_of_objects, rule, key):
    targets, expected = rule(*points_of_objects), golden[key]
    for value in (-1, 0, 1):
        assert torch.equal(targets == value, expected == value), value
    check(targets, expected)


def test_proposal_loss_of_the_stage_and_its_gradient_are_the_originals(golden, points_of_objects):
    targets = score_targets(*points_of_objects).flatten()
    values, gradient = loss_and_gradient(
        lambda x: proposal_loss(x[:, 0], targets), golden["prop_logits"]
    )
    check(values, golden["prop_loss"])
    check(gradient, golden["prop_grad"], "gradients")


# ---- heads


def our_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the official heads -> ours; see LAYERS."""
    renamed = {}
    for name, tensor in state_dict.items():
        name = name.replace("adain.affine_", "adain.0.")
        for pattern, target, period in LAYERS:
            if match := re.match(pattern, name):
                layer, place = divmod(int(match[1]), period)
                norm = ".norm" if place == 2 else ""
                name = f"{target}.{layer}{norm}{name[match.end() :]}"
                break
        renamed[name] = tensor
    return renamed


def load(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """Load all tensors; only counters may be unused."""
    result = module.load_state_dict(state_dict, strict=False)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "num_batches" not in name]
    return module.eval()


def weights_of(golden, module: str, suffix: str = "") -> dict[str, torch.Tensor]:
    """The tensors under "<module>_sd<suffix>/"."""
    start = f"{module}_sd{suffix}/"
    return {k[len(start) :]: golden[k] for k in golden.arrays.files if k.startswith(start)}


def check_statistics(golden, module: nn.Module, name: str) -> None:
    """Running statistics after one forward pass in training mode."""
    after = our_names(weights_of(golden, name, "_after"))
    assert after
    for key, value in after.items():
        check(module.state_dict()[key], value)


@torch.no_grad()
def test_map_controller_is_the_originals(golden):
    weights = our_names(weights_of(golden, "ctrlconv"))
    dim, channels = weights["layers.0.weight"].shape[:2]
    controller = load(Controller(channels, dim, variant="toy"), weights)
    check(controller.prepare(golden["head_feat"]), golden["ctrlconv_eval"])
    controller.train()
    check(controller.prepare(golden["head_feat"]), golden["ctrlconv_train"])
    check_statistics(golden, controller, "ctrlconv")


@torch.no_grad()
def test_vector_controller_is_the_originals(golden):
    weights = our_names(weights_of(golden, "ctrlfc"))
    dim, channels = weights["layers.0.weight"].shape
    controller = load(Controller(channels, dim, variant="cityscapes"), weights)
    check(controller.layers(golden["ctrlfc_in"]), golden["ctrlfc_eval"])
    controller.train()
    check(controller.layers(golden["ctrlfc_in"]), golden["ctrlfc_train"])
    check_statistics(golden, controller, "ctrlfc")


@torch.no_grad()
def test_dense_head_is_the_originals(golden):
    weights = our_names(weights_of(golden, "convhead"))
    last = weights.pop("convs.3.weight"), weights.pop("convs.3.bias")
    weights["predictor.weight"], weights["predictor.bias"] = last
    outputs, dim = last[0].shape[:2]
    channels = weights["convs.0.weight"].shape[1]
    head = load(DenseHead(channels, dim, outputs, num_convs=3), weights)
    check(head(golden["head_feat"]), golden["convhead_eval"])
    head.train()
    check(head(golden["head_feat"]), golden["convhead_train"])


def toy_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names of a toy selection head's tensors, without the controller's."""
    last = {"block1.0": "convs.3", "block1.2": "convs.3.norm", "block1.3": "predictor"}
    renamed = {}
    for name, tensor in our_names(state_dict).items():
        for theirs, ours in last.items():
            name = re.sub(rf"^{re.escape(theirs)}\.", f"{ours}.", name)
        renamed[name] = tensor
    return {k: v for k, v in renamed.items() if not k.startswith("layers.")}


@torch.no_grad()
def test_toy_selection_head_is_the_originals(golden):
    all_weights = weights_of(golden, "toyhead")
    weights = toy_weights(all_weights)
    control = our_names({k: v for k, v in all_weights.items() if k.startswith("controller.")})
    dim, channels = control["layers.0.weight"].shape[:2]
    controller = load(Controller(channels, dim, variant="toy"), control)
    head = load(SelectionHead(channels, dim, norm_radius=9.0), weights)
    feature, points = golden["head_feat"], golden["head_points"]

    def run() -> torch.Tensor:
        vectors = controller(controller.prepare(feature), points, 1.0)
        return head(head.prepare(feature), points, vectors, 1.0)

    check(run(), golden["toyhead_eval"])
    controller.train(), head.train()
    check(run(), golden["toyhead_train"])


def city_weights(state_dict: dict[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    """Our names of the tensors of one of the stride-4 heads."""
    places = {
        "adaptis_head": {
            "block0.0": "convs.0",
            "block0.2": "convs.0.norm",
            "block0.3": "convs.1",
            "block0.4": "convs.2",
            "block1.0": "convs.3",
            "block1.1": "convs.4",
            "block1.2": "convs.5",
            "block1.3": "predictor",
            "adain.affine_scale": "adain.0.scale",
            "adain.affine_bias": "adain.0.bias",
        },
        "segmentation_head": {
            "layers.0": "convs.0",
            "layers.1": "convs.1",
            "layers.2": "predictor",
        },
        "proposals_head": {"layers.0": "convs.0", "layers.2": "convs.1", "layers.3": "predictor"},
    }[head]
    body = {"body.0": "depthwise", "body.1": "pointwise", "body.2": "norm"}
    renamed = {}
    for name, tensor in state_dict.items():
        if not name.startswith(f"{head}.") or ".controller." in name:
            continue
        name = name.removeprefix(f"{head}.")
        for theirs, ours in {**places, **body}.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\1{ours}.", name, count=1)
        renamed[name] = tensor
    return renamed


@pytest.fixture(scope="module")
def city(stand_in_weights):
    return stand_in_weights("adaptis_cityscapes_heads", 0)


@torch.no_grad()
@pytest.mark.parametrize("formula", ["mx", "pt"])
def test_stride_4_selection_head_is_the_port(golden, city, formula):
    feature, points = golden["city_feat"].float(), golden["city_points"]
    control = our_names(
        {
            k.removeprefix("adaptis_head."): v
            for k, v in city.items()
            if k.startswith("adaptis_head.controller.")
        }
    )
    dim, channels = control["layers.0.weight"].shape
    controller = load(Controller(channels, dim, variant="cityscapes"), control)
    up0 = golden["city_inst_mx_up0"]
    stride = up0.shape[-1] // feature.shape[-1]
    vectors = controller(controller.prepare(feature), points, 1 / stride)
    check(vectors, golden["city_w"], "city")
    head = SelectionHead(
        channels, dim, variant="cityscapes", norm_radius=280.0, bias_plus_one=formula == "pt"
    )
    load(head, city_weights(city, "adaptis_head"))
    if formula == "mx":
        head.adain[0].eps = 1e-12  # the original has none
    logits = head(head.prepare(feature), points, vectors, 1 / stride)
    check(logits, golden[f"city_inst_{formula}"], "city")
    if formula == "mx":
        enlarged = resize_corners(logits[:1], (up0.shape[-2], up0.shape[-1]))[0]
        check(enlarged, up0, "city")


@torch.no_grad()
@pytest.mark.parametrize("name, key", [("segmentation_head", "sem"), ("proposals_head", "prop")])
def test_stride_4_dense_heads_are_the_port(golden, city, name, key):
    weights = city_weights(city, name)
    outputs, dim = weights["predictor.weight"].shape[:2]
    feature = golden["city_feat"].float()
    head = DenseHead(feature.shape[1], dim, outputs, num_convs=2, separable=True, dropout=0.5)
    check(load(head, weights)(feature), golden[f"city_{key}"], "city")


# ---- inference


def test_peaks_and_their_floods_are_the_originals(golden):
    assert golden.meta["peak_cases"]
    for k, case in enumerate(golden.meta["peak_cases"]):
        peaks, labels = find_peaks(
            golden[f"peak{k}_map"].numpy(),
            min_value=case["prob_thresh"],
            eps=case["eps"],
            step=case["step_size"],
        )
        assert np.array_equal(peaks, golden[f"peak{k}_points"].numpy()), k
        assert np.array_equal(labels, golden[f"peak{k}_colors"].numpy()), k


class CannedNetwork:
    """Returns the recorded mask i for request i if that is for the recorded point i.

    The original decoded one mask at a time, so only these are recorded.
    """

    def __init__(self, golden, prefix: str):
        self.points = golden[f"{prefix}_mask_points"]
        self.masks = golden[f"{prefix}_mask_u8"]
        self.stride, self.asked = 1, 0

    def soft_masks(self, points: torch.Tensor) -> torch.Tensor:
        if len(points) == 0:
            return self.masks[:0].float()
        assert torch.equal(points.long(), self.points[self.asked : self.asked + 1].long())
        self.asked += 1
        return self.masks[self.asked - 1 : self.asked].float() / 256

    def enlarge(self, masks: torch.Tensor) -> torch.Tensor:
        return masks


# parameter of a case -> option of ``ProposalSelection``, which has the published code's defaults
PARAMETERS = {
    "thresh1": "mask_threshold",
    "thresh2": "max_occupied",
    "max_iters": "max_candidates",
    "cut_radius": "cut_radius",
    "ithresh": "min_things_prob",
    "fl_blur": "blur",
    "fl_prob": "min_value",
    "fl_eps": "eps",
    "fl_step": "step",
}


def test_automatic_mode_on_canned_outputs_is_the_originals(golden):
    assert golden.meta["greedy_cases"]
    for k, case in enumerate(golden.meta["greedy_cases"]):
        prefix = f"greedy{k}"
        options = {PARAMETERS[name]: value for name, value in case["params"].items()}
        selection = ProposalSelection(**options)
        things, stuff = golden[f"{prefix}_things_prob"], golden[f"{prefix}_stuff_prob"]
        ignored = torch.zeros(things.shape[-2:], dtype=torch.bool)
        if f"{prefix}_ignore_mask" in golden:
            ignored = golden[f"{prefix}_ignore_mask"].bool()

        values = selection.search_map(golden[f"{prefix}_proposals_map"], things, ignored)
        check(torch.from_numpy(values), golden[f"{prefix}_pmap_blurred"])
        # all of them, as recorded
        candidates = replace(selection, max_candidates=10**6).candidates(values)
        assert np.array_equal(candidates, golden[f"{prefix}_candidates"].numpy()), k

        network = CannedNetwork(golden, prefix)
        candidates = candidates[: selection.max_candidates]
        masks = selection.select(candidates, network, ignored, batch_size=1)
        assert network.asked == case["n_masks_requested"], k
        accepted = network.masks[golden[f"{prefix}_accepted"].long()].float() / 256
        if selection.cut_radius == 0:
            assert torch.equal(masks, accepted), k
        else:
            assert len(masks) == len(accepted), k
            assert torch.equal(masks, accepted * (masks > 0)), k

        assembler = PanopticAssembler(
            num_stuff=case["n_stuff"], min_segment_area=case["min_segment_area"], **case["top"]
        )
        segmentation = assembler.compete(masks, torch.cat([stuff, things]), ignored)
        check(segmentation.background, golden[f"{prefix}_background"])
        expected = golden[f"{prefix}_instances_mask"]
        assert torch.equal(segmentation.ids, expected.int()), k
        assert torch.equal(segmentation.semantic, golden[f"{prefix}_semantic"].long()), k
        classes, scores = vote(masks, things, mask_threshold=selection.mask_threshold)
        expected = golden[f"{prefix}_instance_class"].long()
        assert torch.equal(classes + case["n_stuff"], expected), k

        _, segments = assembler.segments(segmentation, classes, scores)
        found = [[s["category_id"] + s["isthing"] * case["n_stuff"], s["area"]] for s in segments]
        assert found == golden[f"{prefix}_segments"].tolist(), k
