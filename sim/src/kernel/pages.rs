//! File contents in the kernel: reads and writes through its pages, beside them, and by
//! shared mappings.
//!
//! What programs store to a mapping makes pages dirty. They are written back before an
//! fsync, a close or direct I/O goes on, when the filesystem wants pages back, and now
//! and then; each page is a call of its own in the records. A page that is being written
//! back is not changed, and while the size of a file changes nothing of it is written
//! back (spec 14 section 24; Linux, `fuse_set_nowrite`).
//!
//! What can go wrong: a page that is written back after another node has written to it.
//! The filesystem must have it back before it gives the lock away.

use super::caches::{ALL, Pages};
use super::{Kernel, O_APPEND_RDWR, PAGE, Recorder};
use crate::ask::blocks;
use crate::model::{Call, Contents, Reply, pattern};
use bytes::Bytes;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Ino, Posix, WriteData, WriteHow};
use std::collections::BTreeMap;
use std::ops::Range;

/// How often a program touches a page again that was taken away before it could use it.
const FAULTS: usize = 20;

impl<P: Posix> Kernel<P> {
    pub(super) async fn read(
        &self,
        ino: Ino,
        fh: u64,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Errno> {
        if !self.caches.enabled {
            let pieces = self.fs.read(&self.cx, ino, fh, offset, len).await?;
            return Ok(pieces.concat().into());
        }
        let size = self.getattr(ino).await?.size;
        let end = offset.saturating_add(u64::from(len)).min(size);
        if offset >= end {
            return Ok(Bytes::new());
        }
        let (first, last) = (offset / PAGE, (end - 1) / PAGE);
        let missing = |pages: &mut Pages| {
            pages.reading += 1;
            let mut unknown = (first..=last).filter(|page| !pages.pages.contains_key(page));
            let from = unknown.next();
            let to = unknown.next_back().or(from);
            from.zip(to)
                .map_or_else(Vec::new, |(from, to)| (from..=to).collect())
        };
        let missing = self.caches.lock_pages(ino, first..last + 1, missing).await;
        let mut result = Ok(());
        if let (Some(from), Some(to)) = (missing.first(), missing.last()) {
            result = self.fill(ino, fh, *from, *to).await;
        }
        let mut out = Vec::new();
        {
            let mut maps = self.caches.maps.borrow_mut();
            let pages = maps.pages.entry(ino).or_default();
            pages.reading -= 1;
            for page in first..=last {
                match pages.pages.get(&page) {
                    Some(bytes) => out.extend_from_slice(bytes),
                    None => out.resize(out.len() + PAGE as usize, 0),
                }
            }
        }
        self.caches.unlock_pages(ino, &missing);
        self.caches.reads_done.wake_all();
        result?;
        let skip = (offset - first * PAGE) as usize;
        Ok(Bytes::from(out).slice(skip..skip + (end - offset) as usize))
    }

    async fn fill(&self, ino: Ino, fh: u64, from: u64, to: u64) -> Result<(), Errno> {
        let len = ((to - from + 1) * PAGE) as u32;
        let pieces = self.fs.read(&self.cx, ino, fh, from * PAGE, len).await?;
        let mut bytes = pieces.concat();
        bytes.resize(len as usize, 0);
        let mut maps = self.caches.maps.borrow_mut();
        let pages = maps.pages.entry(ino).or_default();
        for (page, chunk) in (from..).zip(bytes.chunks(PAGE as usize)) {
            // A page written meanwhile is newer than what was read.
            pages.pages.entry(page).or_insert_with(|| chunk.to_vec());
        }
        Ok(())
    }

    pub(super) async fn write(
        &self,
        ino: Ino,
        fh: u64,
        offset: u64,
        data: Bytes,
        how: WriteHow,
    ) -> Result<Reply, Errno> {
        let len = data.len() as u64;
        let (mut locked, mut before) = (Vec::new(), Vec::new());
        if self.caches.enabled {
            let place = |pages: &mut Pages| {
                // What is to be written back waits until this is on its way.
                let dirty = pages.dirty.range(pages_of(offset, len));
                let dirty: Vec<u64> = dirty.map(|(page, _)| *page).collect();
                let copy = |page: &u64| (*page, pages.pages[page].clone());
                before = dirty.iter().map(copy).collect();
                let unknown = write_pages(&mut pages.pages, offset, &data);
                unknown.into_iter().chain(dirty).collect()
            };
            let range = pages_of(offset, len);
            locked = self.caches.lock_pages(ino, range, place).await;
        }
        let bytes = data.clone();
        let data = blocks(data);
        let written = self.fs.write(&self.cx, ino, fh, offset, data, how).await;
        let taken = written.as_ref().map_or(0, |taken| *taken as usize);
        if taken < bytes.len() {
            // Dirty pages stay, with what was written of this.
            self.caches.drop_pages(ino, &ALL);
            let mut maps = self.caches.maps.borrow_mut();
            let pages = maps.pages.entry(ino).or_default();
            pages.pages.extend(before);
            write_pages(&mut pages.pages, offset, &bytes.slice(..taken));
        }
        self.caches.unlock_pages(ino, &locked);
        Ok(Reply::Number(u64::from(written?)))
    }

    /// Appends as a program does that opens the file for it. Such a handle bypasses
    /// the pages where the filesystem says so.
    pub(super) async fn append(
        &self,
        ino: Ino,
        at: u64,
        data: Bytes,
        how: WriteHow,
    ) -> Result<Reply, Errno> {
        let opened = self.fs.open(&self.cx, ino, O_APPEND_RDWR).await?;
        let fh = self.opened(ino, &opened).fh;
        let written = if opened.direct_io {
            let written = self.fs.write(&self.cx, ino, fh, at, data.into(), how).await;
            written.map(|written| Reply::Number(u64::from(written)))
        } else {
            self.write(ino, fh, at, data, how).await
        };
        self.fs.release(ino, fh).await;
        written
    }

    /// Sets the size of a file, by `change`: nothing of it is written back meanwhile, and
    /// the pages behind the new end go.
    pub(super) async fn resize<T>(
        &self,
        ino: Ino,
        size: u64,
        change: impl Future<Output = Result<T, Errno>>,
    ) -> Result<T, Errno> {
        let caches = &self.caches;
        let resizing = |pages: &mut Pages| pages.resizing += 1;
        caches.lock_written(ino, resizing).await;
        let answer = change.await;
        if answer.is_ok() {
            let gone = size / PAGE..u64::MAX;
            let coming = caches.pages_to_come(ino);
            caches.lock_pages(ino, gone, |_| Vec::new()).await;
            caches.drop_pages_from(ino, size, &coming);
        }
        if let Some(pages) = caches.maps.borrow_mut().pages.get_mut(&ino) {
            pages.resizing -= 1;
        }
        caches.unlocked.wake_all();
        answer
    }

    /// Writes beside the pages. Linux from 6.6 on drops those of the range before; what
    /// others read meanwhile, and all of them otherwise, the filesystem takes back.
    pub(super) async fn write_direct(
        &self,
        ino: Ino,
        fh: u64,
        offset: u64,
        data: Bytes,
        how: WriteHow,
    ) -> Result<Reply, Errno> {
        if self.caches.rng.chance(500) {
            let range = pages_of(offset, data.len() as u64);
            self.caches.give_pages_back(ino, &range).await;
        }
        let data = data.into();
        let written = self.fs.write(&self.cx, ino, fh, offset, data, how).await?;
        Ok(Reply::Number(u64::from(written)))
    }

    /// Stores to one page of a shared mapping, no further than to the end of the file.
    pub(super) async fn map_write(
        &self,
        (ino, fh): (Ino, u64),
        offset: u64,
        len: u32,
        tag: u64,
    ) -> Result<Reply, Errno> {
        let page = offset / PAGE;
        let store = |pages: &mut Pages, size: u64| {
            let end = (offset + u64::from(len)).min(size);
            let count = end.saturating_sub(offset);
            if count == 0 {
                return 0;
            }
            let bytes = pages.pages.get_mut(&page).expect("the page is there");
            let from = (offset % PAGE) as usize;
            let stored = pattern(tag, offset, count as u32);
            bytes[from..from + stored.len()].copy_from_slice(&stored);
            // As much as lies before the end of the file is written back.
            let behind = (size - page * PAGE).min(PAGE) as usize;
            let end = pages.dirty.entry(page).or_default();
            *end = (*end).max(behind);
            pages.fh = fh;
            count
        };
        let stored = self.mapped(ino, fh, page, store).await?;
        Ok(Reply::Number(stored.unwrap_or(0)))
    }

    /// Loads from one page of a mapping.
    pub(super) async fn map_read(
        &self,
        (ino, fh): (Ino, u64),
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Errno> {
        let page = offset / PAGE;
        let load = |pages: &mut Pages, size: u64| {
            let end = (offset + u64::from(len)).min(size).max(offset);
            let within = (offset - page * PAGE) as usize..(end - page * PAGE) as usize;
            Bytes::copy_from_slice(&pages.pages[&page][within])
        };
        match self.mapped(ino, fh, page, load).await? {
            Some(bytes) => Ok(bytes),
            None => self.read(ino, fh, offset, len).await,
        }
    }

    /// Makes a page of a mapping be there, and uses it in the step that knows the size
    /// of the file as well: as long as the page stays no other node can change it.
    /// `None` if it is taken away each time.
    async fn mapped<T>(
        &self,
        ino: Ino,
        fh: u64,
        page: u64,
        mut act: impl FnMut(&mut Pages, u64) -> T,
    ) -> Result<Option<T>, Errno> {
        for _ in 0..FAULTS {
            let fault = |pages: &mut Pages| {
                pages.reading += 1;
                match pages.pages.contains_key(&page) {
                    true => Vec::new(),
                    false => vec![page],
                }
            };
            let missing = self.caches.lock_pages(ino, page..page + 1, fault).await;
            let mut filled = Ok(());
            if !missing.is_empty() {
                filled = self.fill(ino, fh, page, page).await;
            }
            let dropped = {
                let mut maps = self.caches.maps.borrow_mut();
                let pages = maps.pages.entry(ino).or_default();
                pages.reading -= 1;
                pages.dropped
            };
            self.caches.unlock_pages(ino, &missing);
            self.caches.reads_done.wake_all();
            filled?;
            let size = self.getattr(ino).await?.size;
            let mut maps = self.caches.maps.borrow_mut();
            let pages = maps.pages.entry(ino).or_default();
            let held = pages.locked.contains(&page) || pages.writing.contains(&page);
            if pages.dropped == dropped && pages.pages.contains_key(&page) && !held {
                return Ok(Some(act(pages, size)));
            }
        }
        Ok(None)
    }

    /// Writes dirty pages of a file back, and waits for those that others write.
    ///
    /// # Errors
    /// The last one of a page; what was stored to it is lost.
    pub async fn write_back(
        &self,
        ino: Ino,
        range: &Range<u64>,
        recorder: &dyn Recorder,
    ) -> Result<(), Errno> {
        let mut result = Ok(());
        loop {
            let unlocked = &self.caches.unlocked;
            let Some((page, data, fh)) = unlocked.wait_for(|| self.claim(ino, range)).await else {
                return result;
            };
            let call = Call::WritePages {
                ino,
                offset: page * PAGE,
                data: Contents(data.clone()),
            };
            let how = WriteHow {
                from_pages: true,
                ..WriteHow::default()
            };
            let (len, data) = (data.len(), WriteData::from(data));
            self.caches.change_begins(ino);
            let number = recorder.begin(&call);
            let written = self.fs.write(&self.cx, ino, fh, page * PAGE, data, how);
            let written = written.await;
            if !written.as_ref().is_ok_and(|taken| *taken as usize == len) {
                let mut maps = self.caches.maps.borrow_mut();
                let pages = maps.pages.entry(ino).or_default();
                pages.pages.remove(&page);
                pages.dropped += 1;
            }
            self.caches.touch(ino);
            self.caches.change_ends(ino);
            let reply = match written {
                Ok(taken) => Reply::Number(u64::from(taken)),
                Err(error) => {
                    result = Err(error);
                    Reply::Err(error)
                }
            };
            recorder.end(number, &reply);
            let mut maps = self.caches.maps.borrow_mut();
            maps.pages.entry(ino).or_default().writing.remove(&page);
            drop(maps);
            self.caches.unlocked.wake_all();
        }
    }

    /// The next dirty page of a range, to be written back: `Some(None)` if there is none
    /// and nobody writes one, `None` if that has to be waited for.
    #[allow(clippy::type_complexity)] // what `write_back` takes apart
    fn claim(&self, ino: Ino, range: &Range<u64>) -> Option<Option<(u64, Bytes, u64)>> {
        let mut maps = self.caches.maps.borrow_mut();
        let Some(pages) = maps.pages.get_mut(&ino) else {
            return Some(None);
        };
        let Some((page, end)) = pages.dirty.range(range.clone()).next() else {
            let writing = pages.writing.range(range.clone()).next();
            return writing.is_none().then_some(None);
        };
        let (page, end) = (*page, *end);
        if pages.resizing > 0 || pages.locked.contains(&page) || pages.writing.contains(&page) {
            return None;
        }
        pages.dirty.remove(&page);
        pages.writing.insert(page);
        let data = Bytes::copy_from_slice(&pages.pages[&page][..end]);
        Some(Some((page, data, pages.fh)))
    }

    /// What has to be written back before a call goes on.
    pub(super) async fn write_back_before(
        &self,
        call: &Call,
        direct: bool,
        recorder: &dyn Recorder,
    ) {
        let (ino, range) = match call {
            Call::Syncfs => {
                for ino in self.caches.dirty_files() {
                    let _ = self.write_back(ino, &ALL, recorder).await;
                }
                return;
            }
            Call::Fsync { ino } | Call::Release { ino } => (*ino, ALL),
            Call::Write {
                ino, append: true, ..
            } if self.caches.walks.get() => (*ino, ALL),
            Call::Read { ino, offset, len }
            | Call::Write {
                ino, offset, len, ..
            } if direct => (*ino, pages_of(*offset, u64::from(*len))),
            _ => return,
        };
        // Who stored what is lost now is told by the failed call: there is no other
        // promise about it that an answer to this one could break.
        let _ = self.write_back(ino, &range, recorder).await;
    }

    /// Now and then the kernel writes a file's dirty pages back by itself.
    pub(super) async fn write_back_some(&self, recorder: &dyn Recorder) {
        let files = self.caches.dirty_files();
        if !files.is_empty() && self.caches.rng.chance(60) {
            let ino = self.caches.rng.pick(&files);
            let _ = self.write_back(ino, &ALL, recorder).await;
        }
    }

    /// Writes all dirty pages back, after a while: the kernel is in no hurry, and others
    /// may ask for them before.
    pub async fn write_all_back(&self, recorder: &dyn Recorder) {
        if !self.caches.dirty_files().is_empty() {
            let most = self.caches.rng.pick(&[1, 10_000_000, 3_000_000_000]);
            let sim = &self.caches.sim;
            sim.sleep(self.caches.rng.below(most)).await;
        }
        self.write_back_before(&Call::Syncfs, false, recorder).await;
    }
}

/// The pages of a range of bytes.
fn pages_of(offset: u64, len: u64) -> Range<u64> {
    offset / PAGE..offset.saturating_add(len).div_ceil(PAGE)
}

/// Writes into the pages that are there. Gives those of which a part is written
/// and the rest is not known.
fn write_pages(pages: &mut BTreeMap<u64, Vec<u8>>, offset: u64, data: &Bytes) -> Vec<u64> {
    let end = offset + data.len() as u64;
    let mut unknown = Vec::new();
    for page in offset / PAGE..end.div_ceil(PAGE) {
        let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
        let bytes = &data[(from - offset) as usize..(to - offset) as usize];
        let within = (from - page * PAGE) as usize..(to - page * PAGE) as usize;
        if bytes.len() == PAGE as usize {
            pages.insert(page, bytes.to_vec());
        } else if let Some(kept) = pages.get_mut(&page) {
            kept[within].copy_from_slice(bytes);
        } else {
            unknown.push(page);
        }
    }
    unknown
}
