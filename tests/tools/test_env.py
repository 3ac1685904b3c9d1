"""The messages of env and of the import of solo_d2 if something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from solo_d2.tools import env

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_without(tmp_path):
    """Run Python with some modules blocked from import; returns the finished process."""

    def run(*arguments: str, missing: tuple[str, ...]) -> subprocess.CompletedProcess:
        # sitecustomize is imported at the start of the interpreter, before anything of ours.
        stub = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
        (tmp_path / "sitecustomize.py").write_text(stub)
        variables = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        return subprocess.run(
            [sys.executable, *arguments], env=variables, capture_output=True, text=True, cwd="/"
        )

    return run


def test_versions_are_listed_and_nothing_is_wrong_where_all_is_there(monkeypatch):
    there = (env.Requirement("numpy", "numpy", "1.0"), env.Requirement("cv2", "opencv", "1.0"))
    monkeypatch.setattr(env, "REQUIREMENTS", there)
    lines, problems = env.report()
    assert problems == []
    assert [line.split()[0] for line in lines] == [
        *("Python", "platform", "numpy", "opencv", "detectron2._C", "CUDA")
    ]
    assert lines[2].split()[1] == np.__version__


def test_one_command_installs_all_that_is_missing_or_old(monkeypatch, capsys):
    wanted = (
        env.Requirement("no_such_module", "its-package"),
        env.Requirement("numpy", "numpy", "999.0"),
        env.Requirement("cv2", "opencv", "1.0"),
        env.Requirement("no_detectron2", "detectron2"),
        env.Requirement("no_other", "other", purpose="nothing"),
    )
    monkeypatch.setattr(env, "REQUIREMENTS", wanted)
    assert env.main() == 1
    (command,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Run: ")]
    assert command.endswith("-m pip install --upgrade its-package 'numpy>=999.0' detectron2")


@pytest.mark.parametrize("missing", ["detectron2", "torch"])
def test_import_without_a_requirement_says_the_command_in_one_line(run_without, missing):
    result = run_without("-c", "from solo_d2 import add_solo_d2_config", missing=(missing,))
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    name = "Detectron2" if missing == "detectron2" else missing
    assert last_line.startswith(f"ImportError: solo_d2 needs {name}, which is not installed. Run: ")
    assert "-m pip install" in last_line


@pytest.mark.parametrize("missing", [("detectron2",), ("torch", "torchvision", "detectron2")])
def test_env_runs_where_detectron2_or_torch_is_absent(run_without, missing):
    result = run_without("-m", "solo_d2", "env", missing=missing)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    problems = [line for line in result.stdout.splitlines() if line.startswith("solo_d2 needs")]
    for name in missing:
        title = "Detectron2" if name == "detectron2" else name
        assert any(line.startswith(f"solo_d2 needs {title}, ") for line in problems)


@pytest.mark.parametrize("command", [["-m", "solo_d2", "predict"], [str(ROOT / "train_net.py")]])
def test_other_commands_name_what_is_missing_in_one_line(run_without, command):
    result = run_without(*command, "--help", missing=("detectron2",))
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: solo_d2 needs Detectron2, which is not installed. Run: ")


def test_env_and_import_give_the_same_command(run_without):
    imported = run_without("-c", "from solo_d2 import add_solo_d2_config", missing=("detectron2",))
    reported = run_without("-m", "solo_d2", "env", missing=("detectron2",))
    command = imported.stderr.strip().splitlines()[-1].split(" Run: ")[1]
    assert f"Run: {command}" in reported.stdout.splitlines()


def test_torch_and_detectron2_are_one_command(run_without):
    result = run_without("-c", "import solo_d2; solo_d2.load", missing=("torch", "detectron2"))
    line = result.stderr.strip().splitlines()[-1]
    assert "needs torch and Detectron2, which are not installed" in line
    assert line.count(" && ") == 1 and line.index("'torch>=2.4'") < line.index("detectron2.")


def test_missing_optional_package_is_no_problem(run_without):
    result = run_without("-m", "solo_d2", "env", missing=("shapely",))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr
    assert "shapely" in result.stdout and "optional" in result.stdout


def test_too_old_version_is_named_with_the_least_one(monkeypatch):
    monkeypatch.setattr(env, "REQUIREMENTS", (env.Requirement("tqdm", "tqdm", "999.0"),))
    _, (problem, command) = env.report()
    assert "is too old; it needs 999.0 or newer" in problem
    assert "tqdm>=999.0" in command


@pytest.mark.parametrize(
    ("lower", "higher"), [("2.4", "2.14.1+cu130"), ("0.19", "0.29.1"), ("0.6", "0.7.2")]
)
def test_versions_compare_as_numbers(lower, higher):
    assert env._numbers(lower) < env._numbers(higher)


def test_detectron2_outside_a_clone_comes_from_its_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "__file__", str(tmp_path / "solo_d2" / "tools" / "env.py"))
    command = env._command([env.Requirement("detectron2", "detectron2")])
    assert command.endswith("'git+https://github.com/facebookresearch/detectron2.git'")
