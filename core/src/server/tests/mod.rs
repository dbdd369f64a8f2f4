//! The server over devices in memory, with mounts that do what mounts do to
//! blocks, power loss at any request, and a census of every block.

mod census;
mod crashes;
mod leaders;
mod merge;
mod mount;
mod protocol;
mod store;

use super::{Policy, Store};
use crate::block;
use crate::env::WallTime;
use crate::env::testing::TestWorld;
use crate::volume::{MkfsOptions, mkfs};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;

const MIB: u64 = 1 << 20;
const FSID: u64 = 0x1122_3344_5566_7788;

fn addr(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

/// A fresh volume with one quorum slot: 512 MiB of metadata, 1 GiB of data.
fn volume(seed: u64) -> TestWorld {
    volume_of(seed, 1)
}

/// A fresh volume with quorum slots 0 to `slots - 1`.
fn volume_of(seed: u64, slots: u64) -> TestWorld {
    let world = TestWorld::new(seed, 512 * MIB, 1024 * MIB);
    let options = MkfsOptions {
        slots: (0..slots)
            .map(|slot| (slot, addr(19700 + slot as u16)))
            .collect(),
        allow_small: true,
        fsid: Some(FSID),
        ..MkfsOptions::default()
    };
    let now = WallTime { sec: 1, nsec: 0 };
    let (meta, data) = (world.meta.handle(), world.data.handle());
    let made = mkfs(&*meta, &*data, &*world.entropy, now, &options);
    world.block_on(made).expect("mkfs");
    world
}

/// A reserve that these small volumes do not reach, and budgets that do not last.
fn block_policy() -> block::Policy {
    block::Policy {
        reserve_server: 100,
        reserve_client: 100,
        move_budget: 61,
        merge_dirty_blocks: 4,
        ..block::Policy::small()
    }
}

async fn open(world: &TestWorld) -> Rc<Store> {
    let policy = Rc::new(block_policy());
    Store::open(&world.env(), Policy::default(), policy, FSID)
        .await
        .expect("the store opens")
}
