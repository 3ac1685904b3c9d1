"""Installed versions, and one command that installs what is missing: ``solo-d2 env``.

Only the standard library is imported at the top, so that this runs where nothing else does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shlex
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Requirement(NamedTuple):
    """A Python package that solo_d2 imports, itself or through Detectron2."""

    module: str
    distribution: str
    minimum: str = "0"
    purpose: str = ""  # of an optional package

    @property
    def title(self) -> str:
        return "Detectron2" if self.module == "detectron2" else self.distribution


MINIMUM_PYTHON = (3, 10)

# Detectron2 comes last, so that a missing package that it imports is named first.
REQUIREMENTS = (
    Requirement("torch", "torch", "2.4"),
    Requirement("torchvision", "torchvision", "0.19"),
    Requirement("numpy", "numpy", "1.23"),
    Requirement("PIL", "pillow", "9.4"),
    Requirement("cv2", "opencv-python-headless", "4.6"),
    Requirement("pycocotools", "pycocotools", "2.0.7"),
    Requirement("fvcore", "fvcore", "0.1.5"),
    Requirement("iopath", "iopath", "0.1.8"),
    Requirement("omegaconf", "omegaconf", "2.1"),
    Requirement("hydra", "hydra-core", "1.1"),
    Requirement("yacs", "yacs", "0.1.8"),
    Requirement("termcolor", "termcolor", "1.1"),
    Requirement("tabulate", "tabulate"),
    Requirement("cloudpickle", "cloudpickle"),
    Requirement("tqdm", "tqdm", "4.29"),
    Requirement("matplotlib", "matplotlib"),
    Requirement("tensorboard", "tensorboard"),
    Requirement("detectron2", "detectron2", "0.6"),
    Requirement("shapely", "shapely", "2.0", purpose="INPUT.CROP on polygons"),
    Requirement("torchmetrics", "torchmetrics", "1.4", purpose="panoptic quality"),
    Requirement("faster_coco_eval", "faster-coco-eval", "1.8", purpose="faster evaluation"),
    Requirement("av", "av", "12.0", purpose="writing videos"),
    Requirement("altair", "altair", "5.4", purpose="charts of compare"),
    Requirement("vl_convert", "vl-convert-python", "1.6", purpose="charts of compare"),
)


def missing_requirement() -> str:
    """One line with the missing packages and the command that installs them; "" if none is missing.

    Detectron2 and the packages that it needs are searched for but not imported.
    """
    names = ("torch", "torchvision", "detectron2")
    missing = [r for r in REQUIREMENTS if r.module in names and _find_spec(r.module) is None]
    if not missing:
        return ""
    titles = " and ".join(requirement.title for requirement in missing)
    verb = "is" if len(missing) == 1 else "are"
    return f"solo_d2 needs {titles}, which {verb} not installed. Run: {_command(missing)}"


def report() -> tuple[list[str], list[str]]:
    """Inspect everything that solo_d2 imports.

    Returns:
        lines: the installed versions, in "name  value" form.
        problems: one line for each required package that is missing, too old or broken, and at the
            end the command that installs all of them.
    """
    rows = [("Python", f"{platform.python_version()} ({sys.executable})")]
    rows.append(("platform", platform.platform()))
    problems, wanted = [], []
    if sys.version_info < MINIMUM_PYTHON:
        least = ".".join(map(str, MINIMUM_PYTHON))
        problems.append(f"solo_d2 needs Python {least}, this is {platform.python_version()}")
    for requirement in REQUIREMENTS:
        state, complaint = _inspect(requirement)
        if complaint and not requirement.purpose:
            problems.append(f"solo_d2 needs {requirement.title}, which {complaint}")
            wanted.append(requirement)
        elif complaint:
            state = f"{state} (optional, for {requirement.purpose})"
        rows.append((requirement.distribution, state))
    rows.append(("detectron2._C", _compiled_part()))
    rows.append(("CUDA", _cuda()))
    width = max(len(name) for name, _ in rows) + 2
    if wanted:
        problems.append(f"Run: {_command(wanted)}")
    return [f"{name:<{width}}{value}" for name, value in rows], problems


def main() -> int:
    """Print the report; return 1 if something required is missing, else 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings of other packages do not matter here
        lines, problems = report()
    print("\n".join([*lines, *problems]))
    if not problems:
        print("Everything that solo_d2 needs is installed.")
    return 1 if problems else 0


def _find_spec(module: str) -> object:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # a stub in sys.modules without a __spec__
        return None


def _inspect(requirement: Requirement) -> tuple[str, str]:
    """(version to print, problem or ""). Imports the module, which may be broken."""
    if _find_spec(requirement.module) is None:
        return "not installed", "is not installed"
    try:
        module = importlib.import_module(requirement.module)
        place = ""
        if requirement.module == "detectron2":
            place = f" ({Path(str(module.__file__)).parent})"
            # Releases of 2021 can be imported, but fail here with current Pillow or NumPy versions.
            importlib.import_module("detectron2.data.transforms")
            modeling = importlib.import_module("detectron2.modeling")
            if not hasattr(modeling.Backbone, "padding_constraints"):
                return module.__version__, "is from before mid-2022 and too old"
    except Exception as error:  # a broken installation can raise anything
        first_line = (str(error).splitlines() or [""])[0]
        return "broken", f"cannot be imported ({type(error).__name__}: {first_line})"
    version = str(getattr(module, "__version__", "") or "")
    if not version:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(requirement.distribution)
    if version and _numbers(version) < _numbers(requirement.minimum):
        return version + place, f"{version} is too old; it needs {requirement.minimum} or newer"
    return (version or "version unknown") + place, ""


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(x) for x in match.group().split(".")) if match else ()


def _command(requirements: Sequence[Requirement]) -> str:
    """One command line that installs all of them; Detectron2 last, as its build needs torch."""
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    packages = [
        shlex.quote(r.distribution + ("" if r.minimum == "0" else f">={r.minimum}"))
        for r in requirements
        if r.module != "detectron2"
    ]
    commands = [f"{pip} --upgrade {' '.join(packages)}"] if packages else []
    if len(packages) < len(requirements):
        commands.append(f"{pip} {_detectron2()}")
    return " && ".join(commands)


def _detectron2() -> str:
    """Arguments of pip to install Detectron2."""
    lock = Path(__file__).resolve().parents[2] / ".ci" / "detectron2.lock"
    if lock.exists():  # a clone of solo_d2: the build that `make install` takes, hash-checked
        site = shlex.quote(sysconfig.get_path("purelib"))
        return (
            "--no-deps --require-hashes --only-binary=:all: --python-version 3.10 "
            f"--upgrade --target {site} -r {shlex.quote(str(lock))}"
        )
    return "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


def _compiled_part() -> str:
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        return "absent (solo_d2 does not need it)"
    except Exception as error:
        return f"broken ({type(error).__name__})"
    return "present"


def _cuda() -> str:
    try:
        import torch

        if not torch.cuda.is_available():
            return f"not available (PyTorch built for CUDA {torch.version.cuda or 'none'})"
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception:
        return "unknown: PyTorch cannot be imported"
    return f"{torch.version.cuda}: {', '.join(names)}"


if __name__ == "__main__":
    sys.exit(main())
