"""`unidiff emoji`: python training/make_emoji_shards.py shards | text | table ..."""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("emoji", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
