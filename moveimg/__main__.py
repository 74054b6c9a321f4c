"""`python -m moveimg` is the `moveimg` command."""

from moveimg.cli import main

if __name__ == "__main__":
    main()
