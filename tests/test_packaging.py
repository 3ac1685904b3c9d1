"""The wheel, built from a copy of the sources and used from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "train_net.py"]


def run(*words: str, folder: Path, **environment: str) -> str:
    """Standard output of a Python command; if it fails, the error shows all of its output."""
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(REPOSITORY / name, folder)
    for name in ("solo_d2", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def wheel(sources):
    pip = ["-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", "dist", ".", folder=sources)
    (path,) = (sources / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Run a Python command with the installed wheel, in a folder without sources."""
    folder = tmp_path_factory.mktemp("elsewhere")
    target = tmp_path_factory.mktemp("site-packages")
    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    run(*pip, str(wheel), folder=folder)
    return lambda *words: run(*words, folder=folder, PYTHONPATH=str(target))


def test_the_wheel_holds_configs_data_and_types(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        f"solo_d2/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("configs/**/*.*")
    }
    assert configs and configs <= packed
    data = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "solo_d2").rglob("*.*")
        if path.suffix != ".pyc"
    }
    assert "solo_d2/py.typed" in data and data <= packed
    entry_points = next(name for name in packed if name.endswith("entry_points.txt"))
    assert b"solo-d2 = solo_d2.__main__:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_configs_and_commands_work_from_another_folder(python, sources):
    script = """
import solo_d2
from solo_d2.config import load_config
name = "SOLOv2/SOLOv2_R50_3x.yaml"
print(solo_d2.__file__)
print(solo_d2.get_config_file(name))
print(load_config(name).SOLVER.MAX_ITER)
print(next(x.mask_ap for x in solo_d2.list_models() if x.config == name))
"""
    module, config, iterations, mask_ap = python("-c", script).splitlines()
    assert not module.startswith((str(REPOSITORY), str(sources)))
    assert Path(config) == Path(module).parent / "configs/SOLOv2/SOLOv2_R50_3x.yaml"
    assert (iterations, mask_ap) == ("270000", "37.6")
    assert "--config-file" in python("-m", "solo_d2", "convert", "--help")


def test_the_source_distribution_holds_the_configs(sources):
    script = (
        "import sys, setuptools.build_meta as build\n"
        "sys.stdout = sys.stderr\n"
        "build.build_sdist(sys.argv[1])\n"
    )
    run("-c", script, "dist", folder=sources)
    (path,) = (sources / "dist").glob("*.tar.gz")
    shutil.unpack_archive(path, sources / "unpacked")
    (unpacked,) = (sources / "unpacked").iterdir()
    files = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    assert {"configs/SOLOv2/SOLOv2_R50_3x.yaml", "solo_d2/model_zoo.yaml", "LICENSE"} <= files
