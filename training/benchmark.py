"""`unidiff benchmark`: python training/benchmark.py [smoke | CONFIG] [--json FILE] [key=value ...]"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("benchmark", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
