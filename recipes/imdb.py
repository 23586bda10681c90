"""
IMDB film reviews read byte by byte, as in the Long Range Arena.

    accelerate launch recipes/imdb.py --config recipes/configs/imdb.yaml [--scale small] [--method full ...]
"""

from experiments.command_line import run_recipe

if __name__ == "__main__":
    run_recipe(__doc__, "imdb.yaml")
