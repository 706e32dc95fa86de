"""Evaluation through lm-eval: the model "hf-dip", several checkpoints on the same items, tables and a picture.

The submodules `statistics`, `answers` and `report` need no lm-eval; import them by name.
"""
