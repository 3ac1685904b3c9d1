"""AdaptIS on tiny inputs: two stages, three modes of use, bad input, options."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from solo_d2.config import load_config
from solo_d2.layers import masks as mask_ops
from solo_d2.layers.points import relative_coordinates
from solo_d2.modeling.adaptis import AdaptIS
from solo_d2.modeling.adaptis.targets import to_input_frame

SIZE = (40, 56)

UNET = {
    "MODEL.BACKBONE.NAME": "build_adaptis_unet_backbone",
    "MODEL.UNET.WIDTH": 8,
    "MODEL.UNET.LEVELS": 3,
}
FPN = {
    "MODEL.BACKBONE.NAME": "build_mobilenetv2_fpn_backbone",
    "MODEL.MOBILENETV2.WIDTH_MULT": 0.25,
    "MODEL.MOBILENETV2.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ADAPTIS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ADAPTIS.FUSE_DIM": 16,
    "MODEL.ADAPTIS.HEAD": "cityscapes",
}
BACKBONES = {"unet": UNET, "fpn": FPN}
PROPOSALS = {"MODEL.ADAPTIS.STAGE": "proposals"}
every_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)


def tiny_config(*parts: dict):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "AdaptIS",
        "MODEL.PIXEL_MEAN": [127.5] * 3,
        "MODEL.PIXEL_STD": [127.5] * 3,
        "MODEL.ADAPTIS.NUM_THINGS": 3,
        "MODEL.ADAPTIS.NUM_POINTS": 4,
        "MODEL.ADAPTIS.CONV_DIM": 8,
        "MODEL.ADAPTIS.SEMANTIC_DIM": 8,
        "MODEL.ADAPTIS.PROPOSAL_DIM": 8,
        "MODEL.ADAPTIS.NORM_RADIUS": 20.0,
        "DATASETS.TRAIN": (),
        "DATASETS.TEST": (),
    }
    for part in parts:
        options |= part
    return load_config(opts=[x for item in options.items() for x in item])


def tiny_model(*parts: dict) -> AdaptIS:
    torch.manual_seed(0)
    return build_model(tiny_config(*parts))


def finds_all(model: AdaptIS) -> AdaptIS:
    """An untrained model with things in a part of the image and confident masks."""
    model.eval()
    with torch.no_grad():
        model.semantic_head.predictor.bias[1] += 1.0
    model.selection_head.rescale = (3.0, 1.0)
    options = model.options
    low = {"mask_threshold": 0.5, "max_occupied": 0.99, "min_things_prob": 0.1, "min_value": 0.01}
    model.options = replace(
        options,
        proposals=replace(options.proposals, **low),
        random=replace(options.random, min_things_prob=0.1, min_free=0.05),
        assembler=replace(options.assembler, stuff_prob_mult=0.5),
    )
    return model


def image(size=SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator).float()


def annotations(size=SIZE, count: int = 3) -> Instances:
    instances = Instances(size)
    masks = torch.zeros((count, *size), dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[4 + 8 * i : 16 + 8 * i, 6 + 10 * i : 20 + 10 * i] = True
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.arange(count) % 3
    return instances


def batch(*sizes) -> list[dict]:
    return [
        {"image": image(size, seed), "instances": annotations(size)}
        for seed, size in enumerate(sizes or (SIZE, SIZE))
    ]


def losses_of(model, inputs) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return model(inputs)


def check_step(model, inputs) -> dict[str, torch.Tensor]:
    """Losses are finite and reach every trainable parameter, with finite gradients."""
    model.zero_grad(set_to_none=True)
    losses = losses_of(model, inputs)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    return losses


# ---- training


@every_backbone
@pytest.mark.parametrize("stage", [{}, PROPOSALS], ids=["instance", "proposals"])
def test_every_step_is_finite_and_complete_whatever_the_annotations(backbone, stage):
    model = tiny_model(backbone, stage).train()
    ordinary = batch()
    check_step(model, ordinary)
    check_step(model, batch(SIZE, (33, 47)))

    bare = Instances(SIZE)  # as Detectron2's mapper leaves an image without annotations
    bare.gt_boxes, bare.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)
    hidden = annotations()
    hidden.gt_masks.tensor[:] = False
    crowd = annotations()
    crowd.gt_crowd = torch.ones(3, dtype=torch.bool)
    for instances in (bare, hidden, crowd):
        inputs = {"image": image(), "instances": instances}
        losses = check_step(model, [inputs])
        for name in ("loss_instance", "loss_proposal"):
            assert losses.get(name, torch.zeros(())).item() == 0
        check_step(model, [inputs, ordinary[0]])


def test_one_point_of_one_image_has_no_batch_statistics_but_trains():
    model = tiny_model(FPN, {"MODEL.ADAPTIS.NUM_POINTS": 1}).train()
    check_step(model, batch(SIZE))


def test_a_few_steps_lower_the_losses():
    model = tiny_model(UNET).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    inputs = batch()
    totals = []
    for _ in range(15):
        losses = check_step(model, inputs)
        totals.append(float(sum(losses.values()).detach()))
        optimizer.step()
    assert totals[-1] < 0.75 * totals[0]


def test_the_first_stage_logs_the_iou_of_its_masks_now_and_then():
    model = tiny_model(UNET).train()
    nn.init.zeros_(model.selection_head.predictor.weight)
    nn.init.constant_(model.selection_head.predictor.bias, 100.0)  # every pixel is the object's
    inputs = batch()
    for x in inputs:
        x["points"] = torch.tensor([[8.0, 6.0]])
    areas = [float(x["instances"].gt_masks[0].tensor.float().mean()) for x in inputs]
    with EventStorage(20) as storage:
        model(inputs)
        assert storage.latest()["adaptis/mask_iou"][0] == pytest.approx(sum(areas) / 2)
    with EventStorage(21) as storage:
        model(inputs)
        assert "adaptis/mask_iou" not in storage.latest()


def test_given_points_take_the_place_of_drawn_ones():
    model = tiny_model(UNET).train()
    inputs = batch()
    for x in inputs:
        x["points"] = torch.tensor([[8.0, 6.0], [8.0, 6.0]])
    images = model.preprocess_image(inputs)
    ground_truth = model.prepare_ground_truth(inputs, images)
    assert [x.points.tolist() for x in ground_truth] == 2 * [[[6, 8], [6, 8]]]
    object_mask = inputs[0]["instances"].gt_masks.tensor[0]
    assert torch.equal(ground_truth[0].masks[0] == 1, object_mask)
    inputs[0]["points"] = torch.tensor([[8.0, 6.0]])
    with pytest.raises(ValueError, match="same number of points, not 1, 2"):
        model(inputs)


def test_images_too_small_for_batch_norm_are_named_with_their_size():
    model = tiny_model({**UNET, "MODEL.UNET.LEVELS": 5, "MODEL.UNET.WIDTH": 4}).train()
    tiny = annotations((14, 12))
    with pytest.raises(ValueError, match="too small to train: a batch with 12 x 14 pixels"):
        model([{"image": image((14, 12)), "instances": tiny}])
    check_step(model, batch((14, 12), (14, 12)))


def test_padding_counts_in_no_loss():
    model = tiny_model(UNET).train()
    seen = {}

    def record(name):
        def hook(module, arguments, output):
            seen[name] = output

        return hook

    model.semantic_head.register_forward_hook(record("semantic"))
    inputs = batch((40, 56), (24, 32))
    losses = losses_of(model, inputs)
    gradient = torch.autograd.grad(sum(losses.values()), seen["semantic"])[0]
    assert not gradient[1, :, 24:].any() and not gradient[1, :, :, 32:].any()
    assert gradient[0, :, 24:].any()


def test_semantic_labels_are_taken_if_there_are_any_and_painted_otherwise():
    model = tiny_model(UNET)
    inputs = batch()[0]

    def labels_of(inputs):
        images = model.preprocess_image([inputs])
        return model.prepare_ground_truth([inputs], images)[0].semantic

    painted = labels_of(inputs)
    assert painted[5, 7] == 1 and painted[0, 0] == 0 and painted.max() == 3
    sem_seg = torch.full(SIZE, 2)
    sem_seg[0, :3] = torch.tensor([255, -1, 4])
    labels = labels_of(inputs | {"sem_seg": sem_seg})
    assert labels[0, :4].tolist() == [-1, -1, -1, 2]


def test_several_stuff_classes_need_semantic_labels():
    model = tiny_model(UNET, {"MODEL.ADAPTIS.NUM_STUFF": 2}).train()
    inputs = batch()
    inputs[0]["file_name"] = "a.png"
    with pytest.raises(ValueError, match="num_stuff is 2, but image a.png has no 'sem_seg'"):
        model(inputs)
    for x in inputs:
        x["sem_seg"] = torch.zeros(SIZE, dtype=torch.long)
    check_step(model, inputs)


# ---- the second stage


@every_backbone
@pytest.mark.parametrize("freeze_bn", [True, False])
def test_the_second_stage_trains_the_proposal_head_alone(backbone, freeze_bn):
    model = tiny_model(backbone, PROPOSALS)
    model.freeze_bn = freeze_bn
    model.train()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"proposal_head"}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    check_step(model, batch())
    optimizer.step()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    drifted = {name for name in changed if not name.startswith("proposal_head.")}
    assert changed > drifted
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(name.endswith(statistics) for name in drifted - {"iou_threshold.value"})
    assert any(name.endswith("running_mean") for name in drifted) != freeze_bn


def test_a_checkpoint_of_the_first_stage_has_all_but_the_proposal_head():
    first, second = tiny_model(UNET), tiny_model(UNET, PROPOSALS)
    result = second.load_state_dict(first.state_dict(), strict=False)
    assert not result.unexpected_keys
    lacking = {name.split(".")[0] for name in result.missing_keys}
    assert lacking == {"proposal_head", "iou_threshold"}


@pytest.mark.parametrize("target", ["score", "top20", "dual"])
def test_every_rule_trains_the_proposal_head(target):
    rule = {"MODEL.ADAPTIS.PROPOSAL_TARGETS": target, "MODEL.ADAPTIS.NUM_POINTS": 10}
    model = tiny_model(UNET, PROPOSALS, rule).train()
    with torch.no_grad():
        model.selection_head.predictor.bias += 8.0  # masks that fit a little
    loss = check_step(model, batch())["loss_proposal"]
    assert loss > 0


# ---- points


@every_backbone
def test_a_point_gives_one_instance_each_in_their_order(backbone):
    model = finds_all(tiny_model(backbone))
    points = [[3.0, 4.0], [50.0, 30.0], [3.0, 4.0], [55.9, 39.9], [0.0, 0.0]]
    inputs = {"image": image(), "points": points}
    instances = model([inputs])[0]["instances"]
    assert len(instances) == 5 and instances.image_size == SIZE
    assert instances.pred_masks.shape == (5, *SIZE) and instances.pred_masks.dtype == torch.bool
    assert torch.equal(instances.pred_masks, instances.mask_probabilities > model.mask_threshold)
    assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
    torch.testing.assert_close(instances.scores[0], instances.scores[2])
    for i, point in enumerate(points):
        alone = model([inputs | {"points": [point]}])[0]["instances"]
        torch.testing.assert_close(
            alone.mask_probabilities[0], instances.mask_probabilities[i], atol=1e-5, rtol=0
        )
        assert alone.pred_classes[0] == instances.pred_classes[i]


def test_points_are_x_and_y_in_pixels_of_the_original_image():
    model = finds_all(tiny_model(UNET))
    small = {"image": image(), "points": [[10.0, 4.0]]}
    expected = model([small])[0]["instances"].mask_probabilities
    large = small | {"height": 80, "width": 112, "points": [[20.0, 8.0]]}
    instances = model([large])[0]["instances"]
    assert instances.image_size == (80, 112)
    shrunk = torch.nn.functional.avg_pool2d(instances.mask_probabilities[None], 2)[0]
    assert (shrunk - expected).abs().mean() < 0.02
    assert to_input_frame([[20.0, 8.0]], (80, 112), SIZE).tolist() == [[4.0, 10.0]]


@pytest.mark.parametrize(
    "points, message",
    [
        ([], "no points"),
        (np.zeros((0, 2)), "no points"),
        ([[1.0, 2.0, 3.0]], r"must be \(P, 2\)"),
        ([1.0, 2.0], r"must be \(P, 2\)"),
        ([[1.0, 2.0], [56.0, 2.0]], r"point 1 \(x=56, y=2\) is outside .* 56 x 40 pixels"),
        ([[1.0, -0.5]], r"point 0 \(x=1, y=-0.5\) is outside"),
        ([[2.0, 40.0]], r"point 0 \(x=2, y=40\) is outside"),
        ([[float("nan"), 2.0]], r"point 0 \(x=nan, y=2\) is not a number"),
        ([[float("inf"), 2.0]], r"point 0 \(x=inf, y=2\) is outside"),
    ],
)
def test_bad_points_are_one_clear_line(points, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_input_frame(points, SIZE, SIZE)
    assert "\n" not in str(caught.value)


def test_many_points_are_made_in_chunks_that_change_nothing(monkeypatch, largest_float):
    model = finds_all(tiny_model(UNET))
    embedded = model.embed_image(image())
    points = torch.rand(40, 2) * torch.tensor([39.0, 55.0])
    at_once = embedded.soft_masks(points)
    head_map = 8 * SIZE[0] * SIZE[1] * 4
    monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 3 * head_map)
    with largest_float() as largest:
        chunked = embedded.soft_masks(points)
    torch.testing.assert_close(chunked, at_once, atol=1e-5, rtol=0)
    assert largest.bytes <= max(3 * head_map, chunked.numel() * 4)


# ---- automatic


@every_backbone
@pytest.mark.parametrize("stage", [{}, PROPOSALS], ids=["random", "proposals"])
def test_the_automatic_mode_has_instances_panoptic_and_semantic_outputs(backbone, stage):
    model = finds_all(tiny_model(backbone, stage))
    assert model.use_proposals == bool(stage)
    output = model([{"image": image(), "height": 60, "width": 84}])[0]
    instances, (ids, segments) = output["instances"], output["panoptic_seg"]
    assert len(instances) > 0 and instances.image_size == (60, 84)
    assert instances.pred_masks.dtype == torch.bool
    assert instances.pred_masks.sum(dim=0).max() == 1
    boxes = BitMasks(instances.pred_masks).get_bounding_boxes()
    assert torch.equal(instances.pred_boxes.tensor, boxes.tensor)
    assert instances.pred_classes.max() < 3 and (instances.scores > 0).all()
    assert ids.shape == (60, 84) and ids.dtype == torch.int32
    assert sum(s["isthing"] for s in segments) == len(instances)
    assert {*ids.unique().tolist()} - {0} == {s["id"] for s in segments}
    assert output["sem_seg"].shape == (4, 60, 84)
    torch.testing.assert_close(output["sem_seg"].sum(dim=0), torch.ones(60, 84))
    assert (instances.scores.diff() <= 0).all()
    again = model([{"image": image(), "height": 60, "width": 84}])[0]
    assert torch.equal(again["panoptic_seg"][0], ids)


def test_the_random_mode_is_an_option_of_a_model_with_proposals():
    options = PROPOSALS | {"MODEL.ADAPTIS.TEST.MODE": "random"}
    model = finds_all(tiny_model(UNET, options))
    ran = []
    model.proposal_head.register_forward_hook(lambda *_: ran.append(True))
    assert len(model([{"image": image()}])[0]["instances"]) > 0
    assert not ran


def test_no_objects_are_found_where_there_are_none():
    for stage in ({}, PROPOSALS):
        model = tiny_model(UNET, stage).eval()
        with torch.no_grad():
            model.semantic_head.predictor.bias[0] += 50
        output = model([{"image": image()}])[0]
        assert len(output["instances"]) == 0
        assert output["instances"].pred_masks.shape == (0, *SIZE)
        ids, segments = output["panoptic_seg"]
        assert (ids == 1).all()
        assert segments == [
            {"id": 1, "isthing": False, "area": SIZE[0] * SIZE[1], "category_id": 0}
        ]


@every_backbone
def test_images_of_different_sizes_give_the_same_masks_together_and_alone(backbone):
    model = finds_all(tiny_model(backbone, PROPOSALS))
    inputs = [{"image": image(size, 3)} for size in ((40, 56), (33, 47), (64, 20))]
    points = [[[3.0, 4.0], [15.0, 30.0]]] * 3
    for together, alone in zip(model(inputs), [model([x])[0] for x in inputs]):
        assert torch.equal(together["panoptic_seg"][0], alone["panoptic_seg"][0])
        assert torch.equal(together["instances"].scores, alone["instances"].scores)
    prompts = [x | {"points": p} for x, p in zip(inputs, points)]
    for together, x in zip(model(prompts), prompts):
        alone = model([x])[0]["instances"]
        assert torch.equal(together["instances"].mask_probabilities, alone.mask_probabilities)


def test_padding_does_not_enter_the_statistics_of_masks():
    """For given features; padding in a batch changes these in the backbone."""
    model = finds_all(tiny_model(UNET))
    images = model.preprocess_image([{"image": image((40, 56))}, {"image": image((24, 32), 1)}])
    points = torch.tensor([[[3.0, 4.0]], [[9.0, 20.0]]])
    with torch.no_grad():
        feature = model.feature_map(model.backbone(images.tensor))
        embedding = model.embed(feature, images.image_sizes, (40, 56))
        assert embedding.valid.flatten(1).sum(1).tolist() == [40 * 56, 24 * 32]
        x = torch.rand(2, 8, 40, 56)
        control = model.controller(embedding.control, points, 1.0)
        layer = model.selection_head.adain[0]
        masked = layer(x, control, embedding.valid)[1, :, :24, :32]
        torch.testing.assert_close(
            masked, layer(x[1:, :, :24, :32], control[1:])[0], atol=1e-5, rtol=1e-4
        )


@every_backbone
def test_the_mirror_image_gives_the_mirrored_result(backbone):
    # no padding, which is always at the right
    size = (64, 96)
    model = finds_all(tiny_model(backbone, PROPOSALS, {"MODEL.ADAPTIS.TEST.FLIP": True}))
    plain, mirrored = (model.embed_image(x) for x in (image(size), image(size).flip(-1)))
    points = torch.tensor([[10.0, 20.0], [60.0, 3.0]])
    flipped = torch.stack([points[:, 0], 95 - points[:, 1]], dim=1)
    torch.testing.assert_close(
        mirrored.soft_masks(flipped).flip(-1), plain.soft_masks(points), atol=1e-4, rtol=0
    )
    for a, b in ((plain.semantic, mirrored.semantic), (plain.proposals, mirrored.proposals)):
        torch.testing.assert_close(b.flip(-1), a, atol=1e-5, rtol=0)


def test_the_mirror_image_is_averaged_at_the_right_place():
    """A padded symmetric image gives symmetric masks."""
    model = finds_all(tiny_model(FPN, {"MODEL.ADAPTIS.TEST.FLIP": True}))
    half = image((40, 28))
    symmetric = torch.cat([half, half.flip(-1)], dim=2)
    embedded = model.embed_image(symmetric)
    assert embedded.size == (40, 56) and embedded.padded_size == (64, 64)
    left, right = embedded.enlarge(embedded.soft_masks(torch.tensor([[20.0, 10.0], [20.0, 45.0]])))
    alone = tiny_model(FPN)
    alone.load_state_dict(model.state_dict())
    alone.eval().selection_head.rescale = model.selection_head.rescale
    points = torch.tensor([[20.0, 10.0], [20.0, 45.0]])
    plain = alone.embed_image(symmetric)
    one_sided = plain.enlarge(plain.soft_masks(points))

    def asymmetry(a, b):
        return float((a - b.flip(-1)).abs().mean())

    assert asymmetry(left, right) < asymmetry(*one_sided)


def test_the_published_mirror_point_is_one_pixel_off():
    model = finds_all(tiny_model(UNET, {"MODEL.ADAPTIS.TEST.FLIP": True}))
    points = torch.tensor([[10.0, 20.0]])
    right = model.embed_image(image()).soft_masks(points)
    model.options = replace(model.options, flip_original=True)
    assert not torch.allclose(model.embed_image(image()).soft_masks(points), right)


# ---- options


@pytest.mark.parametrize(
    "options",
    [
        {"MODEL.ADAPTIS.HEAD": "cityscapes"},
        {"MODEL.UNET.LEVELS": 5, "MODEL.UNET.WIDTH": 4},
        {"MODEL.ADAPTIS.MIN_OBJECT_AREA": 100},
        {"MODEL.ADAPTIS.IGNORED_PROB": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_config_train_and_predict(options):
    model = tiny_model(UNET, options).train()
    check_step(model, batch(SIZE, (35, 51)))
    instances = model.eval()([{"image": image(), "points": [[3.0, 4.0]]}])[0]["instances"]
    assert instances.mask_probabilities.isfinite().all()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("STAGE", "both", "STAGE must be one of instance, proposals, not 'both'"),
        ("HEAD", "city", "variant must be one of toy, cityscapes, not 'city'"),
        ("TEST.MODE", "grid", "mode must be one of auto, proposals, random, not 'grid'"),
        ("TEST.MODE", "proposals", "mode 'proposals' needs a proposal head"),
        ("IN_FEATURES", ["p2"], r"in_features is \['p2'\], but the backbone has \['unet'\]"),
        ("IN_FEATURES", [], r"in_features is \[\]"),
        ("FUSION", "sum", "fusion must be one of pyramid, deeplab, not 'sum'"),
        ("IGNORED_PROB", 1.5, "ignored_prob must be from 0 to 1, not 1.5"),
        ("NUM_STUFF", 0, "num_stuff must be at least 1, not 0"),
        ("SEMANTIC_DIM", 0, "semantic_dim must be at least 1, not 0"),
        ("CONV_DIM", 1, "conv_dim must be at least 2, not 1"),
        ("NORM_RADIUS", 0.0, "norm_radius must be positive, not 0.0"),
        ("NUM_POINTS", 0, "num_points must be at least 1, not 0"),
        ("TEST.PROPOSAL_THRESH", 2.0, "min_value must be from 0 to 1, not 2"),
    ],
)
def test_a_wrong_option_fails_when_the_model_is_built(key, value, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(UNET, {f"MODEL.ADAPTIS.{key}": value})


def test_a_wrong_rule_fails_when_the_model_is_built():
    with pytest.raises(ValueError, match="targets must be one of score, top20, dual, not 'best'"):
        tiny_model(UNET, PROPOSALS, {"MODEL.ADAPTIS.PROPOSAL_TARGETS": "best"})


def test_the_first_selection_layer_is_that_of_the_concatenated_map():
    """Split in two for speed, it must be the plain convolution over coordinates and feature."""
    model = tiny_model(UNET).eval()
    head = model.selection_head
    feature, points = torch.rand(2, 8, 12, 10), torch.rand(2, 3, 2) * 9
    coordinates = relative_coordinates(points.flatten(0, 1), (12, 10), radius=20.0)
    joined = torch.cat([coordinates, feature.repeat_interleave(3, dim=0)], dim=1)
    first = head.convs[0]
    activate, seen = first.activate, []

    def record(x):
        seen.append(x.clone())
        return activate(x)

    first.activate = record
    with torch.no_grad():
        head(head.prepare(feature), points, torch.rand(6, 8), 1.0)
        plain = torch.nn.functional.conv2d(joined, first.weight, first.bias, padding=1)
    torch.testing.assert_close(seen[0], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (13, 16), (16, 13), (7, 9), (1, 5), (75, 101)])
def test_the_unet_takes_any_size(size):
    model = tiny_model({**UNET, "MODEL.UNET.LEVELS": 5, "MODEL.UNET.WIDTH": 4}).eval()
    with torch.no_grad():
        feature = model.backbone(torch.rand(1, 3, *size))["unet"]
    assert feature.shape == (1, 4, *size)
    assert model.backbone.output_shape()["unet"].stride == 1
