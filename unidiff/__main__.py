"""`python -m unidiff`: the command line."""

from unidiff.cli import main

if __name__ == "__main__":
    main()
