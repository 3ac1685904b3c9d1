"""Conversion of published checkpoints: complete, or an error that names what is not."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.checkpoint.convert import config_for, convert_checkpoint, main
from solo_d2.checkpoint.rename_rules import convert, recognize, rename_key
from solo_d2.checkpoint.sources import SOURCES
from solo_d2.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config(name: str = "", *options):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SOLOv2"
    if name:
        cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.merge_from_list(list(options))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    if cfg.MODEL.SOLO.NUM_CLASSES == -1:
        cfg.MODEL.SOLO.NUM_CLASSES = 80
    return cfg


def on_meta(cfg) -> dict[str, torch.Tensor]:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def official_name(name: str, decoupled: bool = False) -> str:
    """Our name -> that of the authors' code; ``decoupled`` of its Decoupled SOLO."""
    name = re.sub(r"\.stem\.conv1\.norm", ".bn1", name).replace(".stem.", ".")
    name = re.sub(r"^backbone\.bottom_up\.", "backbone.", name)
    name = re.sub(r"\.res(\d)\.", lambda m: f".layer{int(m[1]) - 1}.", name)
    name = name.replace(".conv2_offset.", ".conv2.conv_offset.")
    name = re.sub(r"\.shortcut\.norm\.", ".downsample.1.", name)
    name = re.sub(r"\.shortcut\.", ".downsample.0.", name)
    name = re.sub(r"(layer.*)\.conv(\d)\.norm\.", r"\1.bn\2.", name)
    name = re.sub(
        r"^backbone\.fpn_lateral(\d)", lambda m: f"neck.lateral_convs.{int(m[1]) - 2}.conv", name
    )
    name = re.sub(
        r"^backbone\.fpn_output(\d)", lambda m: f"neck.fpn_convs.{int(m[1]) - 2}.conv", name
    )
    outputs = {
        r"^head\.category_pred": "bbox_head.dsolo_cate" if decoupled else "bbox_head.solo_cate",
        r"^head\.kernel_pred": "bbox_head.solo_kernel",
        r"^head\.mask_pred": "bbox_head.solo_ins_list",
        r"^head\.([xy])_pred": r"bbox_head.dsolo_ins_list_\1",
    }
    for ours, theirs in outputs.items():
        if re.match(ours, name):
            return re.sub(ours, theirs, name)
    name = re.sub(r"^head\.category_tower\.(\d)\.", r"bbox_head.cate_convs.\1.conv.", name)
    name = re.sub(r"^head\.kernel_tower\.(\d)\.", r"bbox_head.kernel_convs.\1.conv.", name)
    name = re.sub(r"^head\.mask_tower\.(\d)\.", r"bbox_head.ins_convs.\1.conv.", name)
    name = re.sub(r"^head\.([xy])_tower\.(\d)\.", r"bbox_head.ins_convs_\1.\2.conv.", name)
    name = re.sub(
        r"^mask_branch\.levels\.(\d)\.(\d)\.",
        r"mask_feat_head.convs_all_levels.\1.conv\2.conv.",
        name,
    )
    name = re.sub(r"^mask_branch\.output\.", "mask_feat_head.conv_pred.0.conv.", name)
    return name.replace(".conv.norm.", ".gn.").replace(".conv.offset.", ".conv.conv_offset.")


def official_weights(cfg) -> dict[str, torch.Tensor]:
    model = build_model(cfg)
    weights = {}
    for i, (name, value) in enumerate(model.state_dict().items()):
        weights[official_name(name)] = torch.full_like(value, i)
    return weights


# A bottleneck ResNet of 0.5 million numbers and a head to match.
TINY = [
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.SOLO.CONV_DIM", 32, "MODEL.SOLO.NUM_CONVS", 2, "MODEL.SOLO.NUM_CLASSES", 7),
    *("MODEL.SOLOV2.MASK_DIM", 64, "MODEL.SOLOV2.MASK_CONV_DIM", 32),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.DEVICE", "cpu"),
]


@pytest.fixture(scope="module")
def tiny():
    return official_weights(config("", *TINY))


@pytest.fixture
def saved(tmp_path, tiny):
    def save(changes=(), remove=()):
        weights = {**tiny, **dict(changes)}
        for name in remove:
            del weights[name]
        path = tmp_path / "published.pth"
        torch.save({"state_dict": weights, "meta": {"epoch": 36}}, path)
        return str(path)

    return save


class TestCommand:
    def test_converts_and_says_what_the_weights_need(self, saved, tmp_path, capsys, tiny):
        out = tmp_path / "converted.pth"
        assert main([saved(), str(out)]) == 0
        printed = capsys.readouterr().out
        assert f"{len(tiny)} tensors" in printed and "official_solov2" in printed
        for line in ("INPUT.FORMAT RGB", "MODEL.RESNETS.STRIDE_IN_1X1 False", "NUM_CLASSES 7"):
            assert line in printed
        checkpoint = torch.load(out, weights_only=True)
        assert checkpoint["solo_d2"] == {
            "source": "published.pth",
            "format": "official_solov2",
            "architecture": "SOLOv2",
        }
        model = build_model(config("", *TINY))
        Checkpointer(model).load(str(out))
        for name, value in model.state_dict().items():
            assert torch.equal(value, tiny[official_name(name)]), name

    def test_unused_tensors_are_named_and_nothing_is_written(self, saved, tmp_path, capsys):
        out = tmp_path / "converted.pth"
        extra = {"bbox_head.solo_iou.weight": torch.zeros(1), "new.bias": torch.zeros(1)}
        path = saved(extra)
        assert main([path, str(out)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and path in error
        assert all(name in error for name in extra)
        assert not out.exists()

    @pytest.mark.parametrize(
        "name",
        [
            "bbox_head.solo_kernel.weight",
            "bbox_head.cate_convs.1.gn.bias",
            "backbone.layer4.2.bn3.running_mean",
            "neck.fpn_convs.3.conv.bias",
            "mask_feat_head.convs_all_levels.3.conv2.conv.weight",
            "mask_feat_head.conv_pred.0.conv.weight",
        ],
    )
    def test_missing_tensors_are_named(self, saved, tmp_path, capsys, name):
        assert main([saved(remove=[name]), str(tmp_path / "out.pth")]) == 1
        error = capsys.readouterr().err
        assert "missing" in error and rename_key(name, SOURCES["official_solov2"].rules) in error

    def test_other_shapes_are_named_with_both(self, saved, tmp_path, capsys):
        name = "mask_feat_head.convs_all_levels.2.conv1.conv.weight"
        assert main([saved({name: torch.zeros(32, 16, 3, 3)}), str(tmp_path / "out.pth")]) == 1
        error = capsys.readouterr().err
        assert "mask_branch.levels.2.1.weight" in error
        assert "(32, 16, 3, 3)" in error and "(32, 32, 3, 3)" in error

    def test_a_config_file_is_compared_with(self, saved, tmp_path, capsys):
        cfg = config("", *TINY)
        (tmp_path / "tiny.yaml").write_text(cfg.dump())
        arguments = [
            saved(),
            str(tmp_path / "out.pth"),
            "--config-file",
            str(tmp_path / "tiny.yaml"),
        ]
        assert main(arguments) == 0
        # the defaults are for BGR and Caffe's ResNet: no tensor tells, so the command does
        warnings = capsys.readouterr().err
        assert "INPUT.FORMAT BGR" in warnings and "STRIDE_IN_1X1 True" in warnings
        cfg.MODEL.SOLO.NUM_CONVS = 3
        (tmp_path / "tiny.yaml").write_text(cfg.dump())
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "missing: head.category_tower.2.weight" in error

    def test_another_architectures_config_is_refused(self, saved, tmp_path, capsys):
        (tmp_path / "other.yaml").write_text("MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n")
        arguments = [saved(), str(tmp_path / "out.pth"), "--config-file"]
        assert main([*arguments, str(tmp_path / "other.yaml")]) == 1
        assert "SOLOv2" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "weights, complaint",
        [
            ({"something.weight": torch.zeros(1)}, "none of the layouts"),
            ({"layer1.0.conv1.weight": torch.zeros(1)}, "MODEL.WEIGHTS"),
        ],
    )
    def test_other_files_are_refused_by_name(self, tmp_path, capsys, weights, complaint):
        path = tmp_path / "other.pth"
        torch.save(weights, path)
        assert main([str(path), str(tmp_path / "out.pth")]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and complaint in error and error.count("\n") == 1

    def test_a_file_with_code_needs_the_option(self, tmp_path, capsys, tiny):
        path = tmp_path / "published.pth"
        torch.save({"state_dict": tiny, "hook": torch.nn.Linear(1, 1)}, path)
        assert main([str(path), str(tmp_path / "out.pth")]) == 1
        assert "--allow-pickle" in capsys.readouterr().err
        assert main([str(path), str(tmp_path / "out.pth"), "--allow-pickle"]) == 0


@pytest.mark.parametrize(
    "name",
    [
        "SOLOv2/SOLOv2_Light_448_R18_3x",
        "SOLOv2/SOLOv2_Light_448_R34_3x",
        "SOLOv2/SOLOv2_R101_3x_official",
        "SOLOv2/SOLOv2_Light_512_DCN_R50_3x",
        "SOLOv2/SOLOv2_R101_DCN_3x",
        "SOLOv2/SOLOv2_X101_DCN_3x",
        "SOLO/SOLO_R101_3x",
        "SOLO/DecoupledSOLO_R50_1x",
        "SOLO/DecoupledSOLO_Light_512_R50_3x",
        "SOLO/DecoupledSOLO_Light_512_DCN_R50_3x",
    ],
)
def test_every_published_architecture_is_inferred(name):
    cfg = config(name)
    expected = on_meta(cfg)
    decoupled = cfg.MODEL.META_ARCHITECTURE == "DecoupledSOLO"
    weights = {official_name(name, decoupled): value for name, value in expected.items()}
    assert len(weights) == len(expected)
    source = recognize(weights)
    assert source.architecture == cfg.MODEL.META_ARCHITECTURE
    converted = convert_checkpoint(weights, source, config_for(weights, source))
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape
        for name, value in expected.items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("where", ["none", "last", "all"])
def test_deformable_towers_are_inferred(where, modulated):
    options = ["MODEL.SOLO.DEFORM", where, "MODEL.SOLO.DEFORM_MODULATED", modulated]
    options += ["MODEL.SOLOV2.MASK_DEFORM", where == "all", "MODEL.SOLOV2.KERNEL_SIZE", 3]
    weights = {official_name(k): v for k, v in on_meta(config("", *TINY, *options)).items()}
    cfg = config_for(weights, SOURCES["official_solov2"])
    assert cfg.MODEL.SOLO.DEFORM == where
    assert cfg.MODEL.SOLO.DEFORM_MODULATED == (modulated and where != "none")
    assert cfg.MODEL.SOLOV2.MASK_DEFORM == (where == "all")
    assert cfg.MODEL.SOLOV2.KERNEL_SIZE == 3
    convert_checkpoint(weights, SOURCES["official_solov2"], cfg)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("backbone.layer3.5.conv2_offset.weight", "backbone.bottom_up.res4.5.conv2_offset.weight"),
        (
            "backbone.layer3.5.conv2.conv_offset.bias",
            "backbone.bottom_up.res4.5.conv2_offset.bias",
        ),
        ("bbox_head.cate_convs.3.conv_offset.weight", "head.category_tower.3.offset.weight"),
        ("bbox_head.kernel_convs.3.conv.conv_offset.bias", "head.kernel_tower.3.offset.bias"),
        ("mask_feat_head.conv_pred.0.conv.conv_offset.bias", "mask_branch.output.offset.bias"),
    ],
)
def test_old_and_new_names_of_offsets(theirs, ours):
    assert rename_key(theirs, SOURCES["official_solov2"].rules) == ours


@pytest.mark.parametrize(
    "architecture, source, options",
    [
        ("SOLO", "official_solo", ["MODEL.SOLO.COORD_CONV", False]),
        ("SOLO", "official_solo", ["MODEL.SOLO.NUM_GRIDS", [7, 5, 4, 3, 2]]),
        ("DecoupledSOLO", "official_decoupled_solo", ["MODEL.SOLO.COORD_CONV", False]),
        ("DecoupledSOLO", "official_decoupled_solo", ["MODEL.SOLO.NUM_GRIDS", [7, 5, 4, 3, 2]]),
        ("DecoupledSOLO", "official_decoupled_solo", ["MODEL.DECOUPLED_SOLO.SHARED_TOWER", True]),
    ],
)
def test_ablations_of_solo_are_inferred(architecture, source, options):
    expected = config("", *TINY, "MODEL.META_ARCHITECTURE", architecture, *options)
    decoupled = architecture == "DecoupledSOLO"
    weights = {official_name(k, decoupled): v for k, v in on_meta(expected).items()}
    assert recognize(weights).name == source
    cfg = config_for(weights, SOURCES[source])
    for key in ("META_ARCHITECTURE", "SOLO.NUM_GRIDS", "DECOUPLED_SOLO.SHARED_TOWER"):
        assert _at(cfg.MODEL, key) == _at(expected.MODEL, key), key
    assert cfg.MODEL.SOLO.COORD_CONV == expected.MODEL.SOLO.COORD_CONV
    convert_checkpoint(weights, SOURCES[source], cfg)


def _at(node, key: str):
    for name in key.split("."):
        node = node[name]
    return node


def test_two_tensors_for_one_name_are_an_error():
    weights = {
        "backbone.layer3.5.conv2_offset.bias": 0,
        "backbone.layer3.5.conv2.conv_offset.bias": 1,
    }
    with pytest.raises(UserError, match=r"both .*conv2_offset.* and .*conv_offset"):
        convert(weights, SOURCES["official_solov2"])


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="bbox_head.what"):
        rename_key("bbox_head.what", SOURCES["official_solov2"].rules)


@pytest.fixture
def solo_tables(reference_dir):
    """(table, tensors on the meta device) of the family's checkpoints in the reference folder."""
    tables = []
    for path in sorted((reference_dir / "keys").glob("*solo*.keys.tsv")):
        rows = [
            line.split("\t")
            for line in path.read_text().splitlines()
            if line and not line.startswith(("#", "name\t"))
        ]
        weights = {
            name: torch.empty(
                () if shape == "-" else [int(n) for n in shape.split("x")], device="meta"
            )
            for name, shape, *_ in rows
        }
        tables.append((path.name, weights))
    assert tables
    return tables


@pytest.mark.golden
def test_reference_tables_convert_completely(solo_tables):
    for table, weights in solo_tables:
        source = recognize(weights)
        assert source is not None, table
        architecture = {"solo_": "SOLO", "decou": "DecoupledSOLO"}.get(table[:5], "SOLOv2")
        assert source.architecture == architecture, table
        converted = convert_checkpoint(weights, source, config_for(weights, source))
        counted = [name for name in weights if not name.endswith("num_batches_tracked")]
        assert len(converted) == len(counted), table
        numbers = sum(weights[name].numel() for name in counted)
        assert sum(value.numel() for value in converted.values()) == numbers
