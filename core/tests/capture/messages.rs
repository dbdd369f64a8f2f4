//! Reads each message's payload as the structure of its command (spec 08 section 7)
//! and writes it again.

use outrider_core::format::{
    DiskKey, Key, LogMergeComplete, LogMergeRequest, LogTrees, NetCmd, NetGreeting, NetInodeAlloc,
    NetLock, NetLockRecover, NetResizeDevices, NetRoots, NetStatfs, OpenInoMap, OpenInoMapArgs,
    SrchCompact, VolumeOptions,
};
use outrider_core::locks::Mode;
use outrider_core::wire::Frame;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A payload as its structure.
pub trait Judge: FromBytes + IntoBytes + KnownLayout + Immutable {
    /// What must hold of the fields.
    fn judge(&self) {}
}

fn same_key(key: &DiskKey) -> Key {
    let native = Key::from_bytes(key.as_bytes().try_into().expect("32 bytes"));
    let bytes = native.to_bytes();
    assert_eq!(bytes, key.as_bytes(), "a key comes back as itself");
    native
}

impl Judge for NetGreeting {}
impl Judge for NetInodeAlloc {
    fn judge(&self) {
        assert!(self.ino.get() > 0 && self.nr.get() > 0);
    }
}
impl Judge for LogTrees {
    fn judge(&self) {
        assert!(self.rid.get() != 0 && self.nr.get() != 0);
        assert!(self.get_trans_seq.get() > 0);
    }
}
impl Judge for NetRoots {}
impl Judge for NetLock {
    fn judge(&self) {
        same_key(&self.key);
        for mode in [self.old_mode, self.new_mode] {
            assert!(Mode::from_wire(mode).is_some(), "mode {mode}");
        }
    }
}
impl Judge for SrchCompact {
    fn judge(&self) {
        assert!(usize::from(self.nr) <= self.input.len());
    }
}
impl Judge for LogMergeRequest {
    fn judge(&self) {
        assert!(same_key(&self.start) <= same_key(&self.end));
        assert!(self.rid.get() != 0);
    }
}
impl Judge for LogMergeComplete {
    fn judge(&self) {
        assert!(same_key(&self.start) <= same_key(&self.end));
        same_key(&self.remain);
    }
}
impl Judge for OpenInoMapArgs {}
impl Judge for OpenInoMap {}
impl Judge for VolumeOptions {}
impl Judge for NetResizeDevices {}
impl Judge for NetStatfs {
    fn judge(&self) {
        assert!(self.free_meta_blocks.get() <= self.total_meta_blocks.get());
        assert!(self.free_data_blocks.get() <= self.total_data_blocks.get());
    }
}
impl Judge for DiskKey {
    fn judge(&self) {
        same_key(self);
    }
}
impl Judge for zerocopy::little_endian::U64 {}

fn one<T: Judge>(payload: &[u8]) -> Vec<u8> {
    let value = T::read_from_bytes(payload).unwrap_or_else(|_| {
        let (name, want) = (std::any::type_name::<T>(), size_of::<T>());
        panic!("{name} has {want} bytes, not {}", payload.len())
    });
    value.judge();
    value.as_bytes().to_vec()
}

fn recover(payload: &[u8]) -> Vec<u8> {
    let (head, rest) = NetLockRecover::read_from_prefix(payload).expect("a count");
    let mut out = head.as_bytes().to_vec();
    let locks = rest.chunks_exact(size_of::<NetLock>());
    assert_eq!(locks.len(), usize::from(head.nr.get()));
    assert!(locks.remainder().is_empty());
    for lock in locks {
        out.extend(one::<NetLock>(lock));
    }
    out
}

/// Reads a message's payload as what it is and writes it again.
pub fn reencode(frame: &Frame) -> Vec<u8> {
    use NetCmd as C;
    let Ok(payload) = &frame.body else {
        assert!(frame.response);
        return Vec::new();
    };
    match (frame.cmd, frame.response) {
        (C::Greeting, _) => one::<NetGreeting>(payload),
        (C::AllocInodes, true) => one::<NetInodeAlloc>(payload),
        (C::AllocInodes, false) | (C::GetLastSeq, true) => {
            one::<zerocopy::little_endian::U64>(payload)
        }
        (C::GetLogTrees, true) | (C::CommitLogTrees, false) => one::<LogTrees>(payload),
        (C::GetRoots, true) => one::<NetRoots>(payload),
        (C::Lock, _) => one::<NetLock>(payload),
        (C::LockRecover, false) => one::<DiskKey>(payload),
        (C::LockRecover, true) => recover(payload),
        (C::SrchGetCompact, true) | (C::SrchCommitCompact, false) => one::<SrchCompact>(payload),
        (C::GetLogMerge, true) => one::<LogMergeRequest>(payload),
        (C::CommitLogMerge, false) => one::<LogMergeComplete>(payload),
        (C::OpenInoMap, false) => one::<OpenInoMapArgs>(payload),
        (C::OpenInoMap, true) => one::<OpenInoMap>(payload),
        (C::GetVolopt, true) | (C::SetVolopt | C::ClearVolopt, false) => {
            one::<VolumeOptions>(payload)
        }
        (C::ResizeDevices, false) => one::<NetResizeDevices>(payload),
        (C::Statfs, true) => one::<NetStatfs>(payload),
        (cmd, response) => {
            assert!(payload.is_empty(), "{cmd:?} {response} has no payload");
            Vec::new()
        }
    }
}
