"""The contract that all architectures fulfill, on tiny models."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from example_inputs import BATCHES, NUM_CLASSES, ORDINARY, SIZE, example
from tiny_models import (
    ADAPTIS,
    ADAPTIS_DEEPLAB,
    CENTERMASK,
    EPS,
    FCOS,
    PANOPTIC_SOLO,
    SOLO,
    YOLACT,
    YOLACT_PLUS,
    tiny_model,
)
from torch import nn

from solo_d2.layers import masks as mask_ops
from solo_d2.modeling.prepare import precision
from solo_d2.modeling.segmentor import InstanceSegmentor


class Architecture(NamedTuple):
    """A tiny model, its losses, and a way to make it find something in any image."""

    settings: dict[str, object]
    losses: set[str]
    excite: Callable[[nn.Module], None] | None  # None: labels pixels, see tests/modeling/eps
    has_masks: bool = True
    ranks_masks: bool = False  # has mask_scores beside scores
    tight_boxes: bool = True  # boxes are those of the masks
    random: bool = False  # samples points at inference


def excite_solo(model):
    for name, parameter in model.head.named_parameters():
        if re.search(r"(kernel|mask|x|y)_pred\.", name):
            nn.init.normal_(parameter, std=0.3)


def excite_yolact(model):
    nn.init.normal_(model.head.class_logits.weight, std=0.3)
    nn.init.normal_(model.head.coefficient_pred.weight, std=0.3)
    if model.mask_iou_head is not None:
        nn.init.constant_(model.mask_iou_head.predictor.bias, 0.3)


def excite_fcos(model):
    nn.init.constant_(model.proposal_generator.head.class_logits.bias, 0.0)
    nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.5)
    if model.roi_heads.mask_on:  # untrained masks are at the threshold everywhere
        nn.init.normal_(model.roi_heads.mask_head.predictor.weight, std=1.0)
        nn.init.constant_(model.roi_heads.mask_head.predictor.bias, 0.5)


def excite_adaptis(model):
    """Classify a part of the image as things and rate every mask as good."""
    with torch.no_grad():
        model.semantic_head.predictor.bias[1] += 1.0
    model.selection_head.rescale = (3.0, 1.0)
    low = {"mask_threshold": 0.5, "max_occupied": 0.99, "min_things_prob": 0.1, "min_value": 0.01}
    options = model.options
    model.options = replace(
        options,
        proposals=replace(options.proposals, **low),
        random=replace(options.random, min_things_prob=0.1, min_free=0.05),
        assembler=replace(options.assembler, stuff_prob_mult=0.5),
    )


SOLO_LOSSES = {"loss_category", "loss_mask"}
YOLACT_LOSSES = {"loss_class", "loss_box", "loss_mask", "loss_semantic"}
FCOS_LOSSES = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
FINDS = {"MODEL.SOLO.SCORE_THRESH_TEST": 0.005, "MODEL.SOLO.UPDATE_THRESH_TEST": 0.0}
SOLO_THAT_FINDS = {**SOLO, **FINDS}
YOLACT_THAT_FINDS = {"MODEL.YOLACT.SCORE_THRESH_TEST": 0.01}
ARCHITECTURES = {
    "SOLOv2": Architecture(
        {**SOLO_THAT_FINDS, "MODEL.META_ARCHITECTURE": "SOLOv2"}, SOLO_LOSSES, excite_solo
    ),
    "SOLO": Architecture(
        {**SOLO_THAT_FINDS, "MODEL.META_ARCHITECTURE": "SOLO"}, SOLO_LOSSES, excite_solo
    ),
    "DecoupledSOLO": Architecture(
        {**SOLO_THAT_FINDS, "MODEL.META_ARCHITECTURE": "DecoupledSOLO"}, SOLO_LOSSES, excite_solo
    ),
    "DecoupledSOLO Light": Architecture(
        {
            **SOLO_THAT_FINDS,
            "MODEL.META_ARCHITECTURE": "DecoupledSOLO",
            "MODEL.DECOUPLED_SOLO.SHARED_TOWER": True,
        },
        SOLO_LOSSES,
        excite_solo,
    ),
    "PanopticSOLOv2": Architecture(
        {**PANOPTIC_SOLO, **FINDS}, SOLO_LOSSES | {"loss_sem_seg"}, excite_solo
    ),
    "YOLACT": Architecture(
        {**YOLACT, **YOLACT_THAT_FINDS}, YOLACT_LOSSES, excite_yolact, tight_boxes=False
    ),
    "YOLACT++": Architecture(
        {**YOLACT_PLUS, **YOLACT_THAT_FINDS},
        YOLACT_LOSSES | {"loss_mask_iou"},
        excite_yolact,
        ranks_masks=True,
        tight_boxes=False,
    ),
    "FCOS": Architecture(FCOS, FCOS_LOSSES, excite_fcos, has_masks=False, tight_boxes=False),
    "CenterMask": Architecture(
        CENTERMASK,
        FCOS_LOSSES | {"loss_mask", "loss_maskiou"},
        excite_fcos,
        ranks_masks=True,
        tight_boxes=False,
    ),
    "AdaptIS": Architecture(
        ADAPTIS, {"loss_instance", "loss_semantic"}, excite_adaptis, random=True
    ),
    "AdaptIS DeepLab": Architecture(
        ADAPTIS_DEEPLAB, {"loss_instance", "loss_semantic"}, excite_adaptis, random=True
    ),
    "AdaptIS proposals": Architecture(
        {**ADAPTIS, "MODEL.ADAPTIS.STAGE": "proposals"}, {"loss_proposal"}, excite_adaptis
    ),
    "EPS": Architecture(EPS, {"loss_cls", "loss_sal"}, excite=None),
}


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def architecture(request):
    return request.param


def those(condition: Callable[[Architecture], bool]):
    """Run a test only for some architectures."""
    chosen = {name: x for name, x in ARCHITECTURES.items() if condition(x)}
    return pytest.mark.parametrize(
        "architecture", chosen.values(), ids=chosen, indirect=True, scope="module"
    )


def meta_class(architecture: Architecture) -> type:
    return META_ARCH_REGISTRY.get(architecture.settings["MODEL.META_ARCHITECTURE"])


finding_instances = those(lambda x: x.excite is not None)


@pytest.fixture(scope="module")
def model(architecture):
    """Untrained."""
    return tiny_model(architecture.settings)


@pytest.fixture(scope="module")
def excited(architecture):
    """Finds something in any image."""
    model = tiny_model(architecture.settings).eval()
    architecture.excite(model)
    return model


@pytest.fixture(autouse=True)
def storage():
    """Detectron2's ROI heads write statistics to it in training."""
    with EventStorage() as storage:
        yield storage


# ---- inputs


def images_of(sizes, outputs=None) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    inputs = [{"image": torch.rand(3, *size, generator=generator) * 255} for size in sizes]
    for x, (height, width) in zip(inputs, outputs or sizes):
        x["height"], x["width"] = height, width
    return inputs


@torch.no_grad()
def run(model, sizes=(SIZE,), outputs=None) -> list[Instances]:
    model.eval()
    return [x["instances"] for x in model(images_of(sizes, outputs))]


def losses_of(model, batch) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # some sample points or anchors
    losses = model(copy.deepcopy(batch))
    sum(losses.values()).backward()
    return losses


def check_gradients(model) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def check_output(architecture: Architecture, instances: Instances, size) -> None:
    n = len(instances)
    assert instances.image_size == size
    assert instances.scores.shape == instances.pred_classes.shape == (n,)
    assert (instances.scores[:-1] >= instances.scores[1:]).all()
    assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
    assert ((instances.pred_classes >= 0) & (instances.pred_classes < NUM_CLASSES)).all()
    boxes = instances.pred_boxes.tensor
    assert boxes.shape == (n, 4)
    assert (boxes >= 0).all() and (boxes[:, [3, 2]] <= torch.tensor(size)).all()
    assert instances.has("pred_masks") == architecture.has_masks
    assert instances.has("mask_scores") == architecture.ranks_masks
    if architecture.has_masks:
        assert instances.pred_masks.shape == (n, *size)
        assert instances.pred_masks.dtype == torch.bool
    if architecture.tight_boxes:
        assert instances.pred_masks.flatten(1).any(dim=1).all(), "an instance without a pixel"
        tight = BitMasks(instances.pred_masks).get_bounding_boxes().tensor
        assert torch.equal(boxes, tight)


def share_with_partner(a: Instances, b: Instances) -> float:
    """The share of the instances of ``a`` that ``b`` has too: class, score, box and mask."""
    same = a.pred_classes[:, None] == b.pred_classes
    same &= (a.scores[:, None] - b.scores).abs() < 1e-4
    boxes = (a.pred_boxes.tensor[:, None] - b.pred_boxes.tensor).abs().amax(dim=-1)
    same &= boxes <= 1
    if a.has("pred_masks"):
        masks, others = a.pred_masks.flatten(1).float(), b.pred_masks.flatten(1).float()
        same &= torch.cdist(masks, others, p=1) <= 1e-3 * masks.shape[1]
    return same.any(dim=1).float().mean().item()


class TestTraining:
    @pytest.mark.parametrize("name", BATCHES)
    def test_losses_are_finite_and_their_gradient_reaches_every_parameter(
        self, architecture, model, name
    ):
        losses = losses_of(model, BATCHES[name])
        assert set(losses) == architecture.losses
        assert all(loss.isfinite() for loss in losses.values()), losses
        check_gradients(model)

    @those(lambda x: issubclass(meta_class(x), InstanceSegmentor))
    def test_crowds_alone_are_no_objects(self, architecture, model):
        batch = [example(ORDINARY), example(ORDINARY)]
        for x in batch:
            x["instances"].gt_crowd = torch.ones(1, dtype=torch.bool)
        losses = losses_of(model, batch)
        empty = losses_of(model, BATCHES["no instance at all"])
        check_gradients(model)
        for name in ("loss_mask", "loss_instance", "loss_box", "loss_proposal"):
            assert losses.get(name, 0) == empty.get(name, 0) == 0

    def test_polygons_and_bit_masks_give_the_same_losses(self, architecture, model):
        polygon = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
        with_polygons = copy.deepcopy(BATCHES["one ordinary image"])
        with_polygons[0]["instances"].gt_masks = PolygonMasks([polygon])
        expected = losses_of(model, BATCHES["one ordinary image"])
        for name, loss in losses_of(model, with_polygons).items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=0.02, abs=1e-4)

    def test_mixed_precision_gives_finite_float32_losses(self, architecture, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(model, BATCHES["images of different sizes"])
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        check_gradients(model)

    @pytest.mark.parametrize("wrong", [-1, NUM_CLASSES])
    @those(lambda x: x.losses != {"loss_proposal"})  # that stage does not look at classes
    def test_a_class_out_of_range_is_an_error(self, architecture, model, wrong):
        batch = copy.deepcopy(BATCHES["one ordinary image"])
        batch[0]["instances"].gt_classes[:] = wrong
        with pytest.raises(ValueError, match=rf"{wrong}.*gt_classes|gt_classes.*{wrong}"):
            losses_of(model, batch)

    def test_an_input_without_annotations_is_an_error(self, architecture, model):
        model.train()
        with pytest.raises(ValueError, match="instances"):
            model([{"image": torch.zeros(3, *SIZE), "file_name": "street.jpg"}])

    def test_masks_are_needed_only_by_what_predicts_masks(self, architecture, model):
        batch = copy.deepcopy(BATCHES["one ordinary image"])
        batch[0]["instances"].remove("gt_masks")
        if architecture.has_masks:
            with pytest.raises(ValueError, match="mask"):
                losses_of(model, batch)
        else:
            losses_of(model, batch)
            check_gradients(model)


class TestInference:
    @finding_instances
    def test_instances_have_the_output_size(self, architecture, excited):
        sizes, outputs = [SIZE, (33, 70)], [(128, 200), (20, 31)]
        for instances, size in zip(run(excited, sizes, outputs), outputs):
            assert len(instances) > 0
            check_output(architecture, instances, size)

    @finding_instances
    def test_finding_nothing_is_ordinary(self, architecture, model):
        for parameter in model.parameters():
            assert parameter.isfinite().all()
        for instances in run(model, [SIZE, (33, 70)]):
            check_output(architecture, instances, instances.image_size)

    @pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 2)])
    @finding_instances
    def test_tiny_and_long_images_pass(self, architecture, excited, size):
        (instances,) = run(excited, [size])
        check_output(architecture, instances, size)

    @those(lambda x: x.excite and not x.random)  # not what draws other points for each image
    def test_images_of_one_size_give_the_results_of_one_by_one(self, architecture, excited):
        inputs = images_of([SIZE] * 3)
        excited.eval()
        with torch.no_grad():
            together = [x["instances"] for x in excited(inputs)]
            alone = [excited([x])[0]["instances"] for x in inputs]
        assert all(len(x) for x in alone)
        for a, b in zip(together, alone):
            # rounding decides near-ties at a threshold or in an order
            assert abs(len(a) - len(b)) <= 0.05 * len(b)
            assert share_with_partner(a, b) >= 0.95

    @finding_instances
    def test_results_do_not_depend_on_the_chunks(self, architecture, excited, monkeypatch):
        torch.manual_seed(0)
        (whole,) = run(excited)
        torch.manual_seed(0)
        monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 3 * 16 * 24 * 4)
        (chunked,) = run(excited)
        assert torch.equal(whole.pred_classes, chunked.pred_classes)
        torch.testing.assert_close(whole.scores, chunked.scores)
        if architecture.has_masks:
            assert torch.equal(whole.pred_masks, chunked.pred_masks)

    @finding_instances
    def test_mixed_precision_finds_something(self, architecture, excited):
        with precision("cpu", "bfloat16"):
            (instances,) = run(excited)
        assert len(instances) > 0
        assert instances.scores.dtype == instances.pred_boxes.tensor.dtype == torch.float32
        check_output(architecture, instances, SIZE)

    @finding_instances
    def test_weights_that_are_not_finite_are_no_silent_failure(self, architecture):
        model = tiny_model(architecture.settings).eval()
        run(model)  # it may find nothing, so that its weights are checked: they are still finite
        architecture.excite(model)
        for parameter in model.backbone.parameters():
            nn.init.constant_(parameter, float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            run(model)

    @finding_instances
    def test_one_weight_that_is_not_finite_gives_an_error_or_finite_results(self, architecture):
        for in_backbone in (True, False):
            model = tiny_model(architecture.settings).eval()
            architecture.excite(model)
            named = dict(model.named_parameters()).items()
            parameters = (p for n, p in named if n.startswith("backbone.") == in_backbone)
            nn.init.constant_(next(parameters), float("nan"))
            try:
                (instances,) = run(model)
            except ValueError as error:
                assert "finite" in str(error)
            else:
                found = (instances.scores, instances.pred_boxes.tensor)
                assert all(x.isfinite().all() for x in found)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_weights_are_refused_with_what_to_do(self, architecture, dtype):
        model = tiny_model(architecture.settings).to(dtype)
        with pytest.raises(ValueError, match=rf"{dtype}.*torch\.autocast\('cpu', dtype={dtype}\)"):
            run(model)
        with pytest.raises(ValueError, match=rf"converted to {dtype}"):
            losses_of(model, BATCHES["one ordinary image"])
