"""The interactive interface of AdaptIS: one image, many points."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from solo_d2.config import load_config
from solo_d2.modeling import SOLOv2
from solo_d2.modeling.adaptis import AdaptIS, AdaptISPredictor
from solo_d2.modeling.adaptis.automatic import ProposalSelection, RandomSelection
from solo_d2.modeling.adaptis.criterion import InstanceCriterion
from solo_d2.modeling.adaptis.finder import InferenceOptions
from solo_d2.modeling.adaptis.head import build_heads
from solo_d2.modeling.adaptis.panoptic import PanopticAssembler
from solo_d2.modeling.adaptis.predictor import merge_masks
from solo_d2.modeling.adaptis.targets import PointSampler
from solo_d2.modeling.backbone.unet import AdaptISUNet

SIZE = (40, 56)
SAME_SIZE = T.ResizeShortestEdge(0, 0)


def tiny_model() -> AdaptIS:
    """Untrained; many of its masks are not empty."""
    torch.manual_seed(0)
    heads = build_heads(
        "toy", 8, 4, conv_dim=8, semantic_dim=8, proposal_dim=None, norm_radius=20.0
    )
    heads.selection.rescale = (3.0, 1.0)
    return AdaptIS(
        backbone=AdaptISUNet(width=8, num_levels=3),
        in_features=["unet"],
        heads=heads,
        sampler=PointSampler(4),
        criterion=InstanceCriterion(),
        inference_options=InferenceOptions(
            ProposalSelection(mask_threshold=0.5), RandomSelection(), PanopticAssembler()
        ),
        pixel_mean=[127.5] * 3,
        pixel_std=[127.5] * 3,
    ).eval()


def image(size=SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator).float()


def ready(model=None, picture=None) -> AdaptISPredictor:
    """A predictor that has an image."""
    predictor = AdaptISPredictor(model or tiny_model(), resize=SAME_SIZE, input_format="RGB")
    if picture is None:
        picture = image().permute(1, 2, 0).numpy().astype(np.uint8)
    predictor.set_image(picture)
    return predictor


def test_the_predictor_runs_the_backbone_once_per_image():
    model = tiny_model()
    runs = []
    model.backbone.register_forward_hook(lambda *_: runs.append("backbone"))
    model.semantic_head.register_forward_hook(lambda *_: runs.append("semantic"))
    predictor = AdaptISPredictor(model, resize=SAME_SIZE, input_format="BGR")
    rgb = image().permute(1, 2, 0).numpy().astype(np.uint8)
    predictor.set_image(rgb)
    first = predictor.predict([[3, 4]])
    second = predictor.predict(torch.tensor([[30.0, 20.0], [3.0, 4.0]]))
    assert runs == ["backbone", "semantic"]
    assert len(first) == 1 and len(second) == 2
    torch.testing.assert_close(first.mask_probabilities[0], second.mask_probabilities[1])
    # the same as with the model itself, with channels in its order
    inputs = {"image": image().flip(0), "points": [[3, 4]]}
    direct = model([inputs])[0]["instances"]
    torch.testing.assert_close(direct.mask_probabilities, first.mask_probabilities)
    predictor.set_image(rgb[::-1])
    assert not torch.equal(predictor.predict([[3, 4]]).mask_probabilities, first.mask_probabilities)


def test_the_predictor_resizes_and_answers_in_the_original_frame():
    model = tiny_model()
    predictor = AdaptISPredictor(model, resize=T.ResizeShortestEdge(20, 100), input_format="RGB")
    predictor.set_image(np.zeros((60, 90, 3), dtype=np.uint8))
    instances = predictor.predict([[89.5, 59.5]])
    assert instances.image_size == (60, 90) and instances.pred_masks.shape == (1, 60, 90)
    with pytest.raises(ValueError, match="outside the image; the image has 90 x 60 pixels"):
        predictor.predict([[89.5, 60.5]])
    # an error keeps the image
    assert len(predictor.predict([[1, 1]])) == 1


def test_the_predictor_needs_an_image_and_a_model_that_takes_points():
    model = tiny_model()
    predictor = AdaptISPredictor(model, resize=SAME_SIZE, input_format="RGB")
    with pytest.raises(ValueError, match="call set_image first"):
        predictor.predict([[1, 1]])
    other = object.__new__(SOLOv2)
    with pytest.raises(ValueError, match="points need an AdaptIS model, not SOLOv2"):
        AdaptISPredictor(other, resize=SAME_SIZE, input_format="RGB")


def test_a_config_tells_the_size_and_the_order_of_channels():
    cfg = load_config(opts=["INPUT.MIN_SIZE_TEST", 20, "INPUT.FORMAT", "RGB"])
    predictor = AdaptISPredictor.from_config(cfg, tiny_model())
    predictor.set_image(np.zeros((60, 90, 3), dtype=np.uint8))
    assert predictor._image.size == (20, 30)
    assert predictor.predict([[1, 1]]).image_size == (60, 90)
    with pytest.raises(ValueError, match="input_format must be one of RGB, BGR, not 'L'"):
        AdaptISPredictor(tiny_model(), resize=SAME_SIZE, input_format="L")


# ---- several points for one object


def merged_by_definition(probs, points, positive, threshold):
    """The three rules of ``merge_masks``, pixel by pixel."""
    n, h, w = probs.shape
    result = np.zeros((h, w), np.float32)
    for row in range(h):
        for column in range(w):
            near = {i: (row - points[i][1]) ** 2 + (column - points[i][0]) ** 2 for i in range(n)}
            value = max(probs[i, row, column] for i in range(n) if positive[i])
            for i in (i for i in range(n) if not positive[i]):
                has = {j: probs[i, points[j][1], points[j][0]] > threshold for j in range(n)}
                is_other = has[i] and not any(has[j] for j in range(n) if positive[j])
                if is_other:
                    gone = probs[i, row, column] > threshold
                else:
                    gone = near[i] < min(near[j] for j in range(n) if positive[j])
                value = 0 if gone else value
            result[row, column] = value
    return result


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 8), st.integers(2, 8))
def test_masks_are_merged_by_the_rules(seed, count, h, w):
    rng = np.random.default_rng(seed)
    probs = rng.random((count, h, w), dtype=np.float32)
    points = np.stack([rng.integers(0, w, count), rng.integers(0, h, count)], axis=1)
    positive = rng.random(count) < 0.5
    positive[0] = True
    actual = merge_masks(
        torch.from_numpy(probs),
        torch.from_numpy(points).float(),
        torch.from_numpy(positive),
        mask_threshold=0.6,
    )
    expected = merged_by_definition(probs, points.tolist(), positive, np.float32(0.6))
    assert np.array_equal(actual.numpy(), expected)


def test_parts_are_joined_and_a_neighbor_is_taken_away():
    probs = torch.zeros(3, 10, 12)
    probs[0, :, :5], probs[1, :, 4:10], probs[2, :, 8:] = 0.9, 0.8, 0.9
    points = torch.tensor([[1.0, 5.0], [6.0, 5.0], [11.0, 5.0]])
    whole = merge_masks(probs[:2], points[:2], torch.tensor([True, True]), mask_threshold=0.5)
    assert torch.equal(whole > 0.5, torch.arange(12).expand(10, 12) < 10)
    # the third point is on another object, which the second mask overlaps
    labels = torch.tensor([True, True, False])
    less = merge_masks(probs, points, labels, mask_threshold=0.5)
    assert torch.equal(less > 0.5, torch.arange(12).expand(10, 12) < 8)


def test_a_mask_over_two_objects_is_divided_between_the_points():
    probs = torch.full((2, 10, 12), 0.9)
    points = torch.tensor([[2.0, 5.0], [9.0, 5.0]])
    mask = merge_masks(probs, points, torch.tensor([True, False]), mask_threshold=0.5)
    assert torch.equal(mask > 0.5, torch.arange(12).expand(10, 12) < 6)


def test_labels_make_one_instance_of_all_points():
    predictor = ready()
    points = [[5, 7], [30, 20], [50.5, 33]]
    each = predictor.predict(points)
    single = predictor.predict(points[:1], [1])
    assert len(single) == 1
    for field, value in single.get_fields().items():
        value = getattr(value, "tensor", value)
        expected = each.get(field)[:1]
        torch.testing.assert_close(value, getattr(expected, "tensor", expected))
    union = predictor.predict(points, np.ones(3, int))
    expected = each.mask_probabilities.amax(dim=0)
    torch.testing.assert_close(union.mask_probabilities[0], expected)
    assert union.pred_classes.shape == union.scores.shape == (1,)


def test_excluded_pixels_are_in_no_mask_and_a_point_on_them_finds_nothing():
    predictor = ready()
    points = [[5, 7], [30, 20]]
    free = predictor.predict(points)
    exclude = np.zeros(SIZE, bool)
    exclude[:, 25:] = True
    found = predictor.predict(points, exclude=exclude)
    assert torch.equal(found.pred_masks[0], free.pred_masks[0] & ~torch.from_numpy(exclude))
    assert not found.pred_masks[1].any() and found.scores[1] == 0
    merged = predictor.predict(points, [1, 1], exclude=torch.from_numpy(exclude))
    assert torch.equal(merged.pred_masks[0], found.pred_masks[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": [1]}, r"labels must be \(2,\), not \(1,\)"),
        ({"labels": [1, 2]}, r"labels must be 0 or 1, not \[1, 2\]"),
        ({"labels": [0, 0]}, "labels must contain a 1, for a point on the object"),
        ({"exclude": np.zeros((3, 4), bool)}, r"exclude must be \(40, 56\), not \(3, 4\)"),
    ],
)
def test_wrong_labels_and_masks_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        ready().predict([[5, 7], [30, 20]], **options)


def test_the_promises_hold_on_real_images(data_dir):
    """On images of nuclei: what a merged mask contains and what it does not."""
    files = sorted((data_dir / "nuclei/val").iterdir())[:3]
    model, rng, corrected = tiny_model(), np.random.default_rng(0), 0
    for file in files:
        picture = np.asarray(Image.open(file).convert("RGB"))[:120, :160]
        predictor = ready(model, picture)
        height, width = picture.shape[:2]
        for _ in range(5):
            points = np.stack([rng.integers(0, width, 4), rng.integers(0, height, 4)], axis=1)
            each = predictor.predict(points).pred_masks
            mask = predictor.predict(points, [1, 1, 0, 0]).pred_masks[0]
            assert not (mask & ~each[:2].any(dim=0)).any()
            for x, y in points[2:]:
                assert not mask[y, x]
                corrected += bool(each[:2, y, x].any())
    assert corrected > 0  # a negative point removed something
