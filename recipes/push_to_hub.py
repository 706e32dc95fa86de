"""Pushes a finished run to the Hub in one commit: adapter, plain LoRA copy, card, results, settings, environment.

    python recipes/push_to_hub.py --folder runs/quickstart/dipnet --repo_id you/name --base_model you/base \
        --report runs/quickstart --dry_run

`--config FILE.yaml` takes the same fields from a file; options override it. Without `--dry_run` it pushes, with the
access token of `hf auth login` or `HF_TOKEN`. `dip-hf push FOLDER REPO_ID` is the same without a config file.
"""

from __future__ import annotations

import sys

from yaml import YAMLError

from dip_hf.hub import HubError, PushSettings, push
from dip_hf.recipe.parser import RecipeParser


def main(argv: list[str] | None = None) -> None:
    """Run the recipe; `argv` stands for the command line's words."""
    try:
        (settings,) = RecipeParser([PushSettings]).parse_recipe(argv)
        commit = push(settings, show=print)
    except (HubError, ValueError, OSError, YAMLError) as error:
        sys.exit(f"recipes/push_to_hub.py: {error}")
    print("Dry run: nothing was sent." if commit is None else f"Pushed: {commit.commit_url}")


if __name__ == "__main__":
    main()
