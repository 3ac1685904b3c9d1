import pytest

from solo_d2.config import load_config
from solo_d2.errors import UserError
from solo_d2.tools.compare.fairness import check_fair, describe, find_differences


def config(*overrides):
    return load_config(opts=["SOLVER.MAX_ITER", 100, "SOLVER.IMS_PER_BATCH", 4, *overrides])


def differences(first, second, *, training=True):
    found = find_differences({"a": [first], "b": [second]}, training=training)
    return {x.key: x for x in found}


def test_equal_configs_do_not_differ_whatever_their_folders():
    assert not differences(config(), config("OUTPUT_DIR", "elsewhere", "VERSION", 3))


@pytest.mark.parametrize(
    ("key", "value", "group"),
    [
        ("MODEL.META_ARCHITECTURE", "SOLO", "model"),
        ("MODEL.SOLO.NUM_CONVS", 2, "model"),
        ("MODEL.FPN.OUT_CHANNELS", 32, "backbone"),
        ("MODEL.WEIGHTS", "other.pth", "backbone"),
        ("MODEL.RESNETS.DEPTH", 18, "backbone"),
        ("MODEL.VOVNET.OUT_FEATURES", ["stage5"], "model"),  # no model has a VoVNet
        ("INPUT.FORMAT", "RGB", "other"),
        ("DATALOADER.NUM_WORKERS", 7, "other"),
        ("MODEL.DEVICE", "cpu", "forbidden"),
        ("INPUT.AUGMENTATION", "ssd", "forbidden"),
        ("INPUT.MIN_SIZE_TEST", 640, "forbidden"),
        ("SOLVER.MAX_ITER", 200, "forbidden"),
        ("SOLVER.IMS_PER_BATCH", 8, "forbidden"),
        ("SEED", 4, "forbidden"),
        ("DATASETS.TEST", ("shapes_val",), "forbidden"),
        ("TEST.DETECTIONS_PER_IMAGE", 10, "forbidden"),
    ],
)
def test_a_difference_is_found_and_judged(key, value, group):
    before = config("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    after = config("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", key, value)
    found = differences(before, after)
    assert list(found) == [key]
    assert (found[key].group, found[key].allowed) == (group, group != "forbidden")
    expected = list(value) if isinstance(value, tuple) else value
    assert found[key].values["b"] == expected != found[key].values["a"]
    if group != "forbidden":
        check_fair(list(found.values()))
        return
    with pytest.raises(UserError, match=key) as error:
        check_fair(list(found.values()))
    assert "\n" not in str(error.value)


def test_what_only_a_training_looks_at_may_differ_where_nothing_is_trained():
    other = config("SOLVER.MAX_ITER", 200, "INPUT.MIN_SIZE_TRAIN", (1,), "TEST.AUG.ENABLED", True)
    found = differences(config(), other, training=False)
    assert {k: x.group for k, x in found.items()} == {
        "SOLVER.MAX_ITER": "other",
        "INPUT.MIN_SIZE_TRAIN": "other",
        "TEST.AUG.ENABLED": "forbidden",
    }


def test_learning_rates_may_differ_where_several_are_tried():
    models = {"a": [config("SOLVER.BASE_LR", 0.1)], "b": [config("SOLVER.BASE_LR", 0.2)]}
    (found,) = find_differences(models, training=True, rates=True)
    assert found.key == "SOLVER.BASE_LR" and found.allowed


def test_stages_count_together_and_may_differ_from_each_other():
    one = [config("SOLVER.BASE_LR", 0.1)]
    two = [
        config("SOLVER.BASE_LR", 0.1, "SOLVER.MAX_ITER", 70),
        config("SOLVER.BASE_LR", 0.2, "SOLVER.MAX_ITER", 30),
    ]
    found = find_differences({"one": one, "two": two}, training=True)
    assert [(x.key, x.group) for x in found] == [
        ("SOLVER.BASE_LR", "other"),
        ("SOLVER.MAX_ITER", "other"),
    ]
    assert found[0].values == {"one": 0.1, "two": "0.1, then 0.2"}
    assert found[1].values == {"one": 100, "two": "70 + 30"}
    two[1].SOLVER.MAX_ITER = 100
    found = find_differences({"one": one, "two": two}, training=True)
    assert [x.group for x in found] == ["forbidden", "other"]
    # the first stage must agree
    two[0].SOLVER.BASE_LR = 0.3
    assert "SOLVER.BASE_LR" in {
        x.key for x in find_differences({"one": one, "two": two}, training=True) if not x.allowed
    }


def test_allowed_on_request_but_never_other_test_data():
    found = differences(config(), config("SOLVER.MAX_ITER", 200))
    check_fair(list(found.values()), allow=True)
    other = config("DATASETS.SHAPES.IMAGE_SIZE", (1, 1), "DATASETS.SHAPES.TRAIN_IMAGES", 5)
    found = differences(config(), other)
    with pytest.raises(UserError, match="same data") as error:
        check_fair(list(found.values()), allow=True)
    assert "IMAGE_SIZE" in str(error.value) and "TRAIN_IMAGES" not in str(error.value)


def test_a_description_puts_equal_values_together():
    cfgs = {name: [config("SEED", seed)] for name, seed in (("a", 1), ("b", 2), ("c", 1))}
    (found,) = find_differences(cfgs, training=True)
    assert describe(found) == "SEED is 1 (a, c), 2 (b)"
