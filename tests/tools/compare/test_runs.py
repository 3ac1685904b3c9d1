import json

import pytest
import torch

from solo_d2.errors import UserError
from solo_d2.tools.compare.runs import make_runs, read_models


def test_names_come_from_the_file_or_the_command(tiny_configs):
    stages = f"{tiny_configs['stage1']}+{tiny_configs['stage2']}"
    words = [tiny_configs["solo"], f"Mask R-CNN={tiny_configs['mask_rcnn']}", f"two={stages}"]
    models = read_models(words)
    assert [model.name for model in models] == ["solo", "Mask R-CNN", "two"]
    assert models[1].folder_name == "Mask_R-CNN"
    assert [len(model.cfgs) for model in models] == [1, 1, 2]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("net_shapes_stage1", "net_shapes_stage2"), "net_shapes"),
        (("a1", "a2"), "a"),
        (("stage1", "stage2"), "stage1+stage2"),
        (("x", "y"), "x+y"),
    ],
)
def test_a_training_in_stages_is_called_by_what_its_files_share(
    tiny_configs, tmp_path, names, expected
):
    files = []
    for name in names:
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"_BASE_: {tiny_configs['solo']}")
    (model,) = read_models(["+".join(map(str, files))])
    assert model.name == expected


def test_wrong_words_give_one_line(tiny_configs, tmp_path):
    solo = tiny_configs["solo"]
    for words, weights, message in [
        (["missing.yaml"], [], "missing.yaml"),
        ([solo, solo], [], "NAME=FILE"),
        ([f"a b={solo}", f"a_b={solo}"], [], "NAME=FILE"),
        ([solo], ["a.pth", "b.pth"], "2 files for 1 configs"),
        ([solo], [str(tmp_path / "missing.pth")], "missing.pth"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            read_models(words, weights)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="one data set"):
        read_models([solo], opts=["DATASETS.TEST", "()"])


def test_iterations_are_for_all_stages_together(tiny_configs):
    stages = f"two={tiny_configs['stage1']}+{tiny_configs['stage2']}"
    words = [tiny_configs["solo"], stages]
    opts = ["SOLVER.STEPS", "(1,)", "SOLVER.MAX_ITER", "2"]
    opts += ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    for number in (2, 7, 200):
        one, two = read_models(words, opts=opts, iterations=number)
        assert one.cfgs[0].SOLVER.MAX_ITER == number
        assert one.cfgs[0].SOLVER.STEPS == (number // 2,)
        first, second = (cfg.SOLVER.MAX_ITER for cfg in two.cfgs)
        assert first + second == number and abs(first - second) <= 1
    with pytest.raises(UserError, match="1 iterations are too few for 2 stages"):
        read_models(words, iterations=1)


def test_each_run_has_a_folder_and_each_stage_one_in_it(tiny_configs, tmp_path):
    words = [tiny_configs["solo"], f"two={tiny_configs['stage1']}+{tiny_configs['stage2']}"]
    solo, two = (make_runs(model, tmp_path, [5])[0] for model in read_models(words))
    (cfg,) = solo.cfgs
    assert cfg.OUTPUT_DIR == str(tmp_path / "solo/seed5") and cfg.SEED == 5
    assert [cfg.OUTPUT_DIR for cfg in two.cfgs] == [
        str(tmp_path / "two/seed5/stage1"),
        str(tmp_path / "two/seed5/stage2"),
    ]
    assert two.cfgs[1].MODEL.WEIGHTS == str(tmp_path / "two/seed5/stage1/model_final.pth")
    final, training = (cfg.MODEL.WEIGHTS for cfg in (two.final_cfg, two.training_cfg))
    assert final == str(tmp_path / "two/seed5/stage2/model_final.pth")
    assert training == str(tmp_path / "two/seed5/stage1/model_final.pth")


def test_each_rate_has_a_folder_and_later_stages_keep_their_proportion(tiny_configs, tmp_path):
    (model,) = read_models([f"two={tiny_configs['stage1']}+{tiny_configs['stage2']}"])
    runs = make_runs(model, tmp_path, [1, 2], (0.002, 0.004))
    assert [(x.rate, x.seed) for x in runs] == [(0.002, 1), (0.002, 2), (0.004, 1), (0.004, 2)]
    assert runs[2].folder == tmp_path / "two/rate0.004/seed1"
    assert [x.SOLVER.BASE_LR for x in runs[2].cfgs] == pytest.approx([0.004, 0.002])


def test_given_weights_are_evaluated_and_the_last_stage_has_them(tiny_configs, tmp_path):
    weights = tmp_path / "w.pth"
    torch.save({"model": {}}, weights)
    words = [f"two={tiny_configs['stage1']}+{tiny_configs['stage2']}", tiny_configs["solo"]]
    two, solo = read_models(words, [str(weights), "-"])
    (run,) = make_runs(two, tmp_path, [1, 2])
    assert run.seed is None and run.folder == tmp_path / "two/evaluation"
    assert len(run.cfgs) == 1 and run.training_cfg is None
    assert run.cfgs[0].MODEL.WEIGHTS == run.final_cfg.MODEL.WEIGHTS == str(weights)
    assert [x.seed for x in make_runs(solo, tmp_path, [1, 2])] == [1, 2]


def test_a_folder_is_of_one_dtype(tiny_configs, tmp_path):
    weights = tmp_path / "w.pth"
    torch.save({"model": {}}, weights)
    (model,) = read_models([tiny_configs["solo"]], [str(weights)])
    full, half = (make_runs(model, tmp_path, [1], dtype=x)[0] for x in ("float32", "bfloat16"))
    assert "dtype" not in full.record and half.record["dtype"] == "bfloat16"
    half.folder.mkdir(parents=True)
    (half.folder / "run.json").write_text(json.dumps(half.record))
    half.check_unchanged()
    with pytest.raises(UserError, match="--dtype"):
        full.check_unchanged()


def prepared(tiny_configs, output, *opts, **options):
    """A run whose folder has the record of an earlier one."""
    (model,) = read_models([tiny_configs["solo"]], opts=opts, **options)
    (run,) = make_runs(model, output, [1])
    run.folder.mkdir(parents=True, exist_ok=True)
    record = run.folder / "run.json"
    if not record.exists():
        record.write_text(json.dumps(run.record))
    return run


def test_a_changed_config_is_refused_with_what_changed(tiny_configs, tmp_path):
    prepared(tiny_configs, tmp_path).check_unchanged()
    harmless = ("DATALOADER.NUM_WORKERS", "2", "SOLVER.CHECKPOINT_PERIOD", "3")
    prepared(tiny_configs, tmp_path, *harmless).check_unchanged()
    changed = prepared(tiny_configs, tmp_path, "SOLVER.MAX_ITER", "7", "MODEL.SOLO.NUM_CONVS", "2")
    with pytest.raises(UserError) as error:
        changed.check_unchanged()
    assert "SOLVER.MAX_ITER was 6, now it is 7" in str(error.value)
    assert "MODEL.SOLO.NUM_CONVS was 1, now it is 2" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_keys_that_came_after_a_record_do_not_change_it(tiny_configs, tmp_path):
    run = prepared(tiny_configs, tmp_path)
    record = json.loads((run.folder / "run.json").read_text())
    del record["stages"][0]["TEST.BEST_METRIC"]
    (run.folder / "run.json").write_text(json.dumps(record))
    run.check_unchanged()


def test_weights_are_known_by_their_content(tiny_configs, tmp_path):
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(b"1")
    second.write_bytes(b"1")
    prepared(tiny_configs, tmp_path, "MODEL.WEIGHTS", str(first))
    prepared(tiny_configs, tmp_path, "MODEL.WEIGHTS", str(second)).check_unchanged()
    first.write_bytes(b"2")
    with pytest.raises(UserError, match="another content"):
        prepared(tiny_configs, tmp_path, "MODEL.WEIGHTS", str(first)).check_unchanged()


def test_a_folder_of_something_else_is_not_touched(tiny_configs, tmp_path):
    (model,) = read_models([tiny_configs["solo"]])
    (run,) = make_runs(model, tmp_path, [1])
    run.folder.mkdir(parents=True)
    (run.folder / "model_final.pth").write_bytes(b"precious")
    with pytest.raises(UserError, match="not made by a comparison"):
        run.execute(lambda cfg: None)
    assert [p.name for p in run.folder.iterdir()] == ["model_final.pth"]


def test_a_run_without_its_last_evaluation_is_not_finished(tiny_configs, tmp_path):
    run = prepared(tiny_configs, tmp_path)
    assert not run.is_finished()
    (run.folder / "results.json").write_text("{}")
    assert run.is_finished()
