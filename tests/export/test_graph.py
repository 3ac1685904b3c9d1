"""Graph modules against eager models, in plain PyTorch, where they are expected to be equal."""

from dataclasses import replace

import pytest
import torch
from detectron2.structures import Instances

from solo_d2.errors import UserError
from solo_d2.export.adaptis import AdaptISDecoder, AdaptISEncoder
from solo_d2.export.check import compare, raw_instances
from solo_d2.export.exported import exported_model
from solo_d2.export.files import build_graph

DETECTORS = [
    "SOLO",
    "DecoupledSOLO",
    "SOLOv2",
    "SOLOv2 DCN",
    "YOLACT",
    "YOLACT square",
    "YOLACT cross-class",
    "YOLACT++",
    "FCOS",
    "CenterMask",
    "CenterMask area",
]
ADAPTIS = ["AdaptIS", "AdaptIS cityscapes"]
SOLO_KIN = DETECTORS[:4]


def runner(graph):
    def run(tensors):
        with torch.no_grad():
            found = graph(*(tensors[name] for name in graph.input_names))
        found = found if isinstance(found, tuple) else (found,)
        return dict(zip(graph.output_names, found, strict=True))

    return run


def in_torch(tiny, model):
    """The graph of a model, read as a file of it would be."""
    graph = build_graph(model)
    decoder = runner(AdaptISDecoder(model)) if isinstance(graph, AdaptISEncoder) else None
    return exported_model(runner(graph), tiny.metadata(graph), decoder)


def assert_equal(found, least: int):
    assert found.eager == found.exported == found.matched >= least
    assert found.score <= 1e-5 and found.box <= 1e-4 and found.soft_mask <= 1e-5
    assert found.differing_pixels <= 2 * found.matched


@pytest.mark.parametrize("size", [(64, 96), (150, 70), (200, 300)])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_graph_finds_what_the_model_finds_in_its_order(tiny, name, size):
    model, image = tiny.model(name), tiny.noise(size)
    eager, graph = raw_instances(model, image), raw_instances(in_torch(tiny, model), image)
    assert_equal(compare(eager, graph), least=10)
    assert torch.equal(eager.pred_classes, graph.pred_classes)
    torch.testing.assert_close(eager.scores, graph.scores)
    assert set(eager.get_fields()) == set(graph.get_fields())


@pytest.mark.parametrize("name", DETECTORS)
def test_nothing_few_and_many_are_ordinary(tiny, name):
    model = tiny.model(name)
    scenes = tiny.Scenes(model)
    none, few, many = scenes.found
    # an anchor of YOLACT counts for each class
    assert none == 0 < few <= 3 < many
    graph = in_torch(tiny, model)
    for image, count in zip((scenes.none, scenes.few, scenes.many), scenes.found):
        found = compare(raw_instances(model, image), raw_instances(graph, image))
        assert_equal(found, least=count)


@pytest.mark.parametrize("name", ADAPTIS)
@pytest.mark.parametrize("size", [(64, 96), (150, 70)])
def test_points_have_the_masks_that_the_model_gives_them(tiny, name, size):
    model, image = tiny.model(name), tiny.noise(size)
    eager, graph = raw_instances(model, image), raw_instances(in_torch(tiny, model), image)
    found = compare(eager, graph, in_order=True)
    assert_equal(found, least=25)
    assert (eager.pred_masks > 0.5).any() and not (eager.pred_masks > 0.5).all()


def test_adaptis_finds_the_same_objects_by_itself_with_mirror_images(tiny):
    model = tiny.model("AdaptIS cityscapes")
    model.options = replace(model.options, flip=True)
    inputs = [{"image": tiny.noise((90, 120)), "height": 45, "width": 60}]
    (eager,), (graph,) = model(inputs), in_torch(tiny, model)(inputs)
    assert set(eager) == set(graph)
    torch.testing.assert_close(eager["sem_seg"], graph["sem_seg"])
    assert torch.equal(eager["panoptic_seg"][0], graph["panoptic_seg"][0])
    assert len(eager["instances"]) == len(graph["instances"])


@pytest.mark.parametrize("name", SOLO_KIN)
def test_of_more_candidates_than_a_graph_holds_it_takes_the_best(tiny, name, monkeypatch):
    monkeypatch.setattr("solo_d2.export.solo.MAX_CANDIDATES", 60)
    limits = {"MAX_CANDIDATES_TEST": 0, "TOPK_CANDIDATES_TEST": 60}
    model = tiny.model(name, **{f"MODEL__SOLO__{key}": value for key, value in limits.items()})
    model.detector.score_threshold = 0.0
    graph = in_torch(tiny, model)
    limit = graph.metadata.options["candidates"]
    image = tiny.noise((96, 128))
    images = model.preprocess_image([{"image": image}])
    with torch.no_grad():
        scores = model.category_scores(model.dense(images.tensor).category_logits)
    assert (scores > 0).sum() > limit
    model.detector.max_candidates = limit
    assert_equal(compare(raw_instances(model, image), raw_instances(graph, image)), least=50)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SOLOv2", {"MODEL__SOLO__NMS_TYPE": "mask"}, "NMS_TYPE 'mask'"),
        ("SOLO", {"MODEL__SOLO__CATEGORY_ALIGN": "adaptive_pool"}, "'adaptive_pool'"),
        ("YOLACT", {"MODEL__YOLACT__NMS_TYPE": "traditional"}, "'traditional'"),
        ("FCOS", {"TEST__DETECTIONS_PER_IMAGE": 0}, "DETECTIONS_PER_IMAGE"),
        (
            "CenterMask",
            {"MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead"}
            | {"MODEL__CENTERMASK__MASK_IOU_ON": False},
            "MaskRCNNConvUpsampleHead",
        ),
        ("FCOS", {"MODEL__KEYPOINT_ON": True}, "keypoints cannot be exported"),
        (
            "FCOS",
            {"MODEL__ROI_HEADS__NAME": "StandardROIHeads", "MODEL__PROPOSAL_GENERATOR__NAME": "RPN"}
            | {"MODEL__RPN__IN_FEATURES": ["p3"], "MODEL__ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead"}
            | {"MODEL__ANCHOR_GENERATOR__SIZES": [[32]], "MODEL__ROI_BOX_HEAD__NUM_FC": 1},
            "CenterMask and FCOS",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(tiny, name, options, message):
    with pytest.raises(UserError, match=message):
        build_graph(tiny.model(name, **options))


def test_a_foreign_model_is_refused():
    with pytest.raises(UserError, match="Linear cannot be exported"):
        build_graph(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(("flipped", "matched"), [(0, 0), (1, 1)])
def test_a_pixel_at_the_threshold_explains_its_part_of_a_score(flipped, matched):
    """SOLO's score is a mean over the pixels of the mask: here of 50, one of which may flip."""
    eager = Instances((10, 10), scores=torch.tensor([0.5]), pred_classes=torch.tensor([0]))
    eager.pred_masks = torch.zeros(1, 10, 10)
    eager.pred_masks[0, :5] = 0.9
    exported = Instances((10, 10), **eager.get_fields())
    exported.scores = torch.tensor([0.508])
    exported.pred_masks = eager.pred_masks.clone()
    if flipped:
        eager.pred_masks[0, 0, 0], exported.pred_masks[0, 0, 0] = 0.50001, 0.49999
    assert compare(eager, exported).matched == matched


def test_an_instance_without_partner_takes_no_other_ones():
    """Two of three instances with equal scores are kept, not the same ones."""
    masks = torch.eye(3).view(3, 3, 1)
    eager, exported = (
        Instances(
            (3, 1),
            scores=torch.full((2,), 0.5),
            pred_classes=torch.zeros(2).long(),
            pred_masks=masks[kept],
        )
        for kept in ([0, 1], [1, 2])
    )
    found = compare(eager, exported)
    assert (found.matched, found.identical_masks, found.soft_mask) == (1, 1, 0)
    assert not found.equal
