"""The official toy model of AdaptIS, with stand-in weights: forward, training, automatic mode."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, ImageList, Instances

from solo_d2.checkpoint.rename_rules import convert, find_new_name, recognize
from solo_d2.config import load_config
from solo_d2.layers.points import read_at_points
from solo_d2.modeling.adaptis import AdaptIS
from solo_d2.modeling.adaptis.automatic import ProposalSelection
from solo_d2.modeling.adaptis.panoptic import PanopticAssembler

pytestmark = pytest.mark.golden

CONFIG = Path(__file__).resolve().parents[2] / "configs/AdaptIS/Base-AdaptIS-UNet.yaml"
LOGITS = {"atol": 1e-3, "rtol": 1e-3}
LOSSES = 1e-4  # relative
GRADIENT_NORMS = 5e-3  # relative
# Norm of gradients that are really 0: of a scale or shift right before instance normalization.
DEAD_GRADIENTS = 1e-3
# The first step of Adam is the sign of the gradient, so tiny gradients may flip it.
AFTER_ADAM = {"atol": 1e-3, "rtol": 1e-3}
EQUAL_PIXELS = 0.995  # of id maps
# parameter of meta["auto_cases"] -> option of ``ProposalSelection``
PARAMETERS = {
    "thresh1": "mask_threshold",
    "thresh2": "max_occupied",
    "ithresh": "min_things_prob",
    "fl_prob": "min_value",
    "fl_eps": "eps",
    "fl_step": "step",
    "fl_blur": "blur",
    "max_iters": "max_candidates",
    "cut_radius": "cut_radius",
}
# the file's name for the case with the frozen parts in eval mode, or not
FROZEN = {"train2_frozenbn": True, "train2_train": False}


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("adaptis_full")


@pytest.fixture(scope="module")
def weights(golden, stand_in_weights):
    return stand_in_weights("adaptis_toy_unet", golden.meta["weights_seed"])


@pytest.fixture(scope="module")
def build(weights):
    def make(stage: str, *options) -> AdaptIS:
        cfg = load_config(str(CONFIG), opts=["MODEL.ADAPTIS.STAGE", stage, *options])
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        cfg.MODEL.DEVICE = "cpu"
        state_dict = convert(weights)
        classes = len(state_dict["semantic_head.predictor.bias"])
        cfg.MODEL.ADAPTIS.NUM_THINGS = classes - cfg.MODEL.ADAPTIS.NUM_STUFF
        model = build_model(cfg)
        if stage == "instance":
            state_dict = {k: v for k, v in state_dict.items() if "proposal_head" not in k}
        result = model.load_state_dict(state_dict, strict=False)
        assert not result.unexpected_keys
        missing = [k for k in result.missing_keys if "num_batches_tracked" not in k]
        assert missing in ([], ["iou_threshold.value"])
        return model.eval()

    return make


@pytest.fixture(scope="module")
def model(build) -> AdaptIS:
    return build("proposals")


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), **LOGITS)


def image_of(array: torch.Tensor) -> torch.Tensor:
    """uint8 (H, W, 3) RGB, as the config expects -> float (3, H, W)."""
    return array.permute(2, 0, 1).float()


def as_published(images: ImageList, inputs: list[dict]) -> ImageList:
    """The batch with pixels scaled in the original's order of operations.

    One bit in a pixel can switch a ReLU or a maximum, and a single one moves some gradients by
    more than the tolerance. Their norms can be compared only for identical bits.
    """
    pixels = torch.stack([x["image"] for x in inputs])
    return ImageList((pixels / 255 - 0.5) / 0.5, images.image_sizes)


def swapped(points: torch.Tensor) -> torch.Tensor:
    """(row, column) -> (x, y)."""
    return points.flip(-1)


def scenes(golden) -> list[str]:
    names = sorted({k.split("_")[0] for k in golden.arrays.files if k.startswith("scene")})
    assert names
    return names


def embed(model: AdaptIS, inputs: list[dict]):
    """(feature map, embedding)"""
    images = model.preprocess_image(inputs)
    feature = model.feature_map(model.backbone(images.tensor))
    size = tuple(images.tensor.shape[-2:])
    return feature, model.embed(feature, images.image_sizes, size)


# ---- forward


@pytest.fixture(scope="module")
@torch.no_grad()
def embeddings(golden, model):
    """scene -> (feature map, embedding, points (1, P, 2))."""
    return {
        name: (
            *embed(model, [{"image": image_of(golden[f"{name}_image"])}]),
            golden[f"{name}_points"][None],
        )
        for name in scenes(golden)
    }


def test_features_are_the_originals(golden, embeddings):
    for name, (features, _, _) in embeddings.items():
        feature = features[0]
        check(feature[:, 2::8, 2::8], golden[f"{name}_features_sub"])
        check(feature.flatten(1).mean(1), golden[f"{name}_features_mean"])
        check(feature.flatten(1).std(1), golden[f"{name}_features_std"])


@torch.no_grad()
def test_control_vectors_are_the_originals(golden, model, embeddings):
    for name, (_, embedding, points) in embeddings.items():
        vectors = model.controller(embedding.control, points, 1 / model.stride)
        check(vectors, golden[f"{name}_controller_w"])


@torch.no_grad()
def test_logits_are_the_originals(golden, model, embeddings):
    for name, (feature, embedding, points) in embeddings.items():
        expected = golden[f"{name}_instances"]
        logits = model.decode(embedding, points)[: len(expected), 0]
        check(logits, expected)
        check(model.semantic_head(feature)[0], golden[f"{name}_semantic"])
        proposals = model.proposal_head(feature)
        check(proposals[0, 0], golden[f"{name}_proposals_map_logits"])
        at_points = read_at_points(proposals, points, 1 / model.stride)
        check(at_points, golden[f"{name}_proposals"])


@torch.no_grad()
def test_point_prompts_of_a_scene_are_its_logits(golden, model):
    for name in scenes(golden):
        expected = golden[f"{name}_instances"].sigmoid()
        inputs = {
            "image": image_of(golden[f"{name}_image"]),
            "points": swapped(golden[f"{name}_points"]),
        }
        instances = model([inputs])[0]["instances"]
        assert len(instances) == len(inputs["points"])
        check(instances.mask_probabilities[: len(expected)], expected)


@torch.no_grad()
def test_a_batch_of_images_is_the_originals(golden, model):
    images = [{"image": image_of(image)} for image in golden["batch_images"]]
    feature, embedding = embed(model, images)
    points = golden["batch_points"]
    check(model.decode(embedding, points)[:, 0], golden["batch_instances"])
    at_points = read_at_points(model.proposal_head(feature), points, 1 / model.stride)
    check(at_points, golden["batch_proposals"])


# ---- automatic mode


@pytest.fixture(scope="module")
def automatic(golden, build):
    """case -> the result of the whole pipeline for the first scene."""
    results = {}
    assert golden.meta["auto_cases"]
    image = {"image": image_of(golden["scene0_image"])}
    model = build("proposals")
    for k, case in enumerate(golden.meta["auto_cases"]):
        options = {PARAMETERS[name]: value for name, value in case["params"].items()}
        selection = ProposalSelection(**options)
        # the file was made with the original's mirrored points
        model.options = replace(
            model.options, proposals=selection, flip=case["use_flip"], flip_original=True
        )
        embedded = model.embed_image(image["image"])
        proposals, semantic = embedded.proposals, embedded.semantic
        occupied = torch.zeros(proposals.shape, dtype=torch.bool)
        values = selection.search_map(proposals, semantic[1:], occupied)
        # all of them, as recorded
        candidates = replace(selection, max_candidates=10**6).candidates(values)
        images = model.preprocess_image([image])
        with torch.no_grad():
            (found,) = model.inference(images, model.backbone(images.tensor))
            output = model([image])[0]
        segmentation = PanopticAssembler().compete(found.pred_masks, semantic)
        results[k] = (case, values, candidates, found.pred_masks, segmentation, output)
    return results


def test_candidates_of_the_whole_pipeline_are_the_originals(golden, automatic):
    for k, (case, values, candidates, *_) in automatic.items():
        check(torch.from_numpy(values), golden[f"auto{k}_pmap_blurred"])
        if case["float64_candidates_equal"]:
            assert np.array_equal(candidates, golden[f"auto{k}_candidates"].numpy()), k
            assert len(candidates) == case["n_candidates"]


def test_masks_of_the_whole_pipeline_are_the_originals(golden, automatic):
    for k, (case, _, _, masks, segmentation, _) in automatic.items():
        assert len(masks) == int(golden[f"auto{k}_n_accepted"]) == case["n_accepted"]
        threshold = case["params"]["thresh1"]
        areas = torch.stack([(mask > threshold).sum() for mask in masks])
        expected = golden[f"auto{k}_masks_area"].long()
        # a pixel at the threshold may fall on either side
        assert ((areas - expected).abs() <= (0.001 * expected).clamp(min=3)).all(), k
        sums = torch.stack([mask.sum() for mask in masks])
        check(sums, golden[f"auto{k}_masks_sum"])
        check(segmentation.background, golden[f"auto{k}_background"])
        for ours, theirs in (
            (segmentation.ids, "instances_mask"),
            (segmentation.semantic, "semantic"),
        ):
            same = (ours == golden[f"auto{k}_{theirs}"]).float().mean()
            assert same >= EQUAL_PIXELS, (k, theirs)


def test_outputs_are_those_of_the_pipeline(automatic):
    for _, _, _, _, segmentation, output in automatic.values():
        ids, segments = output["panoptic_seg"]
        is_thing = torch.tensor([False] + [s["isthing"] for s in segments])
        assert torch.equal(is_thing[ids.long()], segmentation.ids > 0)
        instances = output["instances"]
        assert torch.equal(instances.pred_masks.any(dim=0), segmentation.ids > 0)
        assert len(instances) == int(is_thing.sum())


# ---- training


def training_inputs(golden, stage: str) -> list[dict]:
    """The batch with the objects as instances and the recorded points."""
    inputs = []
    for i, (image, ids) in enumerate(zip(golden["batch_images"], golden["batch_ids"])):
        objects = ids.unique()
        objects = objects[objects > 0]
        instances = Instances(tuple(ids.shape))
        instances.gt_masks = BitMasks(ids == objects[:, None, None])
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        instances.gt_classes = torch.zeros(len(objects), dtype=torch.long)
        points = golden["train2_points" if stage == "proposals" else "train_points"][i]
        inputs.append({"image": image_of(image), "instances": instances, "points": swapped(points)})
    return inputs


@pytest.fixture(scope="module")
def first_stage(golden, build):
    """(model after one step of Adam, losses, norms of the gradients)."""
    # Channels-last batch norms on the CPU sum in another order: some gradients differ by percents,
    # since ReLU and pooling then pick other pixels.
    model = build("instance").to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    inputs = training_inputs(golden, "instance")
    images = model.preprocess_image(inputs)
    same_bits = as_published(images, inputs)
    check(images.tensor, same_bits.tensor)
    ground_truth = model.prepare_ground_truth(inputs, images)
    losses = model.losses(same_bits, model.backbone(same_bits.tensor), ground_truth)
    sum(losses.values()).backward()
    norms = {name: float(p.grad.double().norm()) for name, p in model.named_parameters()}
    optimizer.step()
    return model, losses, norms


def our_name(golden, weights, name: str) -> str:
    return find_new_name(name, recognize(weights).rules)


def test_the_points_have_the_objects_under_them(golden, build):
    model = build("instance")
    inputs = training_inputs(golden, "instance")
    images = model.preprocess_image(inputs)
    ground_truth = model.prepare_ground_truth(inputs, images)
    masks = torch.cat([x.masks for x in ground_truth])
    expected = torch.cat(
        [
            ids == objects.long()[:, None, None]
            for ids, objects in zip(golden["batch_ids"], golden["train_gt_object"])
        ]
    )
    assert torch.equal(masks == 1, expected)
    assert torch.equal(masks == 0, ~expected)


def test_losses_of_the_first_stage_are_the_originals(golden, first_stage):
    _, losses, _ = first_stage
    losses = {name: float(loss.detach()) for name, loss in losses.items()}
    assert losses["loss_instance"] == pytest.approx(
        float(golden["train1_instance_loss"].mean()), rel=LOSSES
    )
    assert losses["loss_semantic"] == pytest.approx(
        0.75 * float(golden["train1_semantic_loss"].mean()), rel=LOSSES
    )
    assert sum(losses.values()) == pytest.approx(float(golden["train1_total"]), rel=LOSSES)


def test_gradient_norms_of_the_first_stage_are_the_originals(golden, first_stage, weights):
    _, _, norms = first_stage
    dead = golden.meta["observed_float32_vs_float64"]["train1"]["dead_params"]
    names = golden.arrays["train1_grad_names"].tolist()
    assert {our_name(golden, weights, name) for name in names} == set(norms)
    for name, expected in zip(names, golden["train1_grad_norms"].tolist()):
        norm = norms[our_name(golden, weights, name)]
        if name in dead:
            assert norm < DEAD_GRADIENTS, name
        else:
            assert norm == pytest.approx(expected, rel=GRADIENT_NORMS), name


def test_parameters_and_statistics_after_a_step_are_the_originals(golden, first_stage, weights):
    state_dict = first_stage[0].state_dict()
    compared = 0
    for key in golden.arrays.files:
        if key.startswith(("train1_after_adam/", "train1_after_buffers/")):
            ours = state_dict[our_name(golden, weights, key.split("/", 1)[1])]
            torch.testing.assert_close(ours, golden[key], **AFTER_ADAM)
            compared += 1
    assert compared


@pytest.fixture(scope="module", params=FROZEN)
def second_stage(request, golden, build):
    """(prefix, model after a backward pass, the loss)."""
    model = build("proposals")
    model.freeze_bn = FROZEN[request.param]
    model.train()
    loss = model(training_inputs(golden, "proposals"))["loss_proposal"]
    loss.backward()
    return request.param, model, loss


def test_loss_of_the_second_stage_is_the_originals(golden, second_stage):
    prefix, model, loss = second_stage
    expected = float(golden[f"{prefix}_loss"].mean())
    assert loss.item() == pytest.approx(expected, rel=LOSSES)
    threshold = float(golden[f"{prefix}_iou_thresh"])
    assert float(model.criterion.iou_threshold.value) == pytest.approx(threshold, abs=1e-9)


def test_only_the_proposal_head_has_gradients_and_they_are_the_originals(
    golden, second_stage, weights
):
    prefix, model, _ = second_stage
    norms = {n: p.grad.double().norm() for n, p in model.named_parameters() if p.grad is not None}
    names = golden.arrays[f"{prefix}_grad_names"].tolist()
    assert {our_name(golden, weights, name) for name in names} == set(norms)
    assert all(name.startswith("proposal_head.") for name in norms)
    for name, expected in zip(names, golden[f"{prefix}_grad_norms"].tolist()):
        norm = float(norms[our_name(golden, weights, name)])
        assert norm == pytest.approx(expected, rel=GRADIENT_NORMS), name


def test_statistics_of_the_frozen_network_drift_or_not_as_the_originals(golden, second_stage):
    prefix, model, _ = second_stage
    mean = model.backbone.input_norm.running_mean
    check(mean, golden[f"{prefix}_image_bn_running_mean_after"])


def test_labels_of_the_second_stage_are_the_originals(golden, build, second_stage):
    prefix, *_ = second_stage
    model = build("proposals")
    model.freeze_bn = FROZEN[prefix]
    model.train()
    inputs = training_inputs(golden, "proposals")
    images = model.preprocess_image(inputs)
    ground_truth = model.prepare_ground_truth(inputs, images)
    with torch.no_grad():
        feature, embedding = embed(model, inputs)
        points = torch.stack([x.points for x in ground_truth])
        masks = torch.cat([x.masks for x in ground_truth])
        logits = model.decode(embedding, points)[:, 0]
        count = points.shape[1]
        targets, _ = model.criterion.targets_of(logits.sigmoid(), masks, count)
        at_points = read_at_points(model.proposal_head(feature), points)
    check(targets, golden[f"{prefix}_labels"])
    check(at_points, golden[f"{prefix}_proposals"])
