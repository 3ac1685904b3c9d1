"""Conversion of published checkpoints: it is complete, or an error names the tensors."""

import re

import pytest
import torch
from detectron2.modeling import build_model

from solo_d2.checkpoint import Checkpointer
from solo_d2.checkpoint.architecture import (
    config_with_classes,
    match_configs,
    model_shapes,
    num_classes_of,
    packaged_shapes,
)
from solo_d2.checkpoint.convert import convert_checkpoint, find_configs
from solo_d2.checkpoint.rename_rules import convert, find_new_name, recognize
from solo_d2.checkpoint.sources import SOURCES
from solo_d2.config import load_config
from solo_d2.errors import UserError
from solo_d2.model_zoo import config_names
from solo_d2.tools.convert import main

# Table of names and shapes of a published file -> its layout and the configs that it fits.
TABLES = {
    "adelaidet_solov2_r50_3x": ("adelaidet_solov2", "SOLOv2/SOLOv2_R50", ["1x", "3x"]),
    "official_solov2_r50": ("official_solov2", "SOLOv2/SOLOv2_R50", ["1x_official", "3x_official"]),
    "solov2_light_r50": ("official_solov2", "SOLOv2/SOLOv2_Light_448_R50", ["3x"]),
    "solov2_light_512_dcn_r50": ("official_solov2", "SOLOv2/SOLOv2_Light_512_DCN_R50", ["3x"]),
    "solo_r50": ("official_solo", "SOLO/SOLO_R50", ["1x", "3x"]),
    "decoupled_solo_r50": ("official_decoupled_solo", "SOLO/DecoupledSOLO_R50", ["1x", "3x"]),
    "decoupled_solo_light_r50": (
        "official_decoupled_solo",
        "SOLO/DecoupledSOLO_Light_512_R50",
        ["3x"],
    ),
    "decoupled_solo_light_dcn_r50": (
        "official_decoupled_solo",
        "SOLO/DecoupledSOLO_Light_512_DCN_R50",
        ["3x"],
    ),
    "centermask_v39": ("centermask2", "CenterMask/CenterMask_V39", ["3x"]),
    "centermask_r50": ("centermask2", "CenterMask/CenterMask_R50", ["3x"]),
    "centermask_lite_v39": ("centermask2", "CenterMask/CenterMask_Lite_V39", ["4x"]),
    "centermask_v19_slim_dw_lite": (
        "centermask2",
        "CenterMask/CenterMask_Lite_V19_slim_dw",
        ["4x"],
    ),
    "yolact_r50": ("yolact", "YOLACT/YOLACT", ["R50", "R50_SBD"]),
    "yolact_r101": ("yolact", "YOLACT/YOLACT", ["R101", "im400_R101", "im700_R101"]),
    "yolact_plus_r50": ("yolact", "YOLACT/YOLACT", ["PLUS_R50"]),
    "yolact_darknet53": ("yolact_darknet53", "YOLACT/YOLACT", ["DarkNet53"]),
    "adaptis_toy_unet": (
        "official_adaptis",
        "AdaptIS/AdaptIS_UNet",
        ["rods_stage2", "tubes_stage2"],
    ),
}
CLASSES = {"adaptis_toy_unet": 1}
every_table = pytest.mark.parametrize("table", TABLES)


@pytest.mark.golden
@every_table
def test_every_tensor_of_a_published_file_finds_its_place(key_table, table):
    weights = key_table(table)
    layout, prefix, variants = TABLES[table]
    source = recognize(weights)
    assert source.name == layout
    matches = [x for x in find_configs(weights, source) if not x.name.startswith("finetune/")]
    assert [match.name for match in matches] == [f"{prefix}_{x}.yaml" for x in variants]
    assert {match.num_classes for match in matches} == {CLASSES.get(table, 80)}
    converted = convert_checkpoint(weights, source, matches[-1].config())
    counted = [x for name, x in weights.items() if not name.endswith("num_batches_tracked")]
    assert sum(x.numel() for x in converted.values()) == sum(x.numel() for x in counted)
    # nothing is lost, doubled or changed
    first = {key: x.unique() if x.numel() < 10 else x.flatten()[:1] for key, x in converted.items()}
    values = sorted(float(v) for x in first.values() for v in x)
    assert values == sorted(float(x.flatten()[0]) for x in counted)


@pytest.mark.golden
@every_table
def test_missing_and_unknown_tensors_are_named(key_table, table):
    weights = key_table(table)
    source = recognize(weights)
    lost = [name for name in weights if not name.endswith("num_batches_tracked")][-1]
    kept = {name: value for name, value in weights.items() if name != lost}
    with pytest.raises(
        UserError, match=rf"with {TABLES[table][1]}\w*\.yaml, missing: \S+$"
    ) as error:
        find_configs(kept, source)
    assert str(error.value).endswith(find_new_name(lost, source.rules))
    with pytest.raises(UserError, match="unused.* new.weight"):
        find_configs({**weights, "new.weight": torch.zeros(1)}, source)


@pytest.mark.parametrize("folder", ["SOLO", "SOLOv2", "YOLACT", "CenterMask", "AdaptIS"])
def test_every_published_config_is_found_by_its_own_shapes(folder):
    """With seven classes, each size is that for two plus five times what the third class adds."""
    for name in config_names():
        if name.startswith(f"{folder}/"):
            two, three = packaged_shapes(name, 2), packaged_shapes(name, 3)
            seven = {
                key: tuple(a + 5 * (b - a) for a, b in zip(two[key], three[key])) for key in two
            }
            matches = match_configs(seven, load_config(name).MODEL.META_ARCHITECTURE)
            assert name in [match.name for match in matches]
            assert {(x.num_classes, x.differences) for x in matches} == {(7, 0)}


@pytest.mark.parametrize(
    "shape, two, three, number",
    [
        ((80, 256), (2, 256), (3, 256), 80),
        ((81,), (3,), (4,), 80),  # one more for the background
        ((243, 256), (9, 256), (12, 256), 80),  # three anchors
        ((4, 1), (8, 1), (12, 1), 1),
        ((244, 256), (9, 256), (12, 256), None),
        ((80, 128), (2, 256), (3, 256), None),
        ((80,), (2, 256), (3, 256), None),
        ((1,), (3,), (4,), None),  # no class at all
    ],
)
def test_a_shape_tells_the_number_of_classes(shape, two, three, number):
    assert num_classes_of(shape, two, three) == number


def official_name(name: str, decoupled: bool = False) -> str:
    """Our name -> the name in the authors' code; ``decoupled``: in its Decoupled SOLO."""
    name = re.sub(r"\.stem\.conv1\.norm", ".bn1", name).replace(".stem.", ".")
    name = re.sub(r"^backbone\.bottom_up\.", "backbone.", name)
    name = re.sub(r"\.res(\d)\.", lambda m: f".layer{int(m[1]) - 1}.", name)
    name = name.replace(".conv2_offset.", ".conv2.conv_offset.")
    name = re.sub(r"\.shortcut\.norm\.", ".downsample.1.", name)
    name = re.sub(r"\.shortcut\.", ".downsample.0.", name)
    name = re.sub(r"(layer.*)\.conv(\d)\.norm\.", r"\1.bn\2.", name)
    for ours, theirs in (("fpn_lateral", "lateral_convs"), ("fpn_output", "fpn_convs")):
        name = re.sub(
            rf"^backbone\.{ours}(\d)", lambda m, to=theirs: f"neck.{to}.{int(m[1]) - 2}.conv", name
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


@pytest.mark.parametrize(
    "name",
    [
        "SOLOv2/SOLOv2_Light_448_R18_3x.yaml",
        "SOLOv2/SOLOv2_Light_448_R34_3x.yaml",
        "SOLOv2/SOLOv2_R101_3x_official.yaml",
        "SOLOv2/SOLOv2_R101_DCN_3x.yaml",
        "SOLOv2/SOLOv2_X101_DCN_3x.yaml",
        "SOLO/SOLO_R101_3x.yaml",
        "SOLO/DecoupledSOLO_R101_3x.yaml",
    ],
)
def test_published_files_without_a_table_convert(name):
    """Their names are made from ours with the reverse rules."""
    cfg = config_with_classes(load_config(name), 80)
    decoupled = cfg.MODEL.META_ARCHITECTURE == "DecoupledSOLO"
    expected = model_shapes(cfg)
    weights = {official_name(k, decoupled): torch.zeros(1).expand(s) for k, s in expected.items()}
    assert len(weights) == len(expected)
    source = recognize(weights)
    matches = find_configs(weights, source)
    assert name in [match.name for match in matches]
    converted = convert_checkpoint(weights, source, matches[0].config())
    assert {key: tuple(value.shape) for key, value in converted.items()} == expected


# A bottleneck ResNet with 0.5 million parameters and a matching head.
TINY = [
    *("MODEL.META_ARCHITECTURE", "SOLOv2", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.SOLO.CONV_DIM", 32, "MODEL.SOLO.NUM_CONVS", 2, "MODEL.SOLO.NUM_CLASSES", 7),
    *("MODEL.SOLOV2.MASK_DIM", 64, "MODEL.SOLOV2.MASK_CONV_DIM", 32),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "DATASETS.TRAIN", ()),
]


@pytest.fixture(scope="module")
def tiny():
    """Published weights of a tiny model; each tensor is filled with a different number."""
    state = build_model(load_config(opts=TINY)).state_dict()
    return {official_name(k): torch.full_like(v, i) for i, (k, v) in enumerate(state.items())}


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, tiny, capsys):
        """Converts the tiny model; returns exit code, standard output and standard error."""

        def run(*options, changes=(), remove=(), classes=-1):
            weights = {**tiny, **dict(changes)}
            for name in remove:
                del weights[name]
            torch.save({"state_dict": weights, "meta": {"epoch": 36}}, tmp_path / "published.pth")
            cfg = load_config(opts=[*TINY, "MODEL.SOLO.NUM_CLASSES", classes])
            (tmp_path / "tiny.yaml").write_text(cfg.dump())
            words = [tmp_path / "published.pth", tmp_path / "converted.pth"]
            code = main([*map(str, words), "--config-file", str(tmp_path / "tiny.yaml"), *options])
            return code, *capsys.readouterr()

        return run

    def test_converts_and_says_what_it_did(self, run, tmp_path, tiny):
        code, printed, warnings = run()
        assert code == 0
        assert f"layout official_solov2, {len(tiny)} tensors" in printed
        assert "of 7 classes" in printed and "tiny.yaml" in printed
        # the defaults are for BGR and Caffe's ResNet: no tensor shows this, so the command warns
        assert "INPUT.FORMAT BGR" in warnings and "STRIDE_IN_1X1 True" in warnings
        checkpoint = torch.load(tmp_path / "converted.pth", weights_only=True)
        assert checkpoint["solo_d2"] == {
            "source": "published.pth",
            "format": "official_solov2",
            "architecture": "SOLOv2",
        }
        model = build_model(load_config(opts=TINY))
        Checkpointer(model, require_complete=True).load(str(tmp_path / "converted.pth"))
        for name, value in model.state_dict().items():
            assert torch.equal(value, tiny[official_name(name)]), name

    def test_the_number_of_classes_is_that_of_the_weights(self, run):
        code, printed, _ = run(classes=80)
        assert code == 0 and "of 7 classes" in printed

    def test_unused_tensors_are_named_and_nothing_is_written(self, run, tmp_path):
        extra = {"bbox_head.solo_iou.weight": torch.zeros(1), "new.bias": torch.zeros(1)}
        code, _, error = run(changes=extra)
        assert code == 1
        assert error.count("\n") == 1 and str(tmp_path / "published.pth") in error
        assert all(name in error for name in extra)
        assert not (tmp_path / "converted.pth").exists()

    def test_missing_tensors_are_named(self, run):
        names = [
            "bbox_head.solo_kernel.weight",
            "bbox_head.cate_convs.1.gn.bias",
            "backbone.layer4.2.bn3.running_mean",
            "neck.fpn_convs.3.conv.bias",
            "mask_feat_head.convs_all_levels.3.conv2.conv.weight",
            "mask_feat_head.conv_pred.0.conv.weight",
        ]
        code, _, error = run(remove=names)
        assert code == 1 and "missing: " in error
        assert all(find_new_name(x, SOURCES["official_solov2"].rules) in error for x in names)

    def test_other_shapes_are_named_with_both(self, run):
        name = "mask_feat_head.convs_all_levels.2.conv1.conv.weight"
        code, _, error = run(changes={name: torch.zeros(32, 16, 3, 3)})
        assert code == 1
        assert "mask_branch.levels.2.1.weight" in error
        assert "(32, 16, 3, 3)" in error and "(32, 32, 3, 3)" in error

    def test_what_fits_no_packaged_config_needs_a_config(self, run, tmp_path, capsys):
        run()
        words = [str(tmp_path / "published.pth"), str(tmp_path / "out.pth")]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "fits no packaged config" in error and "SOLOv2/SOLOv2" in error
        assert error.count("\n") == 1

    def test_pairs_need_a_config_and_may_stand_anywhere(self, run, capsys):
        code, _, error = run("SEED", "3", "--source-format", "auto")
        assert code == 0, error
        assert main(["MODEL.DEVICE", "cpu", "in.pth", "out.pth"]) == 1
        assert "MODEL.DEVICE: KEY VALUE pairs need a --config-file" in capsys.readouterr().err

    def test_another_architectures_config_is_refused(self, run):
        code, _, error = run("--config-file", "YOLACT/YOLACT_R50.yaml")
        assert code == 1 and "is of architecture SOLOv2" in error and "of YOLACT" in error

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

    def test_a_file_with_code_needs_the_option(self, run, tmp_path, capsys, tiny):
        run()
        path = tmp_path / "published.pth"
        torch.save({"state_dict": tiny, "hook": torch.nn.Linear(1, 1)}, path)
        words = [str(path), str(tmp_path / "out.pth"), "--config-file", str(tmp_path / "tiny.yaml")]
        assert main(words) == 1
        assert "--allow-pickle" in capsys.readouterr().err
        assert main([*words, "--allow-pickle"]) == 0


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
    assert find_new_name(theirs, SOURCES["official_solov2"].rules) == ours


def test_two_tensors_for_one_name_are_an_error():
    weights = {
        "backbone.layer3.5.conv2_offset.bias": 0,
        "backbone.layer3.5.conv2.conv_offset.bias": 1,
    }
    with pytest.raises(UserError, match=r"both .*conv2_offset.* and .*conv_offset"):
        convert(weights, SOURCES["official_solov2"])
