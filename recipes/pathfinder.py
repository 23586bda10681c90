"""
Pathfinder of the Long Range Arena, 32 x 32 pixels read one by one.

    accelerate launch recipes/pathfinder.py --config recipes/configs/pathfinder.yaml [--scale small] [--method full ...]
"""

from experiments.command_line import run_recipe

if __name__ == "__main__":
    run_recipe(__doc__, "pathfinder.yaml")
