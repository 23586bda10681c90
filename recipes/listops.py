"""
ListOps of the Long Range Arena, generated here or from its files.

    accelerate launch recipes/listops.py --config recipes/configs/listops.yaml [--scale small] [--method full ...]
"""

from experiments.command_line import run_recipe

if __name__ == "__main__":
    run_recipe(__doc__, "listops.yaml")
