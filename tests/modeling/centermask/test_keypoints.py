"""Keypoints in the boxes of FCOS, and CenterMask beside Panoptic FPN's semantic branch."""

import pytest
import torch
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage
from example_inputs import NONE, ORDINARY, SIZE, example
from tiny_models import CENTERMASK, FCOS, tiny_model
from torch import nn

KEYPOINTS = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 5,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
}
SETTINGS = {"without masks": {**FCOS, **KEYPOINTS}, "with masks": {**CENTERMASK, **KEYPOINTS}}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def with_keypoints(visible: int = 2) -> dict:
    x = example(ORDINARY)
    points = torch.full((1, 5, 3), 30.0)
    points[..., 2] = visible
    x["instances"].gt_keypoints = Keypoints(points)
    return x


def trained(model, batch) -> dict[str, torch.Tensor]:
    model.train()
    losses = model(batch)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    return losses


@every_setting
def test_a_step_trains_keypoints_beside_the_other_branches(settings):
    model = tiny_model(settings)
    nn.init.zeros_(model.roi_heads.keypoint_branch.head.score_lowres.weight)
    losses = trained(model, [with_keypoints(), example(NONE)])
    # log(56 * 56), the places of an even heatmap
    assert losses["loss_keypoint"].item() == pytest.approx(8.0507, abs=1e-3)
    assert ("loss_mask" in losses) == settings["MODEL.MASK_ON"]


@every_setting
@pytest.mark.parametrize(
    "batch", [[with_keypoints(visible=0)], [example(NONE), example(NONE)]], ids=["hidden", "none"]
)
def test_without_visible_keypoints_their_loss_is_zero(settings, batch):
    assert trained(tiny_model(settings), batch)["loss_keypoint"] == 0


@torch.no_grad()
def test_keypoints_are_found_at_the_output_size():
    model = tiny_model(SETTINGS["with masks"]).eval()
    nn.init.constant_(model.proposal_generator.head.class_logits.bias, 0.0)
    nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.5)
    (output,) = model([{"image": torch.rand(3, *SIZE) * 255, "height": 128, "width": 192}])
    instances = output["instances"]
    assert len(instances) and instances.has("pred_masks")
    points, boxes = instances.pred_keypoints, instances.pred_boxes.tensor
    assert points.shape == (len(instances), 5, 3)
    # a box that the image clips may have keypoints outside
    inside = (boxes[:, 0] > 0) & (boxes[:, 1] > 0) & (boxes[:, 2] < 192) & (boxes[:, 3] < 128)
    assert inside.any()
    places, boxes = points[inside, :, :2], boxes[inside, None]
    assert (places >= boxes[..., :2] - 1).all() and (places <= boxes[..., 2:] + 1).all()


def test_objects_without_keypoints_are_an_error():
    with pytest.raises(ValueError, match="needs instances with 'gt_keypoints'"):
        trained(tiny_model(SETTINGS["without masks"]), [example(ORDINARY)])


class TestPanopticFPN:
    SETTINGS = {
        **CENTERMASK,
        "MODEL.META_ARCHITECTURE": "PanopticFPN",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    }

    def test_a_step_trains_all_branches(self):
        batch = [{**example(x), "sem_seg": torch.randint(0, 4, SIZE)} for x in (ORDINARY, NONE)]
        losses = trained(tiny_model(self.SETTINGS), batch)
        assert {"loss_sem_seg", "loss_fcos_cls", "loss_mask", "loss_maskiou"} <= set(losses)

    @torch.no_grad()
    def test_the_output_has_instances_with_mask_scores_and_segments(self):
        model = tiny_model(self.SETTINGS).eval()
        nn.init.constant_(model.proposal_generator.head.class_logits.bias, 3.0)
        nn.init.constant_(model.proposal_generator.head.centerness.bias, 3.0)
        nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.5)
        nn.init.constant_(model.roi_heads.mask_head.predictor.bias, 1.0)
        model.combine_stuff_area_thresh = 0
        (output,) = model([{"image": torch.rand(3, *SIZE) * 255}])
        assert len(output["instances"]) and output["instances"].has("mask_scores")
        ids, segments = output["panoptic_seg"]
        assert any(x["isthing"] for x in segments)
        assert set(ids.unique().tolist()) - {0} == {x["id"] for x in segments}
        assert output["sem_seg"].shape == (4, *SIZE)
