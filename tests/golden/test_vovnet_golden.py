"""VoVNetV2 against the original code, with stand-in weights of its ImageNet checkpoints."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.rename_rules import convert
from solo_d2.modeling.backbone.vovnet import BODIES, OSAModule

pytestmark = pytest.mark.golden

# name in the golden file and in the table -> ours
DEPTHS = {name[2:-4].replace("-", "_"): name for name in BODIES}


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("vovnetv2")


# Relative, and relative to the largest absolute value of the array.
RTOL = ATOL = 1e-4
# The file has every n-th pixel, and 16 channels.
PIXEL_STEP = {"stem": 4, "stage2": 4, "stage3": 2, "stage4": 1, "stage5": 1}
CHANNELS = 16
# It has every 8th channel of the gates of this image.
GATE_STEP, GATE_IMAGE = 8, "m"
SEED = 0


@pytest.fixture(scope="module", params=DEPTHS)
def run(request, golden, stand_in_weights):
    """Depth, model, and per image its outputs and gates; each body is built once."""
    depth = request.param
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_vovnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.VOVNET.CONV_BODY = DEPTHS[depth]
    cfg.MODEL.VOVNET.OUT_FEATURES = ["stem", "stage2", "stage3", "stage4", "stage5"]
    model = build_backbone(cfg).eval()
    model.load_state_dict(convert(stand_in_weights(f"vovnet{depth}_imagenet", SEED)))
    gates = {}
    for name, module in model.named_modules():
        if isinstance(module, OSAModule):
            stage, index = re.fullmatch(r"stage(\d)\.osa(\d+)", name).groups()
            key = f"stage{stage}_OSA{stage}_{index}"
            # the gate is computed from the input of eSE
            module.ese.register_forward_pre_hook(
                lambda ese, inputs, key=key: gates.update({key: ese.gate(*inputs)})
            )
    outputs, gates_of = {}, {}
    for image in golden.meta["inputs"]:
        pixels = golden[f"{image}_image"].permute(2, 0, 1)[None].float()
        mean = torch.tensor(golden.meta["pixel_mean_bgr"]).view(-1, 1, 1)
        with torch.no_grad():
            outputs[image] = model(
                (pixels - mean) / torch.tensor(golden.meta["pixel_std"]).view(-1, 1, 1)
            )
        gates_of[image] = dict(gates)
        gates.clear()
    return depth, model, outputs, gates_of


def test_stages_are_the_originals(golden, run):
    depth, _, outputs, _ = run
    compared = 0
    for image, features in outputs.items():
        for name, feature in features.items():
            key, step = f"{depth}_{image}_{name}", PIXEL_STEP[name]
            assert tuple(feature.shape) == tuple(golden[f"{key}_shape"].tolist()), key
            expected = golden[key]
            mean, std, low, high = golden[f"{key}_stats"].tolist()
            largest = max(abs(low), abs(high))
            torch.testing.assert_close(
                feature[0, :: feature.shape[1] // CHANNELS, ::step, ::step],
                expected,
                rtol=RTOL,
                atol=ATOL * float(expected.abs().max()),
                msg=lambda text, key=key: f"{key}: {text}",
            )
            stats = [feature.mean(), feature.std(), feature.min(), feature.max()]
            torch.testing.assert_close(
                torch.stack(stats),
                torch.tensor([mean, std, low, high]),
                rtol=RTOL,
                atol=ATOL * largest,
                msg=lambda text, key=key: f"{key}_stats: {text}",
            )
            compared += 1
    assert compared == len(outputs) * 5


def test_gates_are_the_originals(golden, run):
    depth, model, _, gates = run
    keys = [key for key in golden.arrays.files if key.startswith(f"{depth}_gate_")]
    modules = [module for module in model.modules() if isinstance(module, OSAModule)]
    assert len(keys) == len(modules)
    for key in keys:
        module = key.removeprefix(f"{depth}_gate_")
        gate = gates[GATE_IMAGE][module].flatten()[::GATE_STEP]
        torch.testing.assert_close(gate, golden[key], rtol=RTOL, atol=ATOL)


def test_numbers_of_weights_are_the_originals(golden, run):
    depth, model, _, _ = run
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(value.numel() for value in model.state_dict().values())
    assert [trainable, every] == golden[f"{depth}_n_params"].tolist()


def test_every_body_of_the_file_is_compared(golden):
    found = {key.removesuffix("_n_params") for key in golden.arrays.files if "n_params" in key}
    assert found == set(DEPTHS)
