"""The semantic branch of the SOLO family: targets, losses, and the merge with the instances."""

import copy

import pytest
import tiny_models
import torch
from example_inputs import EMPTY, NONE, ORDINARY, SIZE, example, rectangle
from tiny_models import PANOPTIC_SOLO as SETTINGS
from torch import nn

SOLOV2 = "PanopticSOLOv2"
every_architecture = pytest.mark.parametrize(
    "architecture", [SOLOV2, "PanopticSOLO", "PanopticDecoupledSOLO"]
)


def tiny_model(architecture=SOLOV2, **options):
    settings = {**SETTINGS, "MODEL.META_ARCHITECTURE": architecture}
    return tiny_models.tiny_model(settings, **options)


def labeled(x: dict, labels: torch.Tensor) -> dict:
    return {**copy.copy(x), "sem_seg": labels}


def targets_of(model, batch) -> list[torch.Tensor]:
    images = model.preprocess_image(batch)
    return [gt.semantic for gt in model.prepare_ground_truth(batch, images)]


@every_architecture
def test_a_step_trains_the_semantic_branch_and_the_instances(architecture):
    model = tiny_model(architecture)
    losses = model([example(ORDINARY), example(NONE)])
    assert set(losses) == {"loss_category", "loss_mask", "loss_sem_seg"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.sem_seg_head.predictor.weight.grad.abs().sum() > 0


@every_architecture
@torch.no_grad()
def test_the_output_is_that_of_detectron2s_panoptic_models(architecture):
    model = tiny_model(architecture).eval()
    model.merge_limits = (0.5, 0, 0.5)
    nn.init.constant_(model.sem_seg_head.predictor.weight, 0.0)
    nn.init.constant_(model.sem_seg_head.predictor.bias, 0.0)
    model.sem_seg_head.predictor.bias[1] = 1.0  # stuff everywhere
    (output,) = model([{"image": torch.rand(3, *SIZE), "height": 30, "width": 50}])
    assert output["sem_seg"].shape == (2, 30, 50)
    ids, segments = output["panoptic_seg"]
    # untrained scores are below the limit, so that no instance covers the stuff
    assert ids.dtype == torch.int32 and (ids == 1).all() and ids.shape == (30, 50)
    assert segments == [{"id": 1, "isthing": False, "category_id": 1, "area": 1500}]
    assert set(output) == {"instances", "sem_seg", "panoptic_seg"}


@torch.no_grad()
def test_instances_cover_stuff_and_keep_their_class_and_score():
    thresholds = {"MODEL__SOLO__SCORE_THRESH_TEST": 0.005, "MODEL__SOLO__UPDATE_THRESH_TEST": 0.0}
    model = tiny_model(**thresholds, MODEL__SOLO__MAX_CANDIDATES_TEST=50).eval()
    model.merge_limits = (0.5, 0, 0.0)
    nn.init.normal_(model.head.kernel_pred.weight, std=0.3)
    (output,) = model([{"image": torch.rand(3, *SIZE) * 255}])
    ids, segments = output["panoptic_seg"]
    things = [x for x in segments if x["isthing"]]
    assert things
    for segment in things:
        index = segment["instance_id"]
        instances = output["instances"]
        assert segment["category_id"] == instances.pred_classes[index]
        assert segment["score"] == pytest.approx(instances.scores[index].item())
        assert (instances.pred_masks[index] | (ids != segment["id"])).all()


def test_without_a_label_map_all_but_the_objects_is_stuff():
    x = example(torch.cat([ORDINARY, rectangle(40, 40, 60, 60)]))
    x["instances"].gt_crowd = torch.tensor([False, True])
    small = example(rectangle(0, 0, 30, 30, size=(33, 70)), size=(33, 70))
    first, second = targets_of(tiny_model(), [x, small])
    expected = torch.ones(SIZE, dtype=torch.long)
    expected[40:60, 40:60] = 255
    expected[10:50, 10:50] = 0
    assert torch.equal(first[: SIZE[0], : SIZE[1]], expected)
    # the padding is ignored
    assert (second == 255).sum() == second.numel() - 33 * 70
    assert (second == 0).sum() == 900


def test_a_label_map_is_taken_as_it_is():
    labels = torch.randint(0, 4, SIZE)
    labels[0, 0] = 255
    model = tiny_model(MODEL__SEM_SEG_HEAD__NUM_CLASSES=4)
    (target,) = targets_of(model, [labeled(example(ORDINARY), labels)])
    assert torch.equal(target[: SIZE[0], : SIZE[1]], labels)


@pytest.mark.parametrize("wrong", [4, -1, 254])
def test_a_label_out_of_range_is_named(wrong):
    model = tiny_model(MODEL__SEM_SEG_HEAD__NUM_CLASSES=4)
    batch = [labeled(example(ORDINARY), torch.full(SIZE, wrong))]
    with pytest.raises(ValueError, match=rf"street\.jpg has the semantic label {wrong}.*\[0, 4\)"):
        model(batch)


def test_several_classes_of_stuff_need_a_label_map():
    model = tiny_model(MODEL__SEM_SEG_HEAD__NUM_CLASSES=4)
    with pytest.raises(ValueError, match=r"street\.jpg has no 'sem_seg', which 4"):
        model([example(ORDINARY)])


def test_a_batch_without_any_known_label_gives_a_loss_and_gradients_of_zero():
    model = tiny_model()
    losses = model([labeled(example(ORDINARY), torch.full(SIZE, 255))])
    assert losses["loss_sem_seg"] == 0
    losses["loss_sem_seg"].backward()
    assert all((p.grad == 0).all() for p in model.sem_seg_head.parameters())


def test_the_loss_does_not_depend_on_padding_and_crowds():
    """It is a mean over the known pixels: a uniform prediction costs log 2 in any image."""
    model = tiny_model()
    nn.init.zeros_(model.sem_seg_head.predictor.weight)
    crowd = example(EMPTY, boxes=[[0, 0, 9, 9]])
    crowd["instances"].gt_crowd = torch.ones(1, dtype=torch.bool)
    small = example(rectangle(0, 0, 30, 30, size=(33, 70)), size=(33, 70))
    for batch in ([small], [small, crowd]):
        assert model(batch)["loss_sem_seg"].item() == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODEL__SEM_SEG_HEAD__NUM_CLASSES", 1, "num_semantic_classes must be at least 2, not 1"),
        ("MODEL__PANOPTIC_FPN__COMBINE__OVERLAP_THRESH", 1.5, "overlap_threshold"),
        ("MODEL__PANOPTIC_FPN__COMBINE__STUFF_AREA_LIMIT", -1, "stuff_area_limit"),
        ("MODEL__PANOPTIC_FPN__COMBINE__INSTANCES_CONFIDENCE_THRESH", -0.1, "instance_score"),
    ],
)
def test_unsupported_options_fail_when_the_model_is_built(name, value, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**{name: value})


def test_an_instance_model_is_a_part_of_it_with_the_same_names():
    plain = tiny_models.tiny_model({**SETTINGS, "MODEL.META_ARCHITECTURE": "SOLOv2"})
    names = {k for k in tiny_model().state_dict() if not k.startswith("sem_seg_head.")}
    assert names == set(plain.state_dict())
