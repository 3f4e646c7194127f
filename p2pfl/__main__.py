"""``python -m p2pfl`` is the command line."""

from p2pfl.cli import main

if __name__ == "__main__":
    main()
