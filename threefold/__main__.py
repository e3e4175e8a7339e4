"""`python -m threefold` is the same program as `threefold`."""

from threefold.cli import main

if __name__ == "__main__":
    main()
