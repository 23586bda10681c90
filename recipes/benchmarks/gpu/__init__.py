"""What is measured on a GPU, one module a part; `run_gpu.py` beside this folder runs them all."""
