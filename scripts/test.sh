#!/usr/bin/env bash
# Installs what the tests need from Debian's packages, then runs them all.
# Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."

# Debian keeps Mosquitto where only root's PATH looks.
export PATH="$PATH:/usr/sbin"

scripts/install.sh

# The package starts a broker of its own on port 1883, where quickstart's would be.
if command -v systemctl >/dev/null && systemctl is-active -q mosquitto 2>/dev/null; then
    echo "note: a mosquitto service runs on this machine; the tests use ports of their own"
fi

echo "preparing the example handlers"
venv=target/examples/venv
if ! "$venv/bin/python" -c 'import grpc_tools' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check -r examples/echo-python/requirements.txt
fi
cargo build --quiet --locked --manifest-path examples/echo-rust/Cargo.toml --target-dir target/examples/rust

cargo test --locked "$@"
