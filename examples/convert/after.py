"""The loop of before.py under Lorica. What ds_config.json says is gone from here: compare the two files.

lorica --num_gpus=2 examples/convert/after.py --deepspeed --deepspeed_config examples/convert/ds_config.json
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn

import lorica

SEQ_LEN, WIDTH = 64, 64


class LanguageModel(nn.Module):
    """Predicts the next byte from those before it."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(SEQ_LEN, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x, y):
        h = self.token(x) + self.position.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=h.device, dtype=h.dtype)
        return nn.functional.cross_entropy(self.head(self.blocks(h, mask=mask)).flatten(0, 1).float(), y.flatten())


def batches(text, count, size, device):
    for _ in range(count):
        start = torch.randint(len(text) - SEQ_LEN - 1, (size,))
        rows = torch.stack([text[i : i + SEQ_LEN + 1] for i in start.tolist()]).long().to(device)
        yield rows[:, :-1], rows[:, 1:]


def main():
    parser = lorica.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    torch.manual_seed(0)

    model = LanguageModel()
    engine, _, _, _ = lorica.initialize(args=args, model=model, model_parameters=model.parameters())
    torch.manual_seed(engine.global_rank)  # each process draws its own batches
    size, count = engine.train_micro_batch_size_per_gpu(), args.steps * engine.gradient_accumulation_steps()

    for x, y in batches(text, count, size, engine.device):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()


if __name__ == "__main__":
    main()
