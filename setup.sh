#!/usr/bin/env bash
# Make .venv, install the pinned requirements, and fetch weights, tokenizer and data.
# Can be run again at any time. MINLLAMA_ASSETS, a folder or a base URL, replaces the original
# addresses.
set -eu
unset CDPATH
# A relative MINLLAMA_ASSETS is relative to the caller's working directory.
if [ -d "${MINLLAMA_ASSETS:-}" ]; then
    MINLLAMA_ASSETS=$(cd "$MINLLAMA_ASSETS" && pwd)
    export MINLLAMA_ASSETS
fi
cd "$(dirname "$0")"

suits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! suits .venv/bin/python; then
    python=
    for candidate in python3 python python3.11 python3.12 python3.13 python3.14; do
        if suits "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: no Python 3.11 or later with venv was found; install one and run this again" >&2
        exit 2
    fi
    rm -rf .venv
    "$python" -m venv .venv
fi

installed=.venv/installed-requirements.txt
if ! cat requirements.txt requirements-dev.txt | cmp -s - "$installed"; then
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
    then
        echo "error: the packages in requirements.txt could not be installed; pip says why above" >&2
        exit 2
    fi
    cat requirements.txt requirements-dev.txt >"$installed"
fi

.venv/bin/python -m data.fetch_assets
