#!/usr/bin/env bash
# Makes or completes .venv with what tests need, then checks format, lint and types, and runs the tests, two files at a time.
#   scripts/test.sh                        everything
#   scripts/test.sh --cov                  and print which lines no test runs
#   scripts/test.sh -m "not slow" -n 0     other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# A browser for the tests of pages, which are skipped without one.
install_chromium() {
    local become=()
    if command -v chromium || command -v google-chrome || ! command -v apt-get; then return; fi
    if [ "$(id -u)" != 0 ]; then
        [ "${CI:-}" = true ] || return 0
        become=(sudo -n)
    fi
    export DEBIAN_FRONTEND=noninteractive
    "${become[@]}" timeout -k 5 60 apt-get -qq update
    "${become[@]}" timeout -k 5 240 apt-get -qq install --yes --no-install-recommends chromium
}

(install_chromium) >/dev/null 2>&1 </dev/null || true
prepare_environment test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
