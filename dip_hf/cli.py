"""The `dip-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for input that makes no sense.

    Args:
        arguments: without the program's name; default: the process's own.
    """
    parser = argparse.ArgumentParser(prog="dip-hf", description="Tools for adapters trained with dip_hf.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export-lora", help="write a DIPNet adapter as a plain LoRA adapter that PEFT loads without dip_hf"
    )
    export.add_argument("adapter", metavar="ADAPTER", help="folder of a DIPNet adapter")
    export.add_argument("output", metavar="OUT", help="folder to write; must not exist, or be empty")
    options = parser.parse_args(arguments)

    from dip_hf.dipnet.export import export_lora  # here, so that --help and a mistyped option answer at once

    try:
        output = export_lora(options.adapter, options.output)
    except ValueError as error:
        print(f"dip-hf {options.command}: {error}", file=sys.stderr)
        return 2
    print(f"A plain LoRA adapter stands in {output}; load it with peft.PeftModel.from_pretrained.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
