"""`unidiff encode`: python tokenizers/encode_shards.py OUT --shards TARS --image-tokenizer DIR --text-tokenizer DIR"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("encode", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
