#!/usr/bin/env bash
# Downloads pytest and what it needs as pure-Python wheels, for a machine without a network: `make gpu` unpacks them there.
#
#   make gpu-wheels                              into wheels/, which git ignores: it must travel along with the checkout
#   WHEELS=/some/folder PYTHON_VERSION=3.13 make gpu-wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
[[ $PYTHON_VERSION =~ ^3\.[0-9]+$ ]] || fail "PYTHON_VERSION: '$PYTHON_VERSION' must look like 3.12"
mkdir -p "$WHEELS" || fail "WHEELS: cannot create $WHEELS"
# Packages of other versions beside each other would be unpacked into one another.
rm -f "$WHEELS"/*.whl
"$PYTHON" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version "$PYTHON_VERSION" \
  --implementation py --abi none --platform any --dest "$WHEELS" -c constraints.txt pytest ||
  fail "PYTHON: $PYTHON could not download pytest; see the lines above"
printf '%s\n' "$WHEELS"/*.whl
