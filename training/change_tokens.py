"""`unidiff change-tokens`: python training/change_tokens.py image | text ..."""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("change-tokens", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
