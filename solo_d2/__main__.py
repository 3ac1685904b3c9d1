"""The tools: ``python -m solo_d2 VERB``, or ``solo-d2 VERB`` once the package is installed."""

import importlib
import sys

from solo_d2.tools.env import missing_requirement

# verb -> what it does; each is solo_d2/tools/<verb>.py or a package of that name (_ for -)
VERBS = {
    "train": "train and evaluate a model",
    "predict": "segment images, folders and videos",
    "click-page": "annotate images on a local page: click on an object, and AdaptIS finds it",
    "check": "list every problem of a COCO json file and its images",
    "compare": "train, evaluate and time several models, and report on them",
    "report": "evaluate and time one trained model, and report on it",
    "errors": "say how many points of AP each kind of error in a results file costs",
    "click": "measure how well AdaptIS segments objects from one click each",
    "export": "write a model as ONNX or torch.export file, and compare it with the model",
    "benchmark": "time a model's parts",
    "convert": "convert a published checkpoint for solo_d2",
    "env": "print installed versions and how to install what is missing",
}


def main() -> int:
    """Run the verb given on the command line; returns its exit code."""
    usage = "usage: solo-d2 VERB ...\n\n" + "\n".join(f"  {v:<10} {h}" for v, h in VERBS.items())
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("-h", "--help"):
        print(usage)
        return 0
    if verb not in VERBS:
        problem = f"unknown verb {verb!r}" if verb else "no verb given"
        print(f"{usage}\n\nerror: {problem}", file=sys.stderr)
        return 2
    if verb != "env" and (problem := missing_requirement()):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    sys.argv = [f"solo-d2 {verb}", *sys.argv[2:]]
    return importlib.import_module(f"solo_d2.tools.{verb.replace('-', '_')}").main()


if __name__ == "__main__":
    sys.exit(main())
