"""A progress bar that tells how the run goes."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = {
    "loss": ("loss", 1, ".3f"),
    "eval_text_to_image_r1": ("text to image R@1", 100, ".1f"),
    "eval_image_to_text_r1": ("image to text R@1", 100, ".1f"),
}


class RecallProgress(ProgressCallback):
    """`Trainer`'s bar, with the last loss and recalls (in %) behind it in place of a dict per log on stdout."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shown: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show what was logged."""
        for key, value in (logs or {}).items():
            if key in SHOWN:
                name, factor, form = SHOWN[key]
                self.shown[name] = format(factor * value, form)
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)
