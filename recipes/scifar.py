"""
CIFAR-10 pictures read pixel by pixel, in colour (sCIFAR).

    accelerate launch recipes/scifar.py --config recipes/configs/scifar.yaml [--scale small] [--method full ...]
"""

from experiments.command_line import run_recipe

if __name__ == "__main__":
    run_recipe(__doc__, "scifar.yaml")
