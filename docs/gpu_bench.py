"""The tables of docs/performance.md for a GPU: every architecture, beside Detectron2's Mask R-CNN.

    python docs/gpu_bench.py --output gpu

Runs ``solo-d2 benchmark`` on noise with random weights that find 100 instances, as in
measure_performance.py; AdaptIS finds none. Without a GPU it runs on the CPU; see ``--size``.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from detectron2.modeling import build_model
from measure_performance import FCOS, SOLO, YOLACT, spread_heads
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
ROI_HEADS = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "1.0"]
# by the first letters of a name; classes are 80
OPTIONS = {"SOLO": SOLO, "YOLACT": YOLACT, "CenterMask": FCOS, "MaskRCNN": ROI_HEADS}
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
    parser.add_argument("--output", type=Path, required=True, help="folder of json files")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--runs", type=int, nargs="+", default=range(len(RUNS)), help="numbers of RUNS, from 0"
    )
    parser.add_argument("--image", default="", help="stands for all images (default: noise)")
    parser.add_argument("--size", type=int, nargs=2, help="of all inputs, for a test")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=10.0, help="start nothing after these")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    weights = {name: random_weights(name, options) for name in options.models}
    start = time.monotonic()
    runs = [RUNS[i] for i in options.runs]
    for run, name in itertools.product(runs, options.models):
        if time.monotonic() - start < 60 * options.minutes:
            measure(name, weights[name], run, options)
    print(summary(options.output))


def random_weights(name: str, options: argparse.Namespace) -> str:
    """A file of them."""
    path = options.output / f"{Path(name).name}.pth"
    if not path.exists():
        torch.manual_seed(0)
        opts = [*_options(name), "MODEL.DEVICE", "cpu"]
        model = build_model(load_config(f"{name}.yaml", opts=opts))
        spread_heads(model)
        state = model.state_dict()
        for key in state:
            if "conv3.norm.weight" in key:  # of residual blocks, whose sums float16 has to hold
                state[key].fill_(0.2)
        torch.save({"model": state}, path)
    return str(path)


def measure(name: str, weights: str, run: tuple, options: argparse.Namespace) -> None:
    what, images, dtype, compiled = run
    height, width = options.size or MODELS[name]
    file = options.output / f"{_stem(run)}_{Path(name).name}.json"
    words = ["--config-file", f"{name}.yaml", "--weights", weights, "--image", options.image]
    words += ["--size", str(height), str(width), "--repeat", str(options.repeat), "--warmup", "3"]
    words += ["--only", what, "--images", str(images), "--dtype", dtype, "--output", str(file)]
    try:
        benchmark.main([*words, *["--compile"] * compiled, *_options(name)])
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


def _options(name: str) -> list[str]:
    classes = [(key, "80") for key in num_classes_keys(load_config(f"{name}.yaml"))]
    return [*sum(classes, ()), *next((v for k, v in OPTIONS.items() if name.startswith(k)), [])]


def _stem(run: tuple) -> str:
    what, images, dtype, compiled = run
    return f"{what}_{images}_{dtype}" + "_compiled" * compiled


if __name__ == "__main__":
    main()
