"""A plain PyTorch training loop: a small byte-level language model on the standard library's sources. See after.py."""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn

MICRO_BATCH, ACCUMULATION, SEQ_LEN, WIDTH, WARMUP_STEPS = 8, 2, 64, 64, 20


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


def batches(text, count, device):
    for _ in range(count):
        start = torch.randint(len(text) - SEQ_LEN - 1, (MICRO_BATCH,))
        rows = torch.stack([text[i : i + SEQ_LEN + 1] for i in start.tolist()]).long().to(device)
        yield rows[:, :-1], rows[:, 1:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    torch.manual_seed(0)

    model = LanguageModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARMUP_STEPS))

    for step, (x, y) in enumerate(batches(text, args.steps * ACCUMULATION, device), start=1):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(x, y)
        (loss / ACCUMULATION).backward()
        if step % ACCUMULATION == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % (10 * ACCUMULATION) == 0:
            print(f"step {step // ACCUMULATION} loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
