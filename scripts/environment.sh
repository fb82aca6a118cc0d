# Sourced by the other scripts: makes or completes .venv with the exact versions of constraints.txt.
# Usage: prepare_environment            the toolkit
#        prepare_environment test       and what its tests need

prepare_environment() {
    local extras="${1:-}" wanted
    local target="."
    [ -n "$extras" ] && target=".[$extras]"
    wanted="$extras $(cat constraints.txt pyproject.toml | cksum)"
    if [ -x .venv/bin/finetune ] && grep -qxF "$wanted" .venv/installed 2>/dev/null; then
        return
    fi
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; $python is $("$python" --version). Set PYTHON=/path/to/python." >&2
        return 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "Installing into .venv (about 1.7 GB with PyTorch for CPUs) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$target"
    echo "$wanted" >>.venv/installed
}
