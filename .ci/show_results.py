"""Print the results of a finished run and where its files are: show_results.py OUTPUT_DIR."""

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    # With several test sets there is one level more: {data set: {task: {metric: value}}}.
    for task, metrics in results.items():
        if all(isinstance(value, (int, float)) for value in metrics.values()):
            print(f"{task}: " + "  ".join(f"{k} {v:.1f}" for k, v in metrics.items()))
    pictures = sorted(folder.glob("vis/*/*.png"))  # one folder per evaluation; the last is final
    for title, path in [
        ("results", folder / "results.json"),
        ("metrics", folder / "metrics.json"),
        ("weights", folder / "model_final.pth"),
        *(("pictures", path) for path in pictures[-1:]),
    ]:
        print(f"{title + ':':<10}{path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
