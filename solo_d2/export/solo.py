"""SOLO, Decoupled SOLO and SOLOv2 as graphs."""

from typing import Any

import torch
from torch import Tensor

from solo_d2.errors import UserError
from solo_d2.layers.nms import matrix_nms
from solo_d2.modeling.solo import SOLO, DecoupledSOLO, SOLOv2
from solo_d2.modeling.solo.base import GridOutputs, SOLOFamily
from solo_d2.modeling.solo.inference import score_masks

from .graph import MAX_CANDIDATES, Graph, best_first


class SOLOGraph(Graph):
    """Eager and graph agree while at most K (cell, class) pairs exceed the score threshold."""

    output_names = ("scores", "classes", "masks", "valid")
    architecture = "SOLO"
    model: SOLOFamily

    def __init__(self, model: SOLOFamily):
        """
        Raises:
            UserError: the model has a part that cannot be exported.
        """
        detector = model.detector
        if detector.nms_type != "matrix":
            raise UserError(
                f"MODEL.SOLO.NMS_TYPE {detector.nms_type!r} cannot be exported: greedy mask NMS "
                "has no fixed number of rounds; set it to 'matrix'"
            )
        if model.head.category_align == "adaptive_pool":
            raise UserError(
                "MODEL.SOLO.CATEGORY_ALIGN 'adaptive_pool' cannot be exported: ONNX has no such "
                "operator"
            )
        super().__init__(model)
        cells = model.level_offsets[-1]
        limit = detector.max_candidates or max(MAX_CANDIDATES, detector.topk_candidates)
        self.candidates = min(limit, cells * model.num_classes)
        counts = torch.tensor([grid**2 for grid in model.num_grids])
        level = torch.arange(len(counts)).repeat_interleave(counts)
        self.register_buffer("level_of_cell", level, persistent=False)
        strides = torch.tensor(model.strides, dtype=torch.float32)
        self.register_buffer("stride_of_cell", strides[level], persistent=False)

    def options(self) -> dict[str, Any]:
        return {"mask_threshold": self.model.mask_threshold, "candidates": self.candidates}

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Returns:
            scores (D,), classes (D,), soft masks (D, h, w), valid (D,) bool.
        """
        model, detector = self.model, self.model.detector
        outputs = model.dense(self.normalized(image))
        pair_scores, pairs = best_pairs(
            model.category_scores(outputs.category_logits)[0], self.candidates
        )
        cells, classes = pairs // model.num_classes, pairs % model.num_classes
        stride = min(model.mask_strides)
        masks = self.soft_masks(
            outputs, cells, (image.shape[-2] // stride, image.shape[-1] // stride)
        )
        area, maskness = score_masks(masks, model.mask_threshold)
        valid = (pair_scores > detector.score_threshold) & (area > self.stride_of_cell[cells])
        scores = pair_scores * maskness

        order = best_first(scores, valid, min(detector.topk_candidates, self.candidates))
        scores, classes, valid = scores[order] * valid[order], classes[order], valid[order]
        scores = matrix_nms(
            (masks > model.mask_threshold)[order] & valid[:, None, None],
            classes,
            scores,
            kernel=detector.nms_kernel,
            sigma=detector.nms_sigma,
            finite=detector.nms_finite,
        )
        valid = valid & (scores >= detector.update_threshold)
        best = best_first(scores, valid, min(detector.max_detections, len(order)))
        return scores[best], classes[best], masks[order[best]], valid[best]

    def soft_masks(self, outputs: GridOutputs, cells: Tensor, size: tuple[int, int]) -> Tensor:
        """(K, *size) of cells of all levels: of each level for all cells, then the right ones."""
        level_of = self.level_of_cell[cells]
        masks = self.model.pixel_mean.new_zeros(())
        for level, start in enumerate(self.model.level_offsets[:-1]):
            last = self.model.num_grids[level] ** 2 - 1
            channels = (cells - start).clamp(0, last)
            chosen = self.model.channel_masks(outputs, 0, level, channels, size)
            masks = torch.where((level_of == level)[:, None, None], chosen, masks)
        return masks


class SOLOv2Graph(SOLOGraph):
    """All levels share the mask feature, so that one product makes all masks."""

    model: SOLOv2

    def soft_masks(self, outputs: Any, cells: Tensor, size: tuple[int, int]) -> Tensor:
        kernels = torch.cat([kernel[0].flatten(1) for kernel in outputs.kernels], dim=1)
        return self.model.kernel_masks(outputs.mask_features[0], kernels[:, cells].T, size)


class DecoupledSOLOGraph(SOLOGraph):
    """Makes the maps of all lines: they are fewer than candidates."""

    model: DecoupledSOLO

    def __init__(self, model: DecoupledSOLO):
        super().__init__(model)
        columns, rows, lines = [], [], 0
        for grid in model.num_grids:
            cells = torch.arange(grid**2)
            columns.append(lines + cells % grid)
            rows.append(lines + cells // grid)
            lines += grid
        self.register_buffer("column_of_cell", torch.cat(columns), persistent=False)
        self.register_buffer("row_of_cell", torch.cat(rows), persistent=False)

    def soft_masks(self, outputs: Any, cells: Tensor, size: tuple[int, int]) -> Tensor:
        lines = [torch.arange(grid, device=cells.device) for grid in self.model.num_grids]
        maps = [
            self.model.line_maps(outputs, 0, level, line, line, size)
            for level, line in enumerate(lines)
        ]
        x, y = (torch.cat(axis) for axis in zip(*maps))
        return x[self.column_of_cell[cells]] * y[self.row_of_cell[cells]]


def best_pairs(scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Scores and flat indices of the best entries, in the order of the indices, as eager's.

    Args:
        scores: (cells of all levels, C).
        limit: at most as many as there are.
    """
    flat = scores.flatten()
    pairs = flat.topk(limit).indices.sort().values
    return flat[pairs], pairs


SOLO_GRAPHS: dict[type, type[SOLOGraph]] = {
    SOLO: SOLOGraph,
    SOLOv2: SOLOv2Graph,
    DecoupledSOLO: DecoupledSOLOGraph,
}
