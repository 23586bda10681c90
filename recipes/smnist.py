"""
MNIST digits read pixel by pixel (sMNIST).

    accelerate launch recipes/smnist.py --config recipes/configs/smnist.yaml [--scale small] [--method full ...]
"""

from experiments.command_line import run_recipe

if __name__ == "__main__":
    run_recipe(__doc__, "smnist.yaml")
