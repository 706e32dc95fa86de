"""What a run leaves for others: its record beside the weights, its card, and a push to the Hub."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig, PeftModel
from trl import SFTTrainer

from dip_hf.hub import PushSettings, push
from dip_hf.hub.card import render_card
from dip_hf.hub.record import scrub, training_config, write_record
from dip_hf.hub.run import MODEL, FinishedRun, local_base
from dip_hf.hub.settings import is_repo_id
from dip_hf.trainer.config import DIPSFTConfig


class PublishingTrainer(SFTTrainer):
    """`trl.SFTTrainer` that records its settings, writes this project's model card, and pushes in one commit.

    Args:
        model: as for `SFTTrainer`.
        args: of the run.
        **kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: `push_to_hub` is set, but the push would be refused: the adapter's base is a local folder, or
            another adapter than "default" is trained, which is saved in a folder of its own.
    """

    args: DIPSFTConfig

    def __init__(self, model: Any, args: DIPSFTConfig, **kwargs: Any) -> None:
        if args.push_to_hub:
            if isinstance(model, PeftModel):
                _check_trained_adapter("push_to_hub=True", model, Path(args.output_dir))
            check_public_base(model, kwargs.get("peft_config"), Path(args.output_dir))
        super().__init__(model, args=args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, with training_config.yaml and environment.json beside the weights; see `dip_hf.hub.record`."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            is_local = isinstance(self.model, PeftModel) and local_base(_base_name(self.model), folder) is not None
            write_record(folder, self.args, _own_fields(), is_local)  # before the parent's, which may push
        super().save_model(output_dir, _internal_call)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """As TRL's, README.md in `output_dir`, from this project's template; without results, which come later."""
        if not self.is_world_process_zero():
            return
        adapter: dict[str, Any] = {}
        kind = MODEL
        if isinstance(self.model, PeftModel):
            config = self.model.peft_config[self.model.active_adapter]
            adapter, kind = scrub(config.to_dict()), str(config.peft_type.value)
        base = self.model.config._name_or_path  # where TRL's own card has it from
        names = [dataset_name] if isinstance(dataset_name, str) else dataset_name or []
        run = FinishedRun(
            folder=Path(self.args.output_dir),
            kind=kind,
            adapter=adapter,
            training=training_config(self.args, _own_fields()),
            environment=None,
            base_model=base if base and is_repo_id(base) and not Path(base).exists() else None,
            datasets=tuple(names),
        )
        name = self.hub_model_id or self.args.hub_model_id or model_name or Path(self.args.output_dir).name
        text = render_card(
            run, name if is_repo_id(name) else "model", lora="" if kind == "LORA" else None, tags=self._tags(tags)
        )
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(self.args.output_dir) / "README.md").write_text(text, encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        base_model: str | None = None,
        report: str | None = None,
        merged: bool = False,
        force: bool = False,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the run to `output_dir`, and push it in one commit (see `dip_hf.hub.push`).

        Args:
            commit_message, blocking, token, revision, private: as for Trainer's.
            dataset_name, tags, model_name: as for `create_model_card`.
            base_model, report, merged, force: as for `dip_hf.hub.PushSettings`.

        Returns:
            The commit, or with `blocking=False` the future of it; None in processes other than the main one.

        Raises:
            ValueError: the run cannot be pushed, or the repository has commits that this run did not make. The run is
                saved all the same.
            HubError: the Hub could not be reached, or refused.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if isinstance(self.model, PeftModel):
            _check_trained_adapter("push_to_hub", self.model, Path(self.args.output_dir))
        if not self.is_world_process_zero():
            return None
        self.create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        settings = PushSettings(
            folder=self.args.output_dir,
            repo_id=self.hub_model_id,
            base_model=base_model,
            datasets=[dataset_name] if isinstance(dataset_name, str) else dataset_name,
            report=report,
            merged=merged,
            private=bool(private if private is not None else self.args.hub_private_repo),
            force=force,
            revision=revision if revision is not None else self.args.hub_revision,
            commit_message=commit_message,
        )
        self._finish_current_push()
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        own = [job.result().oid for job in jobs if job.exception() is None]  # checkpoints, pushed while training

        def send() -> CommitInfo:
            commit = push(settings, token, own_commits=own, tags=self._tags(tags))
            assert commit is not None  # it is no dry run
            return commit

        return send() if blocking else HfApi().run_as_future(send)

    def _tags(self, tags: str | list[str] | None) -> list[str]:
        return [*([tags] if isinstance(tags, str) else tags or []), *self._tag_names]


def _check_trained_adapter(asked: str, model: PeftModel, folder: Path) -> None:
    """Refuse to push a run whose folder holds the adapter that was trained in a folder inside it, as PEFT saves it."""
    active = model.active_adapters
    if active != ["default"]:
        name = active[0] if len(active) == 1 else "NAME"
        raise ValueError(
            f"{asked}, but the active adapter is {' and '.join(map(repr, active))}, and a run's is 'default': PEFT "
            f"saves another one in {folder / name}, which `dip-hf push {folder / name} REPO` pushes; or call it "
            "'default'"
        )


def _base_name(model: PeftModel) -> str:
    """The base's name or folder, as the active adapter knows it; empty where it knows none."""
    return model.peft_config[model.active_adapter].base_model_name_or_path or ""


def check_public_base(model: Any, peft_config: PeftConfig | None, folder: Path) -> None:
    """Refuse to push an adapter on a local folder, before it is trained; a whole model needs no base.

    Args:
        model: as for `SFTTrainer`.
        peft_config: likewise.
        folder: of the run.

    Raises:
        ValueError: the base is a local folder.
    """
    if isinstance(model, PeftModel):
        base = _base_name(model)
    elif peft_config is None:
        return
    else:
        base = model if isinstance(model, str) else model.config._name_or_path
    if local_base(base or "", folder) is not None:
        raise ValueError(
            f"push_to_hub=True, but the base {base!r} is a local folder, from which others cannot load the adapter: "
            f"set push_to_hub to False and run `dip-hf push {folder} REPO --base_model NAME` after training, or load "
            "the base by its name on the Hub"
        )


def _own_fields() -> list[str]:
    """Fields that this project adds to TRL's."""
    return list(DIPSFTConfig.__annotations__)
