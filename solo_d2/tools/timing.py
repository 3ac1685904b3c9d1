"""Instruments of ``benchmark``: stages, memory, operators, and inputs to run on."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances
from torch import nn
from torch.profiler import ProfilerActivity, profile

from solo_d2.modeling import AdaptIS, InstanceSegmentor

_PRODUCTS = ("convolution", "conv2d", "::mm", "::bmm", "::addmm", "::baddbmm", "gemm")
# Modules that also select, so that their time is not all the network's.
_SELECTING = ("", "proposal_generator", "roi_heads")


class StageClock:
    """Attributes the time of an inference to stages: to the innermost one at any moment."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.seconds = dict.fromkeys(("preprocess", "network", "selection", "output"), 0.0)
        self._stack: list[str] = []
        self._mark = 0.0

    def run(self, inputs: list[dict]) -> None:
        """Time one inference."""
        model = self.model
        one_by_one = isinstance(model, AdaptIS)  # so does its forward
        with self.attached():
            for batch in [[x] for x in inputs] if one_by_one else [inputs]:
                self.enter("preprocess")
                if isinstance(model, InstanceSegmentor):
                    images = model.preprocess_image(batch)
                    results = model.inference(images, model.backbone(images.tensor))
                    self.proceed("output")
                    model.postprocess_batch(results, batch, images)
                else:
                    model(batch)
                self.leave()

    def enter(self, stage: str) -> None:
        if self._stack[-1:] != [stage]:  # else nothing ends, and waiting would cost time
            self._note()
        self._stack.append(stage)

    def leave(self) -> None:
        if self._stack[-2:-1] != self._stack[-1:]:
            self._note()
        self._stack.pop()

    def proceed(self, stage: str) -> None:
        """``leave`` one and ``enter`` another."""
        self._note()
        self._stack[-1:] = [stage]

    def _enter_module(self) -> None:
        if self._stack == ["preprocess"]:  # this is the backbone
            self.proceed("selection")
        self.enter("network")

    def _note(self) -> None:
        wait(self.device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, modules of the model report to the clock."""
        hooks = []
        for name, module in self.model.named_modules():
            if name not in _SELECTING:
                hooks.append(module.register_forward_pre_hook(lambda *_: self._enter_module()))
                hooks.append(module.register_forward_hook(lambda *_: self.leave()))
            elif name == "roi_heads":  # Detectron2's R-CNNs have nothing but the output after them
                hooks.append(module.register_forward_hook(lambda *_: self.proceed("output")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def differences(expected: Instances, found: Instances) -> dict[str, Any]:
    """Of two results of one image: their counts, and the largest differences of the first ones."""
    n = min(len(expected), len(found))
    result: dict[str, Any] = {"found": f"{len(found)} of {len(expected)}"}
    apart = (expected.scores[:n] - found.scores[:n]).abs()
    result["score difference"] = apart.max().item() if n else 0
    if n and found.has("pred_masks"):
        flipped = expected.pred_masks[:n] ^ found.pred_masks[:n]
        result["mask difference"] = flipped.float().mean().item()
    return result


def random_input(height: int, width: int, instances: int, num_classes: int) -> dict[str, Any]:
    """A noise image with square instances, 16 pixels to half of the shorter side wide."""
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


def profile_operators(run: Callable[[], object], device: torch.device, rows: int) -> None:
    """Print where the time of a run goes, according to PyTorch's profiler."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        wait(device)
    events = profiler.key_averages()

    def own_time(event: Any) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    total = sum(own_time(event) for event in events)
    products = sum(own_time(e) for e in events if any(p in e.key for p in _PRODUCTS))
    print(f"  {products / total:6.1%} convolutions and matrix products")
    for event in events:
        if event.key.startswith("solo_d2."):
            inside = event.device_time_total if cuda else event.cpu_time_total
            print(f"  {inside / total:6.1%} {event.key}")
    for event in sorted(events, key=own_time, reverse=True)[:rows]:
        print(f"  {own_time(event) / total:6.1%} {own_time(event) / 1e3:9.1f} ms  {event.key}")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device, results: list[int]) -> Iterator[None]:
    """Append how many more bytes were in use within the block, where the system tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield
        results.append(torch.cuda.max_memory_allocated(device) - start)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, so that all is counted
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        start = process_memory("VmRSS")
    except (OSError, AttributeError):
        yield
        return
    yield
    results.append(process_memory("VmHWM") - start)


def process_memory(key: str) -> int:
    """Bytes of this process, on Linux: "VmRSS" now, "VmHWM" at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
