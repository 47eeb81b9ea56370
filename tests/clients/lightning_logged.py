"""A Lightning Trainer with torch's plateau, logged by CSVLogger and LearningRateMonitor.

usage: lightning_logged.py FOLDER VALUES (validation losses, as JSON); prints the learning rate after each validation
"""

from __future__ import annotations

import json
import sys
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset


class Model(lightning.LightningModule):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.layer, self.values = torch.nn.Linear(4, 1), values
        self.rates: list[float] = []

    def training_step(self, batch, _index):
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _index):
        self.log("val_loss", torch.tensor(self.values[self.current_epoch], dtype=torch.float64))

    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def main() -> None:
    warnings.simplefilter("ignore")
    values = json.loads(sys.argv[2])
    data = DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4)
    model = Model(values)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=len(values), logger=CSVLogger(sys.argv[1]), log_every_n_steps=1,
        callbacks=[LearningRateMonitor()], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data, data)
    sys.stdout.write("\n" + json.dumps([*model.rates[1:], model.optimizers().param_groups[0]["lr"]]))


if __name__ == "__main__":
    main()
