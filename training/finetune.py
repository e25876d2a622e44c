"""`unidiff finetune`: python training/finetune.py MODEL [CONFIG] data.train=TOKENS output=FOLDER [key=value ...]"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("finetune", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
