//! The cache of large metadata blocks of one actor (spec 02 sections 2 and 3).
//!
//! Maps block numbers to the buffer that is current for this actor: the dirty
//! one of a transaction if there is one, else the copy last read or written.
//! Clean copies leave by a clock hand; dirty ones are pinned.
//!
//! What can go wrong: the cached copy is older or newer than a reference. The
//! first mismatch drops a clean copy and reads again; the second is
//! [`BlockError::Stale`]. A dirty copy is never dropped.

use super::{Block, BlockError, Corruption, Policy};
use crate::env::{
    AlignedBuf, BlockDevice, DeviceError, Entropy, HashMap, IoBuf, Signal, mutant, probe,
};
use crate::format::{
    BlockHeader, BlockRef, HeaderError, LG_BLOCK_SHIFT, LG_BLOCK_SIZE, META_DEV_START_BLKNO, Magic,
    block_crc,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use zerocopy::FromBytes;

/// What a cache has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Blocks found.
    pub hits: u64,
    /// Blocks read from the device.
    pub reads: u64,
    /// Readers that waited for a read begun by another.
    pub shared_reads: u64,
    /// Clean blocks that left for others.
    pub evictions: u64,
    /// Copies dropped because they did not match a reference.
    pub dropped_stale: u64,
}

/// Where a cached block is accounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Clean, at this index of the ring.
    Clean(usize),
    /// Dirty in the transaction with this id.
    Dirty(u64),
}

struct Entry {
    block: Rc<Block>,
    place: Place,
}

/// A clean block in the clock's ring.
struct Slot {
    blkno: u64,
    referenced: bool,
}

/// The content of a read block, or how its CRC differs.
type Loaded = Result<Rc<Block>, HeaderError>;

/// A read that has begun; others wait for its outcome.
#[derive(Default)]
struct Pending {
    /// `Some(None)`: the reader went away and somebody else must read.
    outcome: RefCell<Option<Option<Result<Loaded, BlockError>>>>,
    done: Signal,
}

#[derive(Default)]
struct Inner {
    map: HashMap<u64, Entry>,
    ring: Vec<Slot>,
    hand: usize,
    pending: HashMap<u64, Rc<Pending>>,
    stats: CacheStats,
}

impl Inner {
    /// Adds a clean block unless one with its number is there; evicts what is too much.
    fn insert_clean(&mut self, blkno: u64, block: Rc<Block>, limit: usize) {
        if self.map.contains_key(&blkno) {
            return;
        }
        let place = Place::Clean(self.ring.len());
        self.ring.push(Slot {
            blkno,
            referenced: true,
        });
        self.map.insert(blkno, Entry { block, place });
        while self.ring.len() > limit {
            self.evict_one(blkno);
        }
    }

    /// Evicts the first block under the hand without a second chance, sparing `keep`.
    fn evict_one(&mut self, keep: u64) {
        loop {
            if self.hand >= self.ring.len() {
                self.hand = 0;
            }
            let slot = &mut self.ring[self.hand];
            if std::mem::take(&mut slot.referenced) || slot.blkno == keep {
                self.hand += 1;
                continue;
            }
            let blkno = slot.blkno;
            self.map.remove(&blkno);
            self.leave_ring(self.hand);
            self.stats.evictions += 1;
            return;
        }
    }

    /// Takes one slot out of the ring; the last slot moves into its place.
    fn leave_ring(&mut self, at: usize) {
        self.ring.swap_remove(at);
        if let Some(moved) = self.ring.get(at) {
            let entry = self
                .map
                .get_mut(&moved.blkno)
                .expect("ring slots are mapped");
            entry.place = Place::Clean(at);
        }
    }

    fn remove(&mut self, blkno: u64) {
        if let Some(entry) = self.map.remove(&blkno)
            && let Place::Clean(at) = entry.place
        {
            self.leave_ring(at);
        }
    }
}

/// The block cache of one actor over the metadata device.
pub struct Cache {
    dev: Rc<dyn BlockDevice>,
    entropy: Rc<dyn Entropy>,
    fsid: u64,
    policy: Rc<Policy>,
    total_blocks: Cell<u64>,
    next_tx: Cell<u64>,
    inner: RefCell<Inner>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cache({} blocks)", self.inner.borrow().map.len())
    }
}

impl Cache {
    /// An empty cache over `dev` for the volume `fsid`.
    pub fn new(
        dev: Rc<dyn BlockDevice>,
        entropy: Rc<dyn Entropy>,
        fsid: u64,
        policy: Rc<Policy>,
    ) -> Rc<Self> {
        policy.assert_sane();
        let total_blocks = Cell::new(dev.size() >> LG_BLOCK_SHIFT);
        Rc::new(Self {
            dev,
            entropy,
            fsid,
            policy,
            total_blocks,
            next_tx: Cell::new(0),
            inner: RefCell::default(),
        })
    }

    /// The thresholds in use.
    pub fn policy(&self) -> &Rc<Policy> {
        &self.policy
    }

    /// The metadata device.
    pub fn device(&self) -> &Rc<dyn BlockDevice> {
        &self.dev
    }

    /// The volume's id.
    pub fn fsid(&self) -> u64 {
        self.fsid
    }

    /// Large blocks of the volume: the super block's total, else the device's size.
    pub fn total_blocks(&self) -> u64 {
        self.total_blocks.get()
    }

    /// Sets the total of the current super block (at start and after a resize).
    pub fn set_total_blocks(&self, total_meta_blocks: u64) {
        self.total_blocks.set(total_meta_blocks);
    }

    /// Counters since the cache was made.
    pub fn stats(&self) -> CacheStats {
        self.inner.borrow().stats
    }

    /// Number of cached blocks: clean, dirty.
    pub fn len(&self) -> (usize, usize) {
        let inner = self.inner.borrow();
        (inner.ring.len(), inner.map.len() - inner.ring.len())
    }

    /// Drops every clean block (memory pressure, tests).
    pub fn drop_clean(&self) {
        let inner = &mut *self.inner.borrow_mut();
        for slot in inner.ring.drain(..) {
            inner.map.remove(&slot.blkno);
        }
        inner.hand = 0;
    }

    /// Reads the block that `block_ref` names, from the cache or the device
    /// (spec 02 section 3). Completes at once if it is cached.
    ///
    /// # Errors
    /// `Stale` after two mismatches, `Io` and `Shut` from the device, `Corrupt`
    /// for a reference outside of the device.
    pub async fn read_ref(
        &self,
        block_ref: &BlockRef,
        magic: Magic,
    ) -> Result<Rc<Block>, BlockError> {
        let blkno = block_ref.blkno.get();
        self.check_readable(blkno)?;
        let mut first = true;
        loop {
            let loaded = match self.lookup(blkno) {
                Some(block) => Ok(block),
                None => self.load(blkno).await?,
            };
            let why = match &loaded {
                Ok(block) => match self.matches(block, block_ref, magic) {
                    Ok(()) => return Ok(block.clone()),
                    Err(why) => why,
                },
                Err(why) => *why,
            };
            let may_retry = self.drop_mismatch(blkno, loaded.ok().as_ref());
            if !first || !may_retry {
                probe("stale_block");
                return Err(BlockError::Stale { blkno, why });
            }
            first = false;
        }
    }

    /// The block that `block_ref` names if it is cached and matches; never waits.
    pub fn cached_ref(&self, block_ref: &BlockRef, magic: Magic) -> Option<Rc<Block>> {
        let block = self.lookup(block_ref.blkno.get())?;
        self.matches(&block, block_ref, magic).ok()?;
        Some(block)
    }

    fn check_readable(&self, blkno: u64) -> Result<(), BlockError> {
        let total = self.dev.size() >> LG_BLOCK_SHIFT;
        if (META_DEV_START_BLKNO..total).contains(&blkno) {
            return Ok(());
        }
        Err(BlockError::Corrupt(Corruption {
            blkno,
            what: format!("a reference to it, but the device has blocks 2..{total}"),
        }))
    }

    fn lookup(&self, blkno: u64) -> Option<Rc<Block>> {
        let inner = &mut *self.inner.borrow_mut();
        let entry = inner.map.get(&blkno)?;
        inner.stats.hits += 1;
        if let Place::Clean(at) = entry.place {
            inner.ring[at].referenced = true;
        }
        Some(entry.block.clone())
    }

    /// Compares the header with the reference; the CRC was checked when the
    /// block was read.
    fn matches(
        &self,
        block: &Block,
        block_ref: &BlockRef,
        magic: Magic,
    ) -> Result<(), HeaderError> {
        let (hdr, _) = BlockHeader::ref_from_prefix(block.bytes()).expect("a whole block");
        let pair = |expected: u64, found: u64| (expected != found).then_some((expected, found));
        if hdr.magic.get() != magic.value() {
            return Err(HeaderError::Magic {
                expected: magic.value(),
                found: hdr.magic.get(),
            });
        }
        if let Some((expected, found)) = pair(self.fsid, hdr.fsid.get()) {
            return Err(HeaderError::Fsid { expected, found });
        }
        if let Some((expected, found)) = pair(block_ref.blkno.get(), hdr.blkno.get()) {
            return Err(HeaderError::Blkno { expected, found });
        }
        if let Some((expected, found)) = pair(block_ref.seq.get(), hdr.seq.get())
            // Mutant: breaks spec 02 section 5, another version is not the block.
            && !mutant("stale_block_believed")
        {
            return Err(HeaderError::Seq { expected, found });
        }
        Ok(())
    }

    /// Drops the clean copy that did not match; false if the current one is dirty.
    fn drop_mismatch(&self, blkno: u64, mismatch: Option<&Rc<Block>>) -> bool {
        let inner = &mut *self.inner.borrow_mut();
        match inner.map.get(&blkno) {
            Some(Entry {
                place: Place::Dirty(_),
                ..
            }) => {
                probe("stale_block_is_dirty");
                false
            }
            Some(entry) if mismatch.is_some_and(|block| Rc::ptr_eq(block, &entry.block)) => {
                inner.remove(blkno);
                inner.stats.dropped_stale += 1;
                true
            }
            _ => true,
        }
    }

    /// Reads a block that is not cached, or waits for who reads it already.
    async fn load(&self, blkno: u64) -> Result<Loaded, BlockError> {
        loop {
            let waiting = self.inner.borrow().pending.get(&blkno).cloned();
            let Some(pending) = waiting else {
                return self.lead_read(blkno).await;
            };
            self.inner.borrow_mut().stats.shared_reads += 1;
            let outcome = pending
                .done
                .wait_for(|| pending.outcome.borrow().clone())
                .await;
            if let Some(result) = outcome {
                return result;
            }
            probe("shared_read_abandoned");
        }
    }

    async fn lead_read(&self, blkno: u64) -> Result<Loaded, BlockError> {
        let lead = Lead {
            cache: self,
            blkno,
            pending: Rc::default(),
        };
        {
            let inner = &mut *self.inner.borrow_mut();
            inner.pending.insert(blkno, lead.pending.clone());
            inner.stats.reads += 1;
        }
        let buf = AlignedBuf::to_fill(LG_BLOCK_SIZE);
        let (buf, res) = self.dev.read(blkno << LG_BLOCK_SHIFT, buf).await;
        let result = match res {
            Ok(()) => Ok(self.accept(blkno, buf)),
            Err(source) => Err(BlockError::device(blkno, source)),
        };
        *lead.pending.outcome.borrow_mut() = Some(Some(result.clone()));
        result
    }

    /// Checks the CRC of a block just read and keeps it.
    fn accept(&self, blkno: u64, buf: AlignedBuf) -> Loaded {
        let found = u32::from_le_bytes(buf[..4].try_into().expect("four bytes"));
        let expected = block_crc(&buf);
        if found != expected {
            probe("block_crc_mismatch");
            return Err(HeaderError::Crc { expected, found });
        }
        let block = Rc::new(Block::new(Arc::new(buf), false));
        let limit = self.policy.cache_blocks;
        self.inner
            .borrow_mut()
            .insert_clean(blkno, block.clone(), limit);
        Ok(block)
    }

    // What follows is for transactions.

    /// A number for a new transaction over this cache.
    pub(super) fn new_tx_id(&self) -> u64 {
        self.next_tx.set(self.next_tx.get() + 1);
        self.next_tx.get()
    }

    /// The seq of a new copy of a block.
    pub(super) fn new_seq(&self) -> u64 {
        self.entropy.next_u64()
    }

    /// The transaction that `blkno` is dirty in.
    pub(super) fn dirty_in(&self, blkno: u64) -> Option<u64> {
        match self.inner.borrow().map.get(&blkno)?.place {
            Place::Dirty(tx) => Some(tx),
            Place::Clean(_) => None,
        }
    }

    /// Makes `buf` the current content of `blkno`, dirty in `tx`. Readers of a
    /// replaced copy keep it.
    pub(super) fn insert_dirty(&self, blkno: u64, buf: IoBuf, tx: u64) {
        let inner = &mut *self.inner.borrow_mut();
        inner.remove(blkno);
        let entry = Entry {
            block: Rc::new(Block::new(buf, true)),
            place: Place::Dirty(tx),
        };
        inner.map.insert(blkno, entry);
    }

    /// The current buffer of a dirty block.
    pub(super) fn dirty_buf(&self, blkno: u64, tx: u64) -> IoBuf {
        let inner = self.inner.borrow();
        let entry = inner.map.get(&blkno).expect("dirty blocks are cached");
        assert_eq!(
            entry.place,
            Place::Dirty(tx),
            "block {blkno} is not dirty here"
        );
        entry.block.buf().clone()
    }

    /// Changes a dirty block in place. `f` must not call the cache.
    pub(super) fn edit<R>(&self, blkno: u64, tx: u64, f: impl FnOnce(&mut [u8]) -> R) -> R {
        let inner = &mut *self.inner.borrow_mut();
        let entry = inner.map.get_mut(&blkno).expect("dirty blocks are cached");
        assert_eq!(
            entry.place,
            Place::Dirty(tx),
            "block {blkno} is not dirty here"
        );
        f(Block::make_mut(&mut entry.block))
    }

    /// Changes two different dirty blocks in place.
    pub(super) fn edit2<R>(
        &self,
        (a, b): (u64, u64),
        tx: u64,
        f: impl FnOnce(&mut [u8], &mut [u8]) -> R,
    ) -> R {
        let inner = &mut *self.inner.borrow_mut();
        let [Some(one), Some(two)] = inner.map.get_disjoint_mut([&a, &b]) else {
            panic!("dirty blocks {a} and {b} are not cached");
        };
        for entry in [&one, &two] {
            assert_eq!(
                entry.place,
                Place::Dirty(tx),
                "block {a} or {b} is not dirty here"
            );
        }
        f(
            Block::make_mut(&mut one.block),
            Block::make_mut(&mut two.block),
        )
    }

    /// A dirty block was written: it is clean from now on.
    pub(super) fn mark_clean(&self, blkno: u64, tx: u64) {
        let inner = &mut *self.inner.borrow_mut();
        let entry = inner.map.remove(&blkno).expect("dirty blocks are cached");
        assert_eq!(
            entry.place,
            Place::Dirty(tx),
            "block {blkno} is not dirty here"
        );
        inner.insert_clean(blkno, entry.block, self.policy.cache_blocks);
    }

    /// Drops a block that was replaced: no tree of the actor's own refers to it any
    /// more, and its memory serves the next copy.
    pub(super) fn drop_replaced(&self, blkno: u64) {
        let inner = &mut *self.inner.borrow_mut();
        let clean = |entry: &Entry| matches!(entry.place, Place::Clean(_));
        if inner.map.get(&blkno).is_some_and(clean) {
            inner.remove(blkno);
        }
    }

    /// Drops a dirty block without writing it.
    pub(super) fn forget(&self, blkno: u64, tx: u64) {
        assert_eq!(
            self.dirty_in(blkno),
            Some(tx),
            "block {blkno} is not dirty here"
        );
        self.inner.borrow_mut().remove(blkno);
    }

    /// Flushes the metadata device if the policy says that it needs it.
    ///
    /// # Errors
    /// `Flush` or `Shut`.
    pub async fn flush(&self) -> Result<(), BlockError> {
        if !self.policy.flush {
            return Ok(());
        }
        self.dev.flush().await.map_err(|err| match err {
            DeviceError::Shut => BlockError::Shut,
            err => BlockError::Flush(err),
        })
    }
}

/// The reader that others wait for. Dropped without an outcome it sends them on.
struct Lead<'a> {
    cache: &'a Cache,
    blkno: u64,
    pending: Rc<Pending>,
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.pending.outcome.borrow_mut().get_or_insert(None);
        self.cache.inner.borrow_mut().pending.remove(&self.blkno);
        self.pending.done.wake_all();
    }
}
