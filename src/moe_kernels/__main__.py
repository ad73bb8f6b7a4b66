"""`python -m moe_kernels` is the `moe-kernels` command."""

from moe_kernels.cli.app import main

if __name__ == "__main__":
    main()
