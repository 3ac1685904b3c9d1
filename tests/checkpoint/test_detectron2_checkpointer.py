"""Detectron2's own checkpointer and plain training loop, on our models."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from solo_d2.checkpoint import Checkpointer
from solo_d2.config import load_config
from solo_d2.modeling.num_classes import num_classes_keys

MODELS = ["solo", "decoupled_solo", "solov2", "yolact", "centermask", "mask_rcnn", "adaptis"]


def config(model):
    name = f"{model}_shapes{'_stage1' if model == 'adaptis' else ''}"
    cfg = load_config(f"quick/{name}.yaml", opts=["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", ()])
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.BASE_LR = 0.001
    # smaller, for speed
    cfg.MODEL.SOLO.CONV_DIM = 32
    cfg.MODEL.SOLO.NUM_GRIDS = [max(2, number // 4) for number in cfg.MODEL.SOLO.NUM_GRIDS]
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    for key in num_classes_keys(cfg):
        cfg.merge_from_list([key, 3])
    return cfg


def batch():
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 8:40, 8:40] = masks[1, 30:60, 20:62] = True
    instances = Instances((64, 64), gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8, 40, 40], [20, 30, 62, 60]]))
    image = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).byte()
    return [{"image": image, "instances": instances, "height": 64, "width": 64}]


def equal(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def clear(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert not any(tensor.any() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_training_loop_saves_and_resumes(name, tmp_path):
    """The loop of Detectron2's plain_train_net.py."""
    cfg = config(name)

    def start():
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
        checkpointer = DetectionCheckpointer(
            model, str(tmp_path), optimizer=optimizer, scheduler=scheduler
        )
        return model, optimizer, scheduler, checkpointer

    model, optimizer, scheduler, checkpointer = start()
    periodic = PeriodicCheckpointer(checkpointer, 1, max_iter=1)
    with EventStorage(0):
        losses = sum(model(batch()).values())
        assert torch.isfinite(losses)
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        scheduler.step()
        periodic.step(0)

    resumed, _, resumed_scheduler, checkpointer = start()
    assert not equal(model, resumed)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 0
    assert equal(model, resumed)
    assert resumed_scheduler.state_dict() == scheduler.state_dict()

    # Ours reads the same file, and writes one that Detectron2's reads.
    clear(resumed)
    Checkpointer(resumed, require_complete=True).load(str(tmp_path / "model_final.pth"))
    assert equal(model, resumed)
    Checkpointer(model, str(tmp_path), thing_classes=["a", "b", "c"]).save("ours", iteration=5)
    clear(resumed)
    extra = DetectionCheckpointer(resumed).load(str(tmp_path / "ours.pth"))
    assert equal(model, resumed)
    assert extra["iteration"] == 5 and extra["solo_d2"]["thing_classes"] == ["a", "b", "c"]
