#!/usr/bin/env bash
# The tests that need an NVIDIA GPU, in under 3 minutes. Elsewhere they are skipped; --rehearse runs them on the CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = --rehearse ]; then
  shift
  export BRANCHYNET_REHEARSE=1
fi
exec "${PYTHON:-python3}" -m pytest tests/test_cuda*.py -o filterwarnings= "$@"
