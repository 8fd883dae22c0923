"""`python -m sdcompress`, and so `accelerate launch -m sdcompress`, is the `sdcompress` command."""

from sdcompress.commands import main

if __name__ == "__main__":
    main()
