"""The script for GPUs runs on the CPU with tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_script_for_gpus_runs_on_the_cpu(tmp_path):
    model = "SOLOv2/SOLOv2_Light_448_R50_3x"
    words = ["--output", str(tmp_path), "--models", model]
    words += ["--size", "64", "96", "--repeat", "1", "--runs", "0"]
    done = subprocess.run(
        [sys.executable, str(DOCS / "gpu_bench.py"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("inference_1_float32_*.json")
    (row,) = json.loads(file.read_bytes())["rows"]
    assert row["size"] == "64 x 96" and row["found"] > 0
    assert "inference_1_float32" in done.stdout
