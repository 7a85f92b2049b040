#!/usr/bin/env bash
# Check and time TorchEngine on one GPU in under 8 minutes; run.json goes to $OUT (by default runs/gpu).
# --rehearse runs every line on the CPU, with tiny networks; --budget SECONDS leaves out what does not fit.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"
