"""The tables of docs/performance.md for a GPU: every architecture, beside Detectron2's Mask R-CNN.

    python docs/gpu_bench.py --reference ../shared/reference --output gpu

Runs ``solo-d2 benchmark`` with stand-in weights; those of the SOLO family find objects in photos
(``--image``) and none in noise. AdaptIS and Mask R-CNN have random weights. Without a GPU it runs
on the CPU; see ``--size``.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from measure_export import TABLES, coco_config, fill, prefix
from tabulate import tabulate

from solo_d2.config import load_config
from solo_d2.modeling.num_classes import num_classes_keys
from solo_d2.tools import benchmark

# config and size of the network's input
MODELS = {
    "SOLO/SOLO_R50_3x": (800, 1333),
    "SOLO/DecoupledSOLO_R50_3x": (800, 1333),
    "SOLOv2/SOLOv2_R50_3x": (800, 1333),
    "SOLOv2/SOLOv2_Light_448_R50_3x": (448, 672),
    "YOLACT/YOLACT_R50": (550, 550),
    "CenterMask/CenterMask_R50_3x": (800, 1333),
    "CenterMask/CenterMask_V39_3x": (800, 1333),
    "CenterMask/CenterMask_Lite_V39_4x": (600, 1000),
    "AdaptIS/AdaptIS_R50_FPN_stage1": (800, 1333),
    "MaskRCNN/MaskRCNN_R50_3x": (800, 1333),
}
# what, images, dtype, compiled
RUNS = [
    ("inference", 1, "float32", False),
    ("inference", 1, "float16", False),
    ("inference", 8, "float16", False),
    ("training", 2, "float32", False),
    ("training", 2, "bfloat16", False),
    ("inference", 8, "float32", False),
    ("inference", 1, "float16", True),
    ("training", 2, "bfloat16", True),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of json files")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--image", default="", help="stands for all images (default: noise)")
    parser.add_argument("--size", type=int, nargs=2, help="of all inputs, for a test")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=10.0, help="start nothing after these")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    weights = {name: stand_in(name, options) for name in options.models}
    start = time.monotonic()
    for run, name in itertools.product(RUNS, options.models):
        if time.monotonic() - start < 60 * options.minutes:
            measure(name, weights[name], run, options)
    print(summary(options.output))


def stand_in(name: str, options: argparse.Namespace) -> str:
    """A file of weights; "" where there is no table of published ones."""
    path = options.output / f"{Path(name).name}.pth"
    if (start := prefix(f"{name}.yaml")) is None:
        return ""
    if not path.exists():
        fill(coco_config(f"{name}.yaml"), TABLES[start], options.reference, path)
    return str(path)


def measure(name: str, weights: str, run: tuple, options: argparse.Namespace) -> None:
    what, images, dtype, compiled = run
    cfg = load_config(f"{name}.yaml")
    keys = [word for key in num_classes_keys(cfg) for word in (key, "80")]
    if name.startswith("MaskRCNN"):  # 100 detections of random weights
        roi_heads = "MODEL.ROI_HEADS"
        keys += [f"{roi_heads}.SCORE_THRESH_TEST", "0.0", f"{roi_heads}.NMS_THRESH_TEST", "1.0"]
    height, width = options.size or MODELS[name]
    file = options.output / f"{_stem(run)}_{Path(name).name}.json"
    words = ["--config-file", f"{name}.yaml", "--only", what, "--images", str(images)]
    words += ["--size", str(height), str(width), "--repeat", str(options.repeat), "--warmup", "3"]
    words += ["--dtype", dtype, "--output", str(file), "--image", options.image]
    words += ["--weights", weights] * bool(weights)
    try:
        benchmark.main([*words, *["--compile"] * compiled, *keys])
    except Exception as error:  # of one model: the others go on
        print(f"{name}, {run}: {type(error).__name__}: {error}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(folder: Path) -> str:
    """A table for each kind of run, in Markdown."""
    lines = []
    for run in RUNS:
        files = [folder / f"{_stem(run)}_{Path(name).name}.json" for name in MODELS]
        rows = [row for x in files if x.exists() for row in json.loads(x.read_bytes())["rows"]]
        if rows:
            lines.append(f"\n{_stem(run)}\n")
            keys = [k for k in dict.fromkeys(key for row in rows for key in row) if k != "what"]
            lines.append(tabulate([[r.get(k) for k in keys] for r in rows], keys, "github", ".4g"))
    return "\n".join(lines)


def _stem(run: tuple) -> str:
    what, images, dtype, compiled = run
    return f"{what}_{images}_{dtype}" + "_compiled" * compiled


if __name__ == "__main__":
    main()
