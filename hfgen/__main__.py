"""`python -m hfgen`: the command line where the program `hfgen` is not on the search path, as in some notebooks."""

from hfgen.cli import main


if __name__ == "__main__":
    main()
