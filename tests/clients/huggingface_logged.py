"""A Hugging Face Trainer with torch's plateau, which leaves a trainer_state.json.

usage: huggingface_logged.py FOLDER VALUES (evaluation losses, as JSON); prints the learning rate after each evaluation
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
from transformers import Trainer, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, labels=None):
        return {"loss": self.layer(x).square().mean()}


class Scripted(Trainer):
    """Evaluates to the values it was given, and notes the learning rates."""

    values: list[float]
    rates: list[float]

    def prediction_step(self, *args, **kwargs):
        value = self.values[min(round(self.state.epoch or 0), len(self.values)) - 1]
        return torch.tensor(value, dtype=torch.float64), None, None

    def training_step(self, *args, **kwargs):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return super().training_step(*args, **kwargs)


def main() -> None:
    warnings.simplefilter("ignore")
    values = json.loads(sys.argv[2])
    data = [{"x": torch.randn(4), "labels": torch.zeros(1)} for _ in range(4)]
    settings = TrainingArguments(
        sys.argv[1], num_train_epochs=len(values), per_device_train_batch_size=4, per_device_eval_batch_size=4,
        eval_strategy="epoch", logging_strategy="epoch", save_strategy="no", learning_rate=0.1, optim="sgd",
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 1, "factor": 0.5},
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Scripted(Model(), settings, train_dataset=data, eval_dataset=data)
    trainer.values, trainer.rates = values, []
    trainer.train()
    trainer.evaluate()  # once more, as people do: it is logged a second time
    trainer.save_state()
    sys.stdout.write("\n" + json.dumps([*trainer.rates[1:], trainer.optimizer.param_groups[0]["lr"]]))


if __name__ == "__main__":
    main()
