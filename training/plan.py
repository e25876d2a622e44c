"""`unidiff plan`: python training/plan.py CONFIG [--gpus N] [--memory GiB] [--tflops RATE] [key=value ...]"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("plan", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
