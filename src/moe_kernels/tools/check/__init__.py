"""What judges the kernels, for `moe-kernels verify` and the trial: truth, tolerances, problems and routings."""
