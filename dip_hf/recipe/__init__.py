"""What recipes/sft.py stands on: its arguments, its data, and its dry run."""
