"""Augmentation: images, boxes, polygons, bitmaps and crowds stay together."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from solo_d2.config import load_config
from solo_d2.data.augmentation import (
    ConstrainedCrop,
    PhotometricDistortion,
    PhotometricTransform,
    PlainResizeTransform,
    RandomExpand,
    SquareResize,
    WindowTransform,
    build_augmentations,
    test_resize,
)
from solo_d2.data.mapper import InstanceMapper
from solo_d2.engine import Trainer

HEIGHT, WIDTH = 72, 96
FILL = [123.68, 116.78, 103.94]
# The color of object k: away from the fill and from the background, which is black.
COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]])


def config(**options):
    """Without photometric changes: the tests know objects by their colors."""
    opts = {
        "MODEL.META_ARCHITECTURE": "YOLACT",
        "MODEL.MASK_ON": True,
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.FORMAT": "RGB",
        "INPUT.KEEP_CROWD": True,
        "INPUT.AUGMENTATION": "ssd",
        "INPUT.SQUARE_SIZE": 64,
        "INPUT.SSD.PHOTOMETRIC": False,
        **{f"INPUT.{key.replace('__', '.')}": value for key, value in options.items()},
        "DATALOADER.NUM_WORKERS": 0,
    }
    return load_config(opts=[x for pair in opts.items() for x in pair])


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
    """A record of as many objects as there are polygons, the last of them crowds."""
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
    """Where the image has the color of an object, (H, W) bool: half of it or more."""
    image = example["image"].float().numpy().transpose(1, 2, 0)
    return np.abs(image - COLORS[category]).max(axis=2) <= 127.5


# Apart from each other, so that none hides another.
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
        square=st.sampled_from([0, 64]),
        iou_test=st.booleans(),
    )
    def test_image_boxes_masks_and_crowds_agree(
        self, folder, sizes, form, crowds, seed, square, iou_test
    ):
        crowds = min(crowds, len(sizes) - 1)
        polygons = [quad(*spot, *size) for spot, size in zip(SPOTS, sizes)]
        options = {"MIN_SIZE_TRAIN": (72,), "SQUARE_SIZE": square, "SSD__CROP_IOU_TEST": iou_test}
        mapper = InstanceMapper(config(**options), is_train=True)
        np.random.seed(seed)  # noqa: NPY002
        example = mapper(record(folder, polygons, form, crowds))
        assert example is not None  # these shapes fill their boxes' centers
        instances = example["instances"]
        height, width = instances.image_size
        assert example["image"].shape == (3, height, width)
        if square:
            assert (height, width) == (64, 64)

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
            # the borders are resampled each in its own way: nothing differs beyond them
            kernel = np.ones((5, 5), np.uint8)
            grown = cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)
            core = cv2.erode(mask.astype(np.uint8), kernel).astype(bool)
            assert not (core & ~pixels).any()
            assert not (pixels & ~grown).any()

    @pytest.mark.parametrize("form", ["polygon", "rle"])
    def test_clipped_boxes_cover_their_masks(self, folder, form):
        polygons = [quad(*spot, 24, 28, 0.5) for spot in SPOTS]
        mapper = InstanceMapper(config(SSD__TIGHT_BOXES=False), is_train=True)
        wider = 0
        for seed in range(40):
            np.random.seed(seed)  # noqa: NPY002
            instances = mapper(record(folder, polygons, form))["instances"]
            boxes = instances.gt_boxes.tensor
            tight = instances.gt_masks.get_bounding_boxes().tensor
            assert (boxes >= 0).all() and (boxes <= 64).all()
            assert (boxes[:, :2] <= tight[:, :2] + 1).all()
            assert (boxes[:, 2:] >= tight[:, 2:] - 1).all()
            wider += int(((tight - boxes).abs() > 2).any())
        assert wider > 0  # a slanted object that is cut

    def test_polygons_stay_polygons(self, folder):
        polygons = [quad(*spot, 24, 28, 0.5) for spot in SPOTS]
        options = {"MASK_FORMAT": "polygon", "KEEP_CROWD": False}
        both = [
            InstanceMapper(config(**options), is_train=True),
            InstanceMapper(config(), is_train=True),
        ]
        for seed in range(20):
            found = []
            for mapper in both:
                np.random.seed(seed)  # noqa: NPY002
                found.append(mapper(record(folder, polygons, "polygon"))["instances"])
            assert torch.equal(found[0].gt_classes, found[1].gt_classes)
            difference = found[0].gt_boxes.tensor - found[1].gt_boxes.tensor
            assert difference.abs().max() <= 1  # one is tight around pixels

    def test_equal_seeds_give_equal_examples(self, folder):
        polygons = [quad(*spot, 20, 24, 0.3) for spot in SPOTS]
        mapper = InstanceMapper(config(SSD__PHOTOMETRIC=True), is_train=True)
        images = []
        for seed in (3, 3, 4):
            np.random.seed(seed)  # noqa: NPY002
            images.append(mapper(record(folder, polygons, "rle"))["image"])
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])

    def test_objects_with_their_centres_outside_leave(self, folder):
        polygons = [quad(*spot, 24, 28, 0.5) for spot in SPOTS]
        mapper = InstanceMapper(config(), is_train=True)
        window = WindowTransform(0, 0, 49, 36)  # some pixels of the lower and the right ones too
        mapper.augmentations = T.AugmentationList([window, SquareResize(64)])
        instances = mapper(record(folder, polygons, "polygon", crowds=1))["instances"]
        assert sorted(instances.gt_classes.tolist()) == [0, 1]

    @pytest.mark.parametrize("kept_crowd, expected", [(True, [True]), (False, [])])
    def test_crowd_only_images_pass(self, folder, kept_crowd, expected):
        mapper = InstanceMapper(config(KEEP_CROWD=kept_crowd), is_train=True)
        for seed in range(10):
            np.random.seed(seed)  # noqa: NPY002
            example = mapper(record(folder, [quad(48, 36, 40, 40, 0.2)], "rle", crowds=1))
            instances = example["instances"]
            if kept_crowd:
                assert instances.gt_crowd.tolist() == expected
            assert len(instances) == len(expected)

    def test_images_without_annotations_pass(self, folder):
        mapper = InstanceMapper(config(), is_train=True)
        example = mapper(record(folder, [], "rle"))
        assert len(example["instances"]) == 0

    def test_images_that_lost_their_objects_are_rejected(self, folder):
        mapper = InstanceMapper(config(SSD__MIN_BOX_SIZE=63.0), is_train=True)
        polygons = [quad(48, 36, 20, 20, 0.2), quad(48, 36, 90, 70, 0.2)]
        mapper.augmentations = T.AugmentationList([SquareResize(64)])
        assert mapper(record(folder, polygons, "rle", crowds=1)) is None
        # not so in Detectron2's own augmentation
        plain = InstanceMapper(config(AUGMENTATION="default"), is_train=True)
        outside = [quad(-40, -40, 8, 8, 0.2)]
        assert len(plain(record(folder, outside, "polygon"))["instances"]) == 0

    def test_small_boxes_leave(self, folder):
        polygons = [quad(24, 24, 24, 24, 0), quad(70, 50, 9, 3, 0)]
        expected = {0.0: [0, 1], 4.0: [0]}
        for limit, classes in expected.items():
            options = {"SSD__MIN_BOX_SIZE": limit, "SSD__CROP": False, "SSD__MAX_EXPAND": 1.0}
            mapper = InstanceMapper(config(**options), is_train=True)
            instances = mapper(record(folder, polygons, "rle"))["instances"]
            assert sorted(instances.gt_classes.tolist()) == classes

    def test_the_trainers_test_loader_resizes_too(self, folder, request):
        records = [record(folder, [quad(48, 36, 40, 40, 0.2)], "rle")]
        DatasetCatalog.register("augmentation_test", lambda: records)
        request.addfinalizer(lambda: DatasetCatalog.remove("augmentation_test"))
        (example,) = next(iter(Trainer.build_test_loader(config(), "augmentation_test")))
        assert example["image"].shape == (3, 64, 64)

    def test_inference_resizes_and_nothing_else(self, folder):
        mapper = InstanceMapper(config(), is_train=False)
        example = mapper(record(folder, [quad(48, 36, 40, 40, 0.2)], "rle"))
        assert "instances" not in example and example["height"] == HEIGHT
        image = np.asarray(Image.open(example["file_name"]))
        augmented = T.AugInput(image)
        test_resize(config())(augmented)
        assert torch.equal(example["image"], torch.from_numpy(augmented.image).permute(2, 0, 1))


class TestSquareResize:
    @pytest.mark.parametrize("size", [(40, 70, 3), (200, 90, 3), (30, 50, 1)])
    def test_is_torchs_bilinear_without_antialias(self, size):
        image = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        resized = SquareResize(64).get_transform(image).apply_image(image)
        tensor = torch.from_numpy(image).float().permute(2, 0, 1)[None]
        expected = F.interpolate(tensor, (64, 64), mode="bilinear", align_corners=False)[0]
        assert resized.dtype == np.float32
        torch.testing.assert_close(
            torch.from_numpy(resized).permute(2, 0, 1), expected, rtol=1e-4, atol=1e-2
        )

    def test_masks_are_set_from_one_half_on(self):
        transform = PlainResizeTransform(2, 4, 2, 2)
        mask = np.array([[0, 1, 1, 1], [0, 0, 0, 1]], np.uint8)
        assert transform.apply_segmentation(mask).tolist() == [[1, 1], [0, 1]]
        assert transform.apply_segmentation(mask.astype(bool)).dtype == bool

    def test_labels_are_not_averaged(self):
        labels = np.array([[1, 3], [3, 1]], np.uint8)
        resized = PlainResizeTransform(2, 2, 7, 5).apply_segmentation(labels)
        assert resized.shape == (7, 5) and set(resized.flat) == {1, 3}

    def test_coordinates_scale_with_the_sides(self):
        box = PlainResizeTransform(100, 200, 50, 50).apply_box(np.array([[20.0, 10, 200, 100]]))
        assert box.tolist() == [[5, 5, 50, 50]]


class TestPhotometric:
    def image(self):
        return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)

    def test_does_nothing_by_default(self):
        image = self.image()
        out = PhotometricTransform("RGB").apply_image(image)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, image, atol=1e-3)

    def test_formats_differ_in_the_order_of_channels_only(self):
        options = {"brightness": 20, "contrast": 1.4, "saturation": 0.6, "hue": 15}
        rgb = PhotometricTransform("RGB", **options).apply_image(self.image())
        bgr = PhotometricTransform("BGR", **options).apply_image(self.image()[:, :, ::-1])
        np.testing.assert_allclose(rgb, bgr[:, :, ::-1], atol=1e-3)

    def test_leaves_the_range_of_bytes(self):
        white = np.full((2, 2, 3), 255, np.uint8)
        out = PhotometricTransform("RGB", brightness=32, contrast=1.5).apply_image(white)
        np.testing.assert_allclose(out, 287 * 1.5, rtol=1e-5)

    def test_hue_turns_red_to_orange_and_back_beyond_zero(self):
        red = np.full((1, 1, 3), 0, np.uint8)
        red[..., 0] = 200
        orange = PhotometricTransform("RGB", hue=18).apply_image(red)[0, 0]
        np.testing.assert_allclose(orange, [200, 60, 0], atol=0.1)
        purple = PhotometricTransform("RGB", hue=-18).apply_image(red)[0, 0]
        np.testing.assert_allclose(purple, [200, 0, 60], atol=0.1)

    def test_saturation_scales_the_distance_to_grey(self):
        pixel = np.array([[[200, 100, 50]]], np.uint8)
        out = PhotometricTransform("RGB", saturation=0.5).apply_image(pixel)[0, 0]
        np.testing.assert_allclose(out, [200, 150, 125], atol=0.1)

    def test_contrast_may_come_last(self):
        # negative values, after a loss of brightness, are where the order makes a difference
        image = self.image()
        for first in (True, False):
            out = PhotometricTransform(
                "RGB", brightness=-32, contrast=1.5, contrast_first=first, saturation=1.5
            ).apply_image(image)
            by_hand = image.astype(np.float32) - 32
            by_hand = by_hand * 1.5 if first else by_hand
            hsv = cv2.cvtColor(by_hand, cv2.COLOR_RGB2HSV)
            hsv[..., 1] *= 1.5
            by_hand = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
            np.testing.assert_allclose(out, by_hand if first else by_hand * 1.5, rtol=1e-4)

    def test_draws_within_the_ranges_and_half_of_the_time(self):
        np.random.seed(0)  # noqa: NPY002
        distortion = PhotometricDistortion("RGB")
        drawn = [distortion.get_transform(self.image()) for _ in range(1000)]
        ranges = {
            "brightness": (-32, 32, 0),
            "contrast": (0.5, 1.5, 1),
            "saturation": (0.5, 1.5, 1),
            "hue": (-18, 18, 0),
        }
        for name, (low, high, neutral) in ranges.items():
            values = np.array([getattr(transform, name) for transform in drawn])
            assert low <= values.min() < low + 0.1 * (high - low)
            assert high - 0.1 * (high - low) < values.max() <= high
            assert (values == neutral).mean() == pytest.approx(0.5, abs=0.06)
        first = np.mean([transform.contrast_first for transform in drawn])
        assert first == pytest.approx(0.5, abs=0.06)

    def test_masks_and_boxes_stay(self):
        transform = PhotometricTransform("RGB", brightness=10)
        mask = np.eye(4, dtype=np.uint8)
        assert np.array_equal(transform.apply_segmentation(mask), mask)
        assert transform.apply_box(np.array([[1.0, 2, 3, 4]])).tolist() == [[1, 2, 3, 4]]


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
    def test_clipped_polygons_cover_what_the_window_shows(self, corners, window):
        polygon = np.array(corners)
        x0, y0, width, height = window
        clipped = WindowTransform(*window).apply_polygons([polygon])
        shifted = polygon - [x0, y0]
        canvas = raster(shifted + 60, height + 120, width + 120)
        shown = canvas[60 : 60 + height, 60 : 60 + width]
        found = np.zeros((height, width), bool)
        for part in clipped:
            assert (part >= -1e-6).all() and (part <= [width + 1e-6, height + 1e-6]).all()
            found |= raster(part, height, width)
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
    def draw(self, boxes, is_crowd=None, n=300, **options):
        np.random.seed(0)  # noqa: NPY002
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        is_crowd = np.zeros(len(boxes), bool) if is_crowd is None else np.array(is_crowd)
        image = np.zeros((60, 80, 3), np.uint8)
        crop = ConstrainedCrop(**options)
        return [crop.get_transform(image, boxes, is_crowd) for _ in range(n)]

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

    def test_the_centre_of_an_object_that_is_no_crowd_is_inside(self):
        boxes = [[2, 2, 8, 8], [60, 40, 78, 58]]
        seen = set()
        for t in self.draw(boxes, is_crowd=[False, True]):
            if isinstance(t, WindowTransform):
                inside = t.apply_box(np.array(boxes))[:, 2] > 0
                assert inside[0]
                seen.add(bool(inside[1]))
        assert seen == {True, False}

    def test_the_iou_test_is_inert_unless_asked_for(self):
        box = [38, 28, 42, 32]  # far too small for an IoU of 0.1 with any window
        assert any(isinstance(t, WindowTransform) for t in self.draw([box]))
        windows = [t for t in self.draw([box], iou_test=True) if isinstance(t, WindowTransform)]
        plain = [t for t in self.draw([box]) if isinstance(t, WindowTransform)]
        # only the choice that asks for no IoU still crops
        assert 0 < len(windows) < len(plain)

    def test_with_the_test_each_window_overlaps_an_object(self):
        box = np.array([20.0, 10, 60, 50])
        crop = ConstrainedCrop(iou_test=True)
        crop.MIN_IOUS = (0.7,)
        np.random.seed(1)  # noqa: NPY002
        for _ in range(100):
            t = crop.get_transform(np.zeros((60, 80, 3)), box[None], np.zeros(1, bool))
            if isinstance(t, WindowTransform):
                x0, y0, x1, y1 = t.x0, t.y0, t.x0 + t.width, t.y0 + t.height
                width = min(x1, box[2]) - max(x0, box[0])
                height = min(y1, box[3]) - max(y0, box[1])
                union = (x1 - x0) * (y1 - y0) + 1600 - width * height
                assert width * height / union >= 0.7 - 1e-9

    @pytest.mark.parametrize("boxes, is_crowd", [([], []), ([[1, 1, 50, 50]], [True])])
    def test_nothing_to_keep_means_no_crop(self, boxes, is_crowd):
        drawn = self.draw(boxes, is_crowd=np.array(is_crowd, dtype=bool), n=20)
        assert all(isinstance(t, T.NoOpTransform) for t in drawn)

    def test_unreachable_objects_end_without_a_crop(self):
        drawn = self.draw([[200, 200, 220, 220]], n=5)
        assert all(isinstance(t, T.NoOpTransform) for t in drawn)


class TestConfig:
    def names(self, cfg, is_train=True):
        return [type(a).__name__ for a in build_augmentations(cfg, is_train)]

    def test_order_is_the_published_one(self):
        assert self.names(config(SSD__PHOTOMETRIC=True)) == [
            "PhotometricDistortion",
            "RandomExpand",
            "ConstrainedCrop",
            "RandomFlip",
            "SquareResize",
        ]

    def test_parts_are_switched_off_one_by_one(self):
        assert self.names(config(SSD__CROP=False)) == ["RandomExpand", "RandomFlip", "SquareResize"]
        options = {"SSD__MAX_EXPAND": 1.0, "SSD__CROP": False, "RANDOM_FLIP": "none"}
        assert self.names(config(**options)) == ["SquareResize"]

    def test_default_is_detectron2s(self):
        cfg = load_config(opts=["INPUT.CROP.ENABLED", True])
        assert self.names(cfg) == ["RandomCrop", "ResizeShortestEdge", "RandomFlip"]
        assert self.names(cfg, is_train=False) == ["ResizeShortestEdge"]

    def test_the_square_is_for_inference_too(self):
        cfg = config(AUGMENTATION="default")
        assert self.names(cfg) == ["SquareResize", "RandomFlip"]
        assert self.names(cfg, is_train=False) == ["SquareResize"]

    @pytest.mark.parametrize("image_format", ["RGB", "BGR"])
    def test_canvas_has_one_color_in_either_format(self, image_format):
        expand = build_augmentations(config(FORMAT=image_format), True)[0]
        assert list(expand.fill) == (FILL if image_format == "RGB" else FILL[::-1])

    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("AUGMENTATION", "SSD", "INPUT.AUGMENTATION must be one of"),
            ("FORMAT", "L", "needs RGB or BGR"),
        ],
    )
    def test_unknown_values_are_refused_by_key(self, key, value, message):
        with pytest.raises(ValueError, match=message):
            build_augmentations(config(**{key: value}), True)
