import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import LVISEvaluator, SemSegEvaluator

from solo_d2.config import load_config
from solo_d2.errors import UserError
from solo_d2.evaluation.build import build_evaluators
from solo_d2.evaluation.coco import InstanceEvaluator
from solo_d2.evaluation.panoptic import PanopticEvaluator
from solo_d2.evaluation.pictures import PredictionPictures


@pytest.fixture
def of_kind(shapes_val):
    """(evaluator_type) -> the name of a data set of two images."""
    names = []

    def make(kind):
        records = shapes_val(2)
        known = MetadataCatalog.get("shapes_val")
        name = f"shapes_as_{kind}"
        DatasetCatalog.register(name, lambda: records)
        names.append(name)
        MetadataCatalog.get(name).set(thing_classes=known.thing_classes, json_file=known.json_file)
        if kind:
            MetadataCatalog.get(name).evaluator_type = kind
        return name

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("architecture", "kind", "classes"),
    [
        ("SOLOv2", "coco", [InstanceEvaluator]),
        ("SOLOv2", None, [InstanceEvaluator]),
        ("SOLOv2", "coco_panoptic_seg", [InstanceEvaluator]),
        ("SOLOv2", "lvis", [LVISEvaluator]),
        ("GeneralizedRCNN", "coco", [InstanceEvaluator]),
        ("AdaptIS", "coco", [InstanceEvaluator, PanopticEvaluator]),
        ("AdaptIS", "coco_panoptic_seg", [InstanceEvaluator, PanopticEvaluator]),
        ("PanopticSOLOv2", "coco", [InstanceEvaluator, PanopticEvaluator]),
        ("PanopticFPN", "coco", [InstanceEvaluator]),
        (
            "PanopticFPN",
            "coco_panoptic_seg",
            [InstanceEvaluator, SemSegEvaluator, PanopticEvaluator],
        ),
    ],
)
def test_evaluators_follow_the_data_set_and_the_model(
    of_kind, tmp_path, monkeypatch, architecture, kind, classes
):
    # the package of LVIS need not be installed, and the set has no semantic labels
    for evaluator in (LVISEvaluator, SemSegEvaluator):
        monkeypatch.setattr(evaluator, "__init__", lambda self, *args, **options: None)
    cfg = load_config(opts=("MODEL.META_ARCHITECTURE", architecture, "TEST.VIS_IMAGES", 1))
    found = build_evaluators(cfg, of_kind(kind), str(tmp_path))
    assert [type(x) for x in found] == [*classes, PredictionPictures]
    cfg.TEST.VIS_IMAGES = 0
    found = build_evaluators(cfg, f"shapes_as_{kind}", str(tmp_path))
    assert [type(x) for x in found] == classes


def test_a_data_set_that_the_model_has_no_output_for_is_named(of_kind, tmp_path):
    cfg = load_config(opts=("MODEL.META_ARCHITECTURE", "SOLO"))
    with pytest.raises(UserError, match="SOLO cannot be evaluated on data set 'shapes_as_sem_seg'"):
        build_evaluators(cfg, of_kind("sem_seg"), str(tmp_path))
