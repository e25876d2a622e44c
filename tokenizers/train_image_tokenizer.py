"""`unidiff tokenizer image`: python tokenizers/train_image_tokenizer.py CONFIG [key=value ...]"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("tokenizer", "image", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
