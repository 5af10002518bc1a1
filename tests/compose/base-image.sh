#!/bin/sh
# A base image for where no public one can be pulled: Debian with Python, as a tar file for `docker import`.
# Needs root and debootstrap; DEBIAN_MIRROR is optional.
set -eu
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" ${DEBIAN_MIRROR:-} >&2
tar --create --directory "$root" --exclude './var/cache/apt/*' --exclude './var/lib/apt/lists/*' --file "$1.new" .
mv "$1.new" "$1"
