"""Write an embedded data set for looking at: ``python -m solo_d2.data.draw rods --output DIR``."""

import argparse
from collections.abc import Sequence

from . import EMBEDDED


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write an embedded data set in COCO's format.")
    parser.add_argument("set", choices=list(EMBEDDED))
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=100, help="number of images")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of an image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train")
    args = parser.parse_args(arguments)
    drawn = EMBEDDED[args.set]
    size = tuple(args.size or drawn.image_size)
    drawn.generate(args.output, count=args.count, size=size, seed=args.seed, split=args.split)
    print(f"{args.count} images and annotations/instances_{args.split}.json in {args.output}")


if __name__ == "__main__":
    main()
