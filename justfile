# `just` lists these.

default:
    @just --list

# The whole thing at work, nothing installed.
quickstart:
    cargo run --release -- quickstart

# What CI runs: installs what the tests need, then runs them all.
test:
    scripts/test.sh

# 5,000 confirmed publishes a second while the broker is killed 20 times.
chaos:
    scripts/chaos.sh

# The rules of pub/sub on other brokers.
brokers *names:
    scripts/brokers.sh {{names}}

# Measures a running gateway: `just measure uplink --devices 1000`.
measure *arguments:
    cargo run --release --bin exproto-bench -- {{arguments}}

# Instructions of the hot functions beside those in benches/instructions.txt.
instructions *arguments:
    scripts/instructions.py {{arguments}}

# Where the gateway's instructions and system calls go.
profile *arguments:
    cargo build --release
    scripts/profile.py {{arguments}}

# Fuzzes a target, or all of them, for so many seconds each.
fuzz target="all" seconds="60":
    scripts/fuzz.sh {{target}} {{seconds}}

# The fast part of the tests.
unit:
    cargo test --lib --test config --test machine

lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings

# Writes the generated files again.
generate:
    cargo run --quiet -- default-config > config/default.toml
