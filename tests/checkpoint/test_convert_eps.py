"""The checkpoint of the original EPS."""

import pytest
import torch

from solo_d2.checkpoint.convert import convert_checkpoint, find_configs
from solo_d2.checkpoint.rename_rules import recognize
from solo_d2.errors import UserError

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def weights(reference_dir):
    """Zeros of the published names and shapes; the full model has 105 million numbers."""
    lines = (reference_dir / "keys" / "eps_resnet38.keys.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t")[:2] for line in lines]
    shapes = {name: [] if s == "-" else [int(n) for n in s.split("x")] for name, s in rows}
    return {name: torch.zeros(1).expand(shape or [1]) for name, shape in shapes.items()}


def test_the_published_names_are_those_of_the_packaged_configs(weights):
    assert len(weights) == 229
    source = recognize(weights)
    assert source.name == "official_eps"
    matches = find_configs(weights, source)
    assert [m.name for m in matches] == ["EPS/EPS_R38_COCO.yaml", "EPS/EPS_R38_VOC.yaml"]
    assert {m.num_classes for m in matches} == {20}


def test_unused_and_missing_tensors_are_named(weights):
    source, cfg = recognize(weights), find_configs(weights, recognize(weights))[0].config()
    cut = {k: v for k, v in weights.items() if k != "b4_5.conv_branch2b1.weight"}
    with pytest.raises(UserError, match=r"missing: backbone\.res4\.5\.convs\.1\.weight"):
        convert_checkpoint(cut, source, cfg)
    with pytest.raises(UserError, match=r"unused: backbone\.res8\.0\.convs\.0\.weight"):
        convert_checkpoint({**weights, "b8.conv_branch2a.weight": torch.zeros(1)}, source, cfg)
