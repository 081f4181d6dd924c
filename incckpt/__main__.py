"""`python -m incckpt` is the command `incckpt`."""

from incckpt.cli import main

if __name__ == "__main__":
    main()
