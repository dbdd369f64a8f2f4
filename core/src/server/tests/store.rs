//! Single commands against the store.

use super::census::census;
use super::mount::Mount;
use super::{MIB, addr, block_policy, open, volume};
use crate::errno::Errno;
use crate::format::*;
use crate::server::{Progress, ServerError};

fn errno<T: std::fmt::Debug>(result: Result<T, ServerError>) -> Errno {
    result.expect_err("an error").errno()
}

#[test]
fn a_fresh_volume_opens_and_gives_out_inodes_once() {
    let world = volume(1);
    world.block_on(async {
        let store = open(&world).await;
        let first = store.alloc_inodes(10_240).await.unwrap();
        assert_eq!((first.ino.get(), first.nr.get()), (FIRST_INO, 10_240));
        let store = open(&world).await;
        let next = store.alloc_inodes(1).await.unwrap();
        assert_eq!(next.ino.get(), FIRST_INO + 10_240);
        assert_eq!(store.roots().fs_root, store.stable().fs_root);
        let statfs = store.statfs().await.unwrap();
        assert_eq!(statfs.inode_count.get(), 1);
        let super_seq = store.stable().seq.get();
        assert_eq!(store.last_seq().await.unwrap(), super_seq.saturating_sub(1));
    });
    census(&world.meta).map(|_| ()).unwrap();
}

#[test]
fn inode_numbers_end_without_wrapping() {
    let world = volume(1);
    world.block_on(async {
        let store = open(&world).await;
        let all = store.alloc_inodes(u64::MAX).await.unwrap();
        assert_eq!(all.nr.get(), u64::MAX - FIRST_INO);
        assert_eq!(store.alloc_inodes(5).await.unwrap().nr.get(), 0);
    });
}

#[test]
fn transactions_open_once_and_commit_once() {
    let world = volume(2);
    world.block_on(async {
        let store = open(&world).await;
        assert_eq!(
            errno(store.get_log_trees(5).await),
            Errno::EINVAL,
            "not mounted"
        );
        store.insert_mounted(5, addr(1), true).await.unwrap();
        store.insert_mounted(5, addr(1), true).await.unwrap();
        let mut mount = Mount::new(&world, 5, &block_policy());
        mount.log = store.get_log_trees(5).await.unwrap();
        let log = mount.log;
        assert_eq!((log.rid.get(), log.nr.get(), log.flags.get()), (5, 1, 0));
        assert!(log.is_open() && log.meta_avail.first_nr.get() > 0);
        assert!(log.data_avail.total_len.get() >= block_policy().data_fill_lo);
        assert_eq!(store.get_log_trees(5).await.unwrap(), log, "a resend");
        assert_eq!(store.last_seq().await.unwrap(), log.get_trans_seq.get() - 1);

        let written = mount.build(&world, 20).await;
        assert_eq!(
            errno(store.commit_log_trees(6, written.log).await),
            Errno::EIO
        );
        let mut other = written.log;
        other.nr += 1;
        assert_eq!(errno(store.commit_log_trees(5, other).await), Errno::ENOENT);
        let mut other = written.log;
        other.get_trans_seq += 1;
        assert_eq!(errno(store.commit_log_trees(5, other).await), Errno::EIO);
        store.commit_log_trees(5, written.log).await.unwrap();
        let before = store.stable().logs_root;
        store.commit_log_trees(5, written.log).await.unwrap();
        assert_eq!(store.stable().logs_root, before, "a resend changes nothing");
        let next = store.get_log_trees(5).await.unwrap();
        assert!(next.get_trans_seq > log.get_trans_seq);
        assert_eq!(next.item_root, written.log.item_root);
        assert_eq!(next.meta_freed, AllocListHead::default());
    });
    census(&world.meta).map(|_| ()).unwrap();
}

#[test]
fn a_reclaimed_mount_is_gone_but_for_its_items() {
    let world = volume(3);
    world.block_on(async {
        let store = open(&world).await;
        store.insert_mounted(5, addr(1), false).await.unwrap();
        let mut mount = Mount::new(&world, 5, &block_policy());
        mount.log = store.get_log_trees(5).await.unwrap();
        let written = mount.build(&world, 20).await;
        store.commit_log_trees(5, written.log).await.unwrap();
        mount.log = store.get_log_trees(5).await.unwrap();
        let lost = mount.build(&world, 20).await;
        for _ in 0..2 {
            while store.reclaim_pass(5).await.unwrap() == Progress::More {}
            store.delete_mounted(&[5]).await.unwrap();
        }
        assert!(!store.is_mounted(5).await.unwrap());
        assert_eq!(errno(store.commit_log_trees(5, lost.log).await), Errno::EIO);
        assert_eq!(errno(store.get_log_trees(5).await), Errno::EINVAL);
    });
    let seen = census(&world.meta).unwrap();
    assert_eq!(seen.logs.len(), 1);
    assert!(seen.logs[0].is_finalized());
    assert!(seen.mounted.is_empty());
}

#[test]
fn options_are_checked_and_resize_only_grows() {
    let world = volume(4);
    world.block_on(async {
        let store = open(&world).await;
        let mut wanted = VolumeOptions::default();
        store.set_volopt(wanted).await.unwrap();
        wanted.set_bits = 2.into();
        assert_eq!(errno(store.set_volopt(wanted).await), Errno::EINVAL);
        assert_eq!(errno(store.clear_volopt(wanted).await), Errno::EINVAL);
        wanted.set_bits = VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT.into();
        wanted.data_alloc_zone_blocks = 5.into();
        assert_eq!(errno(store.set_volopt(wanted).await), Errno::EINVAL);
        store.clear_volopt(wanted).await.unwrap();
        assert_eq!(store.volopt(), VolumeOptions::default());

        let (meta, data) = (
            (512 * MIB) >> LG_BLOCK_SHIFT,
            (1024 * MIB) >> SM_BLOCK_SHIFT,
        );
        let size = |meta: u64, data: u64| NetResizeDevices {
            new_total_meta_blocks: meta.into(),
            new_total_data_blocks: data.into(),
        };
        store.resize(size(0, 0)).await.unwrap();
        store.resize(size(meta, data)).await.unwrap();
        assert_eq!(errno(store.resize(size(meta - 1, 0)).await), Errno::EINVAL);
        assert_eq!(errno(store.resize(size(0, data + 1)).await), Errno::EINVAL);
    });
    census(&world.meta).map(|_| ()).unwrap();
}

#[test]
fn a_volume_grows_into_larger_devices() {
    use crate::env::WallTime;
    use crate::env::testing::TestWorld;
    use crate::volume::{MkfsOptions, mkfs};
    let world = TestWorld::new(9, 512 * MIB, 512 * MIB);
    let options = MkfsOptions {
        slots: vec![(0, addr(19700))],
        allow_small: true,
        fsid: Some(super::FSID),
        max_meta_bytes: Some(256 * MIB),
        max_data_bytes: Some(256 * MIB),
        ..MkfsOptions::default()
    };
    world.block_on(async {
        let now = WallTime { sec: 1, nsec: 0 };
        let (meta, data) = (world.meta.handle(), world.data.handle());
        mkfs(&*meta, &*data, &*world.entropy, now, &options)
            .await
            .unwrap();
        let store = open(&world).await;
        let wanted = NetResizeDevices {
            new_total_meta_blocks: ((512 * MIB) >> LG_BLOCK_SHIFT).into(),
            new_total_data_blocks: ((512 * MIB) >> SM_BLOCK_SHIFT).into(),
        };
        for _ in 0..2 {
            store.resize(wanted).await.unwrap();
            assert_eq!(
                store.stable().total_meta_blocks,
                wanted.new_total_meta_blocks
            );
            assert_eq!(
                store.stable().total_data_blocks,
                wanted.new_total_data_blocks
            );
        }
    });
    let seen = census(&world.meta).unwrap();
    assert_eq!(
        seen.free_data,
        ((512 * MIB) >> SM_BLOCK_SHIFT) - DATA_DEV_START_BLKNO
    );
}

#[test]
fn a_failed_super_write_stops_the_server() {
    let world = volume(5);
    world.block_on(async {
        let store = open(&world).await;
        let offset = SUPER_BLKNO << SM_BLOCK_SHIFT;
        world.meta.set_fault(Some(Box::new(move |op| {
            op.op == "write" && op.offset == offset
        })));
        assert!(store.alloc_inodes(1).await.is_err());
        world.meta.set_fault(None);
        assert!(store.failure().is_some());
        assert!(matches!(
            store.alloc_inodes(1).await,
            Err(ServerError::Stopping)
        ));
        store.close().await;
    });
    census(&world.meta).map(|_| ()).unwrap();
}

#[test]
fn a_failed_block_write_is_answered_and_written_again() {
    let world = volume(6);
    world.block_on(async {
        let store = open(&world).await;
        for kind in ["write", "flush"] {
            let mut failed = false;
            world.meta.set_fault(Some(Box::new(move |op| {
                op.op == kind && !std::mem::replace(&mut failed, true)
            })));
            assert!(store.insert_mounted(5, addr(1), true).await.is_err());
            assert!(store.failure().is_none());
            store.insert_mounted(5, addr(1), true).await.unwrap();
            world.meta.set_fault(None);
            while store.reclaim_pass(5).await.unwrap() == Progress::More {}
            store.delete_mounted(&[5]).await.unwrap();
        }
    });
    census(&world.meta).map(|_| ()).unwrap();
}

#[test]
fn open_transactions_hold_the_last_seq_back() {
    let world = volume(7);
    world.block_on(async {
        let store = open(&world).await;
        for rid in [1, 2] {
            store.insert_mounted(rid, addr(1), false).await.unwrap();
        }
        let first = store.get_log_trees(1).await.unwrap();
        let second = store.get_log_trees(2).await.unwrap();
        assert_eq!(
            store.last_seq().await.unwrap(),
            first.get_trans_seq.get() - 1
        );
        store.commit_log_trees(1, first).await.unwrap();
        assert_eq!(
            store.last_seq().await.unwrap(),
            second.get_trans_seq.get() - 1
        );
    });
}
