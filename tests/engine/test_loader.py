# numpy's global state is part of what is tested
# ruff: noqa: NPY002

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from solo_d2.engine.loader import (
    TrainLoader,
    batches,
    build_train_loader,
    derive_seed,
    stream,
)
from solo_d2.errors import UserError

# Three wide images among seven.
RECORDS = [
    {"file_name": f"{i}.png", "image_id": i, "width": 20 if i < 3 else 10, "height": 15}
    for i in range(7)
]


def noisy(record):
    """A mapper that uses every source of random numbers."""
    return record["image_id"], random.random(), np.random.rand(), torch.rand(()).item()


def take(iterable, count):
    return list(itertools.islice(iterable, count))


def test_every_epoch_has_every_image_once_in_another_order():
    samples = take(stream(torch.ones(20), seed=3), 40)
    first, second = [[s.index for s in part] for part in (samples[:20], samples[20:])]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [s.position for s in samples] == list(range(40))
    assert first != [s.index for s in take(stream(torch.ones(20), seed=4), 20)]


def test_repeat_factors_are_met_on_average():
    counts = Counter(s.index for s in take(stream(torch.tensor([1.0, 1.5, 3.0]), seed=0), 5500))
    assert counts[0] == pytest.approx(1000, abs=40)
    assert counts[1] == pytest.approx(1500, abs=60)
    assert counts[2] == pytest.approx(3000, abs=60)


def test_batches_keep_groups_apart_and_lose_no_image():
    groups = [int(r["width"] > r["height"]) for r in RECORDS]
    made = take(batches(stream(torch.ones(7), seed=1), groups, 2), 30)
    assert all(len({groups[s.index] for s in batch}) == 1 for batch in made)
    positions = sorted(s.position for batch in made for s in batch)
    # at most one image of each group waits for a partner
    assert len(set(positions)) == 60 and positions[-1] <= 61


def test_a_sought_batch_is_the_one_that_an_uninterrupted_loader_gives():
    loader = TrainLoader(RECORDS, noisy, batch_size=2, seed=5)
    uninterrupted = take(loader, 12)
    loader.seek(5, 7)
    assert take(loader, 5) == uninterrupted[7:]


def test_processes_share_the_batches_of_one_process():
    one = take(TrainLoader(RECORDS, noisy, batch_size=4, seed=5), 6)
    two = [
        take(TrainLoader(RECORDS, noisy, batch_size=4, seed=5, rank=rank, world_size=2), 6)
        for rank in (0, 1)
    ]
    for whole, first, second in zip(one, *two):
        assert len(first) == len(second) == 2
        assert sorted(whole) == sorted(first + second)


def test_workers_and_random_states_have_no_influence():
    alone = take(TrainLoader(RECORDS, noisy, batch_size=2, seed=5), 6)
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    assert take(TrainLoader(RECORDS, noisy, batch_size=2, seed=5, num_workers=2), 6) == alone


def test_loading_leaves_the_random_states_alone():
    states = [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    take(TrainLoader(RECORDS, noisy, batch_size=2, seed=5), 3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_a_rejected_image_is_replaced_by_the_same_one_each_time():
    def mapper(record):
        return None if record["image_id"] % 2 else record["image_id"]

    first, second = (take(TrainLoader(RECORDS, mapper, batch_size=2, seed=1), 8) for _ in "ab")
    assert first == second
    assert {x % 2 for batch in first for x in batch} == {0}
    with pytest.raises(UserError, match="rejected"):
        take(TrainLoader(RECORDS, lambda record: None, batch_size=2), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named(num_workers):
    def mapper(record):
        raise OSError("truncated")

    loader = TrainLoader(RECORDS[:1], mapper, batch_size=1, num_workers=num_workers)
    with pytest.raises(UserError, match=r"image 0\.png: truncated"):
        take(loader, 1)


def test_derived_seeds_differ():
    seeds = {
        derive_seed(kind, seed, i) for kind in range(3) for seed in range(10) for i in range(10)
    }
    assert len(seeds) == 300


@pytest.fixture
def some_empty():
    """A data set whose last image has no object."""
    things = [[0], [0], [0], [1], []]
    records = [
        {**r, "annotations": [{"category_id": c, "iscrowd": 0} for c in classes]}
        for r, classes in zip(RECORDS, things)
    ]
    DatasetCatalog.register("some_empty", lambda: records)
    yield "some_empty"
    DatasetCatalog.remove("some_empty")


def test_the_config_is_honoured(toy_cfg, some_empty):
    cfg = toy_cfg("DATASETS.TRAIN", (some_empty,))
    for keep_empty, images in ((True, {0, 1, 2, 3, 4}), (False, {0, 1, 2, 3})):
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = not keep_empty
        batches = take(build_train_loader(cfg, noisy), 30)
        assert {x[0] for batch in batches for x in batch} == images
        assert all(len(batch) == cfg.SOLVER.IMS_PER_BATCH for batch in batches)

    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 1.0  # class 1 is in 1 of 4 images: repeated twice
    counts = Counter(x[0] for batch in take(build_train_loader(cfg, noisy), 300) for x in batch)
    assert counts[3] / counts[0] == pytest.approx(2 / 1.15, abs=0.2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("DATALOADER.SAMPLER_TRAIN", "Nonsense"), "DATALOADER.SAMPLER_TRAIN is Nonsense"),
        (("DATASETS.TRAIN", ()), "DATASETS.TRAIN is empty"),
        (("SOLVER.IMS_PER_BATCH", 0), "SOLVER.IMS_PER_BATCH is 0"),
    ],
)
def test_wrong_settings_are_named(toy_cfg, overrides, message):
    with pytest.raises(UserError, match=message):
        build_train_loader(toy_cfg(*overrides))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="IMS_PER_BATCH is 3, which 2 processes"):
        TrainLoader(RECORDS, noisy, batch_size=3, world_size=2)
