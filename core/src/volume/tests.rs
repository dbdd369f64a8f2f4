//! mkfs against volumes of the original, and the offline changes.

use super::golden::{Golden, golden};
use super::*;
use crate::env::testing::{MemDevice, TestEntropy, TestWorld, block_on};
use crate::env::{DeviceRole, WallTime};
use crate::errno::Errno;
use crate::format::*;
use std::mem::offset_of;
use std::net::SocketAddrV4;
use zerocopy::IntoBytes;

const GIB: u64 = 1 << 30;

fn addr(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, port)
}

fn options() -> MkfsOptions {
    MkfsOptions {
        slots: vec![(0, addr(19700))],
        allow_small: true,
        ..MkfsOptions::default()
    }
}

fn small_volume() -> Golden {
    let volume = Golden {
        meta: MemDevice::new(8 * GIB),
        data: MemDevice::new(8 * GIB),
    };
    let entropy = TestEntropy::new(1);
    let now = WallTime { sec: 1, nsec: 0 };
    block_on(mkfs(
        &*volume.meta.handle(),
        &*volume.data.handle(),
        &*entropy,
        now,
        &options(),
    ))
    .expect("mkfs");
    volume
}

fn super_of(dev: &MemDevice) -> SuperBlock {
    SuperBlock::from_block(&dev.peek(SUPER_BLKNO << SM_BLOCK_SHIFT, SM_BLOCK_SIZE))
}

/// Puts right what the original leaves undefined or wrong in a block of mkfs.
fn normalize(block: &mut [u8]) {
    let header = read_header(block);
    match Magic::from_value(header.magic.get()) {
        Some(Magic::Super) => {
            let mut sb = SuperBlock::from_block(block);
            sb.qconf
                .slots
                .iter_mut()
                .for_each(|slot| slot.rest = [0; 24]);
            block[..size_of::<SuperBlock>()].copy_from_slice(sb.as_bytes());
        }
        Some(Magic::Btree) => {
            block[BTREE_HEAD_SIZE + offset_of!(AvlNode, height)] = 1;
            block[BTREE_HEAD_SIZE + BTREE_ITEM_SIZE + offset_of!(AvlNode, height)] = 2;
        }
        _ => return,
    }
    seal(block);
}

/// mkfs with the identity of a golden volume must write the same bytes.
fn same_as_golden(name: &str, allow_small: bool) {
    let want = golden(name);
    let sb = super_of(&want.meta);
    let leaf = want.meta.peek(2 << LG_BLOCK_SHIFT, LG_BLOCK_SIZE);
    let size = Inode::size_for(sb.fmt_vers.get());
    let value = &leaf[BTREE_HASH_START - size..BTREE_HASH_START];
    let inode = Inode::from_value(value, sb.fmt_vers.get()).expect("the root inode");
    let options = MkfsOptions {
        fmt_vers: sb.fmt_vers.get(),
        slots: sb.qconf.present().map(|(nr, a)| (nr as u64, a)).collect(),
        allow_small,
        fsid: Some(sb.hdr.fsid.get()),
        uuid: Some(sb.uuid),
        ..MkfsOptions::default()
    };
    let now = WallTime {
        sec: inode.ctime.sec.get(),
        nsec: inode.ctime.nsec.get(),
    };
    let meta = MemDevice::new(want.meta.handle().size());
    let data = MemDevice::new(want.data.handle().size());
    let entropy = TestEntropy::new(1);
    block_on(mkfs(
        &*meta.handle(),
        &*data.handle(),
        &*entropy,
        now,
        &options,
    ))
    .expect("mkfs");
    let compare = |ours: &MemDevice, theirs: &MemDevice, blkno: u64, size: usize| {
        let offset = blkno * size as u64;
        let (ours, mut theirs) = (ours.peek(offset, size), theirs.peek(offset, size));
        normalize(&mut theirs);
        let differ = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!(
            differ, None,
            "{name}: first different byte of block {blkno}"
        );
    };
    for blkno in 0..32 {
        compare(&meta, &want.meta, blkno, SM_BLOCK_SIZE);
    }
    for blkno in 2..1100 {
        compare(&meta, &want.meta, blkno, LG_BLOCK_SIZE);
    }
    for blkno in 0..64 {
        compare(&data, &want.data, blkno, SM_BLOCK_SIZE);
    }
}

#[test]
fn mkfs_writes_what_the_original_writes() {
    same_as_golden("a", false);
    same_as_golden("a1", false);
    same_as_golden("asmall", true);
}

#[test]
fn mkfs_refuses_bad_options() {
    let entropy = TestEntropy::new(1);
    let plan = |meta, data, o: &MkfsOptions| plan_mkfs(meta, data, &*entropy, o);
    let big = 64 * GIB;
    assert!(plan(big, big, &options()).is_ok());
    let strict = MkfsOptions {
        allow_small: false,
        ..options()
    };
    assert!(plan(big, big, &strict).is_ok());
    assert!(matches!(
        plan(big - 4096, big, &strict),
        Err(VolumeError::TooSmall {
            can_allow: true,
            ..
        })
    ));
    assert!(matches!(
        plan(1032 << 16, big, &options()),
        Err(VolumeError::TooSmall {
            can_allow: false,
            ..
        })
    ));
    assert!(plan(1033 << 16, 65 << 12, &options()).is_ok());
    assert!(plan(big, 64 << 12, &options()).is_err());
    let slots = |slots: Vec<(u64, SocketAddrV4)>| MkfsOptions { slots, ..options() };
    assert_eq!(plan(big, big, &slots(vec![])), Err(VolumeError::NoSlots));
    assert_eq!(
        plan(big, big, &slots(vec![(15, addr(1))])),
        Err(VolumeError::SlotRange(15))
    );
    assert_eq!(
        plan(big, big, &slots(vec![(3, addr(1)), (3, addr(2))])),
        Err(VolumeError::SlotTwice(3))
    );
    assert_eq!(
        plan(big, big, &slots(vec![(3, addr(1)), (4, addr(1))])),
        Err(VolumeError::SlotAddress(3, 4, addr(1)))
    );
    for bad in ["0.0.0.0:1", "255.255.255.255:1", "1.2.3.4:0"] {
        let bad = slots(vec![(0, bad.parse().unwrap())]);
        assert!(matches!(
            plan(big, big, &bad),
            Err(VolumeError::SlotBadAddress(..))
        ));
    }
    let zone = |zone| MkfsOptions {
        data_alloc_zone_blocks: Some(zone),
        ..options()
    };
    let blocks = big >> 12;
    assert!(plan(big, big, &zone(DATA_ZONE_BLOCKS_MIN - 1)).is_err());
    assert!(plan(big, big, &zone(DATA_ZONE_BLOCKS_MIN)).is_ok());
    assert!(plan(big, big, &zone(blocks)).is_ok());
    assert!(plan(big, big, &zone(blocks + 1)).is_err());
    assert!(
        plan(
            big,
            big,
            &MkfsOptions {
                fmt_vers: 3,
                ..options()
            }
        )
        .is_err()
    );
    let limits = MkfsOptions {
        max_meta_bytes: Some(10 * GIB + 5),
        max_data_bytes: Some(1 << 60),
        ..options()
    };
    let made = plan(big, big, &limits).unwrap();
    assert_eq!(made.sb.total_meta_blocks.get(), (10 * GIB) >> 16);
    assert_eq!(made.sb.total_data_blocks.get(), blocks);
    assert_eq!(made.notices.len(), 3);
}

#[test]
fn sizes_of_the_specs_example() {
    let entropy = TestEntropy::new(1);
    let made = plan_mkfs(2 * GIB, 8 * GIB, &*entropy, &options()).unwrap();
    let lens = made.sb.meta_alloc.map(|root| root.total_len.get());
    assert_eq!(lens, [15869, 15868]);
    assert_eq!(made.sb.data_alloc.total_len.get(), 2_097_088);
    assert_eq!(made.sb.uuid[6] >> 4, 4);
}

#[test]
fn mount_checks_name_what_is_wrong() {
    let world = TestWorld::new(1, GIB, GIB);
    let clock = world.env().clock;
    let check = |v: &Golden| {
        world.block_on(read_mount_supers(
            &*v.meta.handle(),
            &*v.data.handle(),
            &*clock,
        ))
    };
    let good = small_volume();
    check(&good).expect("a fresh volume mounts");
    let swapped = Golden {
        meta: good.data.clone(),
        data: good.meta.clone(),
    };
    assert!(matches!(check(&swapped), Err(VolumeError::MetaFlag { .. })));
    let edit = |what: &dyn Fn(&mut SuperBlock)| {
        let v = Golden {
            meta: good.meta.snapshot(),
            data: good.data.snapshot(),
        };
        let mut sb = super_of(&v.data);
        what(&mut sb);
        set_super(&v.data, DeviceRole::Data, &sb);
        let e = check(&v).expect_err("an edited super is refused");
        assert_eq!(e.mount_errno(), Errno::EINVAL);
        e
    };
    let mismatch = |e: VolumeError| matches!(e, VolumeError::Mismatch { .. });
    assert!(mismatch(edit(&|sb| sb.uuid[3] ^= 1)));
    assert!(mismatch(edit(&|sb| sb.hdr.fsid.set(7))));
    assert!(mismatch(edit(&|sb| sb.fmt_vers.set(1))));
    assert!(matches!(
        edit(&|sb| sb.fmt_vers.set(3)),
        VolumeError::FormatVersion { .. }
    ));
    assert!(matches!(
        edit(&|sb| sb.total_data_blocks.set(1 << 40)),
        VolumeError::DeviceTooSmall { .. }
    ));
    let torn = good.meta.snapshot();
    let mut block = torn.peek(65536, 4096);
    block[72] ^= 1;
    torn.poke(65536, &block);
    let v = Golden {
        meta: torn,
        data: good.data.clone(),
    };
    assert!(matches!(check(&v), Err(VolumeError::Header { .. })));
}

#[test]
fn a_super_being_overwritten_is_read_again() {
    let good = small_volume();
    let image = good.meta.peek(65536, 4096);
    let mut torn = image.clone();
    torn[2000] ^= 0xff;
    good.meta.poke(65536, &torn);
    let world = TestWorld::new(1, GIB, GIB);
    let meta = good.meta.clone();
    let env = world.env();
    let reads = std::cell::Cell::new(0);
    good.meta.set_fault(Some(Box::new(move |_| {
        reads.set(reads.get() + 1);
        if reads.get() == 3 {
            meta.poke(65536, &image);
        }
        false
    })));
    let dev = good.meta.handle();
    world
        .block_on(read_super_retrying(
            &*dev,
            DeviceRole::Meta,
            None,
            &*env.clock,
        ))
        .expect("the third read is good");
    good.meta.set_fault(None);
}

#[test]
fn format_version_goes_up_once() {
    let v = golden("a1");
    let (meta, data) = (v.meta.handle(), v.data.handle());
    let change = |target| block_on(change_format_version(&*meta, &*data, target));
    assert_eq!(change(1), Ok(ChangeOutcome::Unchanged));
    assert_eq!(change(2), Ok(ChangeOutcome::Changed));
    assert_eq!(super_of(&v.meta).fmt_vers.get(), 2);
    assert_eq!(super_of(&v.data).fmt_vers.get(), 2);
    assert_eq!(change(2), Ok(ChangeOutcome::Unchanged));
    assert_eq!(change(1).unwrap_err().errno(), Errno::EPERM);
    assert_eq!(change(3).unwrap_err().errno(), Errno::EINVAL);
}

#[test]
fn an_interrupted_format_change_is_finished_by_a_second_run() {
    let v = golden("a1");
    v.data.set_fault(Some(Box::new(|op| op.op == "write")));
    let change = || {
        block_on(change_format_version(
            &*v.meta.handle(),
            &*v.data.handle(),
            2,
        ))
    };
    assert_eq!(change().unwrap_err().errno(), Errno::EIO);
    assert_eq!(super_of(&v.data).fmt_vers.get(), 1);
    v.data.set_fault(None);
    assert_eq!(change(), Ok(ChangeOutcome::Changed));
    assert_eq!(super_of(&v.data).fmt_vers.get(), 2);
}

fn change_slots(dev: &MemDevice, nr: u64) -> Result<SuperBlock, VolumeError> {
    block_on(change_quorum_config(&*dev.handle(), &[(nr, addr(5))]))
}

fn set_super(dev: &MemDevice, role: DeviceRole, sb: &SuperBlock) {
    block_on(write_super(&*dev.handle(), role, sb)).expect("a write");
}

/// Makes slot 0's quorum block look like a running agent's.
fn begin_quorum(v: &Golden) {
    let blkno = QUORUM_BLKNO;
    let mut block = v.meta.peek(blkno << SM_BLOCK_SHIFT, SM_BLOCK_SIZE);
    block[offset_of!(QuorumBlock, write_nr)] = 1;
    block[offset_of!(QuorumBlock, events)] = 1;
    seal(&mut block);
    v.meta.poke(blkno << SM_BLOCK_SHIFT, &block);
}

#[test]
fn volumes_in_use_are_refused() {
    let v = small_volume();
    begin_quorum(&v);
    let meta = v.meta.handle();
    assert_eq!(change_slots(&v.meta, 1).unwrap_err().errno(), Errno::EBUSY);
    assert!(matches!(
        block_on(verify_empty_data_device(&*meta, None)),
        Err(VolumeError::QuorumActive { slot: 0, .. })
    ));
    let v = small_volume();
    let mut sb = super_of(&v.meta);
    sb.mounted_clients = BtreeRoot::new(BlockRef::new(5000, 1), 1);
    set_super(&v.meta, DeviceRole::Meta, &sb);
    assert_eq!(change_slots(&v.meta, 1), Err(VolumeError::MountedClients));
}

#[test]
fn quorum_slots_are_replaced() {
    let v = small_volume();
    let sb = change_slots(&v.meta, 4).unwrap();
    assert_eq!(sb.qconf.version.get(), 2);
    let stored = super_of(&v.meta);
    assert_eq!(stored.qconf.present().collect::<Vec<_>>(), [(4, addr(5))]);
    assert!(matches!(
        change_slots(&v.data, 4),
        Err(VolumeError::MetaFlag { .. })
    ));
}

#[test]
fn an_empty_data_device_takes_over() {
    let v = small_volume();
    let fresh = MemDevice::new(8 * GIB);
    let (meta, new) = (v.meta.handle(), fresh.handle());
    block_on(verify_empty_data_device(&*meta, None)).unwrap();
    block_on(prepare_empty_data_device(&*meta, &*new)).unwrap();
    let world = TestWorld::new(1, GIB, GIB);
    let clock = world.env().clock;
    world
        .block_on(read_mount_supers(&*meta, &*new, &*clock))
        .expect("the new pair mounts");
    let small = MemDevice::new(8 * GIB - 4096);
    assert!(matches!(
        block_on(prepare_empty_data_device(&*meta, &*small.handle())),
        Err(VolumeError::DeviceTooSmall { .. })
    ));
    let mut sb = super_of(&v.meta);
    sb.data_alloc.total_len -= 3;
    block_on(write_super(&*meta, DeviceRole::Meta, &sb)).unwrap();
    assert_eq!(
        block_on(prepare_empty_data_device(&*meta, &*new)),
        Err(VolumeError::DataInUse { used: 3 })
    );
}
