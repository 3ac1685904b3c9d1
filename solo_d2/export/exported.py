"""Exported files as models of Detectron2's interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from solo_d2.errors import UserError, one_line
from solo_d2.modeling.adaptis import ObjectFinder
from solo_d2.modeling.adaptis.automatic import ProposalSelection, RandomSelection
from solo_d2.modeling.adaptis.embedded import ImageEmbedding
from solo_d2.modeling.adaptis.finder import EncodedImage, InferenceOptions, output_size
from solo_d2.modeling.adaptis.panoptic import PanopticAssembler
from solo_d2.modeling.yolact.inference import YOLACTDetector
from solo_d2.postprocessing import postprocess

from .metadata import KEY, Metadata, decoder_path, round_up

SUFFIXES = (".onnx", ".pt2")
# The tensors of one call by name -> its results by name.
Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class ExportedModel(nn.Module, ABC):
    """A file in place of the network; options are those of the model it was exported from.

    Attributes:
        architecture: ``Metadata.architecture`` of the files that a class reads.
    """

    architecture: str

    def __init__(self, run: Run, metadata: Metadata):
        super().__init__()
        self.run = run
        self.metadata = metadata

    @property
    def device(self) -> torch.device:
        """Of inputs and outputs."""
        return torch.device("cpu")

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As the models: "image" (3, h, w), "height", "width" -> {"instances"} at that size."""
        return [self.predict(inputs) for inputs in batched_inputs]

    @abstractmethod
    def predict(self, inputs: dict) -> dict[str, Any]:
        """The same for one image."""

    def pad(self, image: Tensor) -> Tensor:
        """(3, h, w) -> (1, 3, H, W) float32, with the pixel mean at the right and bottom.

        Raises:
            UserError: the image is larger than the only size that the graph takes.
        """
        h, w = image.shape[-2:]
        multiple = self.metadata.divisibility
        height, width = self.metadata.size or (round_up(h, multiple), round_up(w, multiple))
        if h > height or w > width:
            raise UserError(f"the graph takes {height} x {width} pixels, the image has {h} x {w}")
        padded = torch.tensor(self.metadata.pixel_mean)[:, None, None].repeat(1, height, width)
        padded[:, :h, :w] = image
        return padded[None]


class ExportedDetector(ExportedModel):
    """The graph returns instances and which of them are valid."""

    def predict(self, inputs: dict) -> dict[str, Any]:
        image = inputs["image"]
        height = inputs.get("height", image.shape[-2])
        width = inputs.get("width", image.shape[-1])
        return {"instances": self.postprocess(self.raw(image), height, width, self.pad(image))}

    def raw(self, image: Tensor) -> Instances:
        """Instances in the network's frame, with soft masks, as eager's ``inference``."""
        padded, size = self.pad(image), (image.shape[-2], image.shape[-1])
        results = self.run({"image": padded, "image_size": torch.tensor(size)})
        valid = results.pop("valid")
        return self.instances({name: x[valid] for name, x in results.items()}, size)

    @abstractmethod
    def instances(self, results: dict[str, Tensor], size: tuple[int, int]) -> Instances:
        """Valid results of the graph for an image of a size."""

    @abstractmethod
    def postprocess(
        self, instances: Instances, height: int, width: int, padded: Tensor
    ) -> Instances:
        """Instances of ``raw`` in the output frame."""


class ExportedSOLO(ExportedDetector):
    architecture = "SOLO"

    def instances(self, results: dict[str, Tensor], size: tuple[int, int]) -> Instances:
        return Instances(
            size,
            scores=results["scores"],
            pred_classes=results["classes"],
            pred_masks=results["masks"],
        )

    def postprocess(
        self, instances: Instances, height: int, width: int, padded: Tensor
    ) -> Instances:
        return postprocess(
            instances,
            height,
            width,
            padded_size=(padded.shape[-2], padded.shape[-1]),
            mask_threshold=self.metadata.options["mask_threshold"],
        )


class ExportedYOLACT(ExportedDetector):
    architecture = "YOLACT"

    def __init__(self, run: Run, metadata: Metadata):
        super().__init__(run, metadata)
        options = metadata.options
        self.detector = YOLACTDetector(crop=options["crop"], box_rounding=options["box_rounding"])

    def instances(self, results: dict[str, Tensor], size: tuple[int, int]) -> Instances:
        side = self.metadata.options["input_size"]
        found = Instances((side, side) if side else size, pred_boxes=Boxes(results["boxes"]))
        found.scores, found.pred_classes = results["scores"], results["classes"]
        found.pred_masks = results["masks"]
        if "mask_scores" in results:
            found.mask_scores = results["mask_scores"]
        return found

    def postprocess(
        self, instances: Instances, height: int, width: int, padded: Tensor
    ) -> Instances:
        options = self.metadata.options
        side = options["padded_side"]
        padded_size = (side, side) if side else (padded.shape[-2], padded.shape[-1])
        return self.detector.postprocess(
            instances, (height, width), padded_size, options["mask_threshold"]
        )


class ExportedCenterMask(ExportedDetector):
    architecture = "CenterMask"

    def instances(self, results: dict[str, Tensor], size: tuple[int, int]) -> Instances:
        found = Instances(size, pred_boxes=Boxes(results["boxes"]), scores=results["scores"])
        found.pred_classes, found.locations = results["classes"], results["locations"]
        if "masks" in results:
            found.pred_masks = results["masks"][:, None]
        if "mask_scores" in results:
            found.mask_scores = results["mask_scores"]
        return found

    def postprocess(
        self, instances: Instances, height: int, width: int, padded: Tensor
    ) -> Instances:
        return detector_postprocess(instances, height, width)


class ExportedAdaptIS(ExportedModel, ObjectFinder):
    """Takes points too; the search for objects runs here, on the graph's maps."""

    architecture = "AdaptIS"

    def __init__(self, run: Run, metadata: Metadata, decoder: Run):
        super().__init__(run, metadata)
        self.decoder = decoder
        options = metadata.options
        self.stride = options["stride"]
        self.mask_threshold = options["mask_threshold"]
        inference = dict(options["inference"])
        for name, part in (
            ("proposals", ProposalSelection),
            ("random", RandomSelection),
            ("assembler", PanopticAssembler),
        ):
            inference[name] = part(**inference[name])
        self.options = InferenceOptions(**inference)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        (inputs,) = batched_inputs
        image = inputs["image"]
        return ImageList(self.pad(image), [(image.shape[-2], image.shape[-1])])

    def encode(self, image: Tensor, image_size: tuple[int, int]) -> EncodedImage:
        found = self.run({"image": image, "image_size": torch.tensor(image_size)})
        embedding = ImageEmbedding(found["control"], found["selection"], found["cells"])
        return EncodedImage(embedding, found["semantic"], found.get("proposals"))

    def decode(self, embedding: ImageEmbedding, points: Tensor) -> Tensor:
        inputs = {
            "control": embedding.control,
            "selection": embedding.selection,
            "cells": embedding.valid,
            "points": points,
        }
        return self.decoder(inputs)["logits"]

    def predict(self, inputs: dict) -> dict[str, Any]:
        if "points" in inputs:
            return self.prompt(inputs)
        image = self.embed_image(inputs["image"])
        return self.options.assembler(self.find(image), output_size(inputs), image.padded_size)


def open_exported(path: str | Path, *, allow_pickle: bool = False) -> ExportedModel:
    """The model of a file of ``files.export``.

    Args:
        path: with one of ``SUFFIXES``. That of AdaptIS needs its decoder beside it.
        allow_pickle: read a .pt2 file, which can run code; only for files that you trust.

    Raises:
        UserError: a file is missing, damaged or not exported by solo_d2, a package is missing, or
            reading may run code.
    """
    run, metadata = _open(Path(path), allow_pickle)
    decoder = None
    if metadata.architecture == ExportedAdaptIS.architecture:
        decoder, _ = _open(decoder_path(path), allow_pickle)
    return exported_model(run, metadata, decoder)


def exported_model(run: Run, metadata: Metadata, decoder: Run | None = None) -> ExportedModel:
    """The model of a graph; ``decoder`` is that of AdaptIS."""
    if metadata.architecture == ExportedAdaptIS.architecture and decoder is not None:
        return ExportedAdaptIS(run, metadata, decoder)
    for known in (ExportedSOLO, ExportedYOLACT, ExportedCenterMask):
        if metadata.architecture == known.architecture:
            return known(run, metadata)
    raise UserError(f"an export of {metadata.architecture} is no model by itself")


def _open(path: Path, allow_pickle: bool) -> tuple[Run, Metadata]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".onnx":
        return _open_onnx(path)
    if not allow_pickle:
        raise UserError(
            f"{path}: reading a .pt2 file may run code from it; if you trust it, predict reads it "
            "with --allow-pickle"
        )
    return _open_torch(path)


def _open_onnx(path: Path) -> tuple[Run, Metadata]:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f"{path}: ONNX files need onnxruntime; run: python -m pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [x for x in wanted if x in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # of a damaged file onnxruntime raises classes of its own
        raise UserError(f"{path}: onnxruntime cannot read it: {one_line(error)}") from error
    stored = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    inputs = [x.name for x in session.get_inputs()]
    outputs = [x.name for x in session.get_outputs()]

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: np.ascontiguousarray(tensors[name].numpy()) for name in inputs}
        return {k: torch.from_numpy(x) for k, x in zip(outputs, session.run(outputs, arrays))}

    return run, Metadata.from_json(stored, str(path))


def _open_torch(path: Path) -> tuple[Run, Metadata]:
    extra = {KEY: ""}
    try:
        module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:  # of a damaged file torch raises nearly everything
        raise UserError(f"{path}: not a file of torch.export: {one_line(error)}") from error
    metadata = Metadata.from_json(extra[KEY], str(path))
    inputs, outputs = metadata.inputs, metadata.outputs

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = module(*(tensors[name] for name in inputs))
        return dict(zip(outputs, found if isinstance(found, tuple) else (found,)))

    return run, metadata
