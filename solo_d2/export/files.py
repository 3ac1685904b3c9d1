"""From a model to files: ONNX for onnxruntime, or torch.export's .pt2."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNN
from torch import nn

import solo_d2
from solo_d2.errors import UserError
from solo_d2.files import atomic_write
from solo_d2.modeling import YOLACT, AdaptIS

from .adaptis import AdaptISDecoder, AdaptISEncoder
from .centermask import CenterMaskGraph
from .graph import Graph
from .metadata import KEY, Metadata, decoder_path, round_up
from .solo import SOLO_GRAPHS
from .yolact import YOLACTGraph

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
_OPSET = 20  # the first with bilinear Resize and DeformConv as used here
_MAX_SIDE = 8192
# Tensors that are worth storing in half precision.
_MIN_HALF = 256


def build_graph(model: nn.Module) -> Graph:
    """The graph module of a model.

    Raises:
        UserError: the model, or a part of it, cannot be exported.
    """
    if type(model) in SOLO_GRAPHS:
        return SOLO_GRAPHS[type(model)](model)
    for known, graph in (
        (YOLACT, YOLACTGraph),
        (GeneralizedRCNN, CenterMaskGraph),
        (AdaptIS, AdaptISEncoder),
    ):
        if isinstance(model, known):
            return graph(model)
    names = ", ".join(x.__name__ for x in SOLO_GRAPHS)
    raise UserError(
        f"{type(model).__name__} cannot be exported: only {names}, YOLACT, CenterMask, FCOS and "
        "AdaptIS can"
    )


def describe(
    graph: Graph,
    *,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    channel_order: str,
    resize: T.ResizeShortestEdge,
    size: tuple[int, int] | None = None,
) -> Metadata:
    """The metadata of a graph.

    Args:
        graph: of ``build_graph``.
        class_names, category_ids, channel_order: see ``Metadata``.
        resize: of the images that the model is for.
        size: height and width of the only input that the graph is to take; None: any.
    """
    rule: dict[str, Any] = {
        "shortest_edge": resize.short_edge_length[0],
        "max_size": resize.max_size,
    }
    if size is not None:
        size = (round_up(size[0], graph.divisibility), round_up(size[1], graph.divisibility))
        # a model that resizes its own input does not keep the aspect ratio
        rule = {"stretch" if graph.options().get("input_size") else "fit": list(size)}
    mean, std = graph.model.pixel_mean, graph.model.pixel_std
    return Metadata(
        version=solo_d2.__version__,
        architecture=graph.architecture,
        class_names=list(class_names),
        category_ids=list(category_ids),
        channel_order=channel_order,
        pixel_mean=mean.flatten().tolist(),
        pixel_std=std.flatten().tolist(),
        divisibility=graph.divisibility,
        size=None if size is None else list(size),
        resize=rule,
        options=graph.options(),
        inputs=list(graph.input_names),
        outputs=list(graph.output_names),
    )


def export(
    graph: Graph, metadata: Metadata, path: str | Path, *, format: str = "onnx", half: bool = False
) -> list[Path]:
    """Write a model's file, and for AdaptIS a second one with the decoder.

    Args:
        graph: on the CPU.
        metadata: of ``describe``.
        path: of the file.
        format: one of ``FORMATS``.
        half: ONNX only: store weights that float16 can hold exactly as such, see
            ``round_weights``. They are computed with in float32.

    Returns:
        The files.

    Raises:
        UserError: a package is missing, or the model cannot take images of any size.
    """
    size = metadata.size or [9 * graph.divisibility, 11 * graph.divisibility]
    if metadata.size is None and graph.divisibility < 32:
        size = [288, 352]
    inputs = _example(graph, size)
    shapes = _dynamic_sizes(graph, fixed=metadata.size is not None)
    jobs = [(graph, inputs, shapes, Path(path))]
    if isinstance(graph, AdaptISEncoder):
        jobs.append(_decoder_job(graph, inputs, metadata.size is not None, decoder_path(path)))
    for part, example, part_shapes, part_path in jobs:
        text = replace(
            metadata,
            architecture=part.architecture,
            inputs=list(part.input_names),
            outputs=list(part.output_names),
        ).to_json()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _record(part, example, part_shapes)
            content = _onnx_bytes(part, program, text, half) if format == "onnx" else b""
            with atomic_write(part_path) as file:
                if format == "onnx":
                    file.write(content)
                else:
                    torch.export.save(program, file, extra_files={KEY: text})
    return [job[3] for job in jobs]


def _record(graph: Graph, example: tuple[torch.Tensor, ...], shapes: tuple[Any, ...]) -> Any:
    try:
        return torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        if "Constraints violated" not in str(error):
            raise
        raise UserError(
            f"the layers of {type(graph.model.backbone).__name__} depend on the image's size, so "
            "the file can take only one; name it with --size H W"
        ) from error


def round_weights(model: nn.Module) -> None:
    """Round the weights of a model to what float16 can hold, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half())


def _example(graph: Graph, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(1, 3, *size, generator=generator) * 255]
    if "image_size" in graph.input_names:
        inputs.append(torch.tensor(list(size)))
    return tuple(inputs)


def _dynamic_sizes(graph: Graph, *, fixed: bool) -> tuple[Any, ...]:
    if fixed:
        return tuple({} for _ in graph.input_names)
    multiple = graph.divisibility
    image: dict[int, Any] = {}
    for axis, name in ((2, "height"), (3, "width")):
        side = torch.export.Dim(name, min=2, max=_MAX_SIDE // multiple)
        image[axis] = multiple * side if multiple > 1 else side
    return (image, *({} for _ in graph.input_names[1:]))


def _decoder_job(graph: AdaptISEncoder, inputs: tuple, fixed: bool, path: Path) -> tuple:
    with torch.no_grad():
        control, selection, cells = graph(*inputs)[:3]
    points = torch.tensor([[[1.0, 2.0], [30.0, 20.0], [50.0, 60.0]]])
    sides = [torch.export.Dim(name, min=2, max=_MAX_SIDE) for name in ("map_height", "map_width")]
    maps: dict[int, Any] = {} if fixed else {2: sides[0], 3: sides[1]}
    shapes = (maps, maps, maps, {1: torch.export.Dim("points", min=1, max=65536)})
    return AdaptISDecoder(graph.model), (control, selection, cells, points), shapes, path


def _onnx_bytes(graph: Graph, program: Any, metadata: str, half: bool) -> bytes:
    onnx = _import_onnx()
    import onnxscript

    op = getattr(onnxscript, f"opset{_OPSET}")

    def stable_sort(x: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        """TopK puts the lower index first where values are equal, so it is stable."""
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(graph.input_names),
            output_names=list(graph.output_names),
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    model = exported.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # paths and lines of this machine's Python files
    if half:
        _store_as_half(onnx, model.graph)
    onnx.helper.set_model_props(model, {KEY: metadata})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _store_as_half(onnx: Any, graph: Any) -> None:
    """Initializers that float16 can hold exactly become such, each with a cast to float32."""
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        rounded = values.astype("float16")
        if values.size < _MIN_HALF or not (rounded.astype("float32") == values).all():
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, f"{name}.half"))
        casts.append(
            onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _import_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"writing ONNX needs the package {error.name}; run: python -m pip install onnx "
            "onnxscript onnxruntime"
        ) from error
    return onnx
