#!/usr/bin/env bash
# Fuzzes one target or all of them: scripts/fuzz.sh [target] [seconds]
# Starts from fuzz/corpus/ and writes what it finds new to fuzz/target/found/. A crash
# is kept in fuzz/artifacts/ and named: put into the corpus it is a regression test.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-all}
seconds=${2:-60}

command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz

# The sanitizer is an unstable option of the compiler. The stable one, which also builds
# the gateway, is told that it may: no second compiler is needed.
export RUSTC_BOOTSTRAP=1

if [ "$target" = all ]; then
    targets=(fuzz/corpus/*)
    targets=("${targets[@]##*/}")
    cargo fuzz build
else
    targets=("$target")
fi

failed=()
for target in "${targets[@]}"; do
    printf '\n== %s, %s s\n' "$target" "$seconds"
    found=fuzz/target/found/$target
    mkdir -p "$found"
    cargo fuzz run "$target" "$found" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=10 -print_final_stats=1 || failed+=("$target")
done

if [ "${#failed[@]}" -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    find fuzz/artifacts -type f
    exit 1
fi
