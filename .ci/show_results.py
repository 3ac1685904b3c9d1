"""Print where a finished run left its results, and the results: show_results.py OUTPUT_DIR."""

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    results = folder / "results.json"
    if results.exists():
        for task, metrics in json.loads(results.read_text()).items():
            if isinstance(metrics, dict):
                print(f"{task}: " + "  ".join(f"{k} {v:.1f}" for k, v in metrics.items()))
    print("Results:")
    for path in sorted([*folder.glob("*.json"), *folder.glob("**/*.png"), *folder.glob("*.pth")]):
        print(f"  {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
