"""`python -m moe_kernels` is the `moe-kernels` command."""

from moe_kernels.tools.app import main

if __name__ == "__main__":
    main()
