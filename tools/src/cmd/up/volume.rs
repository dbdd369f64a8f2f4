//! The volume of `outrider up`: two sparse files, and as many quorum slots as the
//! number of mounts needs.
//!
//! What can go wrong: slots that do not fit. One mount alone can never win an
//! election among three slots, so the slots of a cleanly unmounted volume are
//! changed to fit; those of a volume in use, or that was not unmounted cleanly, are
//! the word of its last mounts and stay.

use crate::block_on::{SystemEntropy, block_on, wall_now};
use crate::cmd::keygen::{create_key, read_key};
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use outrider_core::env::{DeviceRole, Entropy};
use outrider_core::errno::Errno;
use outrider_core::quorum::Slots;
use outrider_core::secure::{ClusterKey, KeyId};
use outrider_core::volume::{self, MIN_DEVICE_BYTES, MkfsOptions};
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

/// Quorum members among many mounts: enough to lose one.
const MEMBERS: usize = 3;
/// Where the search for free ports begins, by chance so that volumes made at the same
/// time do not choose the same: below the ports that the system gives to outgoing
/// connections, which would come and go.
const FIRST_PORTS: std::ops::Range<u16> = 17_000..30_000;

/// Makes the volume if it is not there, and fits its slots to `nodes` mounts.
/// Returns how many of them are quorum members: those of the lowest numbers. A new
/// volume gets a cluster key if `keyed`; one that is there and has none is refused.
pub fn settle(dir: &Path, nodes: usize, port: Option<u16>, keyed: bool) -> Result<usize, CmdError> {
    let (meta, data) = (dir.join("meta"), dir.join("data"));
    let wanted = nodes.min(MEMBERS);
    if !meta.exists() || !data.exists() {
        let key = match keyed {
            true => Some(make_key(dir)?),
            false => key(dir).as_deref().map(read_key).transpose()?,
        };
        let key = key.map(|key| key.id());
        make(&meta, &data, &free_slots(wanted, port)?, key)?;
        return Ok(wanted);
    }
    if keyed && key(dir).is_none() {
        let text = format!(
            "the volume in '{}' was made without a cluster key; `outrider keygen` makes one, and \
             `outrider change-cluster-key` gives it to a volume that is not mounted",
            dir.display()
        );
        return Err(CmdError::new(Errno::EEXIST, text));
    }
    fit(&meta, nodes, wanted, port)
}

/// The file of the volume's key, if it has one.
pub fn key(dir: &Path) -> Option<PathBuf> {
    let path = dir.join("cluster.key");
    path.exists()
        .then(|| std::path::absolute(&path).unwrap_or(path))
}

/// A key for a volume that is not made yet: one that is left of an earlier attempt
/// will do.
fn make_key(dir: &Path) -> Result<ClusterKey, CmdError> {
    match key(dir) {
        Some(path) => read_key(&path),
        None => create_key(&dir.join("cluster.key")),
    }
}

fn fit(meta: &Path, nodes: usize, wanted: usize, port: Option<u16>) -> Result<usize, CmdError> {
    let device = FileDevice::open(meta, Access::Exclusive)?;
    let sup = block_on(volume::read_super(&device, DeviceRole::Meta, None))?;
    let present: Vec<(usize, SocketAddrV4)> = sup.qconf.present().collect();
    let numbers = present.iter().map(|(slot, _)| *slot);
    let fits = numbers.clone().eq(0..wanted);
    if fits && port.is_none() && present.iter().all(|(_, addr)| is_free(*addr)) {
        return Ok(wanted);
    }
    match block_on(volume::check_not_in_use(&device, &sup)) {
        Ok(()) => {
            block_on(volume::change_quorum_config(
                &device,
                &free_slots(wanted, port)?,
            ))?;
            Ok(wanted)
        }
        // Its ports may be taken by mounts that still run here; they will say so.
        Err(_) if fits => Ok(wanted),
        Err(why) => {
            let members = numbers.clone().max().map_or(0, |last| last + 1);
            let votes = Slots::of(&sup.qconf).votes_needed();
            if numbers.filter(|slot| *slot < nodes).count() < votes {
                return Err(CmdError::new(
                    Errno::EBUSY,
                    format!(
                        "the volume has {} quorum slots and is in use or was not unmounted \
                         cleanly ({why}); if nobody uses it run `outrider up --nodes {members}` once",
                        present.len()
                    ),
                ));
            }
            Ok(members.min(nodes))
        }
    }
}

/// Makes the files under other names first, so that a half-made volume is never
/// taken for a volume.
fn make(
    meta: &Path,
    data: &Path,
    slots: &[(u64, SocketAddrV4)],
    cluster_key: Option<KeyId>,
) -> Result<(), CmdError> {
    let sparse = |path: &Path| -> Result<PathBuf, CmdError> {
        let path = path.with_extension("new");
        let file = File::create(&path).map_err(|e| CmdError::io("create", &path, &e))?;
        file.set_len(MIN_DEVICE_BYTES)
            .map_err(|e| CmdError::io("extend", &path, &e))?;
        Ok(path)
    };
    let (new_meta, new_data) = (sparse(meta)?, sparse(data)?);
    let options = MkfsOptions {
        slots: slots.to_vec(),
        cluster_key,
        // Whoever makes it is to use it, root or not.
        owner: (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        ),
        ..MkfsOptions::default()
    };
    let entropy = entropy()?;
    {
        let meta_device = FileDevice::open(&new_meta, Access::Exclusive)?;
        let data_device = FileDevice::open(&new_data, Access::Exclusive)?;
        let made = volume::mkfs(&meta_device, &data_device, &entropy, wall_now(), &options);
        block_on(made)?;
    }
    for (from, to) in [(&new_data, data), (&new_meta, meta)] {
        fs::rename(from, to).map_err(|e| CmdError::io("rename", from, &e))?;
    }
    Ok(())
}

fn entropy() -> Result<SystemEntropy, CmdError> {
    SystemEntropy::new().map_err(|e| CmdError::new(Errno::EIO, format!("random numbers: {e}")))
}

/// Whether both sockets of a quorum slot could be bound now.
fn is_free(addr: SocketAddrV4) -> bool {
    UdpSocket::bind(addr).is_ok() && TcpListener::bind(addr).is_ok()
}

/// Slots 0 to `count - 1` at 127.0.0.1, 127.0.0.2 and so on, each with a port that
/// nobody uses now: an address of its own lets a firewall cut off one mount.
fn free_slots(count: usize, port: Option<u16>) -> Result<Vec<(u64, SocketAddrV4)>, CmdError> {
    let chosen = || -> Result<u16, CmdError> {
        let random = entropy()?.next_u64() % FIRST_PORTS.len() as u64;
        Ok(FIRST_PORTS.start + random as u16)
    };
    let mut ports = port.map_or_else(chosen, Ok)?..u16::MAX;
    (0..count)
        .map(|slot| {
            let host = Ipv4Addr::new(127, 0, 0, 1 + slot as u8);
            let port = ports.find(|port| is_free(SocketAddrV4::new(host, *port)));
            let port = port.ok_or_else(|| {
                CmdError::new(Errno(libc::EADDRINUSE), format!("no free port on {host}"))
            })?;
            Ok((slot as u64, SocketAddrV4::new(host, port)))
        })
        .collect()
}

/// Who leads by the quorum blocks, which is by slot and so by number: the slot and
/// the term. `None` while nobody does, or nothing can be read.
pub fn leader(meta: &Path) -> Option<(usize, u64)> {
    use outrider_core::format::QuorumEventKind::{Elect, Fence, Stop};
    let device = FileDevice::open(meta, Access::Read).ok()?;
    let sup = block_on(volume::read_super(&device, DeviceRole::Meta, None)).ok()?;
    let fsid = sup.hdr.fsid.get();
    let leads = |(slot, _)| {
        let block = block_on(volume::read_quorum_block(&device, fsid, slot)).ok()?;
        let term = |kind| block.event(kind).term.get();
        // The server is up, and was not stopped since.
        (term(Fence) == term(Elect) && term(Elect) > term(Stop)).then(|| (slot, term(Elect)))
    };
    let leaders = sup.qconf.present().filter_map(leads);
    leaders.max_by_key(|(_, term)| *term)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(meta: &Path) -> Vec<SocketAddrV4> {
        let device = FileDevice::open(meta, Access::Read).unwrap();
        let sup = block_on(volume::read_super(&device, DeviceRole::Meta, None)).unwrap();
        sup.qconf.present().map(|(_, addr)| addr).collect()
    }

    #[test]
    fn a_clean_volume_gets_as_many_slots_as_fit_and_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let meta = dir.path().join("meta");
        assert_eq!(settle(dir.path(), 5, Some(21_210), false).unwrap(), 3);
        let first = slots(&meta);
        assert_eq!(first.len(), 3);
        assert!(first.iter().all(|addr| addr.ip().is_loopback()));
        assert_eq!(settle(dir.path(), 4, None, false).unwrap(), 3);
        assert_eq!(slots(&meta), first, "addresses are remembered");
        assert_eq!(settle(dir.path(), 1, None, false).unwrap(), 1);
        assert_eq!(slots(&meta).len(), 1);
        assert_eq!(leader(&meta), None);
    }

    #[test]
    fn a_volume_is_made_with_a_key_or_stays_without() {
        let dir = tempfile::tempdir().unwrap();
        settle(dir.path(), 1, Some(21_250), true).unwrap();
        let file = key(dir.path()).expect("a key was made");
        let cluster_key = read_key(&file).unwrap();
        let device = FileDevice::open(&dir.path().join("meta"), Access::Read).unwrap();
        let sup = block_on(volume::read_super(&device, DeviceRole::Meta, None)).unwrap();
        let fsid = sup.hdr.fsid.get();
        block_on(volume::check_key(&device, fsid, Some(&cluster_key))).unwrap();
        assert!(block_on(volume::check_key(&device, fsid, None)).is_err());
        drop(device);
        for keyed in [true, false] {
            settle(dir.path(), 1, None, keyed).unwrap();
        }
        let plain = tempfile::tempdir().unwrap();
        settle(plain.path(), 1, Some(21_260), false).unwrap();
        assert!(settle(plain.path(), 1, None, true).is_err());
        assert_eq!(key(plain.path()), None);
    }

    #[test]
    fn a_taken_port_is_replaced_on_a_clean_volume() {
        let dir = tempfile::tempdir().unwrap();
        let meta = dir.path().join("meta");
        settle(dir.path(), 2, Some(21_230), false).unwrap();
        let before = slots(&meta);
        let _taken = TcpListener::bind(before[1]).unwrap();
        settle(dir.path(), 2, None, false).unwrap();
        let after = slots(&meta);
        assert_ne!(after[1], before[1]);
        assert_eq!(after.len(), 2);
    }
}
