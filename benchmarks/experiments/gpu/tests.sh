#!/usr/bin/env bash
# The tests that need an NVIDIA GPU. Elsewhere they are skipped.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m pytest tests/test_cuda*.py -o filterwarnings= "$@"
