#!/bin/sh
# Measures a mount of files on this machine's disk against its references, all in
# one run: bindfs on tmpfs for metadata, ext4 on a loop device over the same disk
# for data and fsync. Prints one table with ratios and says which target is missed.
#
# usage: bench.sh OUTRIDER_BINARY WORK_DIR [ROUNDS]
#
# WORK_DIR lies on the disk to be measured. Needs root, bindfs and e2fsprogs.
# Environment: SIZE (bytes of the data phases, 256M), FILES (10000), PORT (the
# quorum port, 21190), IMAGE (bytes of each image, 16G), PREWRITE (bytes at the
# front of each image that are written beforehand, 0: as `truncate` leaves it).
#
# Both sides get the same scheduling priority and run in turn, so other load on the
# machine hits both. What can go wrong: too little space, a port in use; whatever
# was set up is taken down again in any case.
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
fi
outrider=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")/bench.$$
rounds=${3:-5}
size=${SIZE:-256M} files=${FILES:-10000} port=${PORT:-21190} image=${IMAGE:-16G}
prewrite=${PREWRITE:-0}
loop=

cleanup() {
    set +e
    for dir in bindfs tmpfs ext4; do
        mountpoint -q "$work/$dir" && umount "$work/$dir"
    done
    [ -n "$loop" ] && losetup -d "$loop"
    mountpoint -q "$work/outrider" && "$outrider" umount "$work/outrider"
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

if ! command -v bindfs >/dev/null; then
    echo "bench.sh: bindfs is not installed" >&2
    exit 2
fi
mkdir -p "$work/tmpfs" "$work/bindfs" "$work/ext4" "$work/outrider"
for name in meta data ext4.img; do
    truncate -s "$image" "$work/$name"
    if [ "$prewrite" != 0 ]; then
        head -c "$prewrite" /dev/zero | dd of="$work/$name" conv=notrunc,fsync bs=1M status=none
    fi
done

mount -t tmpfs tmpfs "$work/tmpfs"
nice -n -20 bindfs "$work/tmpfs" "$work/bindfs"

mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$work/ext4.img"
loop=$(losetup --find --show --direct-io=on "$work/ext4.img")
mount "$loop" "$work/ext4"

"$outrider" mkfs -f -A -Q "0,127.0.0.1,$port" "$work/meta" "$work/data" >/dev/null
nice -n -20 "$outrider" mount -o "metadev_path=$work/meta,quorum_slot_nr=0" \
    "$work/data" "$work/outrider"

measure() {
    nice -n -20 "$outrider" bench "$work/outrider" --against "$work/$1" --only "$2" \
        --rounds "$rounds" --size "$size" --files "$files" --json >"$work/$1.json"
}
measure bindfs create,stat,stat_cold,readdir,rename,unlink
measure ext4 seq_write,seq_read_cold,rand_read_4k,rand_write_4k,fsync_small

python3 - "$work/bindfs.json" "$work/ext4.json" <<'PY'
import json, os, sys

TARGETS = {"create": 1.0, "stat_cold": 1.0, "rename": 1.0, "unlink": 1.0,
           "seq_write": 0.8, "seq_read_cold": 0.8, "fsync_small": 1 / 3}
missed = 0
print(f"load {os.getloadavg()[0]:.1f}")
print(f"{'phase':<14} {'unit':<9} {'outrider':>11} {'reference':>11} {'':<7} "
      f"{'ratio':>6} {'target':>6}")
for path, name in zip(sys.argv[1:], ("bindfs", "ext4")):
    with open(path) as file:
        rows = json.load(file)
    for row in rows:
        target = TARGETS.get(row["phase"])
        verdict = ""
        if target is not None:
            verdict = "" if row["ratio"] >= target else "  missed"
            missed += bool(verdict)
        print(f"{row['phase']:<14} {row['unit']:<9} {row['value']:>11.1f} "
              f"{row['against']:>11.1f} {name:<7} {row['ratio']:>6.2f} "
              f"{'' if target is None else format(target, '.2f'):>6}{verdict}")
sys.exit(1 if missed else 0)
PY
