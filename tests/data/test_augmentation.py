"""Augmentation: images, boxes, polygons, bitmaps and crowds stay together."""

import random

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.transforms.augmentation import _TransformToAug as TransformToAug
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from solo_d2.config import load_config
from solo_d2.data.augmentation import (
    ConstrainedCrop,
    RandomExpand,
    WindowTransform,
    build_augmentations,
)
from solo_d2.data.mapper import InstanceMapper
from solo_d2.engine import Trainer

HEIGHT, WIDTH = 72, 96
FILL = (124, 117, 104)
# The color of object k: unlike the fill and the background, which is black.
COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]])


def config(**options):
    """YOLACT's data settings; the shorter side becomes 64 pixels."""
    opts = {
        "MODEL.META_ARCHITECTURE": "YOLACT",
        "MODEL.MASK_ON": True,
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.FORMAT": "RGB",
        "INPUT.AUGMENTATION": "ssd",
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "MODEL.YOLACT.NUM_CLASSES": 5,
        **{f"INPUT.{key}": value for key, value in options.items()},
        "DATALOADER.NUM_WORKERS": 0,
    }
    return load_config(opts=[x for pair in opts.items() for x in pair])


def build(photometric=False, **options):
    """A training mapper. Tests recognize objects by color, so colors change only on request."""
    mapper = InstanceMapper(config(**options), is_train=True)
    if not photometric:
        augmentations = mapper.augmentations.augs
        assert isinstance(augmentations[0], TransformToAug)
        mapper.augmentations = T.AugmentationList(augmentations[1:])
    return mapper


def quad(cx, cy, w, h, lean):
    """A convex quadrangle, (4, 2), as wide as w."""
    return np.array(
        [
            (cx - w / 2, cy - lean * h / 2),
            (cx + lean * w / 2, cy - h / 2),
            (cx + w / 2, cy + lean * h / 2),
            (cx - lean * w / 2, cy + h / 2),
        ]
    )


def raster(polygon, height=HEIGHT, width=WIDTH):
    rles = mask_util.frPyObjects([polygon.reshape(-1).tolist()], height, width)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def annotate(polygon, category, form, crowd=False):
    (x0, y0), (x1, y1) = polygon.min(0), polygon.max(0)
    segmentation = [polygon.reshape(-1).tolist()]
    if form == "rle":
        segmentation = mask_util.encode(np.asfortranarray(raster(polygon).astype(np.uint8)))
    return {
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "bbox_mode": 1,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": int(crowd),
    }


def draw(polygons, path, shape=(HEIGHT, WIDTH)):
    """Later polygons hide the earlier ones."""
    image = np.zeros((*shape, 3), np.uint8)
    for polygon, color in zip(polygons, COLORS):
        image[raster(polygon, *shape)] = color
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


def record(folder, polygons, form, crowds=0):
    """A record with one object per polygon, of which the last are crowds."""
    path = folder / "image.png"
    draw(polygons, path)
    objects = len(polygons) - crowds
    annotations = [annotate(p, k, form, crowd=k >= objects) for k, p in enumerate(polygons)]
    return {
        "file_name": str(path),
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 1,
        # crowds may come anywhere in a file
        "annotations": annotations[::-1],
    }


def seen(example, category):
    """(H, W) bool: pixels with at least half of the object's color."""
    image = example["image"].float().numpy().transpose(1, 2, 0)
    return np.abs(image - COLORS[category]).max(axis=2) <= 127.5


# Separate, so that none hides another.
SPOTS = [(16, 18), (48, 18), (80, 18), (28, 54), (70, 54)]
quads = st.builds(
    lambda w, h, lean: (w, h, lean),
    st.floats(8, 26),
    st.floats(8, 30),
    st.floats(-0.6, 0.6),
)


class TestMapper:
    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(quads, min_size=1, max_size=5),
        form=st.sampled_from(["polygon", "rle"]),
        crowds=st.integers(0, 1),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_image_boxes_masks_and_crowds_agree(self, folder, sizes, form, crowds, seed):
        crowds = min(crowds, len(sizes) - 1)
        polygons = [quad(*spot, *size) for spot, size in zip(SPOTS, sizes)]
        mapper = build()
        np.random.seed(seed)  # noqa: NPY002
        example = mapper(record(folder, polygons, form, crowds))
        assert example is not None  # these shapes fill their boxes' centers
        instances = example["instances"]
        height, width = instances.image_size
        assert example["image"].shape == (3, height, width)
        assert min(height, width) == 64

        crowd, classes = instances.gt_crowd, instances.gt_classes
        assert torch.equal(crowd, classes >= len(polygons) - crowds)
        assert not crowd.all()
        assert crowd.tolist() == sorted(crowd.tolist())  # crowds come last

        boxes, masks = instances.gt_boxes.tensor, instances.gt_masks.tensor
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        torch.testing.assert_close(boxes, instances.gt_masks.get_bounding_boxes().tensor)
        for mask, category in zip(masks.numpy().astype(bool), classes.tolist()):
            pixels = seen(example, category)
            # the two borders are resampled differently; nothing differs beyond them
            kernel = np.ones((5, 5), np.uint8)
            grown = cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)
            core = cv2.erode(mask.astype(np.uint8), kernel).astype(bool)
            assert not (core & ~pixels).any()
            assert not (pixels & ~grown).any()

    def test_equal_seeds_give_equal_examples(self, folder):
        polygons = [quad(*spot, 20, 24, 0.3) for spot in SPOTS]
        mapper = build(photometric=True)
        images = []
        for seed in (3, 3, 4):
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)  # of the photometric part
            images.append(mapper(record(folder, polygons, "rle"))["image"])
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])

    def test_objects_with_their_centres_outside_leave(self, folder):
        polygons = [quad(*spot, 24, 28, 0.5) for spot in SPOTS]
        mapper = build()
        window = WindowTransform(0, 0, 49, 36)  # some pixels of the lower and the right ones too
        mapper.augmentations = T.AugmentationList([window, T.Resize((64, 64))])
        instances = mapper(record(folder, polygons, "polygon", crowds=1))["instances"]
        assert sorted(instances.gt_classes.tolist()) == [0, 1]

    @pytest.mark.parametrize("kept_crowd, expected", [(True, [True]), (False, [])])
    def test_crowd_only_images_pass(self, folder, kept_crowd, expected):
        mapper = build()
        mapper.keep_crowd = kept_crowd
        for seed in range(10):
            np.random.seed(seed)  # noqa: NPY002
            example = mapper(record(folder, [quad(48, 36, 40, 40, 0.2)], "rle", crowds=1))
            instances = example["instances"]
            if kept_crowd:
                assert instances.gt_crowd.tolist() == expected
            assert len(instances) == len(expected)

    def test_images_without_annotations_pass(self, folder):
        example = build()(record(folder, [], "rle"))
        assert len(example["instances"]) == 0

    def test_images_that_lost_their_objects_are_rejected(self, folder):
        mapper = build()
        polygons = [quad(20, 20, 20, 20, 0.2), quad(80, 60, 20, 20, 0.2)]
        crop = WindowTransform(50, 40, 40, 30)  # only the crowd is left
        mapper.augmentations = T.AugmentationList([crop])
        assert mapper(record(folder, polygons, "rle", crowds=1)) is None
        # unlike in Detectron2's own augmentation
        plain = InstanceMapper(config(AUGMENTATION="default"), is_train=True)
        outside = [quad(-40, -40, 8, 8, 0.2)]
        assert len(plain(record(folder, outside, "polygon"))["instances"]) == 0

    def test_the_trainers_test_loader_resizes_too(self, folder, request):
        records = [record(folder, [quad(48, 36, 40, 40, 0.2)], "rle")]
        DatasetCatalog.register("augmentation_test", lambda: records)
        request.addfinalizer(lambda: DatasetCatalog.remove("augmentation_test"))
        (example,) = next(iter(Trainer.build_test_loader(config(), "augmentation_test")))
        assert example["image"].shape == (3, 64, 85)

    def test_inference_resizes_and_nothing_else(self, folder):
        mapper = InstanceMapper(config(), is_train=False)
        example = mapper(record(folder, [quad(48, 36, 40, 40, 0.2)], "rle"))
        assert "instances" not in example and example["height"] == HEIGHT
        image = np.asarray(Image.open(example["file_name"]))
        augmented = T.AugInput(image)
        build_augmentations(config(), is_train=False)[0](augmented)
        assert torch.equal(example["image"], torch.from_numpy(augmented.image).permute(2, 0, 1))


class TestWindow:
    def test_a_larger_window_puts_the_image_on_a_canvas(self):
        image = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
        transform = WindowTransform(-1, -2, 5, 6, FILL)
        out = transform.apply_image(image)
        assert out.shape == (6, 5, 3)
        assert np.array_equal(out[2:4, 1:3], image)
        out[2:4, 1:3] = FILL
        np.testing.assert_allclose(out, np.broadcast_to(FILL, out.shape))
        assert transform.apply_box(np.array([[0.0, 0, 2, 1]])).tolist() == [[1, 2, 3, 3]]
        assert transform.apply_segmentation(np.ones((2, 2), np.uint8)).sum() == 4

    def test_a_smaller_window_cuts(self):
        image = np.arange(48).reshape(4, 4, 3).astype(np.uint8)
        assert np.array_equal(WindowTransform(1, 0, 2, 3).apply_image(image), image[:3, 1:3])

    def test_boxes_are_clipped_and_those_beside_it_become_empty(self):
        boxes = np.array([[0.0, 0, 30, 30], [0, 0, 20, 20], [25, 25, 60, 60], [2, 2, 8, 8]])
        out = WindowTransform(10, 10, 30, 30).apply_box(boxes)
        # the second's center lies on the window's corner
        assert out.tolist() == [[0, 0, 20, 20], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]

    @settings(max_examples=60, deadline=None)
    @given(
        corners=st.lists(st.tuples(st.floats(-20, 60), st.floats(-20, 60)), min_size=3, max_size=8),
        window=st.tuples(
            st.integers(-10, 30), st.integers(-10, 30), st.integers(5, 50), st.integers(5, 50)
        ),
    )
    def test_moved_polygons_cover_what_the_window_shows(self, corners, window):
        """COCO's rasterization clips polygons to the window."""
        polygon = np.array(corners)
        x0, y0, width, height = window
        (moved,) = WindowTransform(*window).apply_polygons([polygon])
        canvas = raster(polygon - [x0, y0] + 60, height + 120, width + 120)
        shown = canvas[60 : 60 + height, 60 : 60 + width]
        found = raster(moved, height, width)
        # COCO's raster moves edges by up to half a pixel, and thin parts come and go
        differing = (found != shown).astype(np.uint8)
        assert not cv2.erode(differing, np.ones((3, 3), np.uint8), borderValue=0).any()


class TestExpand:
    def test_half_of_the_images_are_put_on_a_canvas(self):
        np.random.seed(0)  # noqa: NPY002
        image = np.zeros((20, 30, 3), np.uint8)
        drawn = [RandomExpand(4.0, FILL).get_transform(image) for _ in range(600)]
        windows = [t for t in drawn if isinstance(t, WindowTransform)]
        assert len(windows) / len(drawn) == pytest.approx(0.5, abs=0.07)
        for t in windows:
            assert t.x0 <= 0 and t.y0 <= 0
            assert t.width + t.x0 >= 30 and t.height + t.y0 >= 20  # all of the image is inside
        ratios = np.array([t.width / 30 for t in windows])
        assert 1 <= ratios.min() < 1.1 and 3.9 < ratios.max() <= 4


class TestCrop:
    def draw(self, boxes, n=300):
        np.random.seed(0)  # noqa: NPY002
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        image = np.zeros((60, 80, 3), np.uint8)
        return [ConstrainedCrop().get_transform(image, boxes) for _ in range(n)]

    def test_one_in_six_images_stays_whole(self):
        drawn = self.draw([[0, 0, 80, 60]], n=600)
        whole = [isinstance(t, T.NoOpTransform) for t in drawn]
        assert np.mean(whole) == pytest.approx(1 / 6, abs=0.05)

    def test_windows_are_within_the_image_and_of_allowed_shape(self):
        for t in self.draw([[30, 20, 50, 40]]):
            if isinstance(t, WindowTransform):
                assert t.x0 >= 0 and t.x0 + t.width <= 80
                assert t.y0 >= 0 and t.y0 + t.height <= 60
                assert t.width >= 0.3 * 80 - 1 and t.height >= 0.3 * 60 - 1
                # both sides are rounded
                assert 0.5 <= (t.height + 1) / (t.width - 1) and (t.height - 1) / (t.width + 1) <= 2

    def test_the_center_of_an_object_is_inside(self):
        boxes = [[2, 2, 8, 8], [60, 40, 78, 58]]
        seen = set()
        for t in self.draw(boxes):
            if isinstance(t, WindowTransform):
                inside = tuple(t.apply_box(np.array(boxes))[:, 2] > 0)
                assert any(inside)
                seen.add(inside)
        assert len(seen) == 3

    def test_no_objects_means_no_crop(self):
        assert all(isinstance(t, T.NoOpTransform) for t in self.draw([], n=20))

    def test_unreachable_objects_end_without_a_crop(self):
        drawn = self.draw([[200, 200, 220, 220]], n=5)
        assert all(isinstance(t, T.NoOpTransform) for t in drawn)


class TestConfig:
    def names(self, cfg, is_train=True):
        return [type(a).__name__ for a in build_augmentations(cfg, is_train)]

    def test_order_is_the_published_one(self):
        assert self.names(config()) == [
            "ColorAugSSDTransform",
            "RandomExpand",
            "ConstrainedCrop",
            "RandomFlip",
            "ResizeShortestEdge",
        ]
        photometric = build_augmentations(config(), True)[0]
        ranges = ("contrast_low", "contrast_high", "saturation_low", "saturation_high")
        assert [getattr(photometric, name) for name in ranges] == [0.5, 1.5, 0.5, 1.5]
        assert (photometric.brightness_delta, photometric.hue_delta) == (32, 18)

    def test_default_is_detectron2s(self):
        cfg = load_config(opts=["INPUT.CROP.ENABLED", True])
        assert self.names(cfg) == ["RandomCrop", "ResizeShortestEdge", "RandomFlip"]
        assert self.names(cfg, is_train=False) == ["ResizeShortestEdge"]

    @pytest.mark.parametrize("image_format", ["RGB", "BGR"])
    def test_canvas_has_one_color_in_either_format(self, image_format):
        expand = build_augmentations(config(FORMAT=image_format), True)[1]
        assert expand.fill == (FILL if image_format == "RGB" else FILL[::-1])

    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("AUGMENTATION", "SSD", "INPUT.AUGMENTATION must be one of"),
            ("FORMAT", "L", "needs RGB or BGR"),
            ("MASK_FORMAT", "polygon", "needs INPUT.MASK_FORMAT 'bitmask'"),
        ],
    )
    def test_unknown_values_are_refused_by_key(self, key, value, message):
        with pytest.raises(ValueError, match=message):
            build_augmentations(config(**{key: value}), True)
