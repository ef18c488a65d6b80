"""`python -m optimum_dern`: the command line, for `accelerate launch`."""

from .commands.main import main


if __name__ == "__main__":
    main()
