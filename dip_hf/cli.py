"""The `dip-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of a command's own settings, which have the defaults."""
    return {name: value for name, value in vars(options).items() if name not in ("command", "run")}


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export-lora", help="write a DIPNet adapter as a plain LoRA adapter that PEFT loads without dip_hf"
    )
    export.set_defaults(run=_export)
    export.add_argument("adapter", metavar="ADAPTER", help="folder of a DIPNet adapter")
    export.add_argument("output", metavar="OUT", help="folder to write; must not exist, or be empty")


def _export(options: argparse.Namespace) -> int:
    from dip_hf.dipnet.export import export_lora

    output = export_lora(options.adapter, options.output)
    print(f"A plain LoRA adapter stands in {output}; load it with peft.PeftModel.from_pretrained.")
    return 0


def _add_diagnose(commands: Any) -> None:
    """Add the `diagnose` command; its options are the fields of `dip_hf.diagnostics.run.DiagnoseSettings`."""
    diagnose = commands.add_parser(
        "diagnose",
        help="measure how smooth and how robust a checkpoint is",
        argument_default=argparse.SUPPRESS,  # the settings have the defaults
    )
    diagnose.set_defaults(run=_diagnose)
    add = diagnose.add_argument
    add("adapter", metavar="ADAPTER", help="folder of an adapter, or of a whole model")
    add("--base", help="what the adapter stands on; default: what its config names")
    add("--output_dir", help="folder for diagnose.json and diagnose.png; default: diagnose/NAME")
    add("--dataset", metavar="FILE.jsonl", help="rows of prompt and completion, instead of the reasoning suite")
    add("--families", nargs="+", help="reasoning families; default: the fine-tuning ones")
    add("--split", choices=("validation", "test"), help="default: validation")
    add("--level", choices=("standard", "harder"), help="default: standard")
    add("--limit", type=int, help="examples per family, or of the dataset; default: 32")
    add("--batch_size", type=int, help="examples per pass; default: 16")
    add("--seed", type=int, help="of everything drawn, the questions included; default: 0")
    add("--device", help="such as cuda; default: a CUDA device where there is one")
    add("--noise_scales", type=float, nargs="*", help="of embedding noise, relative to each token's RMS")
    add("--fgsm_scales", type=float, nargs="*", help="step lengths of FGSM, relative to each token's RMS")
    add("--typo_rates", type=float, nargs="*", help="shares of instruction words with a typing error")
    add("--coded_sizes", type=int, nargs="*", help="every N of DReS's reconstruction error, K = 8")


def _diagnose(options: argparse.Namespace) -> int:
    from dip_hf.diagnostics.run import DiagnoseSettings, diagnose, to_text, write

    settings = DiagnoseSettings(**_fields(options))
    result = diagnose(settings)
    print(to_text(result))
    for path in write(result, settings.folder):
        print(path)
    return 0


def _add_push(commands: Any) -> None:
    """Add the `push` command; its options are the fields of `dip_hf.hub.PushSettings`."""
    push = commands.add_parser(
        "push",
        help="push a finished run to the Hub, in one commit",
        argument_default=argparse.SUPPRESS,  # the settings have the defaults
    )
    push.set_defaults(run=_push)
    add = push.add_argument
    add("folder", metavar="FOLDER", help="folder of a finished run: an adapter, or a whole model")
    add("repo_id", metavar="REPO_ID", help="repository on the Hub, such as you/name; made where it is missing")
    add("--base_model", help="the base's name on the Hub; needed where the run was trained on a local folder")
    add("--datasets", nargs="+", help="what it was trained on; default: what the run recorded")
    add("--report", help="report.json of recipes/evaluate.py, or its folder; default: FOLDER/report.json")
    add("--checkpoint", help="what the report calls this run; default: found by its folder")
    add("--benchmarks", nargs="+", metavar="TASK=DATASET_ID:TASK_ID", help="results for Hub benchmarks")
    add("--merged", action="store_true", help="push the base with the adapter merged in too, in merged/")
    add("--dry_run", action="store_true", help="list every file with its size, and send nothing")
    add("--private", action="store_true", help="make a new repository private")
    add("--force", action="store_true", help="push over commits that did not come from this folder")
    add("--revision", help="branch to push to; default: main")
    add("--commit_message", help="of the one commit that a push makes")


def _push(options: argparse.Namespace) -> int:
    from dip_hf.hub import HubError, PushSettings, push

    try:
        commit = push(PushSettings(**_fields(options)), show=print)
    except HubError as error:
        print(f"dip-hf push: {error}", file=sys.stderr)
        return 1
    print("Dry run: nothing was sent." if commit is None else f"Pushed: {commit.commit_url}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for input that makes no sense, 1 where the Hub refuses.

    Args:
        arguments: without the program's name; default: the process's own.
    """
    parser = argparse.ArgumentParser(prog="dip-hf", description="Tools for adapters trained with dip_hf.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (_add_export, _add_diagnose, _add_push):
        add_command(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ImportError, OSError, ValueError) as error:
        print(f"dip-hf {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
