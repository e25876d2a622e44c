"""`unidiff tokenizer text`: python tokenizers/train_text_tokenizer.py OUT --text FILE --shards TARS"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("tokenizer", "text", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
