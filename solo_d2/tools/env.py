"""What solo_d2 runs on, and the command that mends what is missing: ``python -m solo_d2 env``.

Only the standard library is imported at the top, so that this runs where nothing else does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shlex
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple


class Requirement(NamedTuple):
    """A Python package that solo_d2 imports, itself or through Detectron2."""

    module: str
    distribution: str
    minimum: str = "0"
    required: bool = True


MINIMUM_PYTHON = (3, 10)

# Detectron2 comes last: where something that it imports is missing, that is named first.
REQUIREMENTS = (
    Requirement("torch", "torch", "2.4"),
    Requirement("torchvision", "torchvision", "0.19"),
    Requirement("numpy", "numpy", "1.23"),
    Requirement("PIL", "pillow", "9.4"),
    Requirement("cv2", "opencv-python-headless", "4.6"),
    Requirement("pycocotools", "pycocotools", "2.0.6"),
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
    Requirement("shapely", "shapely", "2.0", required=False),
    Requirement("torchmetrics", "torchmetrics", "1.4", required=False),
    Requirement("faster_coco_eval", "faster-coco-eval", "1.8", required=False),
)


def missing_requirement() -> str:
    """What keeps solo_d2 from being imported, in one line with the command for it; "" if nothing.

    Detectron2 and what it cannot do without are looked for, and not imported.
    """
    for name in ("torch", "torchvision", "detectron2"):
        if _find_spec(name) is None:
            return _problem(_requirement(name), "is not installed")
    return ""


def report() -> tuple[list[str], list[str]]:
    """Versions, and for each thing that is missing or too old a line with its remedy.

    Returns:
        lines: what was found, in "name  value" form.
        problems: one line for each required thing that is missing, too old or broken.
    """
    rows = [("Python", f"{platform.python_version()} ({sys.executable})")]
    rows.append(("platform", platform.platform()))
    problems = []
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        problems.append(f"Python {platform.python_version()} is too old, solo_d2 needs {wanted}.")
    for requirement in REQUIREMENTS:
        state, complaint = _inspect(requirement)
        rows.append((requirement.distribution, state))
        if complaint and requirement.required:
            problems.append(_problem(requirement, complaint))
        elif complaint:
            rows[-1] = (requirement.distribution, f"{state} (optional; {_command(requirement)})")
    rows.append(("detectron2._C", _compiled_part()))
    rows.append(("CUDA", _cuda()))
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{value}" for name, value in rows], problems


def main() -> int:
    """Print the report; return 1 if something required is missing, else 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages deprecate is no news here
        lines, problems = report()
    print("\n".join(lines))
    for problem in problems:
        print(problem)
    if not problems:
        print("Everything that solo_d2 needs is here.")
    return 1 if problems else 0


def _requirement(module: str) -> Requirement:
    return next(r for r in REQUIREMENTS if r.module == module)


def _find_spec(module: str) -> object:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # a stub in sys.modules without a __spec__
        return None


def _inspect(requirement: Requirement) -> tuple[str, str]:
    """(what to print, what is wrong or ""). Imports the module: being there is not enough."""
    if _find_spec(requirement.module) is None:
        return "not installed", "is not installed"
    try:
        module = importlib.import_module(requirement.module)
        if requirement.module == "detectron2":
            # Releases of 2021 import, but fail here with today's Pillow or NumPy.
            importlib.import_module("detectron2.data.transforms")
            modeling = importlib.import_module("detectron2.modeling")
            if not hasattr(modeling.Backbone, "padding_constraints"):
                return module.__version__, "is from before mid-2022 and too old"
    except Exception as error:  # whatever a broken installation raises
        first_line = (str(error).splitlines() or [""])[0]
        return "broken", f"cannot be imported ({type(error).__name__}: {first_line})"
    version = str(getattr(module, "__version__", "") or _distribution_version(requirement))
    place = f" ({Path(str(module.__file__)).parent})" if requirement.module == "detectron2" else ""
    if version and _numbers(version) < _numbers(requirement.minimum):
        return version + place, f"{version} is too old, {requirement.minimum} is the least"
    return (version or "version unknown") + place, ""


def _distribution_version(requirement: Requirement) -> str:
    try:
        return importlib.metadata.version(requirement.distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(x) for x in match.group().split(".")) if match else ()


def _problem(requirement: Requirement, complaint: str) -> str:
    name = "Detectron2" if requirement.module == "detectron2" else requirement.distribution
    return f"solo_d2 needs {name}, which {complaint}. Run: {_command(requirement)}"


def _command(requirement: Requirement) -> str:
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if requirement.module != "detectron2":
        minimum = "" if requirement.minimum == "0" else f">={requirement.minimum}"
        return f"{pip} --upgrade {shlex.quote(requirement.distribution + minimum)}"
    lock = Path(__file__).resolve().parents[2] / ".ci" / "detectron2.lock"
    if lock.exists():  # a clone of solo_d2: the build that `make install` takes, hash-checked
        site = shlex.quote(sysconfig.get_path("purelib"))
        return (
            f"{pip} --no-deps --require-hashes --only-binary=:all: --python-version 3.10 "
            f"--upgrade --target {site} -r {shlex.quote(str(lock))}"
        )
    source = "git+https://github.com/facebookresearch/detectron2.git"
    return f"{pip} --no-build-isolation '{source}'"


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
        return "unknown, PyTorch cannot be imported"
    return f"{torch.version.cuda}: {', '.join(names)}"


if __name__ == "__main__":
    sys.exit(main())
