"""`unidiff reward`: python training/reward_tuning.py MODEL OUTPUT --prompts FILE --reward MODULE:FUNCTION"""

import sys

from unidiff.cli import recipe


def main(arguments: list[str]) -> int:
    return recipe("reward", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
