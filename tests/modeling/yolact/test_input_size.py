"""YOLACT resizes its own input, so Detectron2's mapper and predictor need not know how."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import BoxMode, ImageList

from solo_d2 import add_solo_d2_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "YOLACT"


def config(name: str = "YOLACT_R50", **options):
    """The packaged config, with a thin network."""
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.merge_from_list(
        [
            *(
                "MODEL.DEVICE",
                "cpu",
                "MODEL.WEIGHTS",
                "",
                "DATASETS.TRAIN",
                (),
                "DATASETS.TEST",
                (),
            ),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.DEPTH", 50),
            *("MODEL.YOLACT.NUM_CLASSES", 3, "MODEL.YOLACT.CONV_DIM", 16),
        ]
    )
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def small_model(size: int = 96):
    torch.manual_seed(0)
    return build_model(config(MODEL__YOLACT__INPUT_SIZE=size))


def image_of(height: int, width: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)


def record_input(model) -> list[tuple[int, ...]]:
    """The shapes of all inputs of the backbone from now on."""
    shapes: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    return shapes


@pytest.mark.parametrize(
    ("name", "size"), [("YOLACT_R50", 550), ("YOLACT_im400_R101", 400), ("YOLACT_im700_R101", 700)]
)
def test_under_detectron2s_predictor_the_network_sees_the_published_size(name, size):
    torch.manual_seed(0)
    predictor = DefaultPredictor(config(name, MODEL__YOLACT__SCORE_THRESH_TEST=0.0))
    shapes = record_input(predictor.model)
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    instances = predictor(image)["instances"]
    assert shapes == [(1, 3, size, size)]
    assert instances.image_size == (480, 640)
    assert len(instances) and instances.pred_masks.shape[1:] == (480, 640)


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_under_detectron2s_mapper_the_network_sees_the_published_size(tmp_path, mask_format):
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.zeros((60, 80, 3), np.uint8))
    options = {"INPUT__MASK_FORMAT": mask_format, "INPUT__RANDOM_FLIP": "none"}
    mapper = DatasetMapper(config(**options), is_train=True)
    polygon = [20.0, 15.0, 60.0, 15.0, 60.0, 45.0, 20.0, 45.0]
    annotation = {
        "bbox": [20, 15, 40, 30],
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": [polygon],
        "category_id": 1,
    }
    record = {"file_name": str(path), "height": 60, "width": 80, "annotations": [annotation]}
    example = mapper(record)
    assert example["image"].shape == (3, 60, 80)
    model = build_model(config()).train()
    shapes = record_input(model)
    assert all(loss.isfinite() for loss in model([example]).values())
    assert shapes == [(1, 3, 550, 550)]
    (gt,) = model.prepare_ground_truth([example], model.preprocess_image([example]))
    torch.testing.assert_close(gt.boxes, torch.tensor([[20 / 80, 0.25, 60 / 80, 0.75]]) * 550)
    inside = torch.zeros(1, 550, 550, dtype=torch.bool)
    inside[:, 137:413, 137:413] = True
    assert (gt.masks ^ inside).float().mean() < 0.005
    assert gt.image_size == (550, 550)


def test_the_input_is_opencvs_bilinear_without_antialiasing():
    model = small_model()
    image = image_of(131, 77)
    batch = model.preprocess_image([{"image": image}])
    ours = batch.tensor[0] * model.pixel_std + model.pixel_mean
    float_image = image.permute(1, 2, 0).numpy().astype(np.float32)
    theirs = cv2.resize(float_image, (96, 96), interpolation=cv2.INTER_LINEAR)
    torch.testing.assert_close(
        ours, torch.from_numpy(theirs).permute(2, 0, 1), rtol=1e-4, atol=1e-2
    )


def test_an_image_of_the_input_size_is_left_alone():
    model = small_model()
    image = image_of(96, 96)
    ours = model.preprocess_image([{"image": image}]).tensor[0]
    assert torch.equal(ours, (image - model.pixel_mean) / model.pixel_std)


def test_images_of_all_sizes_are_one_batch_without_padding():
    batch = small_model().preprocess_image([{"image": image_of(*s)} for s in ((50, 200), (130, 9))])
    assert isinstance(batch, ImageList)
    assert batch.image_sizes == [(96, 96), (96, 96)]
    assert batch.tensor.shape == (2, 3, 96, 96)


def test_the_output_has_the_size_asked_for_or_that_of_the_image_that_came_in():
    model = small_model().eval()
    inputs = [
        {"image": image_of(50, 70)},
        {"image": image_of(50, 70), "height": 33, "width": 44},
    ]
    with torch.no_grad():
        first, second = (x["instances"] for x in model(inputs))
    assert first.image_size == (50, 70)
    assert second.image_size == (33, 44)
