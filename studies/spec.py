"""What a study declares; `studies.load` reads it from a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


# Fields of the recipe that make the cells of a study: they have one owner
OWNED = (
    *(
        "model_name_or_path",
        "families",
        "train_size",
        "eval_size",
        "families_seed",
        "seed",
        "data_seed",
        "dataset_name",
    ),
    *("output_dir", "dry_run", "eval_strategy", "save_strategy", "save_steps", "save_total_limit"),
    *("resume_from_checkpoint", "push_to_hub", "report_to", "disable_tqdm", "config"),
)
TASK_SETS = ("standard", "harder", "unseen", "pretraining")
MEMBER_STEP = 1000
"""Between the seeds of initialisation and order of an ensemble's members (this project's choice)."""


@dataclass(frozen=True)
class Selection:
    """How hyperparameters are chosen: by teacher-forced exact match on the validation split, ties by NLL.

    Args:
        seeds: training seeds that every trial is run with; the scores are averaged over them.
        examples: validation examples per family.
    """

    seeds: tuple[int, ...]
    examples: int = 100


@dataclass(frozen=True)
class Evaluation:
    """What is measured, once per cell.

    Args:
        items: items per family, by task set; a set that is left out is not measured.
        split: "test", or "validation" for a study that looks for settings.
        batch_size: prompts per forward pass.
        probe_items: items per family of the standard level for robustness; 0 leaves robustness out.
        typo_rate: share of the words of a prompt's instruction that are misspelt, in the robustness to typos.
        smoothness_items: items per family for the smoothness of the loss; 0 leaves it out.
        device: such as "cuda"; None: a GPU where there is one.
    """

    items: dict[str, int]
    split: Literal["test", "validation"] = "test"
    batch_size: int = 128
    probe_items: int = 50
    typo_rate: float = 0.5
    smoothness_items: int = 4
    device: str | None = None


@dataclass(frozen=True, eq=False)  # itself a key of caches
class Arm:
    """One way to train and to predict.

    Args:
        name: what tables call it.
        overrides: fields of the recipe, over those of the study and of the data size.
        trials: alternative overrides, of which one is chosen on the validation split; the same number for every arm.
        epochs_factor: multiplies `num_train_epochs`, for a control at another method's compute.
        num_samples: predictions averaged over so many noise, posterior or dropout samples; 0 is the plain pass.
        dropout_at_test: those samples are of LoRA's dropout (MC dropout, arXiv 1506.02142).
        temperature: divide the logits by a temperature fitted on the standard set's validation split.
        ensemble: number of training runs whose predictions are averaged, on the same examples from other
            initialisations in another order; 1 is no ensemble.
        untrained: the base itself; one cell whatever the sizes and seeds.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    trials: tuple[dict[str, Any], ...] = ({},)
    epochs_factor: float = 1.0
    num_samples: int = 0
    dropout_at_test: bool = False
    temperature: bool = False
    ensemble: int = 1
    untrained: bool = False

    @property
    def one_pass(self) -> bool:
        """Whether a prediction is one plain pass of one model: what robustness and smoothness are measured of."""
        return self.num_samples == 0 and self.ensemble == 1 and not self.temperature


@dataclass(frozen=True, eq=False)  # itself a key of caches
class Study:
    """One study.

    Args:
        name: the file's name without its suffix.
        model: the base: a folder, or a name on the Hub.
        families: fine-tuning families of `dip_hf.reasoning`.
        sizes: training examples per family, each with overrides of its own, such as the number of epochs.
        seeds: of initialisation, data order and the draw of training examples, alike for all arms.
        reference: the arm that the others are compared with.
        selection: of hyperparameters.
        evaluation: of cells.
        common: fields of the recipe that all arms share.
        arms: at least two.
        output_dir: where everything is written.
        weights: SHA-256 of the base's weights, of a base that does not come with the repository: a run is refused on
            others, and a report needs none. None: of `model` as it is.
    """

    name: str
    model: str
    families: tuple[str, ...]
    sizes: dict[int, dict[str, Any]]
    seeds: tuple[int, ...]
    reference: str
    selection: Selection
    evaluation: Evaluation
    common: dict[str, Any]
    arms: tuple[Arm, ...]
    output_dir: str
    weights: str | None = None

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    def training(self, arm: Arm, size: int, seed: int, trial: int, member: int = 0) -> dict[str, Any]:
        """The recipe's fields of one training run, apart from where it writes.

        Args:
            arm: whose.
            size: training examples per family.
            seed: of the study.
            trial: index of the arm's setting.
            member: of an ensemble. All read the examples of `seed`; member 0 is the run that the arm would have
                without an ensemble.
        """
        own_seed = seed + MEMBER_STEP * member
        config = {**self.common, **self.sizes[size], **arm.overrides, **arm.trials[trial]}
        if arm.epochs_factor != 1:
            if "num_train_epochs" not in config:
                raise ValueError(
                    f"epochs_factor={arm.epochs_factor} scales num_train_epochs, which is not set: set it"
                )
            config["num_train_epochs"] = config["num_train_epochs"] * arm.epochs_factor
        return {
            **config,
            "model_name_or_path": self.model,
            "families": list(self.families),
            "train_size": size,
            "eval_size": self.selection.examples,
            "families_seed": seed,
            "seed": own_seed,
            "data_seed": own_seed,
        }
