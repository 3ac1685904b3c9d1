"""Where the time goes: ``python -m solo_d2 benchmark --config-file FILE [--weights FILE] ...``.

Profiles one inference and one training step with torch's profiler and prints the share of
convolutions and matrix products, of target assignment, and the slowest operators. What SOLO gains
by making chosen masks only: run it with and without --full, once with --only training and once
with --only inference, and compare times, peak memory, and the results in the first lines.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config
from solo_d2.layers.resample import UpsampledConv2d

_PRODUCTS = ("convolution", "conv2d", "::mm", "::bmm", "::addmm", "::baddbmm", "gemm")


def random_input(height: int, width: int, instances: int, num_classes: int) -> dict:
    """A noise image with square instances of sizes from 16 pixels to half of the short side."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor([16.0, max(17.0, min(height, width) / 2)]).log().tolist()
    sizes = (low + (high - low) * torch.rand(instances, generator=generator)).exp().long()
    masks = torch.zeros(instances, height, width, dtype=torch.bool)
    for mask, size in zip(masks, sizes.tolist()):
        y = int(torch.randint(0, height - size, (), generator=generator))
        x = int(torch.randint(0, width - size, (), generator=generator))
        mask[y : y + size, x : x + size] = True
    target = Instances((height, width))
    target.gt_masks = BitMasks(masks)
    target.gt_boxes = target.gt_masks.get_bounding_boxes()
    target.gt_classes = torch.randint(0, num_classes, (instances,), generator=generator)
    image = torch.rand(3, height, width, generator=generator) * 255
    return {"image": image, "height": height, "width": width, "instances": target}


def measure(name: str, run: Callable[[], object], device: torch.device, rows: int) -> None:
    """Run once to warm up, once by the clock, once under the profiler; print what it found."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    seconds = timed()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        timed()
    events = profiler.key_averages()

    def own_time(event) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    total = sum(own_time(event) for event in events)
    products = sum(own_time(e) for e in events if any(p in e.key for p in _PRODUCTS))
    print(f"\n{name}: {seconds:.3f} s, of that under the profiler")
    print(f"  {products / total:6.1%} convolutions and matrix products")
    for event in events:
        if event.key.startswith("solo_d2."):
            inside = event.device_time_total if cuda else event.cpu_time_total
            print(f"  {inside / total:6.1%} {event.key}")
    for event in sorted(events, key=own_time, reverse=True)[:rows]:
        print(f"  {own_time(event) / total:6.1%} {own_time(event) / 1e3:9.1f} ms  {event.key}")


def evaluate_fully() -> None:
    """From now on, make all channels of SOLO's mask outputs and choose afterwards.

    As in the published code: after the upsampling, for all cells of a level; in inference only of
    a level that has candidates. Sigmoid and further resizing stay limited to the chosen.
    """

    def select(self: UpsampledConv2d, x: Tensor, channels: Tensor) -> Tensor:
        return self(x[None])[0].index_select(0, channels).float()

    UpsampledConv2d.select = select


def peak_memory(device: torch.device) -> str:
    """Of the process, or on a GPU of the tensors."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1024**3:.2f} GiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2:.2f} GiB"


def _num_classes(model: nn.Module) -> int:
    model = getattr(model, "roi_heads", model)  # of Detectron2's GeneralizedRCNN
    return getattr(model, "num_classes", None) or model.num_things


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", default="", help="default: MODEL.WEIGHTS is not loaded")
    parser.add_argument("--image", default="", help="instead of noise, for inference")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--instances", type=int, default=50, help="in the training image")
    parser.add_argument("--only", choices=["training", "inference"], help="default: both")
    parser.add_argument("--full", action="store_true", help="make SOLO's masks of all cells")
    parser.add_argument("--rows", type=int, default=8, help="operators to list")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    args = parser.parse_args()

    cfg = load_config(args.config_file, opts=args.opts)
    torch.manual_seed(0)
    model = build_model(cfg)
    if args.full:
        evaluate_fully()
    if args.weights:
        Checkpointer(model).load(args.weights)
    device = torch.device(cfg.MODEL.DEVICE)
    inputs = random_input(*args.size, args.instances, _num_classes(model))

    def step() -> dict[str, float]:
        model.zero_grad()
        with EventStorage():  # Detectron2's own models write to it
            losses = model([inputs])
        sum(losses.values()).backward()
        return {name: loss.item() for name, loss in losses.items()}

    test_inputs = dict(inputs)
    if args.image:
        test_inputs["image"] = _read(args.image, args.size, cfg.INPUT.FORMAT)

    @torch.no_grad()
    def infer() -> Instances:
        return model([test_inputs])[0]["instances"]

    print(f"{args.config_file}, {args.size[0]} x {args.size[1]}, {device}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    start = f"peak memory with the model built: {peak_memory(device)}"
    if args.only != "inference":
        model.train()
        losses = ", ".join(f"{name} {value:.6f}" for name, value in step().items())
        measure(f"training step, {args.instances} instances, {losses}", step, device, args.rows)
        model.zero_grad()
    if args.only != "training":
        model.eval()
        found = infer()
        what = f"{len(found)} instances found, scores add up to {found.scores.sum():.6f}"
        measure(f"inference, {what}", infer, device, args.rows)
    print(f"\n{start}\npeak memory: {peak_memory(device)}")


def _read(path: str, size: tuple[int, int], image_format: str) -> torch.Tensor:
    from detectron2.data.detection_utils import read_image
    from PIL import Image

    image = Image.fromarray(read_image(path, "RGB")).resize((size[1], size[0]))
    pixels = torch.as_tensor(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3)
    if image_format == "BGR":
        pixels = pixels.flip(-1)
    return pixels.permute(2, 0, 1).float()


if __name__ == "__main__":
    main()
