"""Any configuration and damage: an adapter that computes, or a ValueError; nothing run, nothing outside touched."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from dip_hf import DIPNetConfig, export_lora
from dip_hf.adapter_files import CONFIG_NAME, PICKLED_NAME, WEIGHTS_NAME
from tests.safety.support import fresh_base, pickles, save_adapter, watched


# Before it asks dip_hf, PEFT itself looks for "peft_type" in the file, with errors of its own.
PEFT_LOOKS_FIRST = (KeyError, TypeError, AttributeError, RecursionError)
# Without shrinking: an example takes tens of milliseconds, and the damage is readable as it is.
fuzz = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=60)


class Adapter:
    """A whole adapter, of which every example damages a copy."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.whole, self.folder, self.out = folder / "whole", folder / "damaged", folder / "out"
        self.marker = folder / "marker"
        save_adapter(self.whole, **arguments)
        self.config = (self.whole / CONFIG_NAME).read_bytes()
        self.weights = (self.whole / WEIGHTS_NAME).read_bytes()

    def check(self, config: bytes, weights: bytes) -> None:
        """Load and export the adapter of these two files."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / CONFIG_NAME).write_bytes(config)
        (self.folder / WEIGHTS_NAME).write_bytes(weights)
        (self.folder / PICKLED_NAME).write_bytes(pickles(self.marker)[1])
        try:
            content = json.loads(config)
            ours = isinstance(content, dict) and content.get("peft_type") == "DIPNET"
        except (ValueError, RecursionError):
            ours = False
        with warnings.catch_warnings(), watched(self.folder) as seen:
            warnings.simplefilter("ignore")
            try:
                model = PeftModel.from_pretrained(fresh_base(), self.folder)
            except ValueError:
                model = None
            except PEFT_LOOKS_FIRST:
                assert not ours
                model = None
        if model is not None and ours:
            self.check_loaded(model)
        assert not seen and not self.marker.exists()
        self.check_export()

    def check_loaded(self, model: PeftModel) -> None:
        loaded = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
        in_file = load_file(self.folder / WEIGHTS_NAME)
        assert len(loaded) == len(in_file)
        for name, value in loaded.items():
            assert torch.isfinite(value).all()
            assert torch.equal(value, in_file[name.replace(".default", "")].to(value.dtype))

    def check_export(self) -> None:
        try:
            export_lora(self.folder, self.out)
        except ValueError:
            assert not self.out.exists()
        else:
            assert {path.name for path in self.out.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
            shutil.rmtree(self.out)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return Adapter(tmp_path_factory.mktemp("adapter"))


def test_the_whole_adapter_passes(adapter: Adapter) -> None:
    adapter.check(adapter.config, adapter.weights)
    adapter.check_loaded(PeftModel.from_pretrained(fresh_base(), adapter.folder))


numbers = st.integers() | st.integers(-(10**30), 10**30) | st.floats() | st.sampled_from([0, 1, 2, 3, 2**31, 10**12])
patterns = st.sampled_from(["q_proj", ".*", "(a+)+$", "(", "../..", "model.layers.0", "all-linear", "lm_head"])
scalars = st.none() | st.booleans() | numbers | patterns | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(patterns, inner, max_size=2), max_leaves=5
)
names = st.sampled_from(sorted(DIPNetConfig().to_dict())) | st.text(max_size=6)


@given(changes=st.dictionaries(names, values, min_size=1, max_size=3), removed=st.sets(names, max_size=2))
@fuzz
def test_configurations(adapter: Adapter, changes: dict[str, Any], removed: set[str]) -> None:
    content = json.loads(adapter.config)
    content = {name: value for name, value in content.items() if name not in removed} | changes
    adapter.check(json.dumps(content).encode(), adapter.weights)


damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


def damage(content: bytes, kind: str, place: float, value: int, header: bool) -> bytes:
    """Flip bits of, cut at, insert or remove a byte, or write a digit over one; in the first 10 % where `header`."""
    index = int(place * len(content) * (0.1 if header else 1))
    before, after = content[:index], content[index:]
    if kind == "flip":
        return before + bytes([after[0] ^ (value or 1)]) + after[1:] if after else content
    if kind == "cut":
        return before
    if kind == "insert":
        return before + bytes([value]) + after
    if kind == "remove":
        return before + after[1:]
    return before + b"0123456789"[value % 10 :][:1] + after[1:]


@pytest.mark.parametrize("damaged", ["config", "weights"])
def test_damage(adapter: Adapter, damaged: str) -> None:
    @given(damages=damages)
    @fuzz
    def check(damages: list[tuple[str, float, int, bool]]) -> None:
        files = {"config": adapter.config, "weights": adapter.weights}
        for kind, place, value, header in damages:
            files[damaged] = damage(files[damaged], kind, place, value, header)
        adapter.check(**files)

    check()


def test_shapes_in_the_header(adapter: Adapter) -> None:
    """Headers that are valid JSON with other names, types, shapes and places."""
    length = int.from_bytes(adapter.weights[:8], "little")
    header, content = json.loads(adapter.weights[8 : 8 + length]), adapter.weights[8 + length :]
    tensors = sorted(set(header) - {"__metadata__"})
    fields = st.tuples(st.just("shape"), st.lists(st.integers(0, 2**63), max_size=3)) | st.tuples(
        st.just("data_offsets"), st.lists(st.integers(0, 2**40), min_size=2, max_size=2)
    )
    fields |= st.tuples(st.just("dtype"), st.sampled_from(["F64", "F16", "BF16", "I32", "U8", "F8_E4M3", "Q9"]))

    @given(
        name=st.sampled_from(tensors), changes=st.lists(fields, max_size=2), renamed=st.none() | st.text(max_size=5)
    )
    @fuzz
    def check(name: str, changes: list[tuple[str, Any]], renamed: str | None) -> None:
        changed = copy.deepcopy(header)
        changed[name].update(changes)
        if renamed is not None:
            changed[renamed] = changed.pop(name)
        text = json.dumps(changed).encode()
        adapter.check(adapter.config, len(text).to_bytes(8, "little") + text + content)

    check()
