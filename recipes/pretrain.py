"""Pretrain the embedded base language model from scratch on two CPU cores (about an hour).

Run, stop at any time, run again to go on from the last checkpoint:

    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 python recipes/pretrain.py --config recipes/configs/pretrain.yaml

Every field of the configuration but `weights` can be overridden on the command line, for example `--max_steps 300`;
`--resume_from_checkpoint FOLDER` goes on from another checkpoint than the last, `false` from none.
"""

from __future__ import annotations

import json
import string
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import muon
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer
from yaml import YAMLError

from dip_hf.reasoning import ANSWER_CUE, INSTRUCTIONS, PRETRAINING, iterate_rows, make_split, score_answer
from dip_hf.recipe.parser import RecipeParser
from dip_hf.recipe.resume import resumed_checkpoint
from dip_hf.trainer.checkpoints import last_checkpoint


COPYING = "copying"
"""Name of the one kind of example that is not from reasoning-gym, see `copying_pairs`."""
KINDS = (*(family.name for family in PRETRAINING), COPYING)


@dataclass
class PretrainingArguments:
    """What TRL's `SFTConfig` does not say: the model's size, the data's mixture, the optimiser."""

    hidden_size: int = field(default=192, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Number of decoder blocks."})
    intermediate_size: int = field(default=512, metadata={"help": "Width of the MLPs."})
    num_attention_heads: int = field(default=6, metadata={"help": "Number of attention heads."})
    vocab_size: int = field(default=512, metadata={"help": "Upper bound of the tokenizer's size."})
    examples_per_family: int = field(
        default=30_000, metadata={"help": "Examples drawn per family, repeats of small families included."}
    )
    weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Family name, or 'copying', to sampling weight; what is not named has weight 1."},
    )
    muon: bool = field(default=True, metadata={"help": "Muon for the blocks' matrices; without it AdamW for all."})
    accuracy_examples: int = field(default=200, metadata={"help": "Test questions per pretraining family at the end."})

    def __post_init__(self) -> None:
        if self.accuracy_examples < 1:
            raise ValueError(f"accuracy_examples={self.accuracy_examples} must be at least 1")
        if unknown := sorted(self.weights.keys() - set(KINDS)):
            raise ValueError(f"weights: {unknown} are no pretraining families; those are {', '.join(KINDS)}")
        if min(self.weights.values(), default=1.0) < 0:
            raise ValueError(f"weights={self.weights} must not be negative; 0 leaves a family out")
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be an even multiple of num_attention_heads="
                f"{self.num_attention_heads}, each of which gets an equal share of even size"
            )


def build_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that keeps letters and digits single and has one token per instruction."""
    tokenizer = Tokenizer(models.BPE())
    # Letters and digits stay apart, so that spelling and arithmetic are visible; merges join punctuation and spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Za-z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(INSTRUCTIONS) - 1,
        min_frequency=50,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.split(":", 1)[1] for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*INSTRUCTIONS, ANSWER_CUE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def copying_pairs(size: int, seed: int) -> list[tuple[str, str]]:
    """Prompts and completions that repeat random characters and instructions.

    Tokens that pretraining never shows end up as copies of each other, in the embeddings and so in the tied head. An
    adapter on the linear layers cannot tell them apart again: it could not learn to answer with a decimal point, nor
    which of two instructions it reads.
    """
    generator = np.random.default_rng((seed, size))
    kinds = (list(string.ascii_letters), list(string.digits), list(string.punctuation), [" "], list(INSTRUCTIONS))
    pairs = []
    for length in generator.integers(3, 17, size=size):
        chosen = generator.choice(len(kinds), size=length, p=(0.3, 0.25, 0.3, 0.1, 0.05))
        text = "".join(generator.choice(kinds[kind]) for kind in chosen).strip() or "."
        pairs.append((f"Copy: {text}{ANSWER_CUE}", f" {text}"))
    return pairs


def build_pool(args: PretrainingArguments, seed: int, folder: Path) -> tuple[Dataset, PreTrainedTokenizerFast]:
    """Draw, tokenize and keep on disk the examples of all pretraining families, family after family, then copying.

    Raises:
        ValueError: the folder holds examples that were made with other settings.
    """
    made_with = {"seed": seed, "examples_per_family": args.examples_per_family, "vocab_size": args.vocab_size}
    note = folder / "pool.json"
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before != made_with:
            raise ValueError(
                f"{folder} holds examples made with {before}, and {made_with} is asked for; give another output_dir"
            )
        return load_from_disk(folder / "pool"), PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    drawn: dict[str, list[tuple[str, str]]] = {}
    for family in PRETRAINING:
        rows = iterate_rows(family.name, "pretrain", seed=seed, limit=4 * args.examples_per_family)
        kept = islice(rows, args.examples_per_family)
        drawn[family.name] = [(row["prompt"], row["completion"]) for row in kept]
        print(f"{family.name}: {len(drawn[family.name])} examples", flush=True)
    sample = [prompt + completion for pairs in drawn.values() for prompt, completion in pairs[:5000]]
    tokenizer = build_tokenizer(sample, args.vocab_size)
    drawn[COPYING] = copying_pairs(args.examples_per_family, seed)
    parts = []
    for name, pairs in drawn.items():
        prompts = tokenizer([prompt for prompt, _ in pairs], return_attention_mask=False)["input_ids"]
        # TRL ends each completion with the end token too; there is no beginning-of-sequence token.
        completions = [completion + tokenizer.eos_token for _, completion in pairs]
        answers = tokenizer(completions, return_attention_mask=False)["input_ids"]
        parts.append(
            Dataset.from_dict(
                {
                    "input_ids": [p + a for p, a in zip(prompts, answers, strict=True)],
                    "labels": [[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)],
                    "family": [name] * len(pairs),
                    "length": [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)],
                }
            )
        )
    pool = concatenate_datasets(parts)
    pool.save_to_disk(folder / "pool")
    tokenizer.save_pretrained(folder / "tokenizer")
    note.write_text(json.dumps(made_with) + "\n", encoding="utf-8")  # last: all before it is whole
    return pool, tokenizer


def order_examples(pool: Dataset, weights: dict[str, float], steps: int, batch: int, seed: int) -> Dataset:
    """Draw `steps` batches of the mixture; each is sorted by length, so that its micro-batches need little padding."""
    families = np.asarray(pool["family"])
    lengths = np.asarray(pool["length"])
    members = [np.flatnonzero(families == name) for name in KINDS]
    shares = np.asarray([weights.get(name, 1.0) for name in KINDS])
    kinds = np.random.default_rng(seed).choice(len(KINDS), size=steps * batch, p=shares / shares.sum())
    chosen = np.empty(steps * batch, dtype=np.int64)
    for kind, index in enumerate(members):
        mask = kinds == kind
        # Whole passes over a family's pool, each in a new order. A generator per family: the first steps stay the same
        # when a resumed run asks for more steps or fewer.
        generator = np.random.default_rng((seed, kind))
        passes = int(mask.sum()) // len(index) + 1
        chosen[mask] = np.concatenate([generator.permutation(index) for _ in range(passes)])[: mask.sum()]
    table = chosen.reshape(steps, batch)
    table = np.take_along_axis(table, np.argsort(lengths[table], axis=1, kind="stable"), axis=1)
    return pool.select_columns(["input_ids", "labels"]).select(table.ravel())


@torch.no_grad()
def greedy_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Return what `model` completes each prompt with, by greedy decoding of up to 64 tokens."""
    answers: list[str] = []
    for start in range(0, len(prompts), 100):
        inputs = tokenizer(prompts[start : start + 100], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def measure_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, size: int) -> float:
    """Return the share of greedy answers that are right on `size` test questions of one family, or of copying.

    reasoning-gym gives a family's right answers 1.0; a copy has to be exact. What is copied is drawn anew.
    """
    if name == COPYING:
        prompts, texts = zip(*copying_pairs(size, seed=0), strict=True)
        answers = greedy_answers(model, tokenizer, list(prompts))
        return sum(answer == text for answer, text in zip(answers, texts, strict=True)) / size
    rows = make_split(name, "test", size)
    answers = greedy_answers(model, tokenizer, list(rows["prompt"]))
    return sum(score_answer(name, answer, row) == 1.0 for answer, row in zip(answers, rows, strict=True)) / size


def main(args: PretrainingArguments, training: SFTConfig) -> None:
    """Pretrain, write the model and its accuracy per pretraining family to `training.output_dir`.

    Raises:
        SystemExit: with one line, where the checkpoint asked for is not there, or the folder's examples are others.
    """
    folder = Path(training.output_dir)
    try:
        if training.max_steps < 1:
            raise ValueError(f"max_steps={training.max_steps} must be at least 1: it says how many examples are drawn")
        checkpoint = resumed_checkpoint(training)  # first, for the examples take minutes
        if training.resume_from_checkpoint is None and folder.is_dir():
            checkpoint = last_checkpoint(folder)
        set_seed(training.seed)
        pool, tokenizer = build_pool(args, training.seed, folder)
    except (ValueError, ImportError) as error:
        sys.exit(f"recipes/pretrain.py: {error}")
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    data = order_examples(pool, args.weights, training.max_steps, batch, training.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            intermediate_size=args.intermediate_size,
            num_attention_heads=args.num_attention_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, mean length {np.mean(pool['length']):.1f}")
    optimizer = muon.Muon.for_model(model, lr=training.learning_rate) if args.muon else None
    trainer = SFTTrainer(
        model, args=training, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.use_cache = True  # the trainer turns it off
    trainer.save_model()
    model.eval()
    accuracy = {f.name: measure_accuracy(model, tokenizer, f.name, args.accuracy_examples) for f in PRETRAINING}
    (folder / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
    print(json.dumps(accuracy, indent=2))


if __name__ == "__main__":
    try:
        arguments = RecipeParser([PretrainingArguments, SFTConfig]).parse_recipe()
    except (ValueError, OSError, YAMLError) as mistake:
        sys.exit(f"recipes/pretrain.py: {mistake}")
    main(*arguments)
