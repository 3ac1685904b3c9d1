"""Training batches as a pure function of a seed and the number of the batch.

Detectron2's loader depends on its history: on random states, on the number of workers, on what its
aspect ratio buckets hold. Here every image of training has a position in one endless stream, and
position and seed decide which image it is, how it is augmented and which batch it is in. So a
training that was killed continues with the very batches that it would have had, and several
processes share the batches that one process would see.
"""

# Detectron2's augmentations use numpy's legacy global state.
# ruff: noqa: NPY002

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from solo_d2.data.mapper import InstanceMapper
from solo_d2.errors import UserError

# What a derived seed is for, so that equal numbers elsewhere give other random numbers.
_EPOCH, _SAMPLE, _STEP = range(3)
# A mapper may reject an image by returning None, as in Detectron2; another one takes its place.
_MAX_REJECTED = 100


class Sample(NamedTuple):
    position: int  # in the stream of all processes
    index: int  # in the data set


def derive_seed(*keys: int) -> int:
    """A seed in [0, 2**32) that any change of the keys (not negative) changes altogether."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed what a model draws in one iteration: proposals, dropout and so on."""
    derived = derive_seed(_STEP, seed, iteration, rank)
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)


def stream(repeat_factors: Tensor, *, seed: int) -> Iterator[Sample]:
    """All images in random order, again and again.

    Args:
        repeat_factors: (images,) how often each image occurs in an epoch, on average; at least 1.
        seed: decides the order, together with the number of the epoch.
    """
    position = 0
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(derive_seed(_EPOCH, seed, epoch))
        extra = torch.rand(len(repeat_factors), generator=generator) < repeat_factors.frac()
        repeats = repeat_factors.long() + extra
        indices = torch.arange(len(repeats)).repeat_interleave(repeats)
        order = torch.randperm(len(indices), generator=generator)
        for index in indices[order].tolist():
            yield Sample(position, index)
            position += 1


def batches(samples: Iterator[Sample], groups: Sequence[int], size: int) -> Iterator[list[Sample]]:
    """Batches of ``size`` samples whose images are of one group, in the order they become full.

    Args:
        samples: of ``stream``.
        groups: per image of the data set; all equal makes batches of successive samples.
    """
    waiting: dict[int, list[Sample]] = {group: [] for group in set(groups)}
    for sample in samples:
        batch = waiting[groups[sample.index]]
        batch.append(sample)
        if len(batch) == size:
            waiting[groups[sample.index]] = []
            yield batch


class TrainLoader:
    """Endless batches for one of several processes; each iteration starts at the batch sought."""

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], Any],
        *,
        batch_size: int,
        repeat_factors: Tensor | None = None,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """
        Args:
            records: Detectron2 dataset dicts.
            mapper: makes the model's input from a record; may use any random numbers.
            batch_size: of all processes together.
            repeat_factors: see ``stream``; by default 1 for each image.
            aspect_ratio_grouping: put wide images with wide ones, as Detectron2 does; needs
                "width" and "height" in the records.
            num_workers: loading processes; has no influence on what is loaded.
            seed: of everything random.
            rank, world_size: of this process; it gets every world_size-th image of a batch.

        Raises:
            UserError: the batch cannot be shared equally, or a record has no size.
        """
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share"
            )
        groups = [0] * len(records)
        if aspect_ratio_grouping:
            try:
                groups = [int(record["width"] > record["height"]) for record in records]
            except KeyError as error:
                raise UserError(
                    f"DATALOADER.ASPECT_RATIO_GROUPING needs {error} in every record; set it False"
                ) from error
        self._groups = groups
        self._repeat_factors = (
            torch.ones(len(records)) if repeat_factors is None else repeat_factors
        )
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._rank, self._world_size = rank, world_size
        self.seek(seed, 0)

    def seek(self, seed: int, batch: int) -> None:
        """Let the next iteration begin with batch number ``batch``, loading no earlier one."""
        self._seed = seed
        self._start = batch

    def sample_batches(self) -> Iterator[list[Sample]]:
        """Which samples this process gets, from the batch that was sought."""
        samples = stream(self._repeat_factors, seed=self._seed)
        every = batches(samples, self._groups, self._batch_size)
        for batch in itertools.islice(every, self._start, None):
            yield batch[self._rank :: self._world_size]

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(
            DataLoader(
                _MappedSamples(self._records, self._mapper, self._seed),
                batch_sampler=_Iterable(self.sample_batches),
                num_workers=self._num_workers,
                collate_fn=list,
                # Its own, since it would else take a number from the model's.
                generator=torch.Generator().manual_seed(self._seed),
            )
        )


def build_train_loader(cfg: CfgNode, mapper: Callable | None = None) -> TrainLoader:
    """Detectron2's ``build_detection_train_loader`` with batches that depend on nothing else.

    Args:
        cfg: a negative SEED gives a random one, the same in all processes.
        mapper: by default an ``InstanceMapper``.

    Raises:
        UserError: no image is left, the batch cannot be shared, or the sampler is not known.
    """
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler not in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {sampler}, but only TrainingSampler and "
            "RepeatFactorTrainingSampler can be resumed exactly"
        )
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty")
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            proposal_files=proposals,
        )
    except AssertionError as error:  # how Detectron2 says that nothing is left
        raise UserError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}: {error}") from error
    if not isinstance(records, list):
        logging.getLogger(__name__).warning(
            "DATASETS.TRAIN is no list of records: Detectron2's loader is used, and a resumed "
            "training sees other batches than an uninterrupted one"
        )
        return build_detection_train_loader(cfg, mapper=mapper)
    repeat_factors = None
    if sampler == "RepeatFactorTrainingSampler":
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
    return TrainLoader(
        records,
        mapper or InstanceMapper(cfg, is_train=True),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        repeat_factors=repeat_factors,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )


class _Iterable:
    """An iterable that starts anew each time, from a generator function."""

    def __init__(self, generator: Callable[[], Iterator[Any]]):
        self._generator = generator

    def __iter__(self) -> Iterator[Any]:
        return self._generator()


class _MappedSamples(Dataset):
    """Detectron2's ``MapDataset`` with random numbers that depend on the sample's position only."""

    def __init__(self, records: Dataset, mapper: Callable[[dict[str, Any]], Any], seed: int):
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, sample: Sample) -> Any:
        record = self._records[sample.index]
        with _seeded(derive_seed(_SAMPLE, self._seed, sample.position)):
            for _ in range(_MAX_REJECTED):
                mapped = self._map(record)
                if mapped is not None:
                    return mapped
                record = self._records[random.randrange(len(self._records))]
        raise UserError(f"the mapper rejected {_MAX_REJECTED} images in a row")

    def _map(self, record: dict[str, Any]) -> Any:
        try:
            return self._mapper(record)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three
            name = record.get("file_name", record.get("image_id"))
            raise UserError(f"image {name}: {error}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers within the block and leave them as they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
