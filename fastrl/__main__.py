"""`python -m fastrl`, also under torchrun: torchrun --nproc_per_node 2 -m fastrl grpo ..."""

import sys

from fastrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
