"""Detectron2's own analysis tools (tools/analyze_model.py) on every architecture."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.utils.analysis import (
    FlopCountAnalysis,
    activation_count_operators,
    parameter_count,
    parameter_count_table,
)
from fvcore.nn import flop_count_table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from solo_d2.config import load_config
from solo_d2.modeling.num_classes import write_num_classes
from solo_d2.modeling.solo.base import SOLOFamily

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "quick"
FAMILY = ["solo_shapes", "decoupled_solo_shapes", "solov2_shapes"]
TRACEABLE = [*FAMILY, "yolact_shapes", "centermask_shapes", "fcos_shapes"]
INPUTS = [{"image": torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0)) * 255}]


@pytest.fixture(autouse=True)
def no_warnings_about_uncounted_operators():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def built(name: str) -> nn.Module:
    """The model of a config; an untrained SOLO model would find nothing and skip its masks."""
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), opts=["DATASETS.TRAIN", ()])
    cfg.DATASETS.TEST = ()
    cfg.MODEL.WEIGHTS = ""
    write_num_classes(cfg, 3)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if isinstance(model, SOLOFamily):
        detector = model.detector
        detector.score_threshold, detector.update_threshold = 0.005, 0.0
        for parameter_name, parameter in model.head.named_parameters():
            if "_pred." in parameter_name:
                nn.init.normal_(parameter, std=0.3)
    return model


def excited(name: str) -> nn.Module:
    """The same, and every architecture finds something."""
    model = built(name)
    if name == "yolact_shapes":
        nn.init.normal_(model.head.class_logits.weight, std=0.3)
    elif name in ("centermask_shapes", "fcos_shapes"):
        nn.init.zeros_(model.proposal_generator.head.class_logits.bias)
    return model


@torch.no_grad()
def dispatched_convolutions(model: nn.Module) -> int:
    """FLOPs of the convolutions that ran, counted by torch (an addition and a product are two)."""
    with FlopCounterMode(display=False) as counter:
        model(INPUTS)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "conv" in str(operator))


@pytest.mark.parametrize("name", TRACEABLE)
def test_detectron2_counts_operations_activations_and_parameters(name):
    model = built(name)
    flops = FlopCountAnalysis(model, INPUTS)
    traced, ran = 2 * flops.by_operator()["conv"], dispatched_convolutions(model)
    # tracing drops operations that do not reach the output, such as masks if nothing is found
    assert 0 < traced <= ran
    if name in FAMILY:
        unused = 0
        if model.mask_branch is None:  # p5 is the input of no level here
            unused = 2 * model.backbone.fpn_output5.weight.numel() * (96 // 32) * (128 // 32)
        assert traced == ran - unused
    assert activation_count_operators(model, INPUTS)["conv"] > 0
    assert parameter_count(model)[""] == sum(x.numel() for x in model.parameters())
    assert "backbone" in parameter_count_table(model, max_depth=2)
    assert "backbone" in flop_count_table(flops)


def test_adaptis_which_returns_more_than_tensors_is_counted_but_not_traced():
    model = built("adaptis_shapes_stage2")
    assert 0 < 2 * FlopCountAnalysis(model, INPUTS).by_operator()["conv"]
    with pytest.raises(ValueError, match=r"^Model cannot be traced .* outputs .*\.$"):
        activation_count_operators(model, INPUTS)


@pytest.mark.parametrize("name", TRACEABLE)
@torch.no_grad()
def test_a_traced_model_gives_the_instances_of_the_eager_one(name):
    """What Detectron2's export_model.py does for --export-method tracing --format torchscript."""
    model = excited(name)
    adapter = TracingAdapter(model, INPUTS)
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    (result,) = adapter.outputs_schema(traced(*adapter.flattened_inputs))
    (expected,) = model(INPUTS)
    found, instances = result["instances"], expected["instances"]
    assert len(instances) > 0
    if instances.has("pred_masks"):
        assert torch.equal(found.pred_masks, instances.pred_masks)
    assert torch.equal(found.pred_classes, instances.pred_classes)
    torch.testing.assert_close(found.scores, instances.scores)


@pytest.mark.parametrize("name", ["solov2_shapes", "centermask_shapes"])
@torch.no_grad()
def test_torch_export_of_a_whole_model_names_the_command_that_works(name):
    adapter = TracingAdapter(built(name), INPUTS)
    with pytest.raises(Exception, match="run: python -m solo_d2 export"):
        torch.export.export(adapter, adapter.flattened_inputs, strict=False)
