"""What the trainer's process prints for the one that watches it; each line ends with what is found.

Nothing is imported here: one side must not pay for the other's imports.
"""

EXPERTS_LINE = "moe-kernels compare: the experts run on "
WEIGHTS_LINE = "moe-kernels compare: the training starts from weights "
FROZEN_LINE = "moe-kernels compare: the frozen experts take (bytes) "
KEYS_LINE = "moe-kernels compare: keys that Axolotl does not know: "
