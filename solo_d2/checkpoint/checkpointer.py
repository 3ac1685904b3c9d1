"""Detectron2's checkpointer, made safe against kills, wrong files and files that run code."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor, nn

from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write

from .fit import belongs, counted, describe_shapes, listed, nonfinite, wrong_types
from .load import adapt_to_model, load_weights_file


class Checkpointer(DetectionCheckpointer):
    """Saves atomically, loads files without running code, and refuses those of other models.

    Training starts from all tensors that fit: ImageNet weights of the backbone, or a checkpoint for
    other classes, whose class layers are skipped and named in the log. Saved files have the names
    of the architecture and of the classes under "solo_d2".
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        thing_classes: Sequence[str] | None = None,
        require_complete: bool = False,
        allow_pickle: bool = False,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            model: may be wrapped for distributed training.
            save_dir: folder of the checkpoints; "" saves none.
            thing_classes: names of the model's classes; None: unknown.
            require_complete: refuse files that lack a tensor of the model; for prediction and
                evaluation. Resuming a training run always requires all of them.
            allow_pickle: also load files that may run code.
            save_to_disk: by default only in the main process.
            checkpointables: see Detectron2's ``Checkpointer``.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.thing_classes = None if thing_classes is None else list(thing_classes)
        self.require_complete = require_complete
        self.allow_pickle = allow_pickle

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``: model, checkpointables and ``kwargs``.

        Raises:
            UserError: a weight is infinite or NaN; the file is not written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        weights = self.model.state_dict()
        if bad := nonfinite(weights):
            raise UserError(
                f"checkpoint {path} is not written: there are inf or NaN values in {listed(bad)}"
            )
        architecture = type(self.model).__name__
        data = {
            "model": weights,
            "solo_d2": {"architecture": architecture, "thing_classes": self.thing_classes},
            **{key: value.state_dict() for key, value in self.checkpointables.items()},
            **kwargs,
        }
        self.logger.info(f"Saving checkpoint to {path}")
        with atomic_write(path) as file:
            torch.save(data, file)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def get_checkpoint_file(self) -> str:
        """The last checkpoint in ``save_dir``; see Detectron2."""
        try:
            return super().get_checkpoint_file()
        except UnicodeDecodeError:
            file = os.path.join(self.save_dir, "last_checkpoint")
            raise UserError(f"{file} does not hold the name of a checkpoint") from None

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file or URL into the model; see Detectron2.

        Returns:
            The other entries of the file.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be read, belongs to another architecture, has weights that are
                infinite or NaN, or is incomplete but must be complete; the message is one line.
        """
        if not path:
            if self.require_complete:
                raise UserError("no weights were given")
            return super().load(path)
        self.logger.info(f"Loading {path}")
        file, _, query = path.partition("?")
        checkpoint = load_weights_file(file, allow_pickle=self.allow_pickle)
        weights, model = checkpoint.pop("model"), self.model.state_dict()
        if query == "matching_heuristics=True" or checkpoint.get("matching_heuristics"):
            caffe2 = checkpoint.get("__author__") == "Caffe2"
            weights = align_and_update_state_dicts(model, weights, c2_conversion=caffe2)
        else:
            weights = adapt_to_model(weights, model)
        wanted = self.checkpointables if checkpointables is None else checkpointables
        resumed = [key for key in wanted if key in checkpoint]
        complete = self.require_complete or bool(resumed)
        self._load_weights(path, weights, checkpoint.get("solo_d2") or {}, complete=complete)
        for key in resumed:
            state, own = checkpoint.pop(key), self.checkpointables[key].state_dict()
            if wrong := next(wrong_types(state, own, key), ""):
                raise UserError(f"weights {path}: its {wrong}")
            try:
                self.checkpointables[key].load_state_dict(state)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"weights {path}: its {key!r} is not from this training run ({one_line(error)})"
                ) from error
        return checkpoint

    def _load_weights(
        self, path: str, weights: Mapping[str, Tensor], saved: Mapping[str, Any], *, complete: bool
    ) -> None:
        model, kind = self.model.state_dict(), type(self.model).__name__
        shapes = {
            name: (tuple(tensor.shape), tuple(model[name].shape))
            for name, tensor in weights.items()
            if name in model and tensor.shape != model[name].shape
        }
        fitting = {name: tensor for name, tensor in weights.items() if name not in shapes}
        if bad := nonfinite(fitting):
            raise UserError(f"weights {path}: there are inf or NaN values in {listed(bad)}")
        origin = f" (saved from {saved['architecture']})" if saved.get("architecture") else ""
        if not belongs(fitting, weights, model):
            raise UserError(
                f"weights {path}{origin} are not for {kind}: hardly any tensor fits; the first in "
                f"the file is {next(iter(weights))}, the first in the model {next(iter(model))}"
            )
        missing, unused = self.model.load_state_dict(fitting, strict=False)
        parameters = {name for name, _ in self.model.named_parameters()}
        missing = [
            name
            for name in missing
            if name not in shapes and (name in parameters or ".running_" in f".{name}")
        ]
        names, ours = saved.get("thing_classes"), self.thing_classes
        differences = []
        if shapes:
            differences.append(describe_shapes(shapes, len(names or ()), len(ours or ())))
        if complete and (shapes or missing):
            differences += [f"the file lacks {listed(missing)}"] if missing else []
            raise UserError(f"weights {path}{origin} do not fit {kind}: {'; '.join(differences)}")
        unused = [name for name in unused if not name.endswith("num_batches_tracked")]
        for what, of in (("not in the file", missing), ("not in the model", unused)):
            differences += [f"{what}: {counted(of)}"] if of else []
        if differences:
            self.logger.warning(f"Weights {path} fit only in part: {'; '.join(differences)}")
        if names and ours and len(names) == len(ours) and names != ours:
            self.logger.warning(f"{path} was trained for the classes {names}; the model has {ours}")


def build_checkpointer(cfg: CfgNode, model: nn.Module, **options: Any) -> Checkpointer:
    """A checkpointer in OUTPUT_DIR that knows the classes of the config's data.

    Args:
        cfg: config of the model.
        model, options: see ``Checkpointer``.
    """
    sets = [name for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if isinstance(name, str)]
    classes = [MetadataCatalog.get(name).get("thing_classes") for name in sets]
    known = next(filter(None, classes), None)
    return Checkpointer(model, cfg.OUTPUT_DIR, thing_classes=known, **options)
