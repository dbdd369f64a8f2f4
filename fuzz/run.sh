#!/bin/sh
# Builds the fuzz targets and runs each for SECONDS (60 unless told), one after
# the other. Usage: fuzz/run.sh [SECONDS [TARGET...]]. Stops at the first crash;
# the input is in fuzz/artifacts/TARGET.
set -eu
cd "$(dirname "$0")"
seconds=${1:-60}
[ "$seconds" -gt 0 ] || { echo "SECONDS must be above 0" >&2; exit 2; }
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- btree_block btree_ops volume messages alloc_list srch super wire fuse_request
triple=x86_64-unknown-linux-gnu

# Valid blocks of the golden volumes to start from.
(cd .. && cargo run --quiet --release -p outrider-core --features testing --example corpus -- fuzz/corpus)

# What cargo-fuzz would set, without its sanitizer: these work on stable Rust.
coverage="-Cpasses=sancov-module"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    coverage="$coverage -Cllvm-args=-sanitizer-coverage-$option"
done
RUSTFLAGS="$coverage --cfg fuzzing" nice cargo build --release --target $triple

for target in "$@"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    case $target in
        btree_block|alloc_list|srch) longest=65536 ;;
        volume|btree_ops|messages) longest=400 ;;
        *) longest=8192 ;;
    esac
    echo "== $target, $seconds s"
    nice "target/$triple/release/$target" "corpus/$target" \
        -max_total_time="$seconds" -timeout=30 -rss_limit_mb=2048 -max_len=$longest \
        -artifact_prefix="artifacts/$target/" -len_control=0 -print_final_stats=1
done
