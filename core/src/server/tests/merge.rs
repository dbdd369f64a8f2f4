//! Merges at their bounds: more inputs than the server's lists have entries, and
//! mounts that never come together.

use super::census::census;
use super::mount::Mount;
use super::{FSID, addr, block_policy, volume};
use crate::block;
use crate::block::Cache;
use crate::env::{Duration, Env};
use crate::errno::Errno;
use crate::format::*;
use crate::log::merge_worker::merge_request;
use crate::server::{Policy, Progress, ServerError, Store};
use std::rc::Rc;

/// A mount's work until there is none.
async fn merge_all(store: &Rc<Store>, env: &Env, rid: u64) {
    let meta = env.devices.open(crate::env::DeviceRole::Meta).unwrap();
    let policy = Rc::new(block_policy());
    loop {
        let request = match store.get_log_merge(rid).await {
            Err(ServerError::Refused(Errno::ENOENT)) => return,
            request => request.unwrap(),
        };
        let cache = Cache::new(meta.clone(), env.entropy.clone(), FSID, policy.clone());
        let comp = merge_request(&cache, &request).await;
        assert_eq!(comp.flags.get() & LOG_MERGE_COMPLETE_FLAG_ERROR, 0);
        store.commit_log_merge(rid, comp).await.unwrap();
    }
}

#[test]
fn a_merge_of_more_log_trees_than_a_list_has_entries_ends_in_one_commit() {
    const TREES: u64 = 180;
    let world = volume(11);
    // The shortest lists that a server works with.
    let blocks = block::Policy {
        list_max: 160,
        list_rotate: 100,
        meta_fill_lo: 140,
        meta_fill_target: 150,
        merge_fill: 60,
        commit_budget: 48,
        splice_unit: 24,
        move_budget: 46,
        free_budget: 8,
        free_commit_limit: 40,
        ..block_policy()
    };
    assert!(TREES > u64::from(blocks.list_max));
    world.block_on(async {
        let policy = Rc::new(blocks.clone());
        let env = world.env();
        let store = Store::open(&env, Policy::default(), policy, FSID);
        let store = store.await.unwrap();
        for rid in 5..5 + TREES {
            store.insert_mounted(rid, addr(1), false).await.unwrap();
            let mut mount = Mount::new(&world, rid, &blocks);
            mount.log = store.get_log_trees(rid).await.unwrap();
            let written = mount.build(&world, 2).await;
            store.commit_log_trees(rid, written.log).await.unwrap();
            while store.reclaim_pass(rid).await.unwrap() == Progress::More {}
            store.delete_mounted(&[rid]).await.unwrap();
        }
        // The second mount's first transaction has started a merge of the first one's tree,
        // which nobody works on: it ends first.
        store.insert_mounted(1, addr(1), false).await.unwrap();
        let mut mount = Mount::new(&world, 1, &blocks);
        mount.log = store.get_log_trees(1).await.unwrap();
        merge_all(&store, &world.env(), 1).await;
        let written = mount.build(&world, 2).await;
        store.commit_log_trees(1, written.log).await.unwrap();
        store.get_log_trees(1).await.unwrap();
        let before = census(&world.meta).unwrap();
        assert_eq!(before.logs.len() as u64, TREES + 1);
        merge_all(&store, &world.env(), 1).await;
        let after = census(&world.meta).unwrap();
        assert_eq!(after.logs.len(), 1, "all inputs are gone");
        while store.free_merged().await.unwrap() == Progress::More {}
    });
    census(&world.meta).map(|_| ()).unwrap();
}

#[test]
fn mounts_whose_commits_are_slow_are_waited_for_longer_and_longer() {
    let world = volume(12);
    world.block_on(async {
        let policy = Policy {
            finalize_height: 0,
            ..Policy::default()
        };
        let usual = policy.log_merge_wait_timeout;
        let blocks = Rc::new(block_policy());
        let store = Store::open(&world.env(), policy, blocks, FSID)
            .await
            .unwrap();
        store.set_clients(2);
        let mut mounts = Vec::new();
        for rid in [5, 6] {
            store.insert_mounted(rid, addr(1), false).await.unwrap();
            let mut mount = Mount::new(&world, rid, &block_policy());
            mount.log = store.get_log_trees(rid).await.unwrap();
            mounts.push(mount);
        }
        // Each comes back when the other has its next transaction open, having waited
        // for it in vain.
        let env = world.env();
        let mut waits = Vec::new();
        for turn in 0..40 {
            let mount = &mut mounts[turn % 2];
            let written = mount.build(&world, 2).await;
            store
                .commit_log_trees(mount.rid, written.log)
                .await
                .unwrap();
            let began = env.clock.now();
            mount.log = store.get_log_trees(mount.rid).await.unwrap();
            waits.push(env.clock.now().since(began));
        }
        assert!(waits[1] < usual * 2, "{waits:?}");
        assert!(waits[19] > usual * 5, "{waits:?}");
        assert!(waits.iter().all(|wait| *wait < usual * 12), "{waits:?}");
        // In the end one comes while the other still waits.
        for mount in &mounts {
            let written = mount.build(&world, 2).await;
            store
                .commit_log_trees(mount.rid, written.log)
                .await
                .unwrap();
        }
        let other = store.clone();
        let waiting = env.spawn("first", async move {
            other.get_log_trees(5).await.unwrap();
        });
        env.sleep(Duration::from_secs(1)).await;
        store.get_log_trees(6).await.unwrap();
        while !waiting.is_finished() {
            env.sleep(Duration::from_millis(10)).await;
        }
        let seen = census(&world.meta).unwrap();
        assert!(seen.logs.iter().any(LogTrees::is_finalized));
        merge_all(&store, &env, 5).await;
        let seen = census(&world.meta).unwrap();
        assert!(!seen.logs.iter().any(LogTrees::is_finalized));
    });
    census(&world.meta).map(|_| ()).unwrap();
}
