//! The medium of a simulated device: which bytes are there now, and which would
//! be there after a crash. No time and no tasks: `backend::disk` adds them.
//!
//! The unit is the 4 KiB sector. Each sector has a durable content and, until a
//! flush (or a forced unit access) settles it, a list of later contents that a
//! power loss may or may not keep: any of them, or none, each sector by itself.
//! After a failed flush a content may be *doomed*: it reads back until the
//! crash, and no later flush makes it durable, as on a system that marks pages
//! clean after a failed write-back. That is the machine's own doing: what other
//! machines have written is not doomed by it.

use crate::rng::Stream;
use crate::trace::{Digest, digest_of_long};
use outrider_core::env::{AlignedBuf, BlockDevice, DeviceError, IoBuf, LocalBoxFuture, WriteFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Bytes of a sector: what a write makes or loses as one.
pub const SECTOR: usize = 4096;

/// A sector's bytes: a piece of the buffer they were written from.
#[derive(Clone)]
struct Sector {
    buf: IoBuf,
    offset: u32,
}

impl Sector {
    fn bytes(&self) -> &[u8] {
        &self.buf[self.offset as usize..self.offset as usize + SECTOR]
    }
}

thread_local! {
    static ZEROS: IoBuf = Arc::new(AlignedBuf::zeroed(SECTOR));
}

/// The sectors of a buffer. Most of a metadata block is zeros, and blocks stay on the
/// medium when nothing refers to them any more: the zeros of all are one sector.
fn sectors(buf: &IoBuf) -> Vec<Sector> {
    let zero = ZEROS.with(Arc::clone);
    let is_zero = |piece: &[u8]| piece == &zero[..];
    let full = buf.chunks(SECTOR).filter(|piece| !is_zero(piece)).count();
    let kept = match full {
        0 => Arc::clone(&zero),
        full if full * SECTOR == buf.len() => Arc::clone(buf),
        full => {
            let mut kept = AlignedBuf::zeroed(full * SECTOR);
            let pieces = buf.chunks(SECTOR).filter(|piece| !is_zero(piece));
            for (to, piece) in kept.chunks_mut(SECTOR).zip(pieces) {
                to.copy_from_slice(piece);
            }
            Arc::new(kept)
        }
    };
    let mut offset = 0;
    let sector = |piece: &[u8]| {
        if is_zero(piece) {
            return Sector {
                buf: Arc::clone(&zero),
                offset: 0,
            };
        }
        offset += SECTOR as u32;
        Sector {
            buf: Arc::clone(&kept),
            offset: offset - SECTOR as u32,
        }
    };
    buf.chunks(SECTOR).map(sector).collect()
}

#[derive(Clone)]
struct Version {
    write: u64,
    /// The machine that wrote it.
    by: u32,
    doomed: bool,
    sector: Sector,
}

/// Which unsettled contents a power loss keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Only what was durable.
    None,
    /// All that was written, as after the end of a process.
    All,
    /// Each sector any of its contents, at random.
    Sectors,
    /// Each write wholly or not at all, at random.
    Writes,
}

/// The contents of a device. Cloning shares the sectors.
#[derive(Clone)]
pub struct Medium {
    size: u64,
    durable: BTreeMap<u64, Sector>,
    pending: BTreeMap<u64, Vec<Version>>,
    next_write: u64,
    /// Where what is there has changed, if anybody wants to know.
    changes: Option<Vec<(u64, u64)>>,
}

impl Medium {
    /// An empty (zero) medium of `size` bytes.
    pub fn new(size: u64) -> Self {
        assert!(
            size.is_multiple_of(SECTOR as u64),
            "sizes are whole sectors"
        );
        Self {
            size,
            durable: BTreeMap::new(),
            pending: BTreeMap::new(),
            next_write: 1,
            changes: None,
        }
    }

    /// Offsets and lengths of what may have other contents now than at the last call; all
    /// of it, if this is the first: changes are noted from then on.
    pub fn take_changes(&mut self) -> Option<Vec<(u64, u64)>> {
        self.changes.replace(Vec::new())
    }

    fn note_change(&mut self, offset: u64, len: u64) {
        if let Some(changes) = &mut self.changes {
            changes.push((offset, len));
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies what is there now into `out`.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for (index, chunk) in out.chunks_mut(SECTOR).enumerate() {
            let number = offset / SECTOR as u64 + index as u64;
            match self.current(number) {
                Some(sector) => chunk.copy_from_slice(sector.bytes()),
                None => chunk.fill(0),
            }
        }
    }

    fn current(&self, number: u64) -> Option<&Sector> {
        self.pending
            .get(&number)
            .and_then(|versions| versions.last())
            .map(|version| &version.sector)
            .or_else(|| self.durable.get(&number))
    }

    fn place(&mut self, number: u64, sector: Sector, (write, by): (u64, u32), durable: bool) {
        if durable {
            self.pending.remove(&number);
            self.durable.insert(number, sector);
        } else {
            self.pending.entry(number).or_default().push(Version {
                write,
                by,
                doomed: false,
                sector,
            });
        }
    }

    /// Machine `by` writes whole buffers; `durable` for forced unit access.
    pub fn write(&mut self, offset: u64, bufs: &[IoBuf], by: u32, durable: bool) {
        self.write_some(offset, bufs, by, durable, |_| true);
    }

    /// Writes only the sectors that `keep` chooses: a write that failed or was
    /// cut by a crash.
    pub fn write_some(
        &mut self,
        offset: u64,
        bufs: &[IoBuf],
        by: u32,
        durable: bool,
        mut keep: impl FnMut(u64) -> bool,
    ) {
        let write = self.next_write;
        self.next_write += 1;
        self.note_change(offset, bufs.iter().map(|buf| buf.len() as u64).sum());
        let mut number = offset / SECTOR as u64;
        for buf in bufs {
            for sector in sectors(buf) {
                if keep(number) {
                    self.place(number, sector, (write, by), durable);
                }
                number += 1;
            }
        }
    }

    /// The point a flush that starts now will cover.
    pub fn flush_point(&self) -> u64 {
        self.next_write
    }

    /// Completes a flush: all writes before `point` become durable, but for the doomed.
    pub fn settle(&mut self, point: u64) {
        let durable = &mut self.durable;
        self.pending.retain(|number, versions| {
            if let Some(last) = versions
                .iter()
                .rposition(|version| version.write < point && !version.doomed)
            {
                durable.insert(*number, versions[last].sector.clone());
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// A flush of machine `by` that covered writes before `point` failed: each content
    /// may have become durable, wait for another flush, or, of its own, be doomed.
    pub fn fail_flush(&mut self, point: u64, by: u32, rng: &Stream) {
        let durable = &mut self.durable;
        self.pending.retain(|number, versions| {
            let covered = |version: &&mut Version| version.write < point && version.by == by;
            for version in versions.iter_mut().filter(covered) {
                version.doomed |= rng.chance(400);
            }
            if rng.chance(300)
                && let Some(last) = versions
                    .iter()
                    .rposition(|version| version.write < point && !version.doomed)
            {
                durable.insert(*number, versions[last].sector.clone());
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// Loses power: settles every sector by `survival`. Which sectors show what they did
    /// not show before, and who had written what they showed.
    pub fn lose_power(&mut self, survival: Survival, rng: &Stream) -> Vec<(u64, u32)> {
        let mut lost = Vec::new();
        let mut writes: BTreeMap<u64, bool> = BTreeMap::new();
        for (number, versions) in std::mem::take(&mut self.pending) {
            let chosen = match survival {
                Survival::None => None,
                Survival::All => versions.last(),
                Survival::Sectors => {
                    let pick = rng.below(versions.len() as u64 + 1) as usize;
                    versions.get(pick)
                }
                Survival::Writes => versions.iter().rfind(|version| {
                    *writes
                        .entry(version.write)
                        .or_insert_with(|| rng.chance(500))
                }),
            };
            let last = versions.last().map(|version| (version.write, version.by));
            if let Some((_, by)) = last.filter(|(write, _)| chosen.map(|v| v.write) != Some(*write))
            {
                lost.push((number, by));
                self.note_change(number * SECTOR as u64, SECTOR as u64);
            }
            if let Some(version) = chosen {
                self.durable.insert(number, version.sector.clone());
            }
        }
        lost
    }

    /// Whether it shows a content that no flush will make durable.
    pub fn shows_doomed(&self) -> bool {
        let mut shown = self.pending.values().filter_map(|versions| versions.last());
        shown.any(|version| version.doomed)
    }

    /// The machines some of whose writes a power loss could still take back.
    pub fn unsettled_writers(&self) -> BTreeSet<u32> {
        let versions = self.pending.values().flatten();
        versions.map(|version| version.by).collect()
    }

    /// Number of sectors a power loss could still take back.
    pub fn unsettled(&self) -> usize {
        self.pending.len()
    }

    /// Flips bits of a durable sector: rot.
    pub fn rot(&mut self, number: u64, rng: &Stream) {
        let mut bytes = AlignedBuf::zeroed(SECTOR);
        self.read(number * SECTOR as u64, &mut bytes);
        for _ in 0..=rng.below(8) {
            let at = rng.below(SECTOR as u64) as usize;
            bytes[at] ^= 1 << rng.below(8);
        }
        let sector = Sector {
            buf: Arc::new(bytes),
            offset: 0,
        };
        self.pending.remove(&number);
        self.durable.insert(number, sector);
        self.note_change(number * SECTOR as u64, SECTOR as u64);
    }

    /// Digest of what is there now; zero sectors count as absent.
    pub fn hash(&self) -> u64 {
        let mut digest = Digest::default();
        digest.word(self.size);
        let mut numbers: Vec<u64> = self.durable.keys().copied().collect();
        numbers.extend(self.pending.keys().copied());
        numbers.sort_unstable();
        numbers.dedup();
        for number in numbers {
            let Some(sector) = self.current(number) else {
                continue;
            };
            // Nearly all zero sectors are one (see `sectors`).
            let shared = ZEROS.with(|zero| Arc::ptr_eq(zero, &sector.buf));
            if !shared && sector.bytes().iter().any(|byte| *byte != 0) {
                digest.word(number);
                digest.word(digest_of_long(sector.bytes()));
            }
        }
        digest.value()
    }
}

/// A device as it was, or is, for those who only read: that takes no time and meets no
/// fault.
pub struct Still<M>(pub M);

/// Somebody who has a medium.
pub trait Holder {
    /// Gives it to `f`.
    fn with<T>(&self, f: impl FnOnce(&Medium) -> T) -> T;
}

impl Holder for Medium {
    fn with<T>(&self, f: impl FnOnce(&Medium) -> T) -> T {
        f(self)
    }
}

impl<M: Holder> BlockDevice for Still<M> {
    fn size(&self) -> u64 {
        self.0.with(Medium::size)
    }

    fn read(
        &self,
        offset: u64,
        mut buf: AlignedBuf,
    ) -> LocalBoxFuture<'static, (AlignedBuf, Result<(), DeviceError>)> {
        let (len, size) = (buf.len() as u64, self.size());
        let fits = offset.checked_add(len).is_some_and(|end| end <= size);
        let result = if fits {
            self.0.with(|medium| medium.read(offset, &mut buf));
            Ok(())
        } else {
            let op = "read";
            Err(DeviceError::OutOfRange {
                op,
                offset,
                len,
                size,
            })
        };
        Box::pin(std::future::ready((buf, result)))
    }

    fn write(
        &self,
        _offset: u64,
        _bufs: Vec<IoBuf>,
        _flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        Box::pin(std::future::ready(Err(DeviceError::Shut)))
    }

    fn flush(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        Box::pin(std::future::ready(Err(DeviceError::Shut)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buf(byte: u8, sectors: usize) -> IoBuf {
        let mut buf = AlignedBuf::zeroed(SECTOR * sectors);
        buf.fill(byte);
        Arc::new(buf)
    }

    fn byte_at(medium: &Medium, sector: u64) -> u8 {
        let mut out = vec![0; SECTOR];
        medium.read(sector * SECTOR as u64, &mut out);
        assert!(out.iter().all(|b| *b == out[0]), "sectors are atomic");
        out[0]
    }

    #[test]
    fn a_flush_covers_only_what_completed_before_it_started() {
        let rng = Stream::new(1, "t", 0);
        let mut medium = Medium::new(1 << 20);
        medium.write(0, &[buf(1, 1)], 1, false);
        let point = medium.flush_point();
        medium.write(4096, &[buf(2, 1)], 1, false);
        medium.settle(point);
        let mut crashed = medium.clone();
        crashed.lose_power(Survival::None, &rng);
        assert_eq!((byte_at(&crashed, 0), byte_at(&crashed, 1)), (1, 0));
        assert_eq!((byte_at(&medium, 0), byte_at(&medium, 1)), (1, 2));
    }

    /// Whoever applies the changes to a copy sees what is there, whatever has happened.
    #[test]
    fn all_changes_are_told() {
        let rng = Stream::new(3, "t", 0);
        let mut medium = Medium::new(64 << 12);
        medium.write(0, &[buf(9, 3)], 1, false);
        assert_eq!(medium.take_changes(), None, "nobody had asked before");
        let mut copy = vec![0; 64 << 12];
        medium.read(0, &mut copy);
        let mut told = 0;
        for step in 0..400 {
            let at = rng.below(60) << 12;
            match rng.below(10) {
                0 => drop(medium.lose_power(Survival::Sectors, &rng)),
                1 => drop(medium.lose_power(Survival::None, &rng)),
                2 => medium.rot(rng.below(64), &rng),
                3 => medium.settle(medium.flush_point()),
                4 => medium.fail_flush(medium.flush_point(), 1, &rng),
                5 => medium.write_some(at, &[buf(step as u8, 4)], 1, false, |_| rng.chance(500)),
                _ => medium.write(at, &[buf(step as u8, 2), buf(7, 1)], 1, step % 7 == 0),
            }
            let changes = medium.take_changes().expect("somebody has asked");
            told += changes.len();
            for (offset, len) in changes {
                let range = offset as usize..(offset + len) as usize;
                medium.read(offset, &mut copy[range]);
            }
            let mut all = vec![0; copy.len()];
            medium.read(0, &mut all);
            assert!(all == copy, "step {step}");
        }
        assert!(told > 200);
    }

    #[test]
    fn a_power_loss_can_keep_any_subset() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let rng = Stream::new(seed, "t", 0);
            let mut medium = Medium::new(1 << 20);
            medium.write(0, &[buf(1, 2)], 1, false);
            medium.write(0, &[buf(2, 2)], 1, false);
            let lost = medium.lose_power(Survival::Sectors, &rng);
            for sector in 0..2 {
                let kept = byte_at(&medium, sector) == 2;
                assert_ne!(lost.contains(&(sector, 1)), kept);
            }
            seen.insert((byte_at(&medium, 0), byte_at(&medium, 1)));
            assert_eq!(medium.unsettled(), 0);
        }
        assert_eq!(seen.len(), 9, "all of {{0,1,2}} x {{0,1,2}}: {seen:?}");
    }

    #[test]
    fn forced_unit_access_is_durable_at_once() {
        let rng = Stream::new(1, "t", 0);
        let mut medium = Medium::new(1 << 20);
        medium.write(0, &[buf(1, 1)], 1, false);
        medium.write(0, &[buf(3, 1)], 1, true);
        medium.lose_power(Survival::None, &rng);
        assert_eq!(byte_at(&medium, 0), 3);
    }

    #[test]
    fn doomed_contents_never_become_durable() {
        let mut lost = 0;
        for seed in 0..100 {
            let rng = Stream::new(seed, "t", 0);
            let mut medium = Medium::new(1 << 20);
            medium.write(0, &[buf(1, 1)], 1, false);
            medium.write(4096, &[buf(2, 1)], 2, false);
            medium.fail_flush(medium.flush_point(), 1, &rng);
            assert_eq!(byte_at(&medium, 0), 1, "it still reads back");
            let doomed = medium.shows_doomed();
            medium.settle(medium.flush_point());
            medium.lose_power(Survival::None, &rng);
            assert_eq!(byte_at(&medium, 1), 2, "nobody else's flush dooms it");
            assert_eq!(doomed, byte_at(&medium, 0) == 0);
            lost += u32::from(byte_at(&medium, 0) == 0);
        }
        assert!((10..90).contains(&lost), "lost {lost} of 100");
    }

    #[test]
    fn what_is_kept_of_a_buffer_reads_back_as_the_buffer() {
        for pattern in 0..32_u32 {
            let mut bytes = AlignedBuf::zeroed(SECTOR * 5);
            for sector in (0..5).filter(|sector| pattern & 1 << sector != 0) {
                bytes[sector * SECTOR + 17 * sector] = sector as u8 + 1;
            }
            let whole = Arc::new(bytes);
            let mut medium = Medium::new(1 << 20);
            medium.write(0, &[buf(9, 7)], 1, true);
            medium.write(4096, &[Arc::clone(&whole)], 1, false);
            let mut out = vec![0; SECTOR * 5];
            medium.read(4096, &mut out);
            assert!(out[..] == whole[..], "pattern {pattern:05b}");
            assert_eq!((byte_at(&medium, 0), byte_at(&medium, 6)), (9, 9));
            let kept: usize = medium
                .pending
                .values()
                .map(|versions| versions[0].sector.buf.len() / SECTOR)
                .max()
                .unwrap_or(0);
            assert!(kept <= pattern.count_ones().max(1) as usize);
        }
    }

    #[test]
    fn hashes_see_contents_not_history() {
        let mut a = Medium::new(1 << 20);
        a.write(8192, &[buf(1, 2), buf(2, 1)], 1, false);
        a.write(0, &[buf(0, 1)], 1, false);
        let mut b = Medium::new(1 << 20);
        b.write(8192, &[buf(1, 1)], 1, true);
        b.write(12288, &[buf(1, 1), buf(2, 1)], 1, true);
        assert_eq!(a.hash(), b.hash());
        b.write(0, &[buf(9, 1)], 1, true);
        assert_ne!(a.hash(), b.hash());
    }
}
