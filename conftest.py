"""What is collected nowhere: torch brings Triton along on Linux with CUDA alone."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["hf_compressm/ops/_gramians_triton.py"]
