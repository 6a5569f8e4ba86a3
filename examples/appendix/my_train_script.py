"""The smallest training script: any nn.Module, a configuration file, and three calls.

lorica --num_gpus=8 my_train_script.py --deepspeed --deepspeed_config ds_config.json
"""

import argparse

import torch
from torch import nn

import lorica


class MyModel(nn.Module):
    """Learns to sort the numbers in a row: takes rows [B, 16], returns its loss."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 16))

    def forward(self, data):
        x = data.to(self.net[0].weight.dtype)
        return nn.functional.mse_loss(self.net(x).float(), data.sort(dim=-1).values)


parser = lorica.add_config_arguments(argparse.ArgumentParser())  # --deepspeed, --deepspeed_config, --local_rank
args = parser.parse_args()
model = MyModel()  # any nn.Module; no optimizer here
model_engine, optimizer, _, _ = lorica.initialize(args=args, model=model, model_parameters=model.parameters())

torch.manual_seed(model_engine.global_rank)  # each process its own batches
batches = (torch.randn(4, 16, device=model_engine.device) for _ in range(20 * 16))
for data in batches:
    loss = model_engine(data)
    model_engine.backward(loss)
    model_engine.step()
