"""Fixtures that several test files share."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[1]


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or REPOSITORY / default).resolve()


def reference_folder() -> Path:
    """Folder of the reference tables and goldens; may not exist."""
    return _folder("SOLO_D2_REFERENCE", "../shared/reference")


def data_folder() -> Path:
    """Folder of the real images; may not exist."""
    return _folder("SOLO_D2_DATA", "../shared/data")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    folder = reference_folder()
    if not folder.is_dir():
        pytest.skip(f"no reference folder {folder} (set SOLO_D2_REFERENCE)")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder} (set SOLO_D2_DATA)")
    return folder


class Golden:
    """One golden file: its arrays, its ``meta``, and packed masks unpacked."""

    def __init__(self, path: Path):
        self.name = path.stem
        self.arrays = np.load(path)
        self.meta = json.loads(str(self.arrays["meta"]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def masks(self, key: str, shape_key: str = "") -> torch.Tensor:
        shape = tuple(self.arrays[shape_key or f"{key}_shape"].tolist())
        packed = self.arrays[key]
        # all masks together, or each for itself (rows of a matrix)
        rest = shape if packed.ndim == 1 else shape[1:]
        bits = np.unpackbits(packed, axis=-1)[..., : int(np.prod(rest))]
        return torch.from_numpy(bits.reshape(shape).astype(bool))


@pytest.fixture(scope="session")
def load_golden(reference_dir):
    def load(name: str) -> Golden:
        path = reference_dir / "goldens" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"no golden {path}")
        return Golden(path)

    return load


@pytest.fixture(scope="session")
def stand_in_weights(reference_dir):
    """Stand-in weights of a published checkpoint: (table name, seed) -> its state dict."""
    path = reference_dir / "synthetic_checkpoint.py"
    spec = importlib.util.spec_from_file_location("synthetic_checkpoint", path)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)

    def make(table: str, seed: int = 0) -> dict[str, torch.Tensor]:
        arrays = generator.state_dict(reference_dir / "keys" / f"{table}.keys.tsv", seed)
        return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}

    return make


class LargestFloat(TorchDispatchMode):
    """Records the size in bytes of the largest floating-point tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.fixture
def largest_float() -> type[LargestFloat]:
    return LargestFloat
