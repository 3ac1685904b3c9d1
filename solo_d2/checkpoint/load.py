"""Reading checkpoints without running code from them, and adapting their names to a model."""

import logging
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from solo_d2.errors import UnsafeFileError, UserError, one_line

from .rename_rules import find_new_name, is_dropped, join, recognize

_MULTIARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
# The pickled arrays of Detectron2's model zoo consist of these; none of them runs foreign code.
_PLAIN_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((module, name) for module in _MULTIARRAYS for name in ("_reconstruct", "scalar")),
}
# The first bytes of files of torch.save, now and before PyTorch 1.6. Other files are plain pickles.
_TORCH_STARTS = (
    b"PK\x03\x04",
    *(pickle.dumps(0x1950A86A20F9469CFC6C, protocol) for protocol in range(2, 6)),
)


def load_weights_file(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running code from it.

    Args:
        path: a PyTorch file, or a pickle of Detectron2's or Detectron1's model zoo, with any
            suffix; also a name that Detectron2's path manager knows.
        allow_pickle: load any content, which may run code from the file.

    Returns:
        The file's dict with the flat state dict under "model", whether the file had it there, under
        "state_dict" (then without the file's other entries), or bare. A prefix "module." of all
        names is removed.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds more than weights, is damaged, or is not a checkpoint; the message is
            one line and names the file.
    """
    try:
        local = Path(PathManager.get_local_path(str(path)))
    except OSError as error:  # downloading
        raise UserError(f"weights {path}: {one_line(error)}") from error
    if not local.is_file():
        raise FileNotFoundError(f"weights {path}: there is no such file")
    try:
        content = _read(local, allow_pickle)
    except _NeedsCode as error:
        raise UnsafeFileError(
            f"weights {path}: loading it may run code from it ({error})"
        ) from None
    except OSError:
        raise
    except Exception as error:  # torch.load and pickle raise nearly everything on damaged files
        raise UserError(
            f"weights {path}: not a checkpoint, or a damaged one ({type(error).__name__})"
        ) from error
    checkpoint = _with_state_dict(content, path)
    _check_metadata(checkpoint, path)
    return checkpoint


def adapt_to_model(state_dict: Mapping[str, Any], model_keys: Iterable[str]) -> dict[str, Any]:
    """Rename the tensors of another project's file to a model's names.

    Recognized layouts are torchvision's ResNet and MobileNetV2 (for the bottom-up backbone,
    wherever the model has it) and the published checkpoints of ``sources.SOURCES``. The tensors of
    any other file, or of a file for another architecture, are returned as they are.

    Args:
        state_dict: name -> tensor.
        model_keys: all names of the model's state dict.

    Returns:
        A new dict. Tensors that the layout's table drops, such as a classifier, are omitted and
        logged once. Unknown names are kept, so that the checkpointer reports them.
    """
    keys = set(model_keys)
    source = recognize(state_dict)
    if source is None or keys.issuperset(state_dict):
        return dict(state_dict)
    state_dict = join(state_dict, source)
    renamed = {name: find_new_name(name, source.rules) for name in state_dict}
    prefix = _prefix_in(keys, filter(None, renamed.values()))
    if prefix is None:
        return dict(state_dict)
    adapted, unused = {}, []
    for name, tensor in state_dict.items():
        new_name = renamed[name]
        target = name if new_name is None else prefix + new_name
        if target in keys or not is_dropped(name, source):
            adapted[target] = tensor
        elif not name.endswith(".num_batches_tracked"):
            unused.append(name)
    logging.getLogger(__name__).info(
        f"Weights in the layout {source.name}, not used: {', '.join(unused) or 'none'}"
    )
    return adapted


class _NeedsCode(Exception):
    """The file refers to something other than plain weights; the message names it."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads numpy arrays and builtin containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN_GLOBALS:
            raise _NeedsCode(f"{module}.{name}")
        return super().find_class(module, name)


def _read(path: Path, allow_pickle: bool) -> Any:
    with open(path, "rb") as file:
        is_torch = file.read(64).startswith(_TORCH_STARTS)
        file.seek(0)
        if not is_torch:
            unpickler = pickle.Unpickler if allow_pickle else _PlainUnpickler
            return _from_model_zoo(unpickler(file, encoding="latin1").load())  # Python 2 wrote many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files that cause warnings are refused below
            content = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        if allow_pickle or unknown is None:
            raise
        raise _NeedsCode(unknown[1]) from None
    if isinstance(content, dict) and "model_state" in content:  # pycls
        return {
            "model": content["model_state"],
            "__author__": "pycls",
            "matching_heuristics": True,
        }
    return content


def _from_model_zoo(content: Any) -> Any:
    """A pickle of Detectron2 or of Caffe2 (Detectron1), as Detectron2 reads it."""
    if not isinstance(content, dict) or "model" in content:
        return content
    blobs = content.get("blobs", content)
    weights = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _with_state_dict(content: Any, path: str | Path) -> dict[str, Any]:
    checkpoint = content
    if isinstance(content, dict) and not _is_state_dict(content):
        if "model" not in content and "state_dict" in content:
            checkpoint = {"model": content["state_dict"]}
    else:
        checkpoint = {"model": content}
    weights = checkpoint.get("model")
    if not _is_state_dict(weights):
        raise UserError(f"weights {path}: holds no tensors by name, so it is not a checkpoint")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    tensors = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor):
            raise UserError(f"weights {path}: {name} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"weights {path}: {name} is sparse, quantized or complex")
        tensors[name] = value
    return {**checkpoint, "model": tensors}


def _check_metadata(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse entries of wrong types among those that our checkpointer adds to the tensors."""
    entries: list[tuple[str, Any, type]] = [("iteration", checkpoint.get("iteration"), int)]
    saved = checkpoint.get("solo_d2") or {}
    if isinstance(saved, dict):
        entries += [(key, saved.get(key), str) for key in ("architecture", "format")]
        classes = saved.get("thing_classes") or []
        entries.append(("thing_classes", classes, list))
        entries += [("class name", name, str) for name in classes if isinstance(classes, list)]
    else:
        entries.append(("solo_d2", saved, dict))
    for key, value, expected in entries:
        if value is not None and not isinstance(value, expected):
            kind = type(value).__name__
            raise UserError(f"weights {path}: its {key} is of type {kind}, not {expected.__name__}")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict | OrderedDict)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(item, Tensor | np.ndarray) for item in value.values())
    )


def _prefix_in(keys: set[str], names: Iterable[str]) -> str | None:
    """The shortest prefix that makes one of ``names`` one of ``keys``; None if there is none."""
    for name in names:
        prefixes = [key.removesuffix(name) for key in keys if f".{key}".endswith(f".{name}")]
        if prefixes:
            return min(prefixes, key=len)
    return None
