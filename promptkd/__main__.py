"""Run `promptkd` under a launcher: torchrun --nproc_per_node 8 -m promptkd train ..."""

from promptkd.cli import main

if __name__ == "__main__":
    main()
