"""A Hugging Face Trainer, run to its end or cut short and resumed; started by torchrun, writes a trace per rank.

usage: huggingface_trainer.py FOLDER EPOCHS
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch

# Before there is a process group, or its threads outlive it and one run in some twenty aborts at its end; see
# distplateau/training/processes.py. The Trainer imports it later by itself.
import torch.distributed.nn.functional
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from distplateau import ReduceLROnPlateau


class Samples(Dataset):
    def __init__(self, size: int, seed: int) -> None:
        self.inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "labels": self.inputs[index].sum()[None]}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.layer(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


class Rates(TrainerCallback):
    def __init__(self, scheduler: ReduceLROnPlateau) -> None:
        self.scheduler, self.trace = scheduler, []

    def on_epoch_begin(self, *_args, **_kwargs) -> None:
        self.trace.append((self.scheduler.get_last_lr()[0].hex(), self.scheduler.num_bad_epochs))


def main() -> None:
    warnings.simplefilter("ignore")
    folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(exist_ok=True)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # A threshold that no step can beat after the first: every second validation reduces.
    scheduler = ReduceLROnPlateau(optimizer, patience=1, threshold=0.9, factor=0.5)
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, eval_strategy="epoch",
        save_strategy="epoch", metric_for_best_model="eval_loss", use_cpu=True, report_to=[], disable_tqdm=True,
        label_names=["labels"], seed=0, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    rates = Rates(scheduler)
    trainer = Trainer(
        model, arguments, train_dataset=Samples(32, 1), eval_dataset=Samples(11, 2),
        optimizers=(optimizer, scheduler), callbacks=[rates],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    rates.on_epoch_begin()
    (folder / f"trace-{arguments.process_index}-{epochs}.json").write_text(json.dumps(rates.trace))


if __name__ == "__main__":
    main()
