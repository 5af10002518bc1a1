#!/bin/sh
# Writes the committed stubs: generate.sh [OUTPUT_FOLDER]. Run through `make proto`.
set -eu
cd "$(dirname "$0")/.."
out=${1:-.}
python -m grpc_tools.protoc --proto_path=proto \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    proto/hocket/v1/*.proto proto/hocket/vendored/*.proto
