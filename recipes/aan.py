"""
Pairs of papers of the ACL Anthology Network (AAN), the Long Range Arena's retrieval.

    accelerate launch recipes/aan.py --config recipes/configs/aan.yaml [--scale small] [--method full ...]
"""

from experiments.command_line import run_recipe

if __name__ == "__main__":
    run_recipe(__doc__, "aan.yaml")
