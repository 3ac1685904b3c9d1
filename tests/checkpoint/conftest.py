"""Fixtures for the conversion tests."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def key_table(reference_dir) -> Callable[[str], dict[str, torch.Tensor]]:
    """Table name -> its tensors, filled with different numbers, without memory for values."""

    def read(table: str) -> dict[str, torch.Tensor]:
        text = (reference_dir / "keys" / f"{table}.keys.tsv").read_text()
        rows = [line.split("\t") for line in text.splitlines() if line and line[0] != "#"]
        return {
            name: torch.tensor(float(i)).expand(
                [] if shape == "-" else [int(size) for size in shape.split("x")]
            )
            for i, (name, shape, *_) in enumerate(rows[1:])
        }

    return read
