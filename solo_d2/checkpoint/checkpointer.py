"""Detectron2's checkpointer, made safe against kills, wrong files and files with code."""

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write

from .load import adapt_to_model, load_weights_file

# An ImageNet file has a classifier that no detector uses: a few tensors. When more are left over,
# while the model lacks others, the file belongs to another architecture.
_MAX_UNUSED = 8
_ON_REQUEST = "set MODEL.WEIGHTS_SKIP_MISMATCHED True to start from what fits"


class Checkpointer(DetectionCheckpointer):
    """Saves whole files only, loads without running code, and refuses what does not fit.

    A checkpoint has under "solo_d2" the name of the architecture and of the classes.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        thing_classes: Sequence[str] | None = None,
        skip_mismatched: bool = False,
        allow_pickle: bool = False,
        tag_last: bool = True,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            model: may be wrapped for distributed training.
            save_dir: of the checkpoints; "" saves none.
            thing_classes: names of the classes that the model is for; None: not known.
            skip_mismatched: load what fits of any file, with warnings about the rest.
            allow_pickle: also load files that may run code.
            tag_last: a saved file is the one that "resume" takes.
            save_to_disk: by default in the main process only.
            checkpointables: see Detectron2.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.thing_classes = None if thing_classes is None else list(thing_classes)
        self.skip_mismatched = skip_mismatched
        self.allow_pickle = allow_pickle
        self.tag_last = tag_last
        self._path = ""  # the file being loaded, for messages

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``: model, checkpointables and ``kwargs``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            "solo_d2": {"architecture": self.architecture, "thing_classes": self.thing_classes},
            **{key: value.state_dict() for key, value in self.checkpointables.items()},
            **kwargs,
        }
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with atomic_write(path) as file:
            torch.save(data, file)
        if self.tag_last:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or URL; see Detectron2.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be read, is for another architecture or for other classes; the
                message is one line that names the file.
        """
        self._path = path
        try:
            return super().load(self._fetch(path), *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it after an error

    def _fetch(self, path: str) -> str:
        """The path with a local file behind it; "" stays."""
        if not path:
            return path
        name = urlparse(path)._replace(query="").geturl()
        try:
            local = self.path_manager.get_local_path(name)
        except OSError as error:  # downloading
            raise UserError(f"weights {path}: {one_line(error)}") from error
        if not os.path.isfile(local):
            raise FileNotFoundError(f"weights {path}: there is no such file")
        return path

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            checkpoint = load_weights_file(filename, allow_pickle=self.allow_pickle)
        else:
            checkpoint = super()._load_file(filename)
        if not checkpoint.get("matching_heuristics", False):
            checkpoint["model"] = adapt_to_model(checkpoint["model"], self.model.state_dict())
        return checkpoint

    def _torch_load(self, f: str) -> dict[str, Any]:
        return load_weights_file(f, allow_pickle=self.allow_pickle)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        saved_with = checkpoint.get("solo_d2") or {}
        names = saved_with.get("thing_classes")
        if not self.skip_mismatched:
            self._check_metadata(saved_with.get("architecture"), names)
        if names and self.thing_classes and len(names) == len(self.thing_classes):
            if names != self.thing_classes:
                self.logger.warning(
                    f"{self._path} was trained for the classes {names}; here they are "
                    f"{self.thing_classes}"
                )
        total = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if not self.skip_mismatched:
            self._check_shapes(incompatible.incorrect_shapes)
            self._check_keys(incompatible, total)
        return incompatible

    def _check_metadata(self, architecture: str | None, names: Sequence[str] | None) -> None:
        if architecture not in (None, self.architecture):
            raise UserError(
                f"weights {self._path} are of architecture {architecture}, the model is "
                f"{self.architecture}; {_ON_REQUEST}"
            )
        if names and self.thing_classes and len(names) != len(self.thing_classes):
            raise UserError(
                f"weights {self._path} are for {len(names)} classes, the model has "
                f"{len(self.thing_classes)}; {_ON_REQUEST}"
            )

    def _check_shapes(self, shapes: Sequence[tuple[str, tuple, tuple]]) -> None:
        """``shapes``: (name, shape in the file, shape in the model) of what does not fit."""
        if not shapes:
            return
        # The outputs for the classes are the smallest of what depends on their number.
        name, in_file, in_model = min(shapes, key=lambda x: sum(x[2]))
        found = self._classes_in(in_file, in_model)
        if found is not None:
            what = f"are for {found} classes, the model has {len(self.thing_classes or [])}"
        else:
            what = f"do not fit the model in {len(shapes)} tensors"
        raise UserError(
            f"weights {self._path} {what} ({name}: {in_file} in the file, {in_model} in the "
            f"model); {_ON_REQUEST}"
        )

    def _classes_in(self, in_file: tuple, in_model: tuple) -> int | None:
        """The number of classes that the file's tensor was made for, if that explains its shape."""
        classes = len(self.thing_classes or [])
        if not classes or not in_file or in_file[1:] != in_model[1:]:
            return None
        if in_model[0] == classes + 1:  # a last output for the background
            return in_file[0] - 1
        per_class, rest = divmod(in_model[0], classes)  # several where there are anchors or boxes
        if rest or in_file[0] % per_class:
            return None
        return in_file[0] // per_class

    def _check_keys(self, incompatible: Any, total: int) -> None:
        parameters = dict(self.model.named_parameters())
        missing = [key for key in incompatible.missing_keys if key in parameters]
        unused = [k for k in incompatible.unexpected_keys if not k.endswith("num_batches_tracked")]
        if missing and (len(unused) > _MAX_UNUSED or len(unused) >= total):
            raise UserError(
                f"weights {self._path} are not of architecture {self.architecture}: "
                f"{len(missing)} of its parameters are missing (first {missing[0]}), and "
                f"{len(unused)} of the file's tensors have no place (first {unused[0]}); "
                + _ON_REQUEST
            )
