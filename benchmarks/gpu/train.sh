#!/usr/bin/env bash
# Train the CIFAR-10 networks on one GPU in under 8 minutes; weights and train.json go to $OUT (by default runs/gpu).
# --rehearse runs every line on the CPU, on a few images.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu/train.py --out "${OUT:-runs/gpu}" "$@"
