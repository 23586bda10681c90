"""
Fashion-MNIST pictures read pixel by pixel.

    accelerate launch recipes/sfashion.py --config recipes/configs/sfashion.yaml [--scale small] [--method full ...]
"""

from experiments.command_line import run_recipe

if __name__ == "__main__":
    run_recipe(__doc__, "sfashion.yaml")
