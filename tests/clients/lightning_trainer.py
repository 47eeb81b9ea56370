"""A Lightning Trainer whose ranks log their own validation loss; started by torchrun, writes a trace per rank.

usage: lightning_trainer.py ours|torch FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import distplateau

SCHEDULERS = {"ours": distplateau.ReduceLROnPlateau, "torch": torch.optim.lr_scheduler.ReduceLROnPlateau}


class Model(lightning.LightningModule):
    def __init__(self, scheduler: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.scheduler_class = SCHEDULERS[scheduler]
        self.trace: list[float] = []

    def training_step(self, batch, _index):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, _index):
        # Every rank sees another curve: improving on rank 0, flat on the others.
        improving = self.global_rank == 0
        self.log("val_loss", torch.tensor(1.0 - 0.1 * self.current_epoch * improving), sync_dist=False)

    def on_train_epoch_start(self):
        self.trace.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = self.scheduler_class(optimizer, patience=0, threshold=0.055, threshold_mode="abs", factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def main() -> None:
    warnings.simplefilter("ignore")
    data = DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4)
    folder = Path(sys.argv[2])
    model = Model(sys.argv[1])
    trainer = lightning.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp", max_epochs=5, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    (folder / f"trace-{trainer.global_rank}.json").write_text(json.dumps(model.trace))


if __name__ == "__main__":
    main()
