"""The order of the training images, which continues after an interruption."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import IterableDataset, Sampler

from solo_d2.data import build_mapper
from solo_d2.errors import UserError


class ResumableSampler(Sampler[int]):
    """An endless sampler of Detectron2 that can start in the middle of its stream."""

    def __init__(self, build: Callable[..., Sampler[int]], seed: int, images: int):
        """
        Args:
            build: creates the sampler of this process, given ``seed``; must be picklable.
            seed: the same in all processes.
            images: number of images in an epoch of all processes.
        """
        self._build = build
        self.images = images
        self.seek(seed, 0)

    def seek(self, seed: int, start: int) -> None:
        """Start at this process's image number ``start``. Call it before iterating."""
        self.seed, self.start = seed, start
        # built here, because a data loading process does not know its rank
        self._sampler = self._build(seed=seed)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._sampler, self.start, None)


def resumable_sampler(loader: Any) -> ResumableSampler | None:
    """The sampler of a Detectron2 loader; None if its stream cannot be continued."""
    while loader is not None:  # loaders wrap data sets that wrap samplers
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, ResumableSampler):
            return sampler
        loader = getattr(loader, "dataset", None)
    return None


def training_records(cfg: CfgNode) -> Any:
    """What Detectron2 trains on: a list of records, or a torch data set.

    Raises:
        UserError: DATASETS.TRAIN has no usable image, or a record lacks its size.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name data sets there, or give --data")
    keypoints, loader = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.DATALOADER
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=loader.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:  # Detectron2's report that no image is left
        raise UserError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: {error}") from error
    if loader.ASPECT_RATIO_GROUPING and isinstance(records, list):
        for record in records:
            if "width" not in record or "height" not in record:
                raise UserError(
                    f"DATALOADER.ASPECT_RATIO_GROUPING needs 'width' and 'height' of image "
                    f"{record.get('file_name')}; set it to False"
                )
    return records


def build_train_loader(cfg: CfgNode) -> Any:
    """Detectron2's ``build_detection_train_loader`` with our mapper and a ``ResumableSampler``.

    Iterable data sets and Detectron2's less common samplers start over after an interruption.

    Raises:
        UserError: see ``training_records``.
    """
    records, loader = training_records(cfg), cfg.DATALOADER
    build: Callable[..., Sampler[int]] | None = None
    if not isinstance(records, IterableDataset):
        if loader.SAMPLER_TRAIN == "TrainingSampler":
            build = partial(TrainingSampler, len(records))
        elif loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                records, loader.REPEAT_THRESHOLD, sqrt=loader.REPEAT_SQRT
            )
            build = partial(RepeatFactorTrainingSampler, factors)
    sampler = None
    if build is not None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        sampler = ResumableSampler(build, seed, len(records))
    mapper = build_mapper(cfg, is_train=True)
    return build_detection_train_loader(cfg, dataset=records, mapper=mapper, sampler=sampler)
