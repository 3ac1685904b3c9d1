"""Two drawn street scenes in Cityscapes' file layout, through Detectron2's own registration."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets.cityscapes_panoptic import register_all_cityscapes_panoptic
from PIL import Image

from solo_d2.config import load_config
from solo_d2.data import InstanceMapper
from solo_d2.data.cityscapes import ShiftAndRotate, StreetColors, panoptic_annotations
from solo_d2.engine import Trainer
from solo_d2.evaluation.panoptic import PanopticEvaluator

H, W = 96, 160
TRAIN, VAL = "cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val"
CONFIG = "AdaptIS/AdaptIS_R50_DeepLab_Cityscapes_stage1.yaml"
# Label in training -> category in the files.
CATEGORIES = {0: 7, 2: 11, 10: 23, 11: 24, 13: 26}
PERSON, CAR = 11, 13
# (label, number of the object or None for stuff, top, left, bottom, right); later ones are on top
SCENE = [
    (10, None, 0, 0, 40, W),
    (2, None, 20, 30, 60, 120),
    (0, None, 60, 0, H, W),
    (CAR, 0, 55, 20, 75, 60),
    (CAR, 1, 60, 50, 85, 95),
    (PERSON, 0, 50, 100, 80, 110),
    (PERSON, None, 50, 125, 70, 155),  # a crowd
]
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.ADAPTIS.FUSE_DIM": 16,
    "MODEL.ADAPTIS.CONV_DIM": 8,
    "MODEL.ADAPTIS.SEMANTIC_DIM": 8,
    "MODEL.ADAPTIS.MIN_OBJECT_AREA": 20,
    "MODEL.ADAPTIS.TEST.RANDOM_ROUNDS": 2,
    "MODEL.ADAPTIS.TEST.RANDOM_THINGS_THRESH": 0.1,
    "INPUT.MIN_SIZE_TRAIN": (82, 110),
    "INPUT.MIN_SIZE_TEST": H,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
}


def draw(root, split: str, name: str, shift: int) -> dict:
    """Write the files of a scene; returns its entry in the json file."""
    labels = np.full((H, W), 255, np.uint8)
    ids = np.zeros((H, W), np.int64)
    for label, number, top, left, bottom, right in SCENE:
        where = (
            slice(top, bottom),
            slice(left and left + shift, right if right == W else right + shift),
        )
        category = CATEGORIES[label]
        labels[where] = label
        ids[where] = category if number is None else 1000 * category + number
    labels[-6:], ids[-6:] = 255, 0  # the bonnet of the car with the camera
    image = np.random.default_rng(shift).integers(0, 40, (H, W, 3)) + 3 * labels[..., None] % 200
    city = root / "cityscapes/leftImg8bit" / split / "aachen"
    truth = root / "cityscapes/gtFine" / split / "aachen"
    pictures = root / "cityscapes/gtFine" / f"cityscapes_panoptic_{split}"
    for folder in (city, truth, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(city / f"{name}_leftImg8bit.png")
    Image.fromarray(labels).save(truth / f"{name}_gtFine_labelTrainIds.png")
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    Image.fromarray(rgb).save(pictures / f"{name}_gtFine_panoptic.png")
    segments = [
        {
            "id": int(i),
            "category_id": int(i) if i < 1000 else int(i) // 1000,
            "iscrowd": int(i == CATEGORIES[PERSON]),
            "area": int((ids == i).sum()),
        }
        for i in np.unique(ids[ids > 0])
    ]
    file_name = f"{name}_gtFine_panoptic.png"
    return {"image_id": name, "file_name": file_name, "segments_info": segments}


@pytest.fixture
def cityscapes(tmp_path):
    """The registration of Detectron2, with drawn files instead of the real ones."""
    for split in ("train", "val"):
        scenes = [draw(tmp_path, split, f"aachen_00000{i}_000019", 4 * i) for i in range(2)]
        file = tmp_path / f"cityscapes/gtFine/cityscapes_panoptic_{split}.json"
        file.write_text(json.dumps({"annotations": scenes}))
    before = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    for name in (TRAIN, VAL):
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    register_all_cityscapes_panoptic(str(tmp_path))
    yield tmp_path
    DatasetCatalog.data, MetadataCatalog.data = before


def config(tmp_path, **options):
    settings = {**TINY, "OUTPUT_DIR": str(tmp_path / "output")}
    settings |= {key.replace("__", "."): value for key, value in options.items()}
    return load_config(CONFIG, opts=[x for item in settings.items() for x in item])


def test_a_panoptic_picture_gives_instances_crowds_and_semantic_labels(cityscapes):
    cfg = config(cityscapes, INPUT__AUGMENTATION="default", INPUT__MIN_SIZE_TRAIN=(H, H))
    cfg.INPUT.RANDOM_FLIP = "none"
    record = DatasetCatalog.get(TRAIN)[0]
    example = InstanceMapper(cfg, is_train=True)(record)
    instances = example["instances"]
    assert instances.gt_classes.tolist() == [PERSON, CAR, CAR, PERSON]
    assert instances.gt_crowd.tolist() == [False, False, False, True]
    areas = instances.gt_masks.tensor.flatten(1).sum(1).tolist()
    assert areas == [30 * 10, 20 * 40 - 10 * 15, 25 * 45, 20 * 30]
    assert instances.gt_boxes.tensor[0].tolist() == [100, 50, 110, 80]
    semantic = example["sem_seg"]
    assert semantic.shape == (H, W) and semantic[60, 70] == CAR and semantic[95, 0] == 255
    assert semantic[0, 0] == 10 and semantic[65, 0] == 0
    assert "annotations" not in record


def test_segments_of_coco_say_whether_they_are_things(cityscapes):
    record = DatasetCatalog.get(TRAIN)[0]
    for number, segment in enumerate(record["segments_info"]):
        segment |= {"isthing": number == 3, "category_id": CAR}
    (annotation,) = panoptic_annotations(record, things={CAR})
    assert mask_util.area(annotation["segmentation"]) == record["segments_info"][3]["area"]


def test_pixels_that_an_augmentation_fills_are_ignored_in_the_semantic_labels(cityscapes):
    mapper = InstanceMapper(config(cityscapes), is_train=True)
    mapper.augmentations = T.AugmentationList([T.PadTransform(8, 0, 0, 4)])
    example = mapper(DatasetCatalog.get(TRAIN)[0])
    assert example["sem_seg"].shape == (H + 4, W + 8)
    assert (example["sem_seg"][:, :8] == 255).all() and (example["sem_seg"][H:] == 255).all()
    assert example["sem_seg"][0, 8] == 10
    assert not example["instances"].gt_masks.tensor[:, :, :8].any()


def test_the_augmentation_keeps_picture_masks_and_labels_together(cityscapes):
    mapper = InstanceMapper(config(cityscapes), is_train=True)
    record = DatasetCatalog.get(TRAIN)[0]
    np.random.seed(0)  # noqa: NPY002
    sizes = set()
    for _ in range(8):
        example = mapper(record)
        sizes.add(tuple(example["image"].shape))
        instances, semantic = example["instances"], example["sem_seg"]
        assert semantic.shape == example["image"].shape[1:] == instances.gt_masks.tensor.shape[1:]
        masks = instances.gt_masks.tensor[~instances.gt_crowd]
        agree = [(semantic[m] == c).float().mean() for m, c in zip(masks, instances.gt_classes)]
        assert min(agree) > 0.85
    assert len(sizes) > 4


def test_shifts_and_rotations_are_small_and_colors_stay_bytes():
    np.random.seed(0)  # noqa: NPY002
    image = np.zeros((100, 200, 3), np.uint8)
    image[45:55, 95:105] = 100
    for _ in range(20):
        moved = ShiftAndRotate().get_transform(image).apply_image(image)
        rows, columns = np.nonzero(moved[..., 0] > 50)
        assert moved.shape == image.shape
        assert abs(rows.mean() - 49.5) < 4 and abs(columns.mean() - 99.5) < 7.5
        colors = StreetColors().get_transform(image).apply_image(image)
        assert colors.dtype == np.uint8 and len(np.unique(colors.reshape(-1, 3), axis=0)) <= 2


def test_an_image_that_lost_its_objects_is_kept_once_in_twenty(cityscapes, monkeypatch):
    mapper = InstanceMapper(config(cityscapes), is_train=True)
    mapper.augmentations = T.AugmentationList([T.CropTransform(0, 0, 30, 20)])
    record = DatasetCatalog.get(TRAIN)[0]
    for drawn, kept in ((0.94, False), (0.96, True)):
        monkeypatch.setattr(np.random, "rand", lambda drawn=drawn: drawn)
        assert (mapper(record) is not None) == kept


def test_the_published_recipe_trains_and_is_evaluated(cityscapes):
    cfg = config(cityscapes, TEST__EVAL_PERIOD=2)
    trainer = Trainer(cfg)
    assert (
        trainer.model.num_classes == 19 and trainer.model.semantic_head.predictor.out_channels == 19
    )
    rates = {
        name: group["lr"]
        for group in trainer.optimizer.param_groups
        for name, p in trainer.model.named_parameters()
        if any(p is x for x in group["params"])
    }
    for name, rate in rates.items():
        assert rate == pytest.approx(0.001 if name.startswith("backbone.") else 0.01), name
    results = trainer.train()
    assert trainer.scheduler.get_last_lr()[0] == pytest.approx(0)  # polynomial
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100
    inputs = next(iter(Trainer.build_test_loader(cfg, VAL)))
    trainer.model.eval()
    output = trainer.model(inputs)[0]
    classes = output["instances"].pred_classes
    assert ((classes >= 11) & (classes < 19)).all()
    assert all((s["category_id"] >= 11) == s["isthing"] for s in output["panoptic_seg"][1])
    assert output["sem_seg"].shape == (19, H, W)


def test_the_second_stage_of_the_recipe_trains_the_proposal_head(cityscapes):
    cfg = config(cityscapes, MODEL__ADAPTIS__STAGE="proposals", MODEL__ADAPTIS__NUM_POINTS=8)
    cfg.DATASETS.TEST = ()
    trainer = Trainer(cfg)
    before = trainer.model.proposal_head.predictor.weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.proposal_head.predictor.weight)


def test_the_truth_as_prediction_has_full_panoptic_quality(cityscapes):
    evaluator = PanopticEvaluator(VAL)
    evaluator.reset()
    for record in DatasetCatalog.get(VAL):
        ids, segments = evaluator.ground_truth(record)
        assert [s["isthing"] for s in segments] == [s["category_id"] >= 11 for s in segments]
        evaluator.process([record], [{"panoptic_seg": (ids.int(), segments)}])
    results = evaluator.evaluate()["panoptic_seg"]
    assert results["PQ"] == results["PQ_st"] == results["PQ_th"] == pytest.approx(100)
