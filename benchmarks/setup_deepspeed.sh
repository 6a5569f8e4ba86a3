#!/usr/bin/env bash
# Makes .venv-bench: the environment of benchmarks/cpu_compare.py, with DeepSpeed beside Lorica and the same torch.
# DeepSpeed is a peer to measure, never a dependency. Its source package is installed without its operators
# (DS_BUILD_OPS=0); the three it uses on a CPU are then compiled by its own loader, into the environment (a C++ compiler
# is needed, and some minutes).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv-bench}
TORCH=${TORCH:-torch==2.13.0}
DEEPSPEED=${DEEPSPEED:-deepspeed==0.19.8}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip="$VENV/bin/pip install --quiet"
$pip "$TORCH" numpy "setuptools<81" wheel ninja
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $pip --no-build-isolation --no-binary deepspeed "$DEEPSPEED"
$pip --editable .
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$PWD/$VENV/extensions" PATH="$PWD/$VENV/bin:$PATH"
"$VENV/bin/python" -c "
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, FusedAdamBuilder, ShareMemCommBuilder
for builder in (ShareMemCommBuilder, FusedAdamBuilder, CPUAdamBuilder):
    builder().load()"
"$VENV/bin/python" -c "
import deepspeed, lorica, torch
print(f'ready: torch {torch.__version__}, deepspeed {deepspeed.__version__}, lorica from {lorica.__file__}')"
