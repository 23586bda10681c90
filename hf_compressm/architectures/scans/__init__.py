"""The recurrences of transformers and mamba-ssm: their arguments and their replacements."""
