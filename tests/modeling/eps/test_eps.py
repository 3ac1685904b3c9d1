"""EPS as a whole; the contract's tests cover its training."""

import copy
import logging

import pytest
import torch
from example_inputs import BATCHES, NUM_CLASSES, SIZE, example, rectangle
from tiny_models import EPS, tiny_config, tiny_model
from torch import nn

from solo_d2 import modeling
from solo_d2.engine import build_optimizer
from solo_d2.modeling.eps.losses import classification_loss, saliency_loss

BASELINE = {**EPS, "MODEL.EPS.SALIENCY_LOSS": False}


def image(size=SIZE, **more):
    return {"image": torch.rand(3, *size, generator=torch.Generator().manual_seed(3)) * 255, **more}


@torch.no_grad()
def segment(model, *inputs):
    return [output["sem_seg"] for output in model.eval()(list(inputs))]


@pytest.fixture(scope="module")
def model():
    model = tiny_model(EPS)
    nn.init.normal_(model.classifier.weight, std=0.5)
    return model


def test_scores_are_background_first_and_0_for_absent_classes(model):
    for size, output in ((SIZE, (128, 200)), ((33, 70), (20, 31)), ((1, 1), (1, 1))):
        labels = torch.tensor([1.0, 0.0, 1.0])
        x = image(size, image_labels=labels, height=output[0], width=output[1])
        (scores,) = segment(model, x)
        assert scores.shape == (NUM_CLASSES + 1, *output)
        assert ((scores >= 0) & (scores <= 1)).all()
        torch.testing.assert_close(scores[0], torch.full(output, 0.2))
        assert scores[2].max() == 0 and scores[1].max() > 0.99 and scores[3].max() > 0.99
        assert scores.dtype == torch.float32


def test_an_image_without_classes_is_all_background(model):
    (scores,) = segment(model, image(image_labels=torch.zeros(NUM_CLASSES)))
    assert scores.argmax(dim=0).sum() == 0


def test_without_labels_the_predicted_classes_are_used(model):
    model = copy.deepcopy(model)
    (every,) = segment(model, image(image_labels=torch.ones(NUM_CLASSES)))
    with torch.no_grad():
        (cam,) = model._cam(model._batch([image()["image"]]).tensor)
        # one class with the sign of its logit turned to that of the image, the others against it
        signs = cam.mean(dim=(1, 2))[:NUM_CLASSES].sign() * torch.tensor([-1, 1, -1])
        model.classifier.weight[:NUM_CLASSES] *= signs.view(-1, 1, 1, 1)
    (scores,) = segment(model, image())
    assert (every[1:].amax(dim=(1, 2)) > 0).all()
    assert (scores[1:].amax(dim=(1, 2)) > 0).tolist() == [False, True, False]


def test_images_of_a_batch_are_segmented_one_by_one(model):
    inputs = [image(image_labels=torch.ones(3)), image((40, 30), image_labels=torch.ones(3))]
    together = segment(model, *inputs)
    for x, scores in zip(inputs, together):
        torch.testing.assert_close(segment(model, x)[0], scores)


def test_a_mirrored_image_has_the_mirrored_labels(model):
    # a width at which no backbone's grid depends on the side it starts from
    x = image((65, 97), image_labels=torch.ones(3))
    mirrored = {**x, "image": x["image"].flip(-1)}
    torch.testing.assert_close(
        segment(model, mirrored)[0], segment(model, x)[0].flip(-1), atol=1e-4, rtol=1e-3
    )


def test_padding_to_the_backbones_multiple_is_not_part_of_the_map():
    """A feature pyramid pads 40 x 33 to 64 x 64; the maps are of 40 x 33."""
    pyramid = {
        **EPS,
        "MODEL.BACKBONE.NAME": "build_mobilenetv2_fpn_backbone",
        "MODEL.MOBILENETV2.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.EPS.IN_FEATURES": ["p3", "p4", "p5"],
        "MODEL.EPS.TEST_SCALES": (1.0,),
    }
    model = tiny_model(pyramid).eval()
    x = image((40, 33), image_labels=torch.ones(3))
    (scores,) = segment(model, x)
    with torch.no_grad():
        cam = model._cam(model._batch([x["image"], x["image"].flip(-1)]).tensor)
    assert cam.shape[-2:] == (8, 8)
    pair = cam[..., :5, :5].softmax(dim=1)
    expected = model.pseudo_masks([pair], torch.arange(3), (40, 33), 3)
    torch.testing.assert_close(scores, expected)


def test_the_losses_are_those_of_the_map_labels_and_padded_saliency(model):
    batch = copy.deepcopy(BATCHES["images of different sizes"])
    generator = torch.Generator().manual_seed(5)
    for x in batch:
        x["saliency"] = torch.rand(1, *x["image"].shape[1:], generator=generator)
    model.train()
    torch.manual_seed(0)
    losses = model(batch)
    saliency = torch.zeros(2, 1, *SIZE)
    for i, x in enumerate(batch):
        saliency[i, :, : x["saliency"].shape[1], : x["saliency"].shape[2]] = x["saliency"]
    cam = model._cam(model._batch([x["image"] for x in batch]).tensor)
    labels = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    torch.testing.assert_close(losses["loss_cls"], classification_loss(cam, labels))
    expected = saliency_loss(cam, labels, saliency, tau=0.4, lam=0.5)
    torch.testing.assert_close(losses["loss_sal"], expected)


def test_the_stand_in_is_announced_once_and_real_saliency_is_not(caplog):
    model = tiny_model(EPS)
    real = {**BATCHES["one ordinary image"][0], "saliency": torch.zeros(1, *SIZE)}
    with caplog.at_level(logging.WARNING, logger="solo_d2.modeling.eps.eps"):
        model([real])
        assert caplog.text == ""
        for _ in range(2):
            model(copy.deepcopy(BATCHES["one ordinary image"]))
    assert caplog.text.count("EPS TRAINS ON GROUND-TRUTH MASKS") == 1


def test_saliency_of_another_size_is_refused_by_image(model):
    model.train()
    with pytest.raises(ValueError, match=r"street.jpg is 64 .* and 96 wide, .*\(1, 32, 96\)"):
        model([{**example(rectangle(1, 1, 9, 9)), "saliency": torch.zeros(1, 32, 96)}])
    labels_only = {**image(), "image_labels": [1, 0, 0], "file_name": "street.jpg"}
    with pytest.raises(ValueError, match="street.jpg has neither 'saliency' nor masks"):
        model([labels_only])


class TestBaseline:
    """A classifier with the classification loss alone."""

    def test_it_needs_no_masks_and_has_no_background(self):
        model = tiny_model(BASELINE)
        assert model.classifier.out_channels == NUM_CLASSES
        losses = model([{**image(), "image_labels": [1, 0, 0]}])
        assert set(losses) == {"loss_cls"}

    def test_its_maps_are_relus_divided_by_their_maximum(self):
        model = tiny_model(BASELINE, MODEL__EPS__TEST_SCALES=(1.0,)).eval()
        nn.init.normal_(model.classifier.weight, std=0.5)
        x = image(image_labels=torch.ones(3))
        (scores,) = segment(model, x)
        with torch.no_grad():
            cam = model._cam(model._batch([x["image"], x["image"].flip(-1)]).tensor).relu()
        expected = model.pseudo_masks([cam], torch.arange(3), SIZE, 3)
        torch.testing.assert_close(scores, expected)

    def test_channels_are_dropped_in_training_only(self):
        model = tiny_model(BASELINE)
        ones = torch.ones(1, 8, 2, 2)
        assert torch.equal(model.eval().dropout(ones), ones)
        assert set(model.train().dropout(ones).unique().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"IN_FEATURES": ["res9"]}, "in_features must be some of"),
        ({"IN_FEATURES": []}, "in_features must be some of"),
        ({"NUM_CLASSES": 255}, "num_classes must be 1 to 254"),
        ({"TAU": 1.5}, "tau must be from 0 to 1"),
        ({"LAM": -0.1}, "lam must be from 0 to 1"),
        ({"USE_BG_CAM": True, "SALIENCY_LOSS": False}, "use_bg_cam needs use_saliency"),
        ({"STAND_IN_BLUR": -1.0}, "blur must be at least 0"),
        ({"TEST_SCALES": ()}, "scales must be positive"),
    ],
)
def test_wrong_options_are_refused_when_the_model_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(EPS, **{f"MODEL__EPS__{key}": value for key, value in options.items()})


def test_mixed_precision_gives_float32_scores(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (scores,) = segment(model, image(image_labels=torch.ones(3)))
    assert scores.dtype == torch.float32 and scores.isfinite().all()


def test_weights_that_are_not_finite_or_half_are_errors():
    model = tiny_model(EPS).eval()
    nn.init.constant_(model.classifier.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        segment(model, image())
    with pytest.raises(ValueError, match=r"converted to torch.bfloat16"):
        segment(tiny_model(EPS).to(torch.bfloat16), image())


def test_statistics_of_batch_norms_can_be_frozen():
    model = tiny_model(EPS, MODEL__BACKBONE__FREEZE_BN_STATS=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)


def test_it_is_public():
    import solo_d2

    assert solo_d2.EPS is modeling.EPS


def test_the_classifier_has_its_own_learning_rate():
    options = {
        "SOLVER__BACKBONE_MULTIPLIER": 0.1,
        "SOLVER__BASE_LR": 0.1,
        "SOLVER__WEIGHT_DECAY": 5e-4,
        "SOLVER__BIAS_LR_FACTOR": 2.0,
        "SOLVER__WEIGHT_DECAY_BIAS": 0.0,
        "SOLVER__MOMENTUM": 5e-4,
    }
    model = tiny_model(EPS, **options)
    optimizer = build_optimizer(tiny_config(EPS, **options), model)
    found = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert found[model.classifier.weight]["lr"] == pytest.approx(0.1)
    assert found[model.backbone.features[0][0].weight]["lr"] == pytest.approx(0.01)
    assert found[model.backbone.features[0][1].bias]["lr"] == pytest.approx(0.02)
    assert found[model.classifier.weight]["weight_decay"] == 5e-4
    assert {group["momentum"] for group in optimizer.param_groups} == {5e-4}
