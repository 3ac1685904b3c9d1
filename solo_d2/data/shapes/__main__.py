"""Write a set for looking at: ``python -m solo_d2.data.shapes --output DIR --count N``."""

import argparse

from .dataset import generate_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a shapes set in COCO's format.")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=100, help="number of images")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("H", "W"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train")
    args = parser.parse_args()
    generate_shapes(
        args.output, count=args.count, size=tuple(args.size), seed=args.seed, split=args.split
    )
    print(f"{args.count} images and annotations/instances_{args.split}.json in {args.output}")


if __name__ == "__main__":
    main()
