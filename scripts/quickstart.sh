#!/usr/bin/env bash
# Makes .venv, installs the toolkit, and runs recipes/quickstart.yaml. A second call only runs.
# Arguments go to the run: scripts/quickstart.sh training.steps=50
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment
exec .venv/bin/finetune run recipes/quickstart.yaml "$@"
