"""The check of :mod:`moe_kernels.trial`: ``python -m moe_kernels.tools.check.trial [GPU]`` judges the Hopper kernels.

Output and every gradient against float64, on uneven routings, with dropped slots, with experts without rows, in every
schedule, twice to the bit, with poisoned memory. Exit code 0 if all is right; else the reason is the last line.
"""

from __future__ import annotations

import sys

import torch

from moe_kernels.kernels.hopper import gluon_names
from moe_kernels.tools.check.problems import Case
from moe_kernels.tools.check.verification import verify_case
from moe_kernels.trial import OUT_OF_MEMORY

ROUTINGS = ("zipf", "sentinels", "empty_first_middle_last")
CASES = (
    Case(700, 4, 9, 512, 192, torch.bfloat16),
    Case(300, 2, 5, 448, 704, torch.float16),
)


def main() -> int:
    """Judge the kernels on the GPU whose number is the first argument."""
    device = torch.device("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    torch.cuda.set_device(device)
    gluon_names.TRIED = (*gluon_names.TRIED, gluon_names.release())  # this is the check
    failures = []
    try:
        for case in CASES:
            for verdict in verify_case(
                case, str(case), device=device, routings=ROUTINGS, configurations=((128, True),), backend="gluon"
            ):
                failures += verdict.failures
    except torch.OutOfMemoryError as error:
        print(f"too little free memory on the GPU: {str(error).splitlines()[0]}", file=sys.stderr)
        return OUT_OF_MEMORY
    for failure in reversed(failures):
        print(failure, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
