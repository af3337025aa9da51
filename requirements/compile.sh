#!/usr/bin/env bash
# Regenerates both pinned files from pyproject.toml. Run `make pins`; arguments (such as --upgrade) go to the resolver.
set -euo pipefail
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND="make pins"
options=(--universal --python-version 3.11 --generate-hashes --no-annotate --quiet)
uv pip compile "${options[@]}" "$@" pyproject.toml --output-file requirements/runtime.txt
uv pip compile "${options[@]}" "$@" pyproject.toml --extra broker --extra report --group dev --constraint requirements/runtime.txt --output-file requirements/dev.txt
