"""The table of docs/export.md: each published config as ONNX against its model.

    python docs/measure_export.py --reference FOLDER --images FOLDER [--limit 12] [CONFIG ...]

The weights come from the key table of a published checkpoint of the same architecture. Tensors that
it lacks, those of deeper backbones, are drawn by the same rules. One line of Markdown per config.
"""

import argparse
import importlib.util
import math
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from torch import Tensor
from torch.nn import functional as F

import solo_d2
from solo_d2.checkpoint.rename_rules import convert, recognize
from solo_d2.config import load_config
from solo_d2.errors import UserError
from solo_d2.export.check import compare, raw_instances
from solo_d2.export.files import build_graph, describe, export
from solo_d2.images import as_rgb
from solo_d2.modeling import YOLACT
from solo_d2.modeling.num_classes import num_classes_keys
from solo_d2.predictor import load_exported

# The first pattern that a config's name starts with says where its weights come from.
TABLES = {
    "SOLO/SOLO": "solo_r50",
    "SOLO/DecoupledSOLO_Light_512_DCN": "decoupled_solo_light_dcn_r50",
    "SOLO/DecoupledSOLO_Light": "decoupled_solo_light_r50",
    "SOLO/Decoupled": "decoupled_solo_r50",
    "SOLOv2/SOLOv2_Light_512_DCN": "solov2_light_512_dcn_r50",
    "SOLOv2/SOLOv2_Light": "solov2_light_r50",
    "SOLOv2/": "official_solov2_r50",
    "YOLACT/YOLACT_DarkNet": "yolact_darknet53",
    "YOLACT/YOLACT_PLUS": "yolact_plus_r50",
    "YOLACT/YOLACT_R50": "yolact_r50",
    "YOLACT/": "yolact_r101",
    "CenterMask/CenterMask_Lite_V19_slim_dw": "centermask_v19_slim_dw_lite",
    "CenterMask/CenterMask_Lite": "centermask_lite_v39",
    "CenterMask/CenterMask_V": "centermask_v39",
    "CenterMask/": "centermask_r50",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=12, help="number of images")
    parser.add_argument("configs", nargs="*", help="default: all published")
    options = parser.parse_args()
    names = options.configs or [x.config for x in solo_d2.list_models() if prefix(x.config)]
    images = [as_rgb(path) for path in sorted(options.images.glob("*.jpg"))[: options.limit]]
    if not images:
        parser.error(f"no .jpg file in {options.images}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(images)} images")
    print("| config | file | matched | identical masks | score | box | soft mask | eager | ORT |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        try:
            print(row(name, images, options.reference), flush=True)
        except UserError as error:
            print(f"| {name} | no: {error} |", flush=True)


def prefix(name: str) -> str | None:
    return next((start for start in TABLES if name.startswith(start)), None)


@torch.no_grad()
def row(name: str, images: list[np.ndarray], reference: Path) -> str:
    cfg = coco_config(name)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        fill(cfg, TABLES[prefix(name) or ""], reference, weights)
        predictor = solo_d2.load(cfg, weights=str(weights))
        if isinstance(predictor.model, YOLACT):
            make_it_find(predictor.model, [predictor.network_input(x) for x in images])
        metadata = describe(
            build_graph(predictor.model),
            class_names=predictor.names,
            category_ids=predictor.category_ids,
            channel_order=predictor.input_format,
            resize=predictor.resize,
        )
        path = Path(folder) / "model.onnx"
        export(build_graph(predictor.model), metadata, path, format="onnx")
        megabytes = path.stat().st_size / 1e6
        exported = load_exported(path)
        found, times = [], ([], [])
        for image in images:
            results = []
            for model, spent in zip((predictor, exported), times):
                start = time.perf_counter()
                results.append(raw_instances(model.model, model.network_input(image)))
                spent.append(time.perf_counter() - start)
            found.append(compare(*results))
    eager, ort = (statistics.median(spent) for spent in times)
    total = sum(x.eager for x in found)
    matched = sum(x.matched for x in found)
    identical = sum(x.identical_masks for x in found)
    pixels = sum(x.differing_pixels for x in found)
    worst = " | ".join(
        f"{max(getattr(x, k) for x in found):.0e}" for k in ("score", "box", "soft_mask")
    )
    extra = sum(x.exported for x in found) - matched
    surplus = f", {extra} more" if extra else ""
    return (
        f"| {Path(name).stem} | {megabytes:.0f} MB | {matched} of {total}{surplus} | {identical} "
        f"({pixels} pixels differ) | {worst} | {eager:.2f} s | {ort:.2f} s |"
    )


def coco_config(name: str) -> CfgNode:
    """A config for 80 classes on the CPU, without weights and data."""
    cfg = load_config(name, opts=["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    for key in num_classes_keys(cfg):
        cfg.merge_from_list([key, 80])
    return cfg


def make_it_find(model: YOLACT, images: list[Tensor]) -> None:
    """Let a head whose stand-in weights see nothing in real images give 50 candidates or more.

    A tenth of the features of its shared convolution become positive. Logits, boxes and prototypes
    are scaled: the order of saturated scores is chance, and boxes a million pixels wide make any
    noise large. The threshold is lowered where it is too high.
    """
    inputs = [model.preprocess_image([{"image": image}]).tensor for image in images]
    before = []
    hook = model.head.shared.register_forward_pre_hook(lambda module, x: before.append(x[0]))
    model.dense(inputs[0])
    hook.remove()
    conv = model.head.shared
    features = F.conv2d(before[0], conv.weight, conv.bias, padding=1)
    conv.bias.sub_(features.flatten(2).quantile(0.9, dim=2).amax(dim=0).clamp(max=0))
    found = [model.dense(x) for x in inputs]
    scale(model.head.class_logits, max(x.class_logits.abs().amax() for x in found) / 10)
    scale(model.head.box_pred, max(x.box_offsets.std() for x in found))
    scale(model.protonet.predictor, max(x.prototypes.std() for x in found))
    scores = [model.dense(x).class_logits[0].softmax(dim=1)[:, 1:].amax(dim=1) for x in inputs]
    threshold = min(x.topk(50).values[-1].item() for x in scores)
    model.detector.score_threshold = min(model.detector.score_threshold, threshold)


def scale(conv: Conv2d, deviation: Tensor) -> None:
    for parameter in conv.parameters():
        parameter.div_(deviation)


def fill(cfg: CfgNode, table: str, reference: Path, path: Path) -> None:
    """Write stand-in weights for the model of ``cfg``."""
    generator = _generator(reference)
    arrays = generator.state_dict(reference / "keys" / f"{table}.keys.tsv")
    published = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
    source = recognize(published)
    known = convert(published, source) if source else published
    state = build_model(cfg.clone()).state_dict()
    for name, value in state.items():
        if name in known and known[name].shape == value.shape:
            state[name] = known[name]
        elif value.is_floating_point() and name not in ("pixel_mean", "pixel_std"):
            state[name] = drawn(name, value)
    torch.save({"model": state}, path)


def drawn(name: str, like: Tensor) -> Tensor:
    """By the rules of the key tables: Kaiming weights, statistics near those of unit variance."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if like.ndim > 1:
        std = 0.01 if "offset" in name else math.sqrt(2 / like[0].numel())
        return torch.randn(like.shape, generator=rng) * std
    low, high = {"running_var": (0.7, 1.3), "weight": (0.8, 1.2)}.get(
        name.split(".")[-1], (-0.2, 0.2)
    )
    if ".conv3.norm.weight" in name:  # the last of a residual block
        low, high = 0.2, 0.5
    return torch.rand(like.shape, generator=rng) * (high - low) + low


def _generator(reference: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen", reference / "synthetic_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
