"""`unidiff train`: python training/pretrain.py CONFIG [key=value ...]"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("train", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
