"""ResNet-38; tests/golden compares it with the original."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from solo_d2.modeling.backbone.resnet38 import ResNet38


@torch.no_grad()
def test_the_output_has_the_declared_shape_for_any_size():
    backbone = ResNet38(stem_channels=2).eval()
    (shape,) = backbone.output_shape().values()
    assert (shape.channels, shape.stride) == (128, 8)
    for h, w in ((48, 64), (33, 70), (1, 1)):
        outputs = backbone(torch.randn(2, 3, h, w))
        assert list(outputs) == ["res7"]
        assert outputs["res7"].shape == (2, 128, -(-h // 8), -(-w // 8))


def test_it_has_the_published_widths_depths_and_dilations():
    with torch.device("meta"):
        backbone = ResNet38()
    convs = sum(isinstance(m, nn.Conv2d) for m in backbone.modules())
    assert convs == 1 + 15 * 2 + 2 * 3 + 6  # stem, blocks, bottlenecks, shortcuts
    last = {name: getattr(backbone, name)[-1].convs for name in ("res5", "res6", "res7")}
    assert {name: convs[-1].out_channels for name, convs in last.items()} == {
        "res5": 1024,
        "res6": 2048,
        "res7": 4096,
    }
    assert [conv.dilation[0] for block in backbone.res5 for conv in block.convs] == [1] + [2] * 5
    assert backbone.res7[0].convs[1].dilation == (4, 4)
    norms = [m for m in backbone.modules() if "BatchNorm" in type(m).__name__]
    assert norms and all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, []), (1, ["stem"]), (2, ["stem", "res2"])])
def test_the_stem_and_the_first_stages_are_frozen(freeze_at, frozen):
    backbone = ResNet38(stem_channels=1, freeze_at=freeze_at)
    fixed = {k.split(".")[0] for k, p in backbone.named_parameters() if not p.requires_grad}
    trained = {k.split(".")[0] for k, p in backbone.named_parameters() if p.requires_grad}
    assert sorted(fixed) == sorted(frozen) and not fixed & trained
    with pytest.raises(ValueError, match="freeze_at must be 0 to 5"):
        ResNet38(stem_channels=1, freeze_at=6)


@torch.no_grad()
def test_only_the_bottlenecks_drop_channels():
    torch.manual_seed(0)
    backbone = ResNet38(stem_channels=4).train()
    x = torch.randn(1, 8, 8, 8)
    assert torch.equal(backbone.res2[1](x), backbone.res2[1].eval()(x))
    x = torch.randn(1, 64, 8, 8)
    block = backbone.res6[0]
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
