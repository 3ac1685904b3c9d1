"""Measure this package against an earlier tree of it, as docs/performance.md reports it.

    git worktree add --detach /tmp/old c3a5afc
    python docs/measure_performance.py /tmp/old --output performance.json

Per row two processes, one with each tree, take turns: one run each, as often as asked. So both see
the same machine. Weights are random and equal; the heads' last layers are spread so that 100
instances are kept. Peak memory is that of the process.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SOLO = ["MODEL.SOLO.NUM_CLASSES", "80", "MODEL.SOLO.SCORE_THRESH_TEST", "0.001"]
SOLO += ["MODEL.SOLO.MAX_CANDIDATES_TEST", "500", "MODEL.SOLO.UPDATE_THRESH_TEST", "0.0"]
YOLACT = ["MODEL.YOLACT.NUM_CLASSES", "80", "MODEL.YOLACT.SCORE_THRESH_TEST", "0.001"]
FCOS = ["MODEL.FCOS.NUM_CLASSES", "80", "MODEL.FCOS.SCORE_THRESH_TEST", "0.001"]
FCOS += ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "TEST.DETECTIONS_PER_IMAGE", "100"]
# name -> config, height and width, options, and the original's figures at c3a5afc (issue 20):
# original / ours in inference and in a training step; ours / original in memory of both
LARGE = (800, 1333)
ROWS = {
    "SOLO R50": ("SOLO/SOLO_R50_1x", LARGE, SOLO, (2.30, 1.43, 0.21, 0.66)),
    "SOLOv2 R50": ("SOLOv2/SOLOv2_R50_1x", LARGE, SOLO, (1.45, 1.11, 0.65, 0.92)),
    "Decoupled SOLO R50": ("SOLO/DecoupledSOLO_R50_1x", LARGE, SOLO, (1.41, 1.09, 0.64, 0.87)),
    "SOLOv2 Light R50": (
        "SOLOv2/SOLOv2_Light_448_R50_3x", (448, 672), SOLO, (1.36, 1.14, 0.59, None)
    ),
    "YOLACT R50": ("YOLACT/YOLACT_R50", (550, 550), YOLACT, (1.28, 1.18, 0.50, 0.87)),
    "CenterMask V39": ("CenterMask/CenterMask_V39_3x", LARGE, FCOS, (1.02, 1.00, 0.99, 0.95)),
    "CenterMask-Lite V39": (
        "CenterMask/CenterMask_Lite_V39_4x", (600, 1000), FCOS, (1.01, 0.98, 0.90, 0.89)
    ),
}  # fmt: skip


def child(tree: str, name: str, mode: str, scale: float, dtype: str) -> None:
    """Print a line of json for each line read: {"ready"}, then {"seconds"}, then {"peak"}."""
    sys.path.insert(0, tree)
    import torch
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from solo_d2 import add_solo_d2_config

    config, size, options, _ = ROWS[name]
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(f"{tree}/configs/{config}.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *options])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    if "INPUT_SIZE" in cfg.MODEL.YOLACT:  # the image has this size
        cfg.MODEL.YOLACT.INPUT_SIZE = 0
    torch.manual_seed(0)
    model = build_model(cfg).train(mode == "step")
    spread_heads(model)
    if tree == str(HERE) and mode == "inference":  # as solo_d2.load does
        from solo_d2.modeling.prepare import prepare_for_inference

        prepare_for_inference(model, dtype)
    height, width = (round(scale * side / 32) * 32 if scale != 1 else side for side in size)
    inputs = random_input(height, width, 20 if mode == "step" else 0)

    def run() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if mode == "inference":
                with torch.no_grad():
                    return len(model([inputs])[0]["instances"])
            model.zero_grad()
            with EventStorage():
                losses = model([inputs])
        sum(losses.values()).backward()
        return len(losses)

    count = run()
    print(json.dumps({"found": count}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak": peak}), flush=True)


def spread_heads(model) -> None:
    """Let random weights find many instances."""
    import torch

    for parameter, value in model.named_parameters():
        if re.search(r"\b(kernel|mask|x|y|coefficient)_pred\.|class_logits\.weight", parameter):
            torch.nn.init.normal_(value, std=0.3 if "proposal_generator" not in parameter else 0.05)
        elif re.search(r"proposal_generator.*(class_logits|box_pred)\.bias", parameter):
            # scores of one half, and boxes of two strides, which NMS leaves
            torch.nn.init.constant_(value, float("box_pred" in parameter))
        elif "roi_heads.mask_head.predictor.weight" in parameter:
            torch.nn.init.normal_(value, std=1.0)


def random_input(height: int, width: int, objects: int) -> dict:
    """Noise, with square objects if there are any."""
    import torch
    from detectron2.structures import BitMasks, Boxes, Instances

    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, height, width, generator=generator) * 255
    inputs = {"image": image, "height": height, "width": width}
    masks, boxes = torch.zeros(objects, height, width, dtype=torch.bool), []
    for mask in masks:
        side = int(torch.randint(16, min(height, width) // 2, (), generator=generator))
        y = int(torch.randint(0, height - side, (), generator=generator))
        x = int(torch.randint(0, width - side, (), generator=generator))
        mask[y : y + side, x : x + side] = True
        boxes.append([x, y, x + side, y + side])
    if objects:
        instances = Instances((height, width), gt_boxes=Boxes(torch.tensor(boxes).float()))
        instances.gt_masks, instances.gt_classes = BitMasks(masks), torch.arange(objects) % 80
        inputs["instances"] = instances
    return inputs


class Runner:
    """A process that runs one model of one tree on demand."""

    def __init__(self, *arguments: str, threads: int):
        environment = {**os.environ, "PYTHONPATH": arguments[0], "PYTHONWARNINGS": "ignore"}
        # idle threads of the process that waits must not take time from the one that runs
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", *arguments],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read(self, key: str) -> float:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)[key]
        raise RuntimeError("a process ended early")

    def run(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read("seconds")

    def peak(self) -> float:
        self.process.stdin.close()
        result = self.read("peak")
        self.process.wait()
        return result


def measure(old: str, name: str, mode: str, options: argparse.Namespace) -> dict:
    runners = []
    for tree, dtype in ((old, "float32"), (str(HERE), options.dtype)):
        arguments = (tree, name, mode, str(options.scale), dtype)
        runners.append(Runner(*arguments, threads=options.threads))
        found = runners[-1].read("found")  # after the warm-up, before the next process starts
    repeat = options.inference if mode == "inference" else options.step
    times = [[runner.run() for runner in runners] for _ in range(repeat)]
    before, now = (list(x) for x in zip(*times))
    ratios = [a / b for a, b in times]
    gain = statistics.median(before) / statistics.median(now)
    peaks = [runner.peak() for runner in runners]
    k = mode == "step"
    published, memory = ROWS[name][3][k], ROWS[name][3][2 + k]
    return {
        "model": name, "mode": mode, "found": found, "before": before, "now": now, "gain": gain,
        "spread": [min(ratios), max(ratios)], "original/ours": published * gain,
        "peaks": peaks, "memory ours/original": memory and memory * peaks[1] / peaks[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="folder of the earlier tree")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--modes", nargs="+", default=["inference", "step"])
    parser.add_argument("--inference", type=int, default=5, help="runs of each tree")
    parser.add_argument("--step", type=int, default=3, help="training steps of each tree")
    parser.add_argument("--scale", type=float, default=1.0, help="of the images' sides, for a test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of the newer tree in inference")
    parser.add_argument("--minutes", type=float, default=15.0, help="start no row after these")
    parser.add_argument("--output", default="performance.json")
    options = parser.parse_args()
    start, results = time.monotonic(), []
    print("| model | mode, found | before | now | gain (spread) | original/ours | memory of it |")
    print("|---|---|---|---|---|---|---|")
    for mode in options.modes:
        for name in options.only:
            if time.monotonic() - start > 60 * options.minutes:
                print(f"| {name} | {mode} | not measured: out of time |")
                continue
            row = measure(str(Path(options.old).resolve()), name, mode, options)
            results.append(row)
            before, now = (statistics.median(row[key]) for key in ("before", "now"))
            low, high = row["spread"]
            memory = row["memory ours/original"]
            print(
                f"| {name} | {mode}, {row['found']} | {before:.2f} s | {now:.2f} s | "
                f"{row['gain']:.2f} ({low:.2f}-{high:.2f}) | {row['original/ours']:.2f} | "
                f"{memory and round(memory, 2)} |",
                flush=True,
            )
            Path(options.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], float(sys.argv[5]), sys.argv[6])
    else:
        main()
